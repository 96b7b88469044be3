"""Settings of the adapter's training, in groups: refused where they cannot be, and turned into an adapter.

What each one means stands at ``MSDiffusionModule``, which takes all of them side by side, as configs have them. Each
group raises a RequestError for what cannot be, which names it, what it was, and what it may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.config import CHECKPOINT_SUFFIX, AdapterConfig
from msdiffusion.adapter.loading import find_adapter
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.backbone.configs import skeleton_unet
from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.places import find_model
from msdiffusion.training.learning.optimizers import Decay, OptimizerName, check_optimizer
from msdiffusion.training.setting_names import check_choices, grouped


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Which adapter is trained, on which base."""

    base_model: str
    image_encoder: str
    adapter: str | None
    resampler: dict[str, Any] | None
    reference_background: list[int] | None
    reference_fit: Literal["squash", "pad"] | None
    projector: Literal["resampler", "global"] | None
    regions: Literal["boxes", "everywhere"] | None
    defaults: dict[str, Any] | None

    def __post_init__(self) -> None:
        """Build the config of the adapter once with any widths, as it will be built when the base is known."""
        sizes = self.resampler or {}
        known = {field.name for field in fields(ResamplerParams)} - {"image_width", "phrase_width", "output_width"}
        unknown = set(sizes) - known
        if unknown and self.adapter is None:
            raise RequestError(f"resampler has unknown sizes {sorted(unknown)}; known: {sorted(known)}")
        try:
            params = ResamplerParams(
                image_width=1, phrase_width=1, output_width=1, **{name: sizes[name] for name in known & set(sizes)}
            )
            AdapterConfig(resampler=params, **self.new_config)
            if self.defaults is not None:
                AdapterConfig(resampler=params, defaults=self.defaults)
        except (WeightsError, TypeError) as error:
            raise RequestError(str(error)) from None

    @property
    def new_config(self) -> dict[str, Any]:
        """Fields of a new adapter's AdapterConfig, but ``resampler``; what was not given keeps its default."""
        names = ("base_model", "image_encoder", "reference_background", "reference_fit", "projector", "regions")
        config = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.reference_background is not None:
            config["reference_background"] = tuple(self.reference_background)
        return config

    def new(self, backbone: Backbone) -> MSAdapter:
        """A fresh adapter for a base: random resampler, keys and values of the frozen ones that read the text."""
        params = ResamplerParams(
            image_width=backbone.image_width_of("global" if self.projector == "global" else "tokens"),
            phrase_width=backbone.phrase_width,
            output_width=backbone.cross_attention_dim,
            **(self.resampler or {}),
        )
        return MSAdapter.from_unet(backbone.unet, params, **self.new_config)

    def given(self) -> MSAdapter | None:
        """The adapter to go on from, whatever ``MSDiffusion.from_pretrained`` takes for one; None for a new one.

        Raises:
            RequestError: a setting contradicts it.
            WeightsError: it cannot be read.
        """
        if self.adapter is None:
            return None
        place = find_adapter(self.adapter)
        if place.is_dir():
            adapter = MSAdapter.from_pretrained(place)
        elif place.suffix == CHECKPOINT_SUFFIX:
            adapter = MSAdapter.from_checkpoint(place)
        else:
            sizes = {name: size for name, size in (self.resampler or {}).items() if name == "head_width"}
            unet = skeleton_unet(find_model(self.base_model))
            adapter = MSAdapter.from_official(place, unet, **sizes, **self.new_config)
        config = adapter.config
        present = {
            "resampler": {name: getattr(config.resampler, name, None) for name in self.resampler or {}},
            "reference_background": list(config.reference_background),
            **{name: getattr(config, name) for name in ("reference_fit", "projector", "regions")},
        }
        for name, theirs in present.items():
            asked = getattr(self, name)
            if asked is not None and asked != theirs:
                raise RequestError(
                    f"{name}={asked} contradicts the adapter {self.adapter!r}, which was trained with {theirs}: "
                    f"leave {name} out, or start a new adapter without adapter="
                )
        return adapter


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How the weights follow the gradients."""

    optimizer: OptimizerName
    fused: bool | None
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    decay: Decay
    ema_decay: float

    def __post_init__(self) -> None:
        _check_signs(self, above=("learning_rate",), not_below=("weight_decay", "warmup_steps"))
        if not 0 <= self.ema_decay < 1:
            raise RequestError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        check_optimizer(self.optimizer, self.fused)
        check_choices(self, listed=True)


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Which errors count, and how much."""

    loss_weighting: Literal["uniform", "min_snr"]
    min_snr_gamma: float
    noise_offset: float
    box_loss_weight: float
    layout_loss_weight: float
    timestep_sampling: Literal["uniform", "logit_normal"]
    timestep_exponent: float
    validation_timesteps: list[int] | None

    def __post_init__(self) -> None:
        _check_signs(
            self,
            above=("box_loss_weight", "timestep_exponent", "min_snr_gamma"),
            not_below=("noise_offset", "layout_loss_weight"),
        )
        check_choices(self, listed=True)
        if self.timestep_sampling != "uniform" and self.timestep_exponent != 1:
            raise RequestError(
                f"timestep_exponent={self.timestep_exponent} tilts timestep_sampling='uniform': leave it at 1 with "
                f"{self.timestep_sampling!r}"
            )
        given = self.validation_timesteps
        if given is None:
            return
        whole = all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in given)
        if not given or not whole or len(set(given)) < len(given):
            raise RequestError(
                f"validation_timesteps must be different whole numbers of at least 0, one or more, got {given}"
            )


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """How the frozen networks compute."""

    size_condition: Literal["picture", "resolution"]
    attention: Literal["sdpa", "softmax"]
    base_dtype: Literal["auto", "float32", "bfloat16", "float16"]
    cache_encodings: bool
    gradient_checkpointing: bool
    compile: bool

    def __post_init__(self) -> None:
        check_choices(self, listed=True)


@dataclass(frozen=True)
class TrainingSettings:
    """All of them."""

    adapter: AdapterSettings
    optimizer: OptimizerSettings
    loss: LossSettings
    base: BaseSettings

    def __post_init__(self) -> None:
        if self.base.compile and self.loss.layout_loss_weight > 0:
            raise RequestError(
                "layout_loss_weight looks into the attention layers while they compute, which compile does not allow: "
                "set one of the two to 0 or false"
            )

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> TrainingSettings:
        """Of the arguments of ``MSDiffusionModule`` by name.

        Raises:
            RequestError: they cannot be honoured; before anything is loaded.
        """
        kinds = (AdapterSettings, OptimizerSettings, LossSettings, BaseSettings)
        return cls(*(grouped(kind, settings) for kind in kinds))


def _check_signs(settings: Any, above: tuple[str, ...], not_below: tuple[str, ...]) -> None:
    for name in above:
        if not 0 < getattr(settings, name) < float("inf"):
            raise RequestError(f"{name} must be above 0, got {getattr(settings, name)}")
    for name in not_below:
        if not 0 <= getattr(settings, name) < float("inf"):
            raise RequestError(f"{name} must not be below 0, got {getattr(settings, name)}")


def validation_timesteps(given: list[int] | None, num_timesteps: int) -> list[int]:
    """The fixed timesteps of validation; five that are equally spaced where none are given.

    Raises:
        RequestError: one is beyond the base's schedule.
    """
    if given is None:
        return [num_timesteps * share // 10 for share in (1, 3, 5, 7, 9)]
    if max(given) >= num_timesteps:
        raise RequestError(
            f"validation_timesteps={given} go beyond the schedule of the base, whose last timestep is "
            f"{num_timesteps - 1}"
        )
    return list(given)
