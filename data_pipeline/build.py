"""The command: ``python -m data_pipeline.build --videos DIR``. What it runs is listed in ``data_pipeline.options``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline import __version__
from data_pipeline.assemble import (
    already_made,
    assemble,
    beginning,
    file_hashes,
    finish,
    outcome,
    settings_hash,
    write_here,
)
from data_pipeline.command_line import check_pool
from data_pipeline.errors import InputError, MiningError, MissingModelError, ModelNeededError, SettingsError
from data_pipeline.extras import need_extras
from data_pipeline.file_names import annotations_beside
from data_pipeline.journal import Journal
from data_pipeline.languages import OTHER_LANGUAGE, SPACY_MODELS
from data_pipeline.options import make_parser, make_steps
from data_pipeline.outputs import check_folder
from data_pipeline.records import VideoFile
from data_pipeline.run import run
from data_pipeline.run_ray import RayOptions, check_ray, group_steps, ray_session, run_on_ray, write_on_ray
from data_pipeline.safe_text import visible
from data_pipeline.shard_reader import rejected_videos
from data_pipeline.sources import find_videos
from data_pipeline.step import Step
from data_pipeline.texts import counted

if TYPE_CHECKING:
    from data_pipeline.models.hub import HubModel


def check_inputs(arguments: argparse.Namespace, files: Sequence[VideoFile], steps: Sequence[Step]) -> None:
    """InputError if no video has what the steps need, with all that is missing in one message."""
    name, among = Path(files[0].name).stem, f"none of {counted(len(files), 'video')} has"
    lacking = []
    mute = [file.name for file in files if not file.caption] if arguments.caption == "files" else []
    if mute and len(mute) < len(files):
        table = f" in {arguments.captions} or" if arguments.captions else ""
        say([f"{len(mute)} of {len(files)} videos without a caption{table} beside them, the first one {mute[0]!r}"])
    elif mute:
        from data_pipeline.models.hub import BLIP

        lacking.append(
            f"{among} a caption.\nGive {name}.txt beside {files[0].name} (and so on), or a table with the columns "
            f"video and caption, --captions FILE; or have them written by {BLIP.told()}: --caption blip"
        )
    sidecars = (annotations_beside(file.path) for file in files)
    if arguments.detector == "annotations" and arguments.annotations is None and not any(sidecars):
        lacking.append(
            f"the detector 'annotations' reads boxes that come with the videos, but {among} any.\nGive sidecars "
            f"({name}.annotations.json ...) or --annotations FILE_OR_FOLDER, or leave --detector away: then boxes and "
            "masks are found"
        )
    if lacking:
        from data_pipeline.models.hub import missing

        needed = [model.told() for model in missing(models_of(steps))]
        later = f"\nStill to be downloaded then: {' and '.join(needed)}" if needed else ""
        raise InputError("\n".join(lacking) + later)


def models_of(steps: Sequence[Step]) -> list[HubModel]:
    """The models of the hub that the steps load."""
    return [model for step in steps for model in step.downloads().values()]


def deal_out(arguments: argparse.Namespace, files: Sequence[VideoFile], steps: list[Step]) -> str:
    """Looks which videos have annotations, and tells the steps that choose by it. Returns a sentence on those that have
    none, for the detector auto. InputError if no entry of the annotations is about any video.
    """
    if arguments.detector not in ("auto", "annotations"):
        return ""
    from data_pipeline.models.annotations import AnnotationSource

    notes: list[str] = []
    source = AnnotationSource(arguments.annotations, notes)
    say(notes + source.check_names(arguments.videos, files))
    bare = 0
    if arguments.detector == "auto":
        bare = sum(not source.knows(file.path, file.name) for file in files)
    for place, step in enumerate(steps):
        if hasattr(step, "model_needed"):
            steps[place] = replace(step, model_needed=bool(bare))
    videos = counted(len(files), "video")
    return f"{bare} of {videos} without annotations: networks find their boxes and masks" * bool(bare)


def say(notes: Sequence[str]) -> None:
    """Prints what was assumed and what was left out."""
    for note in notes:
        print(visible(f"note: {note}"), file=sys.stderr)  # noqa: T201


def build(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the pipeline and writes the dataset; returns the content of build.json."""
    cluster = check_machines(arguments)
    if not (arguments.out / "build.json").is_file():  # of a finished dataset nothing is written
        check_folder(arguments.out)
    if cluster:  # the workers may stand in another folder
        arguments.videos, arguments.out = arguments.videos.resolve(), arguments.out.resolve()
    notes: list[str] = []
    files = find_videos(arguments.videos, arguments.captions, notes)
    say(notes)
    steps = make_steps(arguments)
    bare = deal_out(arguments, files, steps)
    check_inputs(arguments, files, steps)
    settings = {step.name: step.settings() for step in steps}
    journal = Journal(arguments.out)
    journal.check(settings, file_hashes(steps) if journal.is_complete() else None, __version__)
    if journal.is_complete():
        return already_made(journal, files, "videos", "the videos, captions or annotations")
    if not cluster:  # whose machines have caches of their own
        download(steps, arguments, bare)
    say([bare] if bare else [])
    hashes = journal.start(settings, file_hashes(steps), __version__)
    pipeline = {"version": __version__, "settings_hash": settings_hash(settings, __version__)}
    steps[-1] = replace(steps[-1], pipeline=pipeline)
    content = beginning(pipeline, settings, hashes, files)
    with journal.lock():
        try:
            with ray_session(cluster, group_steps(steps)) if cluster else nullcontext():
                _run(steps, files, journal, cluster, arguments, content)
                content |= assemble(journal, files, steps[-1].pairs_per_shard, write_on_ray if cluster else write_here)
                finish(journal, files, steps, content)
        except BaseException:
            journal.forget_if_empty()
            raise
    return content


def download(steps: Sequence[Step], arguments: argparse.Namespace, why: str = "") -> None:
    """Downloads models of the hub that are not here, telling their sizes first. MissingModelError with the commands
    that bring them if they cannot be had; InputError if their device or spaCy's model is not here. why: what
    ``deal_out`` says.
    """
    from data_pipeline.models.hub import fetch, missing
    from data_pipeline.models.threads import check_device

    models = models_of(steps)
    if missing(models):
        for step in steps:  # a download is long: what else is missing is told before it
            check_device(step.model_device)
            if not step.downloads():
                replace(step).set_up()
    try:
        fetch(models, lambda line: print(visible(line), file=sys.stderr), quiet=arguments.quiet)  # noqa: T201
    except MissingModelError as error:
        if not why:
            raise
        ways = "clips of the procedural world: --detector embedded; annotated clips only: --detector annotations"
        raise MissingModelError(f"{why}.\n{error}\n({ways})") from error


def _run(
    steps: list[Step],
    files: Sequence[VideoFile],
    journal: Journal,
    cluster: RayOptions | None,
    arguments: argparse.Namespace,
    content: dict[str, Any],
) -> None:
    """Mines the clips. content: of build.json; the files of models that only turn out to be needed are added to it."""
    if cluster:
        run_on_ray(steps, files, journal, cluster, quiet=arguments.quiet)
        return
    settings = {"workers": arguments.workers, "timeout": arguments.clip_timeout, "quiet": arguments.quiet}
    while True:
        try:
            run(steps, files, journal, **settings)
            return
        except ModelNeededError as error:  # that annotated boxes lack masks is seen when they are read
            place = [step.name for step in steps].index(error.step)
            steps[place] = replace(steps[place], model_needed=True)
            download(steps, arguments)
            content["files"] = journal.start(content["settings"], file_hashes([steps[place]]), __version__)


def default_out(videos: Path) -> Path:
    """``clips/`` -> ``clips-pairs`` beside it. SettingsError for the root, which has nothing beside it."""
    folder = videos.resolve()
    if not folder.name:
        raise SettingsError(f"{videos} has no folder beside it for the dataset: give --out DIR")
    return folder.with_name(f"{folder.name}-pairs")


def check_machines(arguments: argparse.Namespace) -> RayOptions | None:
    """What to run on: None for this machine. SettingsError for a wrong number, InputError for Ray without Ray."""
    check_pool(arguments.workers, arguments.clip_timeout, "--clip-timeout")
    if arguments.ray is None:
        for name in ("model_workers", "gpu_share", "batch_clips"):
            if getattr(arguments, name) != 1:
                raise SettingsError(
                    f"--{name.replace('_', '-')} is for a run on Ray: give --ray local or --ray ADDRESS"
                )
        return None
    if arguments.device not in ("cpu", "cuda"):
        raise SettingsError(f"on Ray --device is cpu or cuda: Ray deals the GPUs out itself; got {arguments.device!r}")
    widths = {name: getattr(arguments, name) for name in ("workers", "model_workers", "gpu_share", "batch_clips")}
    options = RayOptions(address=arguments.ray, timeout=arguments.clip_timeout, **widths)
    check_ray(options)
    return options


def language_note(out: Path) -> str:
    """One line about the clips of a dataset that were rejected for the language of their captions; "" if none was."""
    rejected = (entry for entry in rejected_videos(out) if entry["reason"].startswith(OTHER_LANGUAGE))
    found = [(entry["reason"].removeprefix(OTHER_LANGUAGE), entry["evidence"]["language"]) for entry in rejected]
    if not found:
        return ""
    counts = Counter(language for _, language in found).most_common()
    listed = ", ".join(f"{count} {language}" for language, count in counts)
    models = [SPACY_MODELS[language] for language, _ in counts if language in SPACY_MODELS]
    note = f"note: rejected, as they do not look {found[0][0]}: {counted(len(found), 'caption')} ({listed})"
    if models:
        note += (
            ". Clips of one language, in a folder of their own, can be mined with a spaCy model for it: "
            + "; ".join(f"`python -m spacy download {model}`, --language-model {model}" for model in models)
        )
    return note


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 a dataset was written, 1 no pair was left, 2 wrong input."""
    arguments = make_parser().parse_args(argv)
    try:
        need_extras("mining")
        arguments.out = arguments.out or default_out(arguments.videos)
        content = build(arguments)
    except MiningError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)  # noqa: T201
        return 130
    print("\n".join(outcome(content, arguments.out, "video")))  # noqa: T201
    if note := language_note(arguments.out):
        print(visible(note), file=sys.stderr)  # noqa: T201
    if content["counts"]["samples"] == 0:
        print("error: no pair was left; the reasons are above and in rejected.jsonl", file=sys.stderr)  # noqa: T201
        if arguments.detector == "embedded":
            known = "the embedded detector knows the ten categories of the procedural world, and no photograph"
            print(f"note: {known}; other detectors: docs/mining.md", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
