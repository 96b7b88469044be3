"""Grounding DINO through the package groundingdino-py 0.4, on current transformers, in batches.

Two things are mended, without touching an installed file and without leaving anything changed in the package:

- The package wraps BERT in a way that transformers 5 no longer allows. While a model is being built, BERT itself
  stands in for the wrapper, with a hook that turns the package's three-dimensional boolean attention mask into the
  additive float mask that BERT takes (a boolean one would be right with one attention implementation and wrong with
  another). Outputs are bit-equal to the package on transformers 4.57, and the names of the weights are unchanged.
- The text layers repeat their masks in the wrong order, so that in a batch of different captions a caption gets the
  mask of another. A hook on each of these layers hands in masks that are repeated in the right order.
"""

import ast
import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from data_pipeline.errors import InputError
from data_pipeline.models.grounding import GroundingDetector, Preprocessing
from data_pipeline.models.model_claims import MAX_BYTES, check_network, check_values, configs_here
from data_pipeline.models.weights import check_weights, fill, read_tensors
from data_pipeline.reasons import reason

# Tensors that the network works out for itself, or has no use for: a checkpoint may lack them.
DISPENSABLE = ("relative_position_index", "bert.pooler.", "bert.embeddings.position_ids")
# Beginnings of names of what training has left in the released checkpoints.
LEFT_OVER = ("label_enc.",)


def _bert_with_float_masks(bert_model: Any) -> Any:
    """Stands in for the package's BertModelWarper, which is called with this keyword."""

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 3:
            lowest = torch.finfo(module.dtype).min
            kwargs["attention_mask"] = (1.0 - mask[:, None].to(module.dtype)) * lowest
        return args, kwargs

    bert_model.register_forward_pre_hook(hook, with_kwargs=True)
    return bert_model


def _untrained_language_model(name: str) -> Any:
    """Stands in for the package's loader of BERT weights: those of the detector's checkpoint replace them anyway."""
    from transformers import AutoConfig, AutoModel

    return AutoModel.from_config(AutoConfig.from_pretrained(name))


@contextlib.contextmanager
def _replaced_bert() -> Iterator[None]:
    from groundingdino.models.GroundingDINO import groundingdino as package
    from groundingdino.util import get_tokenlizer
    from transformers import BertModel

    originals = package.BertModelWarper, get_tokenlizer.get_pretrained_language_model
    get_tokenlizer.get_pretrained_language_model = _untrained_language_model
    # transformers 4 still has what the package's wrapper needs, and refuses a four-dimensional mask.
    if not hasattr(BertModel, "get_head_mask"):
        package.BertModelWarper = _bert_with_float_masks
    try:
        yield
    finally:
        package.BertModelWarper, get_tokenlizer.get_pretrained_language_model = originals


def mend_text_masks(model: torch.nn.Module) -> None:
    """Gives text layers their masks in the order of their attention: all heads of a caption, then of the next."""
    from groundingdino.models.GroundingDINO.transformer_vanilla import TransformerEncoderLayer

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs.get("src_mask")
        # The layer repeats a mask only if it has one row per caption, so this one passes as it is.
        if mask is not None and mask.dim() == 3:
            kwargs["src_mask"] = mask.repeat_interleave(module.nhead, dim=0)
        return args, kwargs

    for layer in model.modules():
        if isinstance(layer, TransformerEncoderLayer):
            layer.register_forward_pre_hook(hook, with_kwargs=True)


def read_package_config(path: Path) -> dict[str, Any]:
    """The settings in a configuration file of the package: Python assignments of plain values.

    They are read, not run: such a file may come from a stranger. InputError if it holds anything else.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size / 1e6:.0f} MB")
        lines = ast.parse(path.read_text(encoding="utf-8")).body
        settings = {}
        for line in lines:
            if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
                continue  # a docstring
            [target] = line.targets
            settings[target.id] = ast.literal_eval(line.value)
    except (OSError, SyntaxError, ValueError, AttributeError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(
            f"cannot read the Grounding DINO configuration {path}: it must hold plain assignments, as "
            f"GroundingDINO_SwinT_OGC.py does ({reason(error)})"
        ) from error
    check_values(path, {name: value for name, value in settings.items() if name != "backbone"})  # a name of its own
    return settings


def build_from_config(settings: Mapping[str, Any], text_encoder: str, device: str = "cpu") -> torch.nn.Module:
    """The package's network with random weights, mended. text_encoder: directory or hub id of a BERT's configuration
    and tokenizer. InputError if something is missing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations and syntax warnings inside the package
        from groundingdino.models import build_model

    # The last two save memory in training only.
    fixed = {
        "device": device,
        "text_encoder_type": text_encoder,
        "use_checkpoint": False,
        "use_transformer_ckpt": False,
    }
    try:
        with _replaced_bert(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build_model(SimpleNamespace(**{**settings, **fixed}))
    except (OSError, ValueError) as error:
        problem = f"cannot build Grounding DINO with the text encoder {text_encoder!r}: {error}"
        raise InputError(
            f"{problem}\n  give a directory with a BERT's config.json and tokenizer: --detector-text-encoder DIR"
        ) from error
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"the configuration does not describe a Grounding DINO: {error}") from error
    mend_text_masks(model)
    return model


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by the package's names: safetensors, or a .pth of which only tensors are read.

    InputError if the file is something else.
    """
    try:
        return {name.removeprefix("module."): tensor for name, tensor in read_tensors(checkpoint, ("model",)).items()}
    except InputError as error:
        raise InputError(f"cannot read Grounding DINO weights from {checkpoint}: {error}") from error


def load_grounding_dino(config: Path, checkpoint: Path, text_encoder: str, device: str) -> torch.nn.Module:
    """The model of a configuration file of the package with the weights of a checkpoint.

    text_encoder: directory or name of a BERT's configuration and tokenizer; "" for the folder "text_encoder" beside
    the configuration if there is one, else for the one that the configuration names. InputError if anything is
    missing or does not fit.
    """
    settings = read_package_config(config)
    beside = config.parent / "text_encoder"
    named = str(beside) if beside.is_dir() else str(settings.get("text_encoder_type", "bert-base-uncased"))
    weights = read_weights(checkpoint)
    encoder = _text_encoder_folder(text_encoder or named)
    with torch.device("meta"), _RowsOnTheProcessor():  # a configuration can ask for any size
        skeleton = build_from_config(settings, encoder, "cpu")
    check_weights(skeleton, weights, checkpoint, may_lack=DISPENSABLE, left_out=LEFT_OVER)
    model = build_from_config(settings, encoder, device)
    fill(model, weights, checkpoint, may_lack=DISPENSABLE, left_out=LEFT_OVER)
    return model.to(device).eval()


class _RowsOnTheProcessor(TorchFunctionMode):
    """Rows of numbers are real ones on the meta device too: the package's Swin reads them while it is built."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchFunctionMode."""
        known = {"device": "cpu"} if function is torch.linspace else {}
        return function(*args, **{**(kwargs or {}), **known})


def _text_encoder_folder(name: str) -> str:
    """Where a BERT's configuration and tokenizer are, seen to be those of a BERT; a name that is nowhere stays."""
    try:
        folder, _ = configs_here(name)
    except (OSError, ValueError):  # building says what to do
        return name
    check_network(folder, ("bert",), tokenizer=True)
    return name


class GroundingDino(GroundingDetector):
    """A detector (see data_pipeline.models.detector.Detector) round a model of the package."""

    def __init__(self, model: torch.nn.Module, **settings: Any) -> None:
        """settings: of GroundingDetector."""
        super().__init__(model.tokenizer, Preprocessing(), max_tokens=model.max_text_len, **settings)
        self.model = model

    def forward(self, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """See GroundingDetector."""
        device = next(self.model.parameters()).device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = self.model(pixels.to(device), captions=texts)
        return output["pred_logits"], output["pred_boxes"]
