"""MSAdapter: everything that is trained. The resampler, and keys and values of the subjects for every layer.

Shapes: B batch, S subjects, T tokens per subject, L encoder tokens, D encoder width, P phrase width, C cross-attention
width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from data_pipeline.models.weights import fill, read_tensors
from msdiffusion.adapter.auto_layout import AutoLayout
from msdiffusion.adapter.condition import SubjectCondition
from msdiffusion.adapter.config import CONFIG_NAME, SCHEMA, WEIGHTS_NAME, AdapterConfig, read_checkpoint
from msdiffusion.adapter.official import from_record, read_record, to_record, write_record
from msdiffusion.adapter.resampler import GlobalProjector, GroundingResampler, ResamplerParams
from msdiffusion.attention.binding import install, is_installed
from msdiffusion.attention.control import Backend
from msdiffusion.attention.unet import (
    cross_attentions,
    layer_name,
)
from msdiffusion.errors import LayoutError, RequestError, WeightsError, reason, refused_weights
from msdiffusion.files import write_weights, written
from msdiffusion.own_memory import give_own_memory


class SubjectProjection(nn.Module):
    """Keys and values of the subject tokens for one cross-attention layer."""

    def __init__(self, token_width: int, layer_width: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(token_width, layer_width, bias=False)
        self.to_v = nn.Linear(token_width, layer_width, bias=False)


class MSAdapter(nn.Module):
    """The trained part of MS-Diffusion.

    ``resampler`` makes tokens of the references; ``layers`` holds, per cross-attention layer of the UNet, the two
    projections that turn tokens into keys and values. Layer names are the UNet's module paths with "/" for ".".
    """

    def __init__(self, config: AdapterConfig, layer_widths: Mapping[str, int]) -> None:
        """Build with random weights.

        Args:
            config: sizes and surroundings.
            layer_widths: width of every cross-attention layer, by name.
        """
        super().__init__()
        self.config = config
        self.resampler = (GlobalProjector if config.projector == "global" else GroundingResampler)(config.resampler)
        width = config.resampler.output_width
        self.layers = nn.ModuleDict({name: SubjectProjection(width, size) for name, size in layer_widths.items()})

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, params: ResamplerParams, **config: Any) -> MSAdapter:
        """A fresh adapter: random resampler, keys and values copied from the frozen ones that read the text.

        Args:
            unet: the frozen UNet; its weights are copied, not shared.
            params: sizes of the resampler.
            config: other fields of AdapterConfig.

        Raises:
            WeightsError: the UNet has no cross-attention, or one that is not ``params.output_width`` wide.
        """
        modules = cross_attentions(unet)
        adapter = cls(
            AdapterConfig(resampler=params, **config), {name: m.to_k.out_features for name, m in modules.items()}
        )
        adapter.check_unet(unet)
        with torch.no_grad():
            for name, module in modules.items():
                adapter.layers[name].to_k.weight.copy_(module.to_k.weight)
                adapter.layers[name].to_v.weight.copy_(module.to_v.weight)
        return adapter

    @property
    def tokens_per_subject(self) -> int:
        """T."""
        return self.config.resampler.tokens

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.resampler.output_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.resampler.output_norm.weight.device

    def check_unet(self, unet: UNet2DConditionModel) -> None:
        """Raise unless the adapter was made for a UNet of this architecture.

        Raises:
            WeightsError: names the first difference, with the shapes of both sides.
        """
        theirs = {name: (m.to_k.out_features, m.to_k.in_features) for name, m in cross_attentions(unet).items()}
        ours = {name: tuple(layer.to_k.weight.shape) for name, layer in self.layers.items()}
        use = "use the base model that the adapter was trained on"
        if ours.keys() != theirs.keys():
            raise WeightsError(
                f"the adapter is for a UNet with {len(ours)} cross-attention layers, but this one has {len(theirs)}; "
                f"only in the adapter: {_some(sorted(ours.keys() - theirs.keys()))}, only in the UNet: "
                f"{_some(sorted(theirs.keys() - ours.keys()))}: {use}"
            )
        for name, shape in ours.items():
            if shape != theirs[name]:
                raise WeightsError(
                    f"the adapter does not fit the UNet: in layer {name} its keys have shape {shape}, the UNet's "
                    f"{theirs[name]}: {use}"
                )

    def install(self, unet: UNet2DConditionModel, backend: Backend = "sdpa") -> None:
        """Give the UNet the processors that read a SubjectCondition. Without one they change nothing.

        Processors that somebody else has put in place (IP-Adapter, attention slicing, ...) go on working inside ours.
        Doing it again changes nothing, and puts back what has been replaced since.

        Args:
            unet: a UNet that the adapter fits.
            backend: "sdpa", or "softmax", whose backward is cheaper on a CPU (then for all attention of the UNet).

        Raises:
            WeightsError: the UNet is of another architecture.
            RequestError: unknown backend.
        """
        self.check_unet(unet)
        install(unet, backend)

    def is_installed(self, unet: UNet2DConditionModel) -> bool:
        """Whether every cross-attention layer of the UNet shows subjects."""
        return is_installed(unet)

    def forward(
        self,
        image_tokens: Tensor,
        phrase_embeddings: Tensor,
        boxes: Tensor,
        *,
        drop_grounding: Tensor | None = None,
        **options: Any,
    ) -> SubjectCondition:
        """References to condition in one go: the resampler, then ``condition``, whose options these are."""
        tokens = self.resampler(image_tokens, phrase_embeddings, boxes, drop_grounding)
        return self.condition(tokens, boxes, **options)

    def condition(
        self,
        subject_tokens: Tensor,
        boxes: Tensor,
        *,
        scale: float | Sequence[float] | Tensor = 1.0,
        subject_scales: Sequence[float] | Tensor | None = None,
        masks: Tensor | None = None,
        windows: Tensor | None = None,
        train_timesteps: int = 1000,
        auto_layout: AutoLayout | None = None,
        num_images: int | None = None,
        guidance: bool | None = None,
        phrases: Sequence[str] = (),
        batch_is_sure: bool = False,
    ) -> SubjectCondition:
        """Keys, values and regions for runs of a sampler, or single calls of a UNet. Differentiable.

        Args:
            subject_tokens: (B, S, T, C) from the resampler. B = 1 serves a batch of any size.
            boxes: (B, S, 4) normalised xyxy; an empty box (padding) removes its subject.
            scale: weight of all subjects against the text; one number, or (B,).
            subject_scales: (S,) or (B, S) weights that multiply ``scale``; 0 removes a subject.
            masks: (B, S, H, W) bool regions that replace the boxes, at any resolution.
            windows: see SubjectCondition.
            train_timesteps: see SubjectCondition.
            auto_layout: let the text's attention replace the regions after some steps.
            num_images: see SubjectCondition.
            guidance: see SubjectCondition.
            phrases: see SubjectCondition.
            batch_is_sure: see SubjectCondition.

        Raises:
            LayoutError: shapes of tokens, boxes, masks or spans do not go together.
            RequestError: there is not one scale per subject.
        """
        if subject_tokens.ndim != 4 or boxes.shape != (*subject_tokens.shape[:2], 4):
            raise LayoutError(
                f"subject tokens of shape {tuple(subject_tokens.shape)} need boxes of shape "
                f"(batch, subjects, 4), got {tuple(boxes.shape)}"
            )
        if self.config.regions == "everywhere" and masks is None:
            masks = (boxes[..., 2:] > boxes[..., :2]).all(-1)[..., None, None]  # one cell: the whole picture
        B, S, T, _ = subject_tokens.shape
        scales = self._scales(scale, subject_scales, B, S)  # (B, S)
        tokens = subject_tokens.flatten(1, 2)
        # Scaling the values equals the official scaling of probabilities, because attention is linear in the values.
        weights = scales.repeat_interleave(T, dim=1).unsqueeze(-1).to(tokens.dtype)
        return SubjectCondition(
            keys={name: layer.to_k(tokens) for name, layer in self.layers.items()},
            values={name: layer.to_v(tokens) * weights for name, layer in self.layers.items()},
            boxes=boxes,
            masks=masks,
            # Without this a subject of scale 0 would still take its share of the softmax where boxes overlap.
            present=scales != 0,
            windows=windows,
            train_timesteps=train_timesteps,
            auto_layout=auto_layout,
            num_images=num_images,
            guidance=guidance,
            inert=isinstance(scale, (int, float)) and scale == 0 and auto_layout is None,
            phrases=phrases,
            batch_is_sure=batch_is_sure,
        )

    def _scales(
        self, scale: float | Sequence[float] | Tensor, subject_scales: Sequence[float] | Tensor | None, B: int, S: int
    ) -> Tensor:
        common = torch.as_tensor(scale, dtype=torch.float32, device=self.device)
        if common.shape not in ((), (B,)):
            raise RequestError(f"scale must be one number, or one per picture ({B}), got shape {tuple(common.shape)}")
        common = common.reshape(-1, 1).expand(B, S)
        if subject_scales is None:
            return common
        scales = torch.as_tensor(subject_scales, dtype=torch.float32, device=self.device)
        if scales.shape not in ((S,), (B, S)):
            raise RequestError(f"subject_scales must be one number per subject ({S}), got shape {tuple(scales.shape)}")
        return common * scales

    def save_pretrained(self, directory: str | Path, **config: Any) -> None:
        """Write adapter.safetensors and config.json.

        Args:
            directory: is made if it is missing.
            config: fields of AdapterConfig to write with other values.

        Raises:
            RequestError: they cannot be written.
        """
        directory = Path(directory)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_weights(weights, directory / WEIGHTS_NAME, {"format": "pt", "schema": SCHEMA})
        with written(directory / CONFIG_NAME) as partial:
            partial.write_text(replace(self.config, **config).to_json(), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> MSAdapter:
        """Read what save_pretrained wrote.

        Raises:
            WeightsError: a file is missing or broken, or weights and config do not belong together.
        """
        directory = Path(directory)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (directory / name).is_file():
                raise WeightsError(f"{directory} holds no {name}: an adapter is {CONFIG_NAME} and {WEIGHTS_NAME}")
        config = AdapterConfig.read(directory / CONFIG_NAME)
        with refused_weights():
            weights = read_tensors(directory / WEIGHTS_NAME)
        return cls._from_weights(config, weights, str(directory / WEIGHTS_NAME))

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> MSAdapter:
        """Read the adapter out of a checkpoint of ``lightning fit``: the averaged weights where the run keeps them.

        Optimizer and schedule are not read from the disk, and no code in the file is run.

        Args:
            path: a ``.ckpt`` file, ``checkpoints/last.ckpt`` or ``checkpoints/best.ckpt`` of a run.

        Raises:
            WeightsError: no such file, no checkpoint, one of something else than an adapter, or broken weights.
        """
        return cls._from_weights(*read_checkpoint(path), str(path))

    @classmethod
    def from_official(
        cls, path: str | Path, unet: UNet2DConditionModel, *, head_width: int = 64, **config: Any
    ) -> MSAdapter:
        """Read the official ``ms_adapter.bin`` (without unpickling code) and convert it.

        Args:
            path: the file.
            unet: the UNet it was trained on, which names the numbered layers of the file.
            head_width: width of a resampler head, the one size that the file does not tell (64 in the release).
            config: other fields of AdapterConfig.

        Raises:
            WeightsError: no such file, not such a file, or a UNet of another architecture.
        """
        return cls.from_official_record(read_record(path), unet, head_width=head_width, source=str(path), **config)

    @classmethod
    def from_official_record(
        cls,
        record: Mapping[str, Any],
        unet: UNet2DConditionModel,
        *,
        head_width: int = 64,
        source: str = "ms_adapter.bin",
        **config: Any,
    ) -> MSAdapter:
        """``from_official`` of what the file holds; the weights are taken over, on whatever device they are.

        Args:
            record: {"image_proj": ..., "ms_adapter": ...}.
            unet: see ``from_official``.
            head_width: see ``from_official``.
            source: for messages.
            config: see ``from_official``.

        Raises:
            WeightsError: something is missing, or a UNet of another architecture.
        """
        official = from_record(record, list(unet.attn_processors), head_width=head_width, source=source)
        names = {key: layer_name(name) for key, name in official.layer_names.items()}
        weights = {f"resampler.{name}": tensor for name, tensor in official.resampler.items()}
        for (key, part), tensor in official.layers.items():
            weights[f"layers.{names[key]}.{part}.weight"] = tensor
        adapter = cls._from_weights(AdapterConfig(resampler=official.params, **config), weights, source)
        adapter.check_unet(unet)
        return adapter

    def official_record(self, unet: UNet2DConditionModel) -> dict[str, Any]:
        """The adapter in the layout of the official ``ms_adapter.bin``: plain tensors, not copied.

        Args:
            unet: the UNet it was made for, in which the file counts the layers; its weights are not read.

        Raises:
            WeightsError: an ablation, which the official code cannot run, or another UNet.
        """
        if self.config.projector != "resampler" or self.config.regions != "boxes":
            raise WeightsError(
                f'an adapter with projector "{self.config.projector}" and regions "{self.config.regions}" is an '
                'ablation that the official code cannot run; it needs "resampler" and "boxes"'
            )
        processors = {layer_name(name): name for name in unet.attn_processors}
        weights = self.state_dict()
        layers = {
            processors.get(name, name): {part: weights[f"layers.{name}.{part}.weight"] for part in ("to_k", "to_v")}
            for name in self.layers
        }
        return to_record(self.config.resampler, self.resampler.state_dict(), layers, list(unet.attn_processors))

    def to_official(self, path: str | Path, unet: UNet2DConditionModel) -> None:
        """Write the official ``ms_adapter.bin``. What config.json says beyond sizes is not in it.

        Raises:
            WeightsError: see ``official_record``.
        """
        write_record(self.official_record(unet), path)

    @classmethod
    def _from_weights(cls, config: AdapterConfig, weights: Mapping[str, Tensor], source: str) -> MSAdapter:
        """Strict loading on the meta device's shapes, so that no random weights are drawn first."""
        layers = {
            name.removeprefix("layers.").rsplit(".", 2)[0]: tensor.shape[0] if tensor.ndim else 0
            for name, tensor in weights.items()
            if name.startswith("layers.")
        }
        if config.projector == "resampler":  # building takes time by depth, even without weights
            blocks = {name.split(".")[2] for name in weights if name.startswith("resampler.blocks.")}
            if len(blocks) != config.resampler.depth:
                raise WeightsError(
                    f"{source}: missing or unexpected blocks of the resampler: there are {len(blocks)}, but the config "
                    f"asks for depth {config.resampler.depth}: weights and config belong to different adapters"
                )
        try:
            with torch.device("meta"):
                adapter = cls(config, layers)
        except KeyError as error:  # of a module's name
            raise WeightsError(f"{source}: no layer can be called so: {error.args[0]}") from None
        except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond what a tensor can have
            raise WeightsError(f"{source}: no adapter has the sizes of its config: {reason(error)}") from None
        with refused_weights():
            fill(adapter, weights, source, assign=True)
        give_own_memory(adapter)
        return adapter


def _some(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{list(names[:limit])}{more}" if names else "nothing"
