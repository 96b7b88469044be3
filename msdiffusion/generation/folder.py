"""Pictures of many requests into one folder: planned, compared with what is there, drawn in batches, written at once.

Pictures are drawn in the same batches however often a run is killed, so that a rerun gives the same files: a picture's
last bits depend on how many are drawn beside it. Its place in the batch stands in its record.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdiffusion import __version__
from msdiffusion.environment import arithmetic
from msdiffusion.errors import RequestError
from msdiffusion.figures import draw_layout
from msdiffusion.generation.safety import FLAGGED
from msdiffusion.request.provenance import SCHEMA, read_record, request_record, same_request, save_at_once, save_png
from msdiffusion.request.request import DEFAULTS, FALLBACKS, check_auto_layout_start, check_size
from msdiffusion.request.request_file import ARGUMENTS, Embedded, Entry, open_request, picture_names

if TYPE_CHECKING:
    from msdiffusion.adapter.loading import Sources
    from msdiffusion.generation.generate import MSDiffusion
    from msdiffusion.request.request import GenerationRequest
    from msdiffusion.request.subjects import Subjects

_SAMPLES, _SAMPLE_BYTES = 64, 2**16
_NOT_IDENTITY = (
    "base_model", "image_encoder", "base_config", "defaults", "largest_side", "most_subjects", "closed_vocabulary"
)  # fmt: skip
"""What an adapter's config says of places, which are told by their content, of arguments, which records have, and of
what it was trained for, which changes no picture."""
_MODEL_FILES = (
    *(".safetensors", ".bin", "config.json", "index.json", "tokenizer.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)
"""Weights, configs and vocabularies."""


@dataclass(frozen=True)
class Identity:
    """Which model draws, told without loading it."""

    model: Mapping[str, str | None]
    """As records have it."""
    defaults: Mapping[str, Any]
    """Of the adapter."""
    sources: Sources
    """Where the frozen models are."""


@dataclass(frozen=True)
class Picture:
    """One picture to draw."""

    path: Path
    arguments: Mapping[str, Any]
    """Of generate, for this picture alone, with its seed."""
    record: Mapping[str, Any]
    """What its file will say, as far as that is known before it is drawn; a seed that nobody chose is None."""
    wanted: bool = True
    """False: it is drawn for its neighbours' sake, but not written."""


def identify(
    model: str, base_model: str | None, image_encoder: str | None, dtype: str, base_config: str | None = None
) -> Identity:
    """Find the adapter and say what it is.

    Args:
        model: as for MSDiffusion.from_pretrained.
        base_model: the same.
        image_encoder: the same.
        dtype: name of the weights' dtype.
        base_config: as for MSDiffusion.from_pretrained.

    Raises:
        WeightsError: there is no such adapter, or its config is broken.
    """
    from msdiffusion.adapter.config import (
        CHECKPOINT_SUFFIX,
        CONFIG_NAME,
        WEIGHTS_NAME,
        AdapterConfig,
        read_checkpoint,
    )
    from msdiffusion.adapter.loading import find_adapter, model_sources
    from msdiffusion.adapter.resampler import ResamplerParams
    from msdiffusion.errors import WeightsError
    from msdiffusion.files import file_sha256

    place = find_adapter(model)
    if place.suffix == CHECKPOINT_SUFFIX and place.is_file():
        weights, (config, _) = place, read_checkpoint(place)
        sources = model_sources(place.parent, config, base_model, image_encoder, base_config)
    elif place.is_file():  # the official file says nothing but weights
        weights = place
        config = AdapterConfig(resampler=ResamplerParams(image_width=1, phrase_width=1, output_width=1))
        sources = model_sources(place, None, base_model, image_encoder, base_config)
    else:
        weights = place / WEIGHTS_NAME
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (place / name).is_file():
                raise WeightsError(f"{place} holds no {name}: an adapter is {CONFIG_NAME} and {WEIGHTS_NAME}")
        config = AdapterConfig.read(place / CONFIG_NAME)
        sources = model_sources(place, config, base_model, image_encoder, base_config)
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_IDENTITY}
    names = {
        "adapter": Path(model).resolve().name if Path(model).exists() else model,
        "adapter_sha256": file_sha256(weights),
        "adapter_config": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16],
        "base_model": frozen_name(sources.base_model),
        "base_config": None if sources.base_config is None else frozen_name(sources.base_config),
        "image_encoder": frozen_name(sources.image_encoder),
        "dtype": dtype,
    }
    return Identity(names, config.defaults, sources)


def frozen_name(source: str) -> str:
    """A frozen model as records call it: a hub name, or a local place's last part with a fingerprint of its content.

    Args:
        source: folder, file, hub name or ``open_clip:...``.
    """
    from msdiffusion.backbone.open_clip_encoder import OpenClipName, names_open_clip
    from msdiffusion.backbone.pretrained import is_local

    if names_open_clip(source):
        name = OpenClipName.parse(source)
        return source if name.file is None else str(replace(name, file=Path(_fingerprinted(name.file))))
    return _fingerprinted(Path(source)) if is_local(source) else source


def plan(
    entries: Sequence[Entry],
    folder: Path,
    identity: Identity,
    hooks: Mapping[str, str | None],
    *,
    suffix: str = ".png",
    embed: bool = False,
) -> list[Picture]:
    """The pictures of all entries, in order.

    Args:
        entries: checked requests.
        folder: where the pictures will be.
        identity: of the model.
        hooks: ``safety_checker`` and ``watermark``, None where there is none.
        suffix: of the files.
        embed: put references into the files.

    Raises:
        RequestError: a reference cannot be read or embedded, or a subject without a box would not find its place in
            so few steps.
    """
    pictures = []
    for entry in entries:
        arguments = _resolved(entry.arguments, identity.defaults)
        try:
            if _follows_text(arguments):
                _check_auto_layout(open_request(entry.arguments).subjects, arguments["steps"], identity.sources)
            request = request_record(arguments, folder, embed=embed)
        except RequestError as error:
            raise RequestError(f"{entry.where}: {error}") from None
        first = secrets.randbelow(2**31) if arguments["seed"] is None else arguments["seed"]
        for number, name in enumerate(picture_names(entry)):
            seed = None if arguments["seed"] is None else first + number
            record = {
                "schema": SCHEMA,
                "request": {**request, "seed": seed},
                "left_out": [side for side in ("height", "width") if arguments[side] is None],
                "model": dict(identity.model),
                "hooks": dict(hooks),
            }
            own = {**arguments, "num_images": 1, "seed": first + number}
            pictures.append(Picture(folder / f"{name}{suffix}", own, record))
    return pictures


def check_sizes(pictures: Sequence[Picture], hooks: Sequence[Any], side: int | None) -> None:
    """Ask the hooks that have a ``check_size(width, height)`` whether they can take the pictures.

    Args:
        pictures: what is planned.
        hooks: see ``MSDiffusion.picture_hooks``.
        side: height and width where a picture's are left out; None: not known.

    Raises:
        RequestError: a hook refuses a size; the message names the picture.
    """
    for hook in hooks:
        check = getattr(hook, "check_size", None)
        for picture in pictures if check is not None else ():
            width, height = (picture.arguments[name] or side for name in ("width", "height"))
            if width is None or height is None:
                continue
            try:
                check(width, height)
            except RequestError as error:
                raise RequestError(f"{picture.path.name}: {error}") from None


def check_batches(batches: Sequence[Sequence[Picture]]) -> None:
    """Raise RequestError where pictures that are drawn at once have too many pixels; of known sizes only."""
    for batch in batches:
        height, width = (batch[0].arguments[name] for name in ("height", "width"))
        if height is not None and width is not None:
            check_size(height, width, len(batch))


def without_finished(pictures: Sequence[Picture], *, overwrite: bool = False) -> list[Picture]:
    """The pictures, those that are there already marked as not wanted.

    Args:
        pictures: what is planned.
        overwrite: take those that are there but are of another request for missing.

    Raises:
        RequestError: such pictures are there, and may not be overwritten.
    """
    marked, others = [], []
    for picture in pictures:
        finished, reason = _finished(picture)
        marked.append(replace(picture, wanted=not finished))
        if picture.path.exists() and not finished:
            others.append(f"{picture.path} ({reason})")
    if others and not overwrite:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise RequestError(
            f"there already, but not from this request and model: {', '.join(others[:3])}{more}; --overwrite replaces "
            "them, or give another --out"
        )
    return marked


def in_batches(pictures: Sequence[Picture], size: int) -> list[list[Picture]]:
    """The pictures in batches of at most ``size`` that are drawn together, the same ones whatever is finished."""
    groups: dict[Any, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(_kind(picture.arguments), []).append(picture)
    return [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]


def repeated(picture: Picture, size: int, position: int) -> list[Picture]:
    """A batch in which a picture is computed to the last bit as in the one that it came from: copies for neighbours."""
    return [replace(picture, wanted=index == position) for index in range(size)]


def draw(
    model: MSDiffusion,
    batches: Sequence[Sequence[Picture]],
    on_picture: Callable[[Picture], None],
    *,
    progress: bool = False,
    layouts: bool = False,
) -> list[Path]:
    """Draw all batches in which something is wanted; each wanted picture is written as soon as it is there.

    Args:
        model: with its hooks.
        batches: see ``in_batches``.
        on_picture: called after each picture, also the unwanted ones of a batch that is drawn.
        progress: show a bar of the denoising steps.
        layouts: write beside each picture one of its boxes, phrases and attention maps, see ``layout_path``.

    Returns:
        The pictures that the safety checker flagged.

    Raises:
        RequestError: a picture cannot be written, or a reference is another than when the run began.
    """
    flagged = []
    for batch in batches:
        if not any(picture.wanted for picture in batch):
            continue
        requests = [open_request(picture.arguments) for picture in batch]
        for picture in batch:
            _check_unchanged(picture)

        def finish(
            index: int,
            result: Any,
            batch: Sequence[Picture] = batch,
            requests: Sequence[GenerationRequest] = requests,
        ) -> None:
            if batch[index].wanted:
                if layouts:
                    _write_layout(batch[index], result, requests[index].subjects)
                _write(batch[index], result, model, {"size": len(batch), "position": index})
                if FLAGGED in result.pictures[0].info:
                    flagged.append(batch[index].path)
            on_picture(batch[index])

        model.generate_batch(requests, progress=progress, batch_size=len(batch), on_result=finish)
    return flagged


def references(picture: Picture) -> Iterator[Path]:
    """The files that a picture is drawn from: references and masks."""
    for key in ("images", "masks"):
        yield from (item for item in _flat(picture.arguments.get(key)) if isinstance(item, Path))


def layout_path(path: Path) -> Path:
    """Where the drawing of a picture's layout is written."""
    return path.with_name(f"{path.stem}_layout.png")


def check_layout_paths(pictures: Sequence[Picture]) -> None:
    """Raise RequestError if the drawing of a layout would be written over a picture."""
    taken = {str(picture.path).casefold() for picture in pictures}
    for picture in pictures:
        if str(layout_path(picture.path)).casefold() in taken:
            raise RequestError(
                f"{picture.path.name}: its layout would be drawn into {layout_path(picture.path).name}, which is "
                "another picture of the run: give other names, or leave out --layout"
            )


def made_with(device: str) -> dict[str, str]:
    """Versions, kind of device, and what computes there: all that decides the last bits of a picture."""
    import diffusers
    import torch

    kind = device.partition(":")[0]
    versions = {"msdiffusion": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    return {**versions, "device": kind, **arithmetic(device)}


def _write(picture: Picture, result: Any, model: MSDiffusion, place: Mapping[str, int]) -> None:
    drawn = result.pictures[0]
    if picture.path.suffix.lower() != ".png":
        save_at_once(drawn, picture.path, quality=95)  # of formats that lose something
        return
    request = {**picture.record["request"], "seed": result.seeds[0], "width": drawn.width, "height": drawn.height}
    record = {
        **picture.record,
        "request": request,
        "flagged": FLAGGED in drawn.info,
        "batch": dict(place),
        "made_with": made_with(str(model.backbone.device)),
    }
    save_png(drawn, picture.path, record)


def _check_auto_layout(subjects: Subjects, steps: int, sources: Sources) -> None:
    """Raise RequestError if a subject without a box would not find its place."""
    from msdiffusion.backbone.pretrained import calls_per_step

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # drawing says it
        try:
            check_auto_layout_start(subjects, steps)
        except RequestError:  # unless the base's sampler calls the UNet more than once in a step
            check_auto_layout_start(subjects, steps * calls_per_step(sources.base_model, sources.base_config))


def _write_layout(picture: Picture, result: Any, subjects: Subjects) -> None:
    first = [subjects.numbers.index(number) for number in range(max(subjects.numbers) + 1)]  # view of each subject
    drawing = draw_layout(
        result.pictures[0],
        boxes=[subjects.boxes[view] for view in first],
        phrases=[subjects.phrases[view] for view in first],
        maps=None if result.layout_maps is None else result.layout_maps[0],
    )
    save_at_once(drawing, layout_path(picture.path))


def _finished(picture: Picture) -> tuple[bool, str]:
    """Whether the picture is there, and if something else is, what."""
    if not picture.path.exists():
        return False, ""
    try:
        found = read_record(picture.path)
    except RequestError:
        return False, "no picture of this command"
    if same_request(picture.record, found):
        return True, ""
    return False, "another model" if picture.record["model"] != found["model"] else "another request"


def _check_unchanged(picture: Picture) -> None:
    """Raise RequestError if a file is no longer what the record says: somebody edits references during a long run."""
    from msdiffusion.files import file_sha256

    said = picture.record["request"]
    for key in ("images", "masks"):
        paths, records = picture.arguments.get(key), said[key]
        for item, record in zip(_flat(paths), _flat(records), strict=True):
            if not isinstance(item, Embedded) and file_sha256(item) != record["sha256"]:
                raise RequestError(f"{item} was changed since the run began; run again to draw the rest with it")


def _flat(references: Any) -> Iterator[Any]:
    for item in references or ():
        if isinstance(item, list):
            yield from item
        elif item is not None:
            yield item


def _resolved(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments, with what is left out filled in as far as it can be told without the model."""
    found: dict[str, Any] = {name: DEFAULTS.get(name) for name in ARGUMENTS}
    for layer in (FALLBACKS, defaults, arguments):  # the later ones win, where they say something
        found.update({name: value for name, value in layer.items() if value is not None})
    return found


def _kind(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """What pictures of one batch have in common, so that their neighbours make no difference to the arithmetic.

    At least as fine as what MSDiffusion.generate_batch would put together.
    """
    settings = tuple(arguments[name] for name in ("height", "width", "steps", "guidance_scale"))
    masked = any(mask is not None for mask in arguments["masks"] or ())
    views = sum(1 for _ in _flat(arguments["images"]))
    plain = arguments["negative_prompt"] is None  # drawn apart from those that have one
    return (*settings, views, masked, plain, arguments["auto_layout_threshold"] if _follows_text(arguments) else None)


def _follows_text(arguments: Mapping[str, Any]) -> bool:
    """Whether the text's attention may place a subject."""
    nothing = [None] * len(arguments["images"])
    boxes, masks = arguments["boxes"] or nothing, arguments["masks"] or nothing
    placed = all(box is not None or mask is not None for box, mask in zip(boxes, masks, strict=True))
    return bool(arguments["auto_layout"]) or not placed


def _fingerprinted(place: Path) -> str:
    inside = [place] if place.is_file() else [file for file in place.rglob("*") if file.name.endswith(_MODEL_FILES)]
    digest = hashlib.sha256()
    for file in sorted(path for path in inside if path.is_file()):
        own = _without_place(file)
        size = file.stat().st_size if own is None else len(own)
        digest.update(f"{file.relative_to(place) if place.is_dir() else ''} {size}\n".encode())
        # samples will do: reading ten gigabytes would take longer than drawing
        with file.open("rb") if own is None else io.BytesIO(own) as content:
            for number in range(_SAMPLES):
                content.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return f"{place.resolve().name}#{digest.hexdigest()[:16]}"


def _without_place(file: Path) -> bytes | None:
    """A config without the place that it was once loaded from, which saving writes into it; None: as it stands."""
    if file.suffix != ".json" or b'"_name_or_path"' not in (content := file.read_bytes()):
        return None
    try:
        record = json.loads(content)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    record.pop("_name_or_path", None)
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()  # as diffusers and transformers write it
