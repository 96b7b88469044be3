"""Pictures of many requests into one folder: planned, compared with what is there, drawn in batches, written at once.

Pictures are drawn in the same batches however often a run is killed, so that a rerun gives the same files: a picture's
last bits depend on how many are drawn beside it. Its place in the batch stands in its record.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdiffusion.backbone.configs import calls_per_step
from msdiffusion.errors import RequestError
from msdiffusion.figures import draw_layout
from msdiffusion.files import file_sha256
from msdiffusion.generation.drawing import grouped
from msdiffusion.generation.identity import Identity, made_with
from msdiffusion.generation.safety import FLAGGED
from msdiffusion.request.provenance import SCHEMA, read_record, request_record, same_request, save_at_once, save_png
from msdiffusion.request.request import DEFAULTS, FALLBACKS, check_auto_layout_start, check_size
from msdiffusion.request.request_file import ARGUMENTS, Embedded, Entry, open_request, picture_names

if TYPE_CHECKING:
    from msdiffusion.adapter.loading import Sources
    from msdiffusion.generation.generate import MSDiffusion
    from msdiffusion.request.request import GenerationRequest
    from msdiffusion.request.subjects import Subjects


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

    Raises:
        RequestError: some are there but of another request, and may not be taken for missing (``overwrite``).
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
    return grouped(pictures, lambda picture: _kind(picture.arguments), size)


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
            index: int, result: Any, batch: Sequence[Picture] = batch, requests: Sequence[GenerationRequest] = requests
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # drawing says it
        try:
            check_auto_layout_start(subjects, steps)
        except RequestError:  # unless the base's sampler calls the UNet more than once in a step
            check_auto_layout_start(subjects, steps * calls_per_step(sources.base_model, sources.base_config))


def _write_layout(picture: Picture, result: Any, subjects: Subjects) -> None:
    drawing = draw_layout(
        result.pictures[0],
        boxes=[subjects.boxes[view] for view in subjects.first_views],
        phrases=subjects.names,
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
