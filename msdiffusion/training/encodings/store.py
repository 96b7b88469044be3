"""Encodings made ahead, found again by the run that they fit, and by no other.

``data.init_args.encodings`` says what a run does: "auto" takes what is there and fits, and refuses what is there and
does not; "require" wants at least one part; "off" looks for nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.utilities import rank_zero_info

from msdiffusion.errors import DataError
from msdiffusion.training.catalogue import Catalogue
from msdiffusion.training.encodings.files import PartFile, file_name, is_of
from msdiffusion.training.encodings.keys import PartKey
from msdiffusion.training.pairs.data_files import local_path
from msdiffusion.training.pairs.sources import Shard
from msdiffusion.training.samples.encoded import PARTS, EncodedSample, Part

FOLDER = "encodings"
"""Beside the shards."""
MANIFEST = "manifest.json"
OPEN_FILES = 96
"""Of one process; a file that is open is mapped, not read."""
EXACTNESS = ("float32", "bfloat16", "float16")
"""Number types of the files; where a part is there in several, the first of these is taken."""
ADVICE = "or train without them: --data.init_args.encodings off"


class ShardEncodings:
    """The encodings of the pairs of one catalogue: an ``EncodingStore``.

    Files are opened when they are needed, in every process for itself.
    """

    def __init__(self, folders: dict[Part, Path], catalogue: Catalogue) -> None:
        self.folders = folders
        self._names = [file_name(shard) for shard in catalogue.shards]
        self._shard, self._place = catalogue.shard, catalogue.place
        self._files: OrderedDict[tuple[Part, int], PartFile] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    @property
    def parts(self) -> frozenset[Part]:
        """What it holds."""
        return frozenset(self.folders)

    def read(self, index: int) -> EncodedSample:
        """The encodings of pair ``index`` of the catalogue.

        Raises:
            DataError: if a file was removed or changed since the store was opened.
            IndexError: if the catalogue has no such pair.
        """
        if not 0 <= index < len(self._shard):
            raise IndexError(f"there are encodings of {len(self._shard)} pairs, so none of number {index}")
        fields: dict[str, Any] = dict.fromkeys(EncodedSample.__dataclass_fields__)
        for part in self.folders:
            fields |= self._opened(part, int(self._shard[index])).read(int(self._place[index]))
        return EncodedSample(**fields)

    def _opened(self, part: Part, shard: int) -> PartFile:
        key = (part, shard)
        if key not in self._files:
            self._files[key] = PartFile(self.folders[part] / self._names[shard])
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(key)
        return self._files[key]


def encodings_root(catalogue: Catalogue, out: str | Path | None = None) -> Path | None:
    """Where the encodings of a catalogue lie.

    Args:
        catalogue: of one source.
        out: a folder for the encodings of all sources; None: beside the shards.

    Returns:
        A folder that need not exist; None for shards that are not on this machine where ``out`` is None.
    """
    shard = catalogue.shards[0]
    root = local_path(shard.place).removesuffix(shard.name)
    if out is None:
        return None if shard.file.is_remote else Path(root, FOLDER)
    place = root if shard.file.is_remote else str(Path(root).resolve())
    label = Path(place.split("://")[-1].rstrip("/")).name or "pairs"
    return Path(out, f"{label}-{hashlib.sha256(place.encode()).hexdigest()[:8]}")


def content_of(shard: Shard) -> Path | None:
    """The file of a shard, where it is on this machine; one from elsewhere was compared when it was fetched."""
    return None if shard.file.is_remote else Path(local_path(shard.place))


def found_folders(root: Path, part: Part) -> dict[Path, dict[str, Any]]:
    """The folders of a part that have a manifest, with it.

    Raises:
        DataError: if a manifest cannot be read.
    """
    found = {}
    for path in sorted(root.glob(f"{part}-*/{MANIFEST}")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} cannot be read ({error}); remove {path.parent}, {ADVICE}") from error
        if not isinstance(manifest, dict):
            raise DataError(f"{path} is no manifest of encodings; remove {path.parent}, {ADVICE}")
        found[path.parent] = manifest
    return found


def open_store(
    catalogue: Catalogue,
    never: Mapping[Part, str],
    make_keys: Callable[[], Mapping[Part, PartKey]],
    out: str | None = None,
    required: bool = False,
) -> ShardEncodings | None:
    """The encodings of a catalogue that fit a run; None where there are none.

    Args:
        never: parts that are not taken, and why; see ``changing``.
        make_keys: what fits. Asked where something is there only: it takes seconds for large networks.
        required: at least one part must be there.

    Raises:
        DataError: if there are encodings of a part that do not fit, or not of all pairs: the message says what differs
            and which command makes them anew; or if some are required and there are none that the run can use.
    """
    root, source = encodings_root(catalogue, out), _source_of(catalogue)
    folders: dict[Part, Path] = {}
    keys: Mapping[Part, PartKey] = {}
    for part in PARTS:
        there = {} if root is None else found_folders(root, part)
        if not there:
            continue
        if part in never:
            rank_zero_info(f"encodings of {source}: the {part} made ahead are not used, because {never[part]}")
            continue
        keys = keys or make_keys()
        folders[part] = _fitting(keys[part], there, catalogue, source)
    if folders:
        told = ", ".join(f"{part} ({folder.name})" for part, folder in folders.items())
        rank_zero_info(f"encodings of {source} made ahead: {told}, in {root}")
        return ShardEncodings(folders, catalogue)
    if required:
        possible = [part for part in PARTS if part not in never]
        where = "they need data.init_args.encodings_folder for remote shards" if root is None else f"they lie in {root}"
        because = f", and {'; '.join(never.values())}" if never else ""
        raise DataError(
            f"encodings: require, but none of {source} can be used ({where}{because}). {_command(possible, source)}, "
            f"{ADVICE}"
        )
    return None


def _fitting(key: PartKey, there: Mapping[Path, dict[str, Any]], catalogue: Catalogue, source: str) -> Path:
    """The folder of a part that fits and is complete.

    Raises:
        DataError: none does.
    """
    differences = {folder: key.differences(manifest) for folder, manifest in there.items()}
    fitting = [folder for folder, differing in differences.items() if not differing]
    if not fitting:
        nearest = min(there, key=lambda folder: len(differences[folder]))
        raise DataError(
            f"the {key.part} of {source} that were made ahead are stale: in {nearest}, "
            f"{'; '.join(differences[nearest])}. {_command([key.part], source)}, remove the folder, {ADVICE}"
        )
    exact = {name: place for place, name in enumerate(EXACTNESS)}
    fitting.sort(key=lambda folder: exact.get(there[folder].get("dtype"), len(exact)))
    reasons = {folder: incomplete(folder, catalogue) for folder in fitting}
    for folder, why in reasons.items():
        if why is None:
            return folder
    first, dtype = fitting[0], there[fitting[0]].get("dtype")
    raise DataError(
        f"the {key.part} of {source} that were made ahead do not fit its pairs: in {first}, {reasons[first]}. "
        f"{_command([key.part], source)} --dtype {dtype} (what fits is kept), remove the folder, {ADVICE}"
    )


def incomplete(folder: Path, catalogue: Catalogue) -> str | None:
    """Why a folder does not hold the encodings of all pairs of a catalogue; None where it does."""
    ends = np.cumsum(catalogue.shard_sizes)
    problems: list[str] = []
    for number, shard in enumerate(catalogue.shards):
        needed = catalogue.place[ends[number] - catalogue.shard_sizes[number] : ends[number]]
        if why := unusable(folder / file_name(shard), shard, needed):
            problems.append(why)
    if not problems:
        return None
    more = f" ({len(problems)} of {len(catalogue.shards)} shards have such a problem)" if len(problems) > 1 else ""
    return problems[0] + more


def unusable(path: Path, shard: Shard, places: np.ndarray) -> str | None:
    """Why a file does not hold the encodings of these pairs of a shard as it is now; None where it does."""
    if not path.is_file():
        return f"shard {shard.name} was not encoded"
    try:
        file = PartFile(path)
    except DataError as error:
        return str(error)
    if not is_of(file.stamp, shard, content_of(shard)):
        return f"shard {shard.name} was changed since"
    if lost := int((~np.isin(places, file.places)).sum()):
        return f"{lost} pairs of shard {shard.name} were not encoded"
    return None


def _source_of(catalogue: Catalogue) -> str:
    shard = catalogue.shards[0]
    return shard.place.removesuffix(shard.name).rstrip("/") or "."


def _command(parts: Sequence[Part], source: str) -> str:
    return (
        "Make them with the run's own config and settings: python -m msdiffusion.training.precompute -c CONFIG "
        f"--pairs {source} --parts {','.join(parts)}"
    )
