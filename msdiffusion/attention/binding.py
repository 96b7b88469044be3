"""How controls reach the layers of a denoiser: what is installed in it, and the hook that begins each of its calls."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from msdiffusion.attention.control import Backend, Control, ControlledProcessor, Layer, Participants, Step
from msdiffusion.attention.rows import Rows, check_seen, guided, seen
from msdiffusion.attention.text_cache import Run, Runs
from msdiffusion.attention.unet import PAG_PROCESSORS, remove_pag, unet_processors
from msdiffusion.errors import RequestError, shown

GIVEN = ("subjects", "controls", "rows")
"""What callers may say to the hook."""


class ControlHook:
    """Forward pre-hook of a denoiser: reads ``{"subjects": condition, "controls": [...], "rows": Rows(...)}``.

    ``subjects`` is a control like the others, the first one. Without ``rows`` a control that knows says what the rows
    of the batch are, or else they are looked at, once per run. Whatever depends on size, timestep or text of a call is
    worked out here, once, instead of in every layer.
    """

    def __init__(self, denoiser: nn.Module, layers: Sequence[Layer]) -> None:
        """Take the layers, in which our processors are installed by now."""
        paths = [layer.name.replace("/", ".") for layer in layers]
        self.layers, self.attentions = list(layers), [denoiser.get_submodule(path) for path in paths]
        self.blocks = [denoiser.get_submodule(path) for path in dict.fromkeys(p.rpartition(".")[0] for p in paths)]
        self.is_unet = isinstance(denoiser, UNet2DConditionModel)
        self.kwargs_name = "cross_attention_kwargs" if self.is_unet else "joint_attention_kwargs"
        names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self.places = {name: place for place, name in enumerate(names)}
        self.runs = Runs()

    def in_place(self) -> bool:
        """Whether controls can take part in every layer that reads the text."""
        pairs = zip(self.layers, self.attentions, strict=True)
        return all(_is_ours(attention) for layer, attention in pairs if layer.kind != "self")

    def __call__(
        self, denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace what the caller gave by what the layers need.

        Raises:
            RequestError: what was given is no control; processors were replaced after the installation, so a control
                would be ignored; or the batch is not what a control is for.
        """
        given = kwargs.get(self.kwargs_name)
        if not given:
            return None
        controls = self._controls(given)
        others = {name: value for name, value in given.items() if name not in GIVEN}
        if controls:
            try:
                args, kwargs, others["participants"] = self._begin(args, kwargs, controls, given.get("rows"))
            except RequestError:
                if self.is_unet:  # PAG's pipeline takes its processors away at the end of a run: there won't be one
                    remove_pag(denoiser)
                raise
        return args, {**kwargs, self.kwargs_name: others}

    def _controls(self, given: Mapping[str, Any]) -> list[Control]:
        for name, value in given.items():
            if name not in GIVEN and isinstance(value, Control):
                raise RequestError(f'{self.kwargs_name} has a condition as {name!r}: its name must be "subjects"')
        subjects, controls = given.get("subjects"), given.get("controls")
        if controls is not None and not isinstance(controls, (list, tuple)):
            raise RequestError(f"controls must be a list, got {shown(controls)}")
        found = [*([] if subjects is None else [subjects]), *(controls or ())]
        for control in found:
            if not isinstance(control, Control):
                raise RequestError(f"subjects and controls must be Control objects, got {shown(control)}")
        return found

    def _begin(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], controls: Sequence[Control], told: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any], Participants]:
        """The call's arguments, with the text that controls made of it, and what the layers get."""
        sample, timestep, text = (
            self._argument(args, kwargs, name)
            for name in ("sample" if self.is_unet else "hidden_states", "timestep", "encoder_hidden_states")
        )
        if told is None and any(isinstance(attention.processor, PAG_PROCESSORS) for attention in self.attentions):
            raise RequestError(
                "batches of other parts, as of PAG, don't show what they are: say which, "
                '"rows": Rows(("unconditional", "conditional", "perturbed"), pictures)'
            )
        run = self.runs.begin(text)
        grid = tuple(sample.shape[-2:]) if self.is_unet else _grid(self._argument(args, kwargs, "img_ids"), run)
        shared = any(block._compiled_call_impl is not None for block in self.blocks)
        if shared:
            for attention in self.attentions:
                if _is_ours(attention):
                    attention.processor.number = attention.processor.number.to(sample.device)
        step = Step(
            sample,
            timestep,
            _rows(told, controls, sample, run) if self.is_unet or told is not None else guided(sample.shape[0], False),
            grid,
            number=None if run is None else run.number,
            text_tokens=text.shape[1],
            layers=self.layers,
            shared=shared,
        )
        bound = [taking for control in controls if (taking := control.at(step)) is not None]
        for layer, attention in zip(self.layers, self.attentions, strict=True):
            if not _is_ours(attention) and any(control.wants(layer) for control in bound):
                raise RequestError(
                    f"the attention processor of {layer.name} was replaced after ours had been installed "
                    "(load_ip_adapter, attention slicing, ...), so subjects and controls would be ignored: call "
                    "model.install(), or make the condition after the change"
                )
        states = text
        for control in bound:
            states = control.text(step, states)
        step.text_tokens = states.shape[1]
        cache = None if run is None else run.cache(states)
        if bound and not step.rows.sure and run is not None and run.number == 0:
            check_seen(step.rows, sample)
        place = self.places["encoder_hidden_states"]
        if len(args) > place:
            args = (*args[:place], states, *args[place + 1 :])
        else:
            kwargs = {**kwargs, "encoder_hidden_states": states}
        return args, kwargs, Participants(step, bound, cache)

    def _argument(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        return args[self.places[name]] if len(args) > self.places[name] else kwargs[name]


def _is_ours(attention: nn.Module) -> bool:
    processor = attention.processor
    return isinstance(processor, ControlledProcessor) and processor.kind is not None


def _rows(told: Any, controls: Sequence[Control], sample: Tensor, run: Run | None) -> Rows:
    """What the rows of this batch are."""
    samples = sample.shape[0]
    if told is not None:
        if not isinstance(told, Rows) or told.samples != samples:
            raise RequestError(f"rows must be Rows(branches, pictures) for a batch of {samples}, got {shown(told)}")
        return told
    for control in controls:
        rows = control.rows(samples)
        if rows is not None:
            return rows
    if run is None:
        raise RequestError(
            "code that is compiled as a whole can't look at the batch: say rows=Rows(branches, pictures)"
        )
    if run.rows is None or run.rows.samples != samples:
        run.rows = seen(sample)
    return run.rows


def _grid(img_ids: Tensor, run: Run | None) -> tuple[int, int]:
    """Rows and columns of a transformer's patches, by their ids (N, 3): (0 for the picture itself, row, column)."""
    if run is None:
        raise RequestError(
            "controls do not go together with a transformer that is compiled as a whole: use compile_repeated_blocks()"
        )
    known, grid = run.grid
    if known is None or known() is not img_ids:
        ids = img_ids[0] if img_ids.ndim == 3 else img_ids
        own = ids[ids[:, 0] == 0]
        columns = int((own[:, 1] == own[0, 1]).sum())  # counted: in bfloat16 numbers above 256 are rounded
        run.grid = known, grid = weakref.ref(img_ids), (own.shape[0] // columns, columns)
    return grid


def install(denoiser: nn.Module, backend: Backend = "sdpa") -> list[Layer]:
    """Give a denoiser the processors in which controls take part. Without a control they change nothing.

    Processors that somebody else has put in place (IP-Adapter, attention slicing, ...) go on working inside ours; those
    of a transformer that have weights stay where they are, and controls that want their layers are refused. Doing it
    again changes nothing, and puts back what has been replaced since.

    Args:
        denoiser: a UNet2DConditionModel or FluxTransformer2DModel.
        backend: "sdpa", or "softmax", whose backward is cheaper on a CPU (then for all attention of a UNet).

    Returns:
        The layers in which controls can take part.

    Raises:
        RequestError: unknown backend, or another kind of network.
        WeightsError: the UNet has no cross-attention that is known.
    """
    if backend not in ("sdpa", "softmax"):
        raise RequestError(f'backend must be "sdpa" or "softmax", got {backend!r}')
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile(unet) wraps it; hooks belong on the inner one
    if isinstance(denoiser, UNet2DConditionModel):
        processors, layers = unet_processors(denoiser, backend)
    else:
        from diffusers import FluxTransformer2DModel

        from msdiffusion.attention.dit import flux_processors

        if not isinstance(denoiser, FluxTransformer2DModel):
            raise RequestError(
                "controls can take part in a UNet2DConditionModel or a FluxTransformer2DModel, got "
                f"{type(denoiser).__name__}"
            )
        processors, layers = flux_processors(denoiser, backend)
    denoiser.set_attn_processor(processors)
    for handle, hook in list(denoiser._forward_pre_hooks.items()):
        if isinstance(hook, ControlHook):
            del denoiser._forward_pre_hooks[handle]
            denoiser._forward_pre_hooks_with_kwargs.pop(handle, None)
    denoiser.register_forward_pre_hook(ControlHook(denoiser, layers), with_kwargs=True)
    return layers


def is_installed(denoiser: nn.Module) -> bool:
    """Whether controls can take part in every layer of the denoiser that reads the text."""
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    return any(isinstance(hook, ControlHook) and hook.in_place() for hook in denoiser._forward_pre_hooks.values())


def after_steps(controls: Sequence[Control], callback: Callable[..., Any] | None = None) -> Callable[..., Any] | None:
    """``callback_on_step_end`` of a diffusers pipeline for controls with ``latents``, in the order given.

    Args:
        controls: those that have none are left out.
        callback: called after them, with what they made.

    Returns:
        ``callback`` itself where no control has ``latents``.
    """
    changing = [
        control for control in controls if getattr(type(control), "latents", Control.latents) is not Control.latents
    ]
    if not changing:
        return callback

    def call(pipeline: Any, number: int, timestep: Any, tensors: dict[str, Tensor]) -> Any:
        if "latents" not in tensors:
            raise RequestError('a control changes latents: callback_on_step_end_tensor_inputs must hold "latents"')
        latents = tensors["latents"]
        if latents.ndim != 4:
            raise RequestError("controls change latents of (pictures, channels, rows, columns), not packed ones")
        step = Step(latents, timestep, guided(latents.shape[0], False), tuple(latents.shape[-2:]), number=number)
        for control in changing:
            latents = control.latents(step, latents)
        tensors = {**tensors, "latents": latents}
        given = None if callback is None else callback(pipeline, number, timestep, tensors)
        return {**tensors, **(given or {})}

    return call
