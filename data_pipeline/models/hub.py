"""Models of the Hugging Face hub: their sizes are told, and they are downloaded once, before any worker starts. Workers
find them in the cache of huggingface_hub and don't ask the network.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import InputError, MissingModelError
from data_pipeline.models.model_files import (
    TEXT_AND_IMAGE_MODEL,
    Needed,
    check_model_directory,
    choose_files,
    fits,
    is_hub_id,
    list_files,
    missing_parts,
)

TRANSFORMERS_FILES = ("*.json", "*.txt", "*.safetensors")


@dataclass(frozen=True)
class HubModel:
    """A model of the hub.

    needed: without these files it is not there. besides: patterns of what else belongs to it. title: what people call
    it. megabytes: of the download, for messages where the hub cannot be asked.
    """

    hub_id: str
    needed: Needed
    besides: tuple[str, ...] = ()
    title: str = ""
    megabytes: int | None = None

    def told(self, megabytes: float | None = None) -> str:
        """For messages: "MobileSAM (dhkim2810/MobileSAM, 41 MB)". megabytes: what the hub says."""
        size = self.megabytes if megabytes is None else megabytes
        known = [] if size is None else [f"{size:.0f} MB" if size < 1000 else f"{size / 1000:.1f} GB"]
        if not self.title:
            return ", ".join([self.hub_id, *known])
        return f"{self.title} ({', '.join([self.hub_id, *known])})"

    @property
    def command(self) -> str:
        """What downloads it on a machine with a network."""
        included = self.besides or tuple(patterns[0] for patterns in self.needed.values())
        return " ".join(["hf download", self.hub_id, *(f"--include '{pattern}'" for pattern in included)])


GROUNDING_DINO = HubModel(
    "IDEA-Research/grounding-dino-tiny", TEXT_AND_IMAGE_MODEL, TRANSFORMERS_FILES, "Grounding DINO", 690
)
# The smaller one has its weights as a pickle only.
BLIP = HubModel("Salesforce/blip-image-captioning-large", TEXT_AND_IMAGE_MODEL, TRANSFORMERS_FILES, "BLIP", 1880)
# By the names that --segmenter-model knows.
SEGMENTERS = {
    "vit_t": HubModel("dhkim2810/MobileSAM", {"weights": ("mobile_sam.pt",)}, title="MobileSAM", megabytes=41),
    **{
        name: HubModel(
            "ybelkada/segment-anything", {"weights": (f"checkpoints/{file}",)}, title=f"SAM {name}", megabytes=megabytes
        )
        for name, file, megabytes in (
            ("vit_b", "sam_vit_b_01ec64.pth", 375),
            ("vit_l", "sam_vit_l_0b3195.pth", 1250),
            ("vit_h", "sam_vit_h_4b8939.pth", 2565),
        )
    },
}


def transformers_model(hub_id: str, needed: Needed = TEXT_AND_IMAGE_MODEL) -> HubModel:
    """A repository in the layout of transformers, known here or not."""
    known = {model.hub_id: model for model in (GROUNDING_DINO, BLIP)}
    return known.get(hub_id) or HubModel(hub_id, needed, TRANSFORMERS_FILES)


def in_cache(model: HubModel) -> Path | None:
    """The folder of a model that has been downloaded, or its file if it has but one; None if a file that it needs is
    not there. InputError if it is no name of the hub, or if the cache is forbidden.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(model.hub_id)
    except HFValidationError as error:
        raise InputError(f"{model.hub_id!r} is no directory here, and cannot be on the hub: {error}") from error
    # Not snapshot_download: that misses a repository of which other files were left out.
    repository = _repository(model)
    try:
        folder = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        files = choose_files(model.hub_id, "", model.needed, list_files(folder))
    except PermissionError as error:
        raise InputError(f"the models in {repository} cannot be read: no permission ({error.filename})") from error
    except (OSError, ValueError):  # nothing there, or not all, or a reference that is none
        return None
    if missing_parts(folder):
        return None
    return folder / files.popitem()[1] if len(files) == 1 and not model.besides else folder


def missing(models: Iterable[HubModel]) -> list[HubModel]:
    """Those that are not on this machine, each once."""
    found: list[HubModel] = []
    for model in models:
        if model not in found and in_cache(model) is None:
            found.append(model)
    return found


def fetch(models: Iterable[HubModel], say: Callable[[str], None] = lambda line: None, *, quiet: bool = False) -> None:
    """Downloads what is not on this machine yet. say: takes a line on each before it begins. quiet: without bars.

    InputError if a repository has not what is needed, or the disk no room for it; MissingModelError, which names all
    that is missing with its size and command, if the hub does not give it.
    """
    import huggingface_hub

    lacking = missing(models)
    try:
        chosen = [(model, *_on_the_hub(model)) for model in lacking]  # all, before the first download
        _check_room(chosen)
        for model, files, megabytes in chosen:
            say(f"downloading {model.told(megabytes)} to the cache of huggingface_hub")
            with _bars(shown=not quiet):
                huggingface_hub.snapshot_download(model.hub_id, allow_patterns=files)
    except InputError:
        raise
    except Exception as error:  # no network, no such repository, no permission, no space: no common parent
        raise MissingModelError(_how_to_get(lacking, error)) from error


def place_of(model: HubModel) -> Path:
    """Like ``in_cache``, of a model that is downloaded silently if need be. MissingModelError: not to be had."""
    fetch([model], quiet=True)
    place = in_cache(model)
    if place is None:
        raise MissingModelError(_how_to_get([model]))
    return place


def model_folder(name: str, needed: Needed) -> Path:
    """The folder of a model in the layout of transformers: a directory, or by a hub id, from the cache."""
    return place_of(transformers_model(name, needed)) if is_hub_id(name) else Path(name)


def find_files(name: str, option: str, needed: Needed) -> dict[str, Path]:
    """The files of a model, meaning -> path, in a directory or, by a hub id, on the hub.

    InputError where one is missing, where several fit and none is named exactly, or where the hub does not answer.
    """
    if is_hub_id(name):
        model = HubModel(name, needed)
        place = place_of(model)
        folder = place if place.is_dir() else place.parent
        listing = list_files(folder)
    else:
        check_model_directory(name, option, {})
        folder = Path(name)
        listing = sorted(path.name for path in folder.iterdir() if path.is_file())
    return {meaning: folder / file for meaning, file in choose_files(name, option, needed, listing).items()}


def _on_the_hub(model: HubModel) -> tuple[list[str], float]:
    """The files to download and their megabytes. InputError if the repository lacks one."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = huggingface_hub.HfApi().model_info(model.hub_id, files_metadata=True)
    except GatedRepoError as error:
        raise InputError(
            f"{model.told()} is given only to those who accept its terms, at {constants.ENDPOINT}/{model.hub_id}; "
            "then log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no model {model.hub_id}: look for a mistake in the name, or, if it is private, log in with: "
            "hf auth login"
        ) from error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    needed = set(choose_files(model.hub_id, "the hub", model.needed, sorted(sizes)).values())
    files = sorted(file for file in sizes if file in needed or any(fits(file, pattern) for pattern in model.besides))
    return files, sum(sizes[file] for file in files) / 1e6


def _check_room(chosen: Sequence[tuple[HubModel, Sequence[str], float]]) -> None:
    """InputError if the disk of the cache has less room than the downloads need: the library only warns."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    here = next(place for place in (cache, *cache.absolute().parents) if os.path.exists(place))  # noqa: PTH110
    free = shutil.disk_usage(here).free / 1e6
    needed = 0.0
    for model, _, megabytes in chosen:
        blobs = (_repository(model) / "blobs").glob("*")  # what an earlier download has left
        needed += max(0.0, megabytes - sum(blob.stat().st_size for blob in blobs) / 1e6)
    if needed > free:
        names = " and ".join(model.told(megabytes) for model, _, megabytes in chosen)
        raise InputError(
            f"{names} must be downloaded, and {cache} has room for {free:.0f} MB: free some, or name a folder on "
            "another disk with HF_HOME"
        )


def _repository(model: HubModel) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model.hub_id, repo_type="model")


def _how_to_get(models: Sequence[HubModel], error: Exception | None = None) -> str:
    why = "" if error is None else f", and cannot be had from the hub ({_first_line(error)})"
    names = " and ".join(model.told() for model in models)
    commands = " && ".join(model.command for model in models)
    state = "is" if len(models) == 1 else "are"
    halves = [str(place) for model in models if os.path.exists(place := _repository(model))]  # noqa: PTH110
    if halves:
        why += f"; what is in {' and '.join(halves)} is not whole, and can be deleted if it is damaged"
    return (
        f"{names} {state} not on this machine{why}; where there is a network:\n  {commands}\n"
        "(HF_HOME names the folder that they are kept in, which can be taken along)"
    )


def _first_line(error: Exception) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
