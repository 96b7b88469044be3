"""The one door for weights: every network of this project gets them here, whatever file they come from.

All tensors are there, none is left over, each has the shape that the network has, holds floating-point numbers where
the network does, and every number is finite. What a file lacks would be random otherwise, and a wrong number draws
noise without a word. An error names file and tensor.
"""

import pickle
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.errors import InputError
from data_pipeline.models.model_claims import check_network, configs_here, read_json
from data_pipeline.reasons import reason

COUNTERS = ("position_ids", "num_batches_tracked", "relative_position_index", "attention_bias_idxs")
"""Last names of tensors that count places or steps: whole numbers, which a file may hold or lack."""
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SPARE = 100_000_000
"""How many numbers more than its files hold, and half as many again, a config may ask for: what is missing then is
named, but has to be allocated first."""


# How many numbers a class has with a config.json of this text: building it to count takes a tenth of the loading.
_numbers: dict[tuple[Any, str], int] = {}


@dataclass(frozen=True)
class Heading:
    """What a file says of a tensor before its numbers are read."""

    shape: tuple[int, ...]
    floating: bool
    dtype: str
    """As the file calls it."""


def is_counter(name: str) -> bool:
    """Whether a tensor of this name counts places or steps."""
    return name.rpartition(".")[2] in COUNTERS


def read_tensors(path: Path, inside: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file of torch of which nothing but tensors is unpickled: what torch
    has written as a zip is mapped, not read. inside: keys under which some release keeps its tensors; the first that is
    there is taken. InputError: no such file, another kind of file, or tensors that are not as large as they say.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path} is not a safetensors file: {error}") from None
    content = load_pickle(path)
    if isinstance(content, Mapping):
        content = next((content[key] for key in inside if isinstance(content.get(key), Mapping)), content)
    check_plain(content, path)
    return dict(content)


def load_pickle(path: Path) -> Any:
    """What a file of torch holds, mapped where it is a zip; nothing but tensors and plain values is unpickled.
    InputError if it holds more, or would grow while it is read.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as file:
                grown = [entry for entry in file.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            if grown:  # torch stores, so that it can map; a few bytes can be packed that grow to gigabytes
                raise InputError(f"{path}: {grown[0].filename[:80]} in it is compressed: torch writes no such files")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except Exception as error:  # pickle, zip and runtime errors, according to what the file is
        told = reason(error) if isinstance(error, (RuntimeError, OSError, pickle.UnpicklingError)) else "it is none"
        raise InputError(f"{path} is not a file of tensors only, so it is not opened: {told}") from error


def check_plain(content: Any, source: str | Path) -> None:
    """InputError, which names the first that is none, unless these are tensors by their names, each as large in the
    file as its shape says: a pickle can repeat one number as a tensor of any size, or hold tensors without numbers.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{source} holds a {type(content).__name__}: needed are tensors by their names")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{source}: {str(name)[:80]!r} is a {type(tensor).__name__}: needed are tensors by name")
        plain = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise InputError(
                f"{source}: {name} is no plain tensor (shape {tuple(tensor.shape)}, {tensor.layout}, on "
                f"{tensor.device}): its numbers are not all in the file"
            )


def fill(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    source: str | Path,
    *,
    may_lack: Sequence[str] = (),
    left_out: Sequence[str] = (),
    assign: bool = False,
) -> None:
    """Give a network, on the meta device or with any weights, its own, after all of them were looked at
    (``check_weights``, which see).

    assign: take the tensors themselves, with their dtype, not copies; for networks on the meta device, which may then
    lack nothing.
    """
    check_weights(network, weights, source, may_lack=may_lack, left_out=left_out, counters=not assign)
    own = network.state_dict()
    network.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False, assign=assign)


def check_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    source: str | Path,
    *,
    may_lack: Sequence[str] = (),
    left_out: Sequence[str] = (),
    counters: bool = True,
) -> None:
    """InputError, which names file and tensor, unless these are the weights of a network by the names of its
    ``state_dict``, with its shapes and kinds of dtypes. It may be on the meta device: nothing is changed.

    source: the file, for messages. may_lack: parts of names of tensors that need not be there. left_out: beginnings of
    names of tensors that have no place in the network and are known, such as the head of a classifier. counters:
    whether ``COUNTERS`` may be lacking, too.
    """
    own = network.state_dict()
    known = {"may_lack": may_lack, "left_out": left_out, "counters": counters}
    check_names(source, own.keys() - weights.keys(), weights.keys() - own.keys(), **known)
    kept = {name: tensor for name, tensor in weights.items() if name in own}
    for name, tensor in kept.items():
        if tuple(tensor.shape) != tuple(own[name].shape):
            raise InputError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, the network needs {tuple(own[name].shape)}: "
                "weights and sizes belong to different models"
            )
        if own[name].is_floating_point() != tensor.is_floating_point() or own[name].is_complex() != tensor.is_complex():
            raise _wrong_dtype(source, name, str(tensor.dtype))
    check_finite(kept.items(), source)


def check_names(
    source: str | Path,
    missing: Iterable[str],
    extra: Iterable[str] = (),
    *,
    may_lack: Sequence[str] = (),
    left_out: Sequence[str] = (),
    counters: bool = False,
) -> None:
    """InputError that names some of each where tensors are missing or left over, but for those that ``check_weights``
    is told of; counters are never left over.
    """
    extra = [name for name in extra if not is_counter(name) and not name.startswith(tuple(left_out))]
    missing = [name for name in missing if not (counters and is_counter(name))]
    if missing := [name for name in missing if not any(part in name for part in may_lack)]:
        also = f"; there are others, such as {_some(extra, 1)}, which have no place in it" if extra else ""
        raise InputError(
            f"{source} is incomplete: its files lack {_some(missing)}{also}. What is missing would be random: get the "
            "files anew, or the ones of that kind of model"
        )
    if extra:
        raise InputError(
            f"{source} holds tensors that have no place in this network: {_some(extra)}: the weights are those of "
            "another model, or of another version"
        )


def check_dtypes(source: str | Path, headings: Mapping[str, Heading]) -> None:
    """InputError that names the tensor and what it holds, if that is not floating-point numbers, counters apart."""
    for name, heading in headings.items():
        if not heading.floating and not is_counter(name):
            raise _wrong_dtype(source, name, heading.dtype)


def _wrong_dtype(source: str | Path, name: str, dtype: str) -> InputError:
    return InputError(
        f"{source}: {name} is {dtype.removeprefix('torch.')}: weights are floating-point numbers, and counters whole "
        "ones (quantized weights are not read: give the original)"
    )


def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str | Path) -> None:
    """InputError that names the tensor, and how many of its numbers, where one is NaN or infinite. Other dtypes than
    floating-point ones, and the meta device, pass.
    """
    for name, tensor in tensors:
        plain = tensor.is_floating_point() and tensor.layout is torch.strided and tensor.device.type != "meta"
        if not plain or not tensor.numel():
            continue
        values = tensor.detach()
        values = values.float() if values.element_size() == 1 else values
        if all(edge.isfinite() for edge in values.aminmax()):  # both are NaN if one number is; quicker than isfinite
            continue
        wrong = int((~values.isfinite()).sum())
        half = " (too large for half a precision?)" if values.dtype in (torch.float16, torch.bfloat16) else ""
        raise InputError(
            f"{source}: {name} holds {wrong} of {values.numel()} numbers that are NaN or infinite{half}: get the file "
            "anew"
        )


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network by name, each once, buffers that are not saved among them."""
    return {**dict(network.named_buffers()), **dict(network.named_parameters())}


def load_network(
    kind: Any,
    place: str | Path,
    what: str,
    *,
    folder: Path | None = None,
    model_types: Collection[str] = (),
    may_lack: Sequence[str] = (),
    left_out: Sequence[str] = (),
    variant: str | None = None,
    **options: Any,
) -> nn.Module:
    """A network of diffusers or transformers, if its folder claims nothing strange and its files hold all of it; else
    an InputError that names file or network, and tensor.

    kind: the class, whose ``from_pretrained`` reads it; one of transformers' Auto classes too. place: what
    ``from_pretrained`` gets: folder or hub name. what: the network, for messages. folder: where its configs are on this
    machine; None: ``place``, or fetched from the hub. model_types: see ``check_network``. may_lack, left_out: see
    ``check_weights``. variant: as ``from_pretrained`` has it: of "fp16", model.fp16.safetensors. None: a folder that
    has only those is read from them. options: of ``from_pretrained``.
    """
    if folder is None:
        folder, version = configs_here(str(place), options.get("subfolder", ""))
        options |= version
    diffusers = hasattr(kind, "load_config")
    check_network(folder, model_types, kind.__name__ if diffusers else None)
    stem = "diffusion_pytorch_model" if diffusers else "model"
    if Path(place).is_dir() and not any(_weight_files(folder, stem, each) for each in {None, variant}):
        variant = "fp16"  # all that there is, if anything
    headings = read_headings(folder, stem, variant)
    if headings:
        check_dtypes(what, headings)
        _check_size(kind, folder, what, headings)
    if variant is not None:
        options["variant"] = variant
    files = _weight_files(folder, stem, variant)
    if files and files[0].suffix == ".safetensors":
        options["use_safetensors"] = True  # no other file is taken where one of them is broken
    network, report = kind.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if not headings:  # from a hub: now they are here
        check_dtypes(what, read_headings(folder, stem, variant))
    known = {"may_lack": may_lack, "left_out": left_out, "counters": True}
    check_names(what, report["missing_keys"], report["unexpected_keys"], **known)
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{what} does not fit its config: {name} has shape {tuple(found)}, the config asks for {tuple(expected)}: "
            "weights and config belong to different models"
        )
    check_finite(state_of(network).items(), what)
    return network


def read_headings(folder: Path, stem: str, variant: str | None = None) -> dict[str, Heading]:
    """Shapes and dtypes of the weights in a network's folder, in the files that diffusers or transformers would read,
    by the names in the files; empty where there are no weights. InputError if a file is none of tensors alone.

    stem: "model" (transformers) or "diffusion_pytorch_model" (diffusers). variant: "fp16" or None.
    """
    headings: dict[str, Heading] = {}
    for path in _weight_files(folder, stem, variant):
        headings |= file_headings(path)
    return headings


def file_headings(path: Path) -> dict[str, Heading]:
    """The same of one file: its header, or a pickle that is mapped."""
    if path.suffix.lower() != ".safetensors":
        return {
            name: Heading(tuple(tensor.shape), tensor.is_floating_point(), str(tensor.dtype))
            for name, tensor in read_tensors(path).items()
        }
    try:
        with safe_open(path, "pt") as file:
            pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Heading(tuple(piece.get_shape()), piece.get_dtype() in _FLOATS, piece.get_dtype())
                for name, piece in pieces.items()
            }
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}") from None


def _weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """One file, or the parts that an index names; both where both are there, as libraries differ in what they take."""
    middle = "" if variant is None else f".{variant}"
    for name, ending in ((stem, "safetensors"), ("pytorch_model" if stem == "model" else stem, "bin")):
        # The second is that of diffusers before 0.30.
        indexes = [folder / f"{name}.{ending}{end}.json" for end in (f".index{middle}", f"{middle}.index")]
        index = next((path for path in indexes if path.is_file()), None)
        parts = [] if index is None else sorted(set(read_json(index)["weight_map"].values()))
        files = [folder / part for part in (f"{name}{middle}.{ending}", *parts)]
        if any(path.is_file() for path in files):
            return [path for path in files if path.is_file()]
    return []


def _check_size(kind: Any, folder: Path, what: str, headings: Mapping[str, Heading]) -> None:
    """Raise where the config describes a network of more numbers than its files hold: the rest would be allocated."""
    text = (folder / "config.json").read_text(encoding="utf-8")
    if (kind, text) not in _numbers:
        skeleton(kind, folder)
    wanted = _numbers[kind, text]
    held = sum(torch.Size(heading.shape).numel() for heading in headings.values())
    if wanted > 1.5 * held + _SPARE:
        raise InputError(
            f"{what} does not fit its config: that asks for {wanted:,} numbers, the files hold {held:,}: weights and "
            "config belong to different models"
        )


def skeleton(kind: Any, folder: Path) -> nn.Module:
    """The network that the config.json in a folder describes, on the meta device: names and shapes alone.

    kind: as in ``load_network``. folder: on this machine; what it claims should have been looked at
    (``check_network``).
    """
    with torch.device("meta"):
        if hasattr(kind, "load_config"):
            network = kind.from_config(kind.load_config(folder))
        elif getattr(kind, "config_class", None) is not None:
            network = kind(kind.config_class.from_pretrained(folder))
        else:
            from transformers import AutoConfig

            network = kind.from_config(AutoConfig.from_pretrained(folder))
    text = (folder / "config.json").read_text(encoding="utf-8")
    _numbers[kind, text] = sum(parameter.numel() for parameter in network.parameters())
    return network


def _some(names: Collection[str], limit: int = 3) -> str:
    shown = [name if len(name) <= 120 else name[:117] + "..." for name in sorted(names)[:limit]]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown) + (more if limit > 1 else "")
