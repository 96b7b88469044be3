"""The subjects of many pictures encoded once, and one condition for any batch of them.

Shapes: P pictures of a batch, S subjects (of the picture with the most; the others are padded with empty boxes), T
tokens per subject, C cross-attention width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from msdiffusion.adapter.auto_layout import AutoLayout
from msdiffusion.adapter.condition import SubjectCondition
from msdiffusion.attention.unet import remove_pag
from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.request.phrases import token_span
from msdiffusion.request.subjects import WHOLE, Subjects

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from msdiffusion.adapter.adapter import MSAdapter
    from msdiffusion.backbone.backbone import Backbone

ENCODED_AT_ONCE = 16
"""References that the image encoder sees at once at most."""


class Model(Protocol):
    """What encoding needs of MSDiffusion."""

    backbone: Backbone
    adapter: MSAdapter

    def at_work(self) -> AbstractContextManager[torch.device]:
        """The device to compute on, with image encoder and adapter there for a while."""
        ...


class SubjectBatch:
    """The subjects of several pictures, encoded once, and conditions for any choice of them."""

    @torch.no_grad()
    def __init__(
        self, model: Model, scheduler: Any, layouts: Sequence[Subjects], prompts: Sequence[str | None]
    ) -> None:
        """Encode references, phrases and boxes of all pictures together.

        Args:
            model: whose encoders, resampler and projections these are.
            scheduler: of the runs that the conditions will be for; windows are measured in its timesteps.
            layouts: checked subjects per picture.
            prompts: per picture; needed where a layout has auto layout.

        Raises:
            PhraseError: a phrase cannot be found among the prompt's tokens.
        """
        remove_pag(model.backbone.unet)  # what a run that was broken off has left
        if not model.adapter.is_installed(model.backbone.unet):
            model.adapter.install(model.backbone.unet)
        self.model, self.scheduler, self.layouts = model, scheduler, layouts
        tokenizer, written = model.backbone.tokenizer, functools.partial(written_out, model.backbone.pipeline)
        self._spans = [
            [
                token_span(tokenizer, written(prompt or ""), written(phrase), occurrence) if automatic else (0, 0)
                for phrase, occurrence, automatic in zip(
                    layout.phrases, layout.occurrences, layout.auto_layout, strict=True
                )
            ]
            for layout, prompt in zip(layouts, prompts, strict=True)
        ]
        counts = [len(layout.images) for layout in layouts]
        boxes = [WHOLE if box is None else box for layout in layouts for box in layout.boxes]
        with model.at_work() as device:
            all_boxes = torch.tensor([boxes], dtype=torch.float32, device=device)
            tokens = self._tokens(all_boxes, device)  # (1, all subjects, T, C)
        self._tokens_of = tokens[0].split(counts)
        self._boxes_of = all_boxes[0].split(counts)

    def _tokens(self, boxes: Tensor, device: torch.device) -> Tensor:
        backbone, adapter = self.model.backbone, self.model.adapter
        config, dtype = adapter.config, adapter.dtype
        images = [image for layout in self.layouts for image in layout.images]
        phrases = [written_out(backbone.pipeline, phrase) for layout in self.layouts for phrase in layout.phrases]
        free = torch.tensor([[box is None for layout in self.layouts for box in layout.boxes]], device=device)
        pixels = backbone.prepare_references(images, config.reference_background, config.reference_fit)
        encoded = [
            backbone.encode_references(part, config.reference_features) for part in pixels.split(ENCODED_AT_ONCE)
        ]
        image_tokens = torch.cat(encoded).unsqueeze(0).to(device, dtype)
        check_numbers(image_tokens, "image encoder", backbone.image_encoder)
        phrase_embeddings = backbone.encode_phrases(phrases).unsqueeze(0).to(device, dtype)
        check_numbers(phrase_embeddings, "text encoder", backbone.pipeline.text_encoder)
        tokens = adapter.resampler(image_tokens, phrase_embeddings, boxes, free)
        check_numbers(tokens, "adapter", adapter)
        return tokens

    @torch.no_grad()
    def condition(
        self,
        pictures: Sequence[int],
        scales: Sequence[float],
        *,
        guidance: bool | None = None,
        phrases: Sequence[str] = (),
        batch_is_sure: bool = False,
    ) -> SubjectCondition:
        """One condition for a batch of pictures.

        Args:
            pictures: per picture of the batch the index of its layout.
            scales: per layout the weight of all its subjects.
            guidance: see SubjectCondition.
            phrases: see SubjectCondition.
            batch_is_sure: see SubjectCondition.

        Raises:
            RequestError: windows, and a scheduler whose timesteps do not say how far a run is.
        """
        different = sorted(set(pictures))
        rows = different if len(different) == 1 else list(pictures)  # one layout serves any number of pictures
        layouts = [self.layouts[row] for row in rows]
        S = max(len(layout.images) for layout in layouts)
        device = self._boxes_of[0].device

        def padded(values: Sequence[Tensor]) -> Tensor:
            """Stack tensors whose first axis is the subjects; missing ones are zero."""
            return torch.stack(
                [functional.pad(value, (0, 0) * (value.ndim - 1) + (0, S - len(value))) for value in values]
            )

        def table(name: str, dtype: torch.dtype) -> Tensor:
            return padded([torch.tensor(getattr(layout, name), dtype=dtype) for layout in layouts]).to(device)

        automatic = table("auto_layout", torch.bool)
        auto_layout = None
        if any(flag for layout in layouts for flag in layout.auto_layout):
            thresholds = {layout.auto_layout_threshold for layout in layouts if any(layout.auto_layout)}
            auto_layout = AutoLayout(
                padded([torch.tensor(self._spans[row]) for row in rows]).to(device),
                thresholds.pop(),
                table("auto_layout_starts", torch.long),
                automatic,
            )
        windows = None
        if any(window != (0.0, 1.0) for layout in layouts for window in layout.windows):
            check_windows(self.scheduler)
            windows = table("windows", torch.float32)
        adapter = self.model.adapter
        chosen = [float(scales[row]) for row in rows]
        with self.model.at_work():
            return adapter.condition(
                padded([self._tokens_of[row] for row in rows]),
                padded([self._boxes_of[row] for row in rows]),
                scale=chosen[0] if len(chosen) == 1 else chosen,
                subject_scales=table("scales", torch.float32),
                masks=_masks(layouts, device),
                windows=windows,
                train_timesteps=self.scheduler.config.num_train_timesteps,
                auto_layout=auto_layout,
                num_images=len(pictures),
                guidance=guidance,
                phrases=phrases,
                batch_is_sure=batch_is_sure,
            )


def check_numbers(values: Tensor, part: str, network: nn.Module) -> None:
    """Raise WeightsError where a network gave values that are no numbers; says whether its weights are to blame."""
    if torch.isfinite(values).all():
        return
    check_weights(part, network)
    raise WeightsError(
        f"the {part} gives values that are no numbers (NaN or infinite) in {str(values.dtype).removeprefix('torch.')}, "
        "though its weights are: load the model with another torch_dtype (torch.bfloat16, torch.float32), or ask for "
        "smaller scales and guidance"
    )


def check_weights(part: str, network: nn.Module) -> None:
    """Raise WeightsError where weights of a network are no numbers; those that offloading keeps away are not seen."""
    for name, weight in network.state_dict().items():
        if weight.device.type != "meta" and weight.is_floating_point() and not torch.isfinite(weight).all():
            raise WeightsError(
                f"the {part} has weights that are no numbers (NaN or infinite), such as {name}: its file is damaged, "
                "or was saved by a training that had failed; use another"
            )


def written_out(pipeline: Any, text: str) -> str:
    """The text as the pipeline tokenizes it: a textual inversion of several vectors is as many words."""
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    return text if convert is None else convert(text, pipeline.tokenizer)


def _masks(layouts: Sequence[Subjects], device: torch.device) -> list[list[Tensor | None]] | None:
    """Masks at their own resolutions, None if there are none at all."""
    if not any(mask is not None for layout in layouts for mask in layout.masks):
        return None
    return [
        [None if mask is None else torch.from_numpy(mask).to(device) for mask in layout.masks] for layout in layouts
    ]


def check_windows(scheduler: Any) -> None:
    """Raise RequestError unless the scheduler's timesteps say how far a run is, which windows go by."""
    kind = type(scheduler).__name__
    if kind.startswith("EDM") or scheduler.config.get("timestep_type") == "continuous":
        raise RequestError(
            f"subject_windows are measured in timesteps from {scheduler.config.num_train_timesteps} down to 0, but "
            f"this {kind} counts in logarithms of noise: use another scheduler, or no windows"
        )
