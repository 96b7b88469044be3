"""class MSDiffusion: pictures of your subjects, each in its box, in the scene that the prompt names."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.condition import SubjectCondition
from msdiffusion.adapter.loading import Sources, check_encoders, check_options, load_adapter
from msdiffusion.backbone.backbone import Backbone, usable_device, weights_dtype
from msdiffusion.errors import RequestError, shown
from msdiffusion.generation.drawing import BatchDrawing, GenerationResult, PictureHook, warn_beyond_training
from msdiffusion.generation.pipeline_call import with_own_scheduler
from msdiffusion.generation.saving import push, save
from msdiffusion.generation.subject_batch import SubjectBatch
from msdiffusion.generation.turns import Turns, turns_of
from msdiffusion.request.request import (
    MAX_BATCH,
    MAX_IMAGES,
    MISSING,
    GenerationRequest,
    OutputType,
    RequestArguments,
    check_given,
    check_request,
    check_requests,
)
from msdiffusion.request.subjects import (
    MAX_WEIGHT,
    SubjectArguments,
    check_subjects,
    number_between,
    true_or_false,
    whole_number,
)

Reference = Image.Image | str | Path
_CHECKING = threading.RLock()
"""Taken where arguments are checked: a picture that is read only now, and spaCy, serve one thread at a time."""


class MSDiffusion:
    """A frozen backbone with a trained adapter installed.

    ``generate``, ``generate_batch`` and ``condition`` may be called from several threads: they take turns, first come,
    first served, and give to the bit what calls in a row give. What else is done to a model (LoRA, another scheduler,
    ``to``, ...) holds for the calls that begin later.
    """

    def __init__(self, backbone: Backbone, adapter: MSAdapter, sources: Sources | None = None) -> None:
        """Take built parts; the adapter is frozen, moved beside the UNet and installed there.

        Args:
            backbone: the frozen parts.
            adapter: the trained part.
            sources: where base model and image encoder came from, for save_pretrained; None: built in memory.

        Raises:
            WeightsError: they do not fit; the message names both shapes.
        """
        features = adapter.config.reference_features
        check_encoders(adapter.config, backbone.phrase_width, backbone.image_width_of(features), sources)
        adapter.install(backbone.unet)
        self.backbone = backbone
        self.sources = None if sources is None else sources.absolute()  # the working directory may change
        self.picture_hooks: list[PictureHook] = []
        """Called in order with the PIL pictures of a batch, right after decoding; each returns as many pictures."""
        self._offloaded = False
        self.adapter = adapter.to(backbone.device, backbone.dtype).eval().requires_grad_(False)

    def __copy__(self) -> MSDiffusion:
        """Another object on the same networks."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> MSDiffusion:
        """A model with networks of its own."""
        other = memo[id(self)] = object.__new__(type(self))
        with self._turns.take():
            other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """RequestError, with what to do: hooks of the networks have no names that a pickle could hold."""
        raise RequestError(
            "a model is not pickled: for a file, save_pretrained(folder) and from_pretrained(folder); for another "
            "process, load it there with from_pretrained"
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        base_model: str | Path | None = None,
        image_encoder: str | Path | None = None,
        base_config: str | Path | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        **others: Any,
    ) -> MSDiffusion:
        """Load an adapter and the models it was trained on.

        Args:
            model: an adapter's folder or hub repository, ours or official; the official ``ms_adapter.bin``; a
                checkpoint of ``lightning fit``, or the folder of a whole run (its best adapter by validation).
            base_model: another pipeline of the same architecture, such as a fine-tune: folder, hub name, or one
                ``.safetensors`` file.
            image_encoder: another image encoder of the same widths: folder, hub name, or ``open_clip:MODEL``,
                ``open_clip:MODEL/TAG``, ``open_clip:MODEL@FILE.safetensors``.
            base_config: where a base model in one file has its configs and tokenizers from: folder or hub name of a
                pipeline. None: the base model that the adapter names.
            torch_dtype: of all weights, or its name; None: float32. ``torch.float16`` suits SDXL on a GPU.
            device: None: the first CUDA device if there is one, else the CPU.
            others: nothing more is known; a hint says what a name of other libraries is called here.

        Raises:
            RequestError: no such dtype, device or argument.
            WeightsError: something is missing, or parts of different models; before any large file is read where that
                can be told from the configs.
        """
        check_options(others, cls.from_pretrained)
        torch_dtype, device = weights_dtype(torch_dtype), usable_device(device)
        found = load_adapter(model, base_model, image_encoder, base_config)
        backbone = Backbone.from_pretrained(**vars(found.sources), torch_dtype=torch_dtype, device=device)
        return cls(backbone, found.adapter, found.sources)

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline, for LoRA, other schedulers, offloading, ..."""
        return self.backbone.pipeline

    @property
    def _turns(self) -> Turns:
        """Of all models on this UNet."""
        return turns_of(self.backbone.unet)

    def to(self, device: str | torch.device) -> MSDiffusion:
        """Move all parts."""
        device = usable_device(device)
        with self._turns.take():
            self.backbone.to(device)
            self.adapter.to(device)
        return self

    def install(self) -> None:
        """Put the adapter's attention processors in place again, after something has replaced them.

        ``condition`` and ``generate`` do so of their own accord; only a condition made before the change needs this.
        """
        with self._turns.take():
            self.adapter.install(self.backbone.unet)

    def enable_model_cpu_offload(self, **options: Any) -> None:
        """Keep every model on the CPU but the one at work: the pipeline's method of this name, for all parts."""
        with self._turns.take():
            self.pipeline.enable_model_cpu_offload(**options)
            self._rest_on_cpu()

    def enable_sequential_cpu_offload(self, **options: Any) -> None:
        """Keep all weights on the CPU but those of the layer at work: least memory, slow. See the pipeline's method."""
        with self._turns.take():
            self.pipeline.enable_sequential_cpu_offload(**options)
            self._rest_on_cpu()

    def _rest_on_cpu(self) -> None:
        self._offloaded = True
        self.adapter.to("cpu")
        self.backbone.image_encoder.to("cpu")

    @contextmanager
    def at_work(self) -> Iterator[torch.device]:
        """The device to compute on, with image encoder and adapter there for a while."""
        device = self.backbone.device
        if not self._offloaded:
            yield device
            return
        try:
            self.adapter.to(device)
            self.backbone.image_encoder.to(device)
            yield device
        finally:
            self._rest_on_cpu()

    def condition(
        self,
        images: Sequence[Reference | Sequence[Reference]],
        boxes: Sequence[Sequence[float] | None] | None,
        phrases: Sequence[str] | None = None,
        *,
        prompt: str | None = None,
        scale: float | None = None,
        num_images: int = 1,
        guidance: bool | None = None,
        **arguments: Unpack[SubjectArguments],
    ) -> SubjectCondition:
        """The subjects as one object, for any diffusers pipeline on this UNet: img2img, inpainting, ControlNet, ...

        ``pipeline(..., cross_attention_kwargs={"subjects": condition})`` is all that such a pipeline needs, at any
        size. The condition may be used again, for other prompts (without auto layout), seeds and sizes.

        Args:
            images: as for ``generate``, as are ``boxes`` and ``scale``.
            boxes: see there.
            phrases: what each subject is called; None: read from ``prompt``.
            prompt: what the pipeline will be given; needed to read phrases from, for subjects without a box and for
                auto layout.
            scale: see there.
            num_images: pictures that the pipeline draws at once.
            guidance: None: whether the UNet's batch has an unconditional half is told from its size.
            arguments: ``masks``, ``subject_scales``, ``subject_windows``, ``auto_layout``, ``auto_layout_threshold``
                and ``auto_layout_start``, as for ``generate``.

        Raises:
            RequestError, LayoutError, PhraseError: an argument cannot be honoured.
        """
        with _CHECKING:
            subjects = check_subjects(images, boxes, phrases, prompt=prompt, **arguments)
        whole_number(num_images, "num_images", 1, MAX_IMAGES)
        guidance = None if guidance is None else true_or_false(guidance, "guidance")
        chosen = self.scale_of(None if scale is None else number_between(scale, "scale", 0.0, MAX_WEIGHT))
        scheduler = self.pipeline.scheduler
        with self._turns.take():
            warn_beyond_training(self, [subjects], [prompt])  # the tokenizer serves one at a time
            layout = SubjectBatch(self, scheduler, [subjects], [prompt])
            return layout.condition([0] * num_images, [chosen], guidance=guidance, phrases=subjects.names)

    def scale_of(self, scale: float | None) -> float:
        """The weight of all subjects: ``scale``, or the adapter's own for None."""
        return self.adapter.config.drawing(scale=scale)["scale"]

    def generate(
        self,
        images: Sequence[Reference | Sequence[Reference]] = MISSING,
        boxes: Sequence[Sequence[float] | None] | None = MISSING,
        prompt: str = MISSING,
        phrases: Sequence[str] | None = None,
        *,
        masks: Sequence[Any] | None = None,
        negative_prompt: str | None = None,
        num_images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        scale: float | None = None,
        subject_scales: Sequence[float] | None = None,
        subject_windows: Sequence[Sequence[float] | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        auto_layout: bool = False,
        auto_layout_threshold: float = 0.5,
        auto_layout_start: int | None = None,
        seed: int | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
        batch_size: int = 4,
        latents: Tensor | None = None,
        **pipeline_options: Any,
    ) -> list[Image.Image] | np.ndarray | Tensor:
        """Draw pictures with each subject in its box.

        ``images``, ``boxes`` and ``prompt`` must be given. Where None is allowed, the adapter's own default is used.
        Arguments are checked before anything is computed.

        Args:
            images: one item per subject: a PIL picture, RGB or RGBA (cut-out), the path of one, or a list of such,
                several views of the same subject, which are all attended to.
            boxes: one (x1, y1, x2, y2) per subject, in fractions of the picture, x to the right and y downwards. A box
                without area leaves its subject out. None, for a subject or for all: no layout. Such a subject is drawn
                from its reference alone (the resampler's learned queries), over the whole picture in the first step,
                and from step ``auto_layout_start`` on where the text's attention sees its phrase.
            prompt: the scene; name every subject in it.
            phrases: what each subject is called, such as "dog". None: the prompt's noun phrases, if they match the
                images one to one.
            masks: one per subject, or None: a bool array (rows, columns) of any size over the whole picture, a picture
                in black and white, or the path of one. It replaces the box as region; the box, if there is none, is
                the one round the mask.
            negative_prompt: what to stay away from. None, and no default of the adapter: the pipeline's own choice,
                which for SDXL are zeros in place of an empty text.
            num_images: how many pictures. Picture k is the one that ``seed=seed + k`` gives alone.
            steps: denoising steps.
            guidance_scale: weight of the prompt and the subjects against the negative prompt; 1 or less: no guidance.
            scale: weight of all subjects against the text; 0 is the bare base model, exactly.
            subject_scales: one weight per subject that multiplies ``scale``; 0 leaves a subject out.
            subject_windows: one (start, end) in [0, 1] per subject, or None: the part of the way from noise to picture
                in which the subject is there, measured on the noise schedule as diffusers' ``denoising_end`` is.
            height: pixels, a multiple of 8.
            width: pixels, a multiple of 8.
            auto_layout: after some steps, follow the regions that the text's attention gives the phrases instead of
                the boxes. Every phrase must be in the prompt.
            auto_layout_threshold: how much of its highest attention a patch needs to belong to a subject, in [0, 1].
            auto_layout_start: the first step, counted from 1, with these regions; None: 5, and 2 for subjects without
                a box. Samplers of second order (Heun, ...) count twice a step.
            seed: of the noise, which is drawn on the CPU so that every device gives the same. None: a new one.
            output_type: "pil" a list of pictures, "np" (n, height, width, 3) in [0, 1], "pt" (n, 3, height, width) in
                [0, 1], "latent" (n, channels, rows, columns).
            progress: show a bar.
            batch_size: pictures drawn at once at most.
            latents: (num_images, channels, rows, columns) the noise to start from, in place of the seed's.
            pipeline_options: anything else that the diffusers pipeline takes: ``callback_on_step_end``,
                ``ip_adapter_image``, ``prompt_embeds`` (of one prompt), ``guidance_rescale``, ``sigmas``, ...

        Raises:
            RequestError, LayoutError, PhraseError: an argument cannot be honoured.
        """
        arguments = dict(locals())  # before there is any other name
        check_given({"images": images, "boxes": boxes, "prompt": prompt}, pipeline_options)
        named = {name: arguments[name] for name in RequestArguments.__annotations__}
        with _CHECKING:
            request = check_request(images, boxes, prompt, phrases, **named, **pipeline_options)
        return self.generate_batch([request], progress=progress, batch_size=batch_size)[0].pictures

    @torch.no_grad()
    def generate_batch(
        self,
        requests: Sequence[GenerationRequest | Mapping[str, Any]],
        *,
        progress: bool = True,
        batch_size: int = 8,
        on_result: Callable[[int, GenerationResult], None] | None = None,
    ) -> list[GenerationResult]:
        """Draw the pictures of many requests, together wherever that is possible.

        Requests of the same size, steps, guidance and output type share the denoiser's batch, however many subjects
        each has; one request's pictures do not change another's.

        Args:
            requests: what ``check_request`` made of the arguments of ``generate``, or mappings of these arguments.
            progress: show a bar.
            batch_size: pictures drawn at once at most.
            on_result: called with the index of a request and its result as soon as it is complete, within this call's
                turn: it may call the model itself, but waits for ever for a call of the model in another thread.

        Returns:
            One result per request, in their order.

        Raises:
            RequestError, LayoutError, PhraseError: a request cannot be honoured; before anything is drawn.
        """
        if on_result is not None and not callable(on_result):
            raise RequestError(f"on_result must be a function of (index, result), got {shown(on_result)}")
        true_or_false(progress, "progress")
        whole_number(batch_size, "batch_size", 1, MAX_BATCH)
        with _CHECKING:
            checked = check_requests(requests)
        pipeline = with_own_scheduler(self.pipeline)  # as it is when the call comes, not when its turn does
        with self._turns.take():
            return BatchDrawing(self, pipeline, checked, batch_size, progress).draw(on_result)

    def save_pretrained(self, directory: str | Path, *, include_backbone: bool = False) -> None:
        """Write the adapter, so that from_pretrained(directory) gives this model again, and a model card.

        A README.md that is there already, and that a person wrote or changed, is kept.

        Args:
            directory: is made if it is missing.
            include_backbone: also write base model and image encoder, for a directory that needs nothing else. Without
                it the config points to where they were loaded from.

        Raises:
            RequestError: nothing can be written there.
            WeightsError: ``include_backbone`` is off, and the backbone was not loaded from anywhere; or it is on, and
                something was put into the networks that their files have no place for (a LoRA, an IP-Adapter).
        """
        save(self.backbone, self.adapter, self.sources, directory, include_backbone)

    def push_to_hub(
        self, repo_id: str, *, include_backbone: bool = False, private: bool = False, token: str | None = None
    ) -> str:
        """Upload what save_pretrained writes to a hub repository, which is made if it is missing; returns its address.

        A README.md that stands there already, and that a person wrote or changed, is kept.

        Raises:
            WeightsError: the config would point to a folder of this machine.
        """
        return push(self.backbone, self.adapter, self.sources, repo_id, include_backbone, private, token)
