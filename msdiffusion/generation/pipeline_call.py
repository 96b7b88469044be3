"""One call of the diffusers pipeline: what is set for it and taken back, and what is said of what it raises."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from msdiffusion.attention.binding import after_steps
from msdiffusion.backbone.pretrained import withheld
from msdiffusion.errors import RequestError, reason, shown

_COMPUTING = ("text_encoder", "text_encoder_2", "unet", "vae")
"""Parts of a pipeline that hand each other what they compute."""
_DENOISING: WeakSet[Any] = WeakSet()
"""UNets that are at work; whoever looks has taken their turn (``msdiffusion.generation.turns``)."""


def call_pipeline(
    pipeline: Any,
    arguments: Mapping[str, Any],
    options: Mapping[str, Any],
    condition: Any,
    check_first: Callable[[Tensor], None],
    bar: Mapping[str, Any],
) -> Any:
    """What the pipeline gives.

    Args:
        pipeline: made by ``with_own_scheduler``.
        arguments: of its call.
        options: what a request adds to them; None counts as left out.
        condition: of the subjects; the pipeline keeps it no longer than the call.
        check_first: called with the latents after the first step.
        bar: settings of the progress bar, for this call.

    Raises:
        RequestError: the pipeline is at work already, its parts don't compute in one type, or it refuses an option.
    """
    if pipeline.unet in _DENOISING:  # the pipeline would go on with the settings of the inner run
        raise RequestError(
            "generate was called by a callback of a run of the same model: draw after the run, or from on_result"
        )
    given = {name: value for name, value in options.items() if value is not None}
    kwargs = {**(given.pop("cross_attention_kwargs", None) or {}), "subjects": condition}
    controls, theirs = kwargs.get("controls"), given.get("callback_on_step_end")
    # What is no list of controls is refused by the hook of the UNet.
    callback = after_steps(controls if isinstance(controls, (list, tuple)) else (), theirs)
    if callback is not theirs:
        given["callback_on_step_end"] = callback
        # What diffusers' own callbacks want to see they can't say through ours.
        wanted = getattr(theirs, "tensor_inputs", given.get("callback_on_step_end_tensor_inputs", ()))
        given["callback_on_step_end_tensor_inputs"] = sorted({"latents", *wanted})
    watched = "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters
    if watched and not hasattr(callback, "tensor_inputs"):  # diffusers' own say by it what they want to see
        callback = given["callback_on_step_end"] = _Watched(callback, check_first)
    encoder = getattr(pipeline.text_encoder, "_orig_mod", pipeline.text_encoder)
    # diffusers looks for the last norm where transformers had it before 5.6. Not for longer than this call: by the
    # same name LoRA loaders tell how layers are called.
    stand_in = "clip_skip" in given and not hasattr(encoder, "text_model")
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**bar)
    try:  # whatever is set here is taken back, also where Ctrl+C comes in between
        _DENOISING.add(pipeline.unet)
        if stand_in:
            encoder.__dict__["text_model"] = encoder
        with withheld([type(pipeline).encode_prompt.__module__], "input was truncated"):  # drawing has said it
            return pipeline(**arguments, cross_attention_kwargs=kwargs, **given)
    except Exception as error:
        refused = None if getattr(callback, "error", None) is error else _refusal(error, pipeline, options)
        if refused is None:
            raise
        raise refused from error
    finally:
        _DENOISING.discard(pipeline.unet)
        if stand_in:
            encoder.__dict__.pop("text_model", None)
        pipeline._cross_attention_kwargs = None  # the pipeline would keep the condition alive
        pipeline.set_progress_bar_config(**before)


def with_own_scheduler(pipeline: Any) -> Any:
    """The pipeline with a scheduler of its own, as the pipeline's is now; everything else is shared, not copied.

    A run counts its steps in the scheduler, so a run of another pipeline on the same scheduler, or another scheduler in
    its place, would change this one. What is set on either (``_interrupt``, ...) is set on both.
    """
    kind, scheduler = type(pipeline), copy.copy(pipeline.scheduler)

    def replace(_: Any, other: Any) -> None:  # by a callback
        nonlocal scheduler
        scheduler = other

    own = object.__new__(type(kind.__name__, (kind,), {"scheduler": property(lambda _: scheduler, replace)}))
    own.__dict__ = pipeline.__dict__
    return own


def _refusal(error: Exception, pipeline: Any, options: Mapping[str, Any]) -> RequestError | None:
    """What to say of an error that diffusers raised of its own accord, caught round its call; None: it is another's."""
    parts = {name: getattr(getattr(pipeline, name, None), "dtype", None) for name in _COMPUTING}
    if isinstance(error, RuntimeError) and "dtype" in str(error) and len(set(parts.values()) - {None}) > 1:
        told = ", ".join(f"{name} in {str(dtype).removeprefix('torch.')}" for name, dtype in parts.items() if dtype)
        return RequestError(
            f"the parts of the pipeline compute in types that do not fit together: {told}; move all of them, "
            "model.pipeline.to(dtype)"
        )
    given = [name for name, value in options.items() if value is not None and not name.startswith("callback")]
    if not given or not isinstance(error, (ValueError, TypeError, AttributeError, RuntimeError)):
        return None
    if isinstance(error, torch.OutOfMemoryError) or not _raised_by_libraries(error.__traceback__):
        return None
    return RequestError(
        f"{type(pipeline).__name__} cannot be called with {', '.join(given)} as given: {reason(error)[:300]}"
    )


def _raised_by_libraries(trace: TracebackType | None) -> bool:
    """Whether below the line that called the pipeline there is none of ours, and none of a user's hook or callback."""
    lines = [] if trace is None else [frame for frame, _ in traceback.walk_tb(trace)][1:]
    packages = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame in lines}
    return packages <= {"diffusers", "torch", "transformers", "huggingface_hub"} and "diffusers" in packages


class _Watched:
    """A user's callback at the end of a step, which may return nothing, and whose damage is told as its own."""

    def __init__(self, callback: Callable[..., Any] | None, check_first: Callable[[Tensor], None]) -> None:
        """``check_first``: called with the latents after the first step, before the callback sees them."""
        self.callback, self.check_first = callback, check_first
        self.error: BaseException | None = None
        """What the callback has raised."""

    def __call__(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A callback of the pipeline: a broken network is told before the other steps are computed in vain.

        Raises:
            RequestError: the callback gave latents that are no numbers, or no mapping of tensors.
        """
        latents = tensors.get("latents")
        if step == 0 and latents is not None:
            self.check_first(latents)
        if self.callback is None:
            return tensors
        sound = latents is None or bool(torch.isfinite(latents).all())
        try:
            changed = self.callback(pipeline, step, timestep, tensors)
        except BaseException as error:
            self.error = error
            raise
        changed = tensors if changed is None else changed
        if not isinstance(changed, Mapping):
            raise RequestError(
                f"callback_on_step_end returned {shown(changed)}: it must return the mapping of tensors, or nothing"
            )
        for name, tensor in changed.items():
            if sound and isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise RequestError(
                    f"callback_on_step_end gave {name} that are no numbers (NaN or infinite) after step {step}: the "
                    "mistake is in the callback, or in a control that changes latents"
                )
        return changed
