"""Which shards a source means: a folder, a URL of a folder, or a pattern of shards; and what build.json says of them.

Everything here is decided from names, sizes and build.json: no shard is opened.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.pairs_format import BUILD_SCHEMA, MOST_BUILD_BYTES, SAMPLE_BYTES
from msdiffusion.errors import DataError, RequestError, shown
from msdiffusion.training.pairs.data_files import (
    DataFile,
    attempt,
    described,
    filesystem,
    is_remote,
    joined,
    listed,
    local_path,
    parent_of,
    read_bytes,
)

HOW_TO_MAKE_PAIRS = (
    "Give one with --data.init_args.pairs, or make it of captioned videos, for instance of these:\n"
    "  python -m data_pipeline.world --out data/world/clips --count 3000 && "
    "python -m data_pipeline.build --videos data/world/clips --out {directory}"
)
MOST_SHARDS = 1_000_000
"""A brace pattern that means more is a slip of the pen."""


@dataclass(frozen=True)
class Shard:
    """One tar file of a dataset."""

    name: str
    """Unique in the dataset: its file name, or where shards lie in several folders its path below their common one."""
    place: str
    """Path or URL."""
    sha256: str | None = None
    """From build.json."""
    bytes: int | None = None
    """From build.json, or else from the disk or the server."""
    samples: int | None = None
    """From build.json, or else counted by whoever walked the shard."""
    stamp: str = ""
    """See ``DataFile``."""

    @property
    def file(self) -> DataFile:
        """The same as the cache knows it."""
        return DataFile(self.place, self.bytes, self.sha256, self.stamp)


@dataclass(frozen=True)
class Damage:
    """A shard or a pair that cannot be used."""

    shard: str
    """Name of the shard."""
    key: str | None
    """Of the pair; None: the whole shard."""
    reason: str
    """What is wrong, with the place of the shard."""
    pairs: int | None
    """How many pairs are lost with it; None where nobody knows."""


@dataclass(frozen=True)
class Source:
    """The shards that a source means."""

    shards: tuple[Shard, ...]
    """In the order of build.json, else of the pattern, else of the names; without those that are damaged."""
    damaged: tuple[Damage, ...]
    """Shards that are missing or of another size than build.json says."""
    index: DataFile | None
    """The dataset's index.parquet, where a build.json vouches for it."""
    folder: str | None
    """The folder or URL that holds all shards, where it is one."""
    listed: dict[str, int] | None = None
    """Name -> samples of every shard in build.json, of which a pattern may want only some; None without build.json."""


def locate(source: str) -> Source:
    """Find the shards of a source.

    Args:
        source: a folder; the URL of a folder; or a path or URL of shards, in which ``{000000..000012}`` and ``{a,b}``
            are written out and ``*``, ``[...]`` and, in a path, ``?`` match what there is.

    Raises:
        RequestError: if a pattern cannot be read, or the protocol of a URL is unknown here.
        DataError: if there is no such folder or no shard (the message says which commands make some), if the dataset
            was never finished, or if its build.json is damaged or of another schema, or does not know a shard.
    """
    source = str(source)
    if is_pattern(source):
        shards = _matching(source)
        folder = parent_of(shards[0].place)
        if any(parent_of(shard.place) != folder for shard in shards):
            return _source(_with_names(shards), None, None, None)
        build = _read_build(folder)
        return _source(_with_names(shards), build, folder, None)
    check_there(source)
    folder = source if is_remote(source) else local_path(source)
    build = _read_build(folder)
    if build is None and _is_unfinished(folder):
        raise DataError(
            f"{folder} has no build.json but a .mining folder: mining was interrupted, or is still at work. Run the "
            "same mining command again to finish it"
        )
    there = _listing(folder, needed=build is None)
    if build is None and not there:
        raise DataError(
            f"no pairs dataset: {folder} holds no .tar shard. " + HOW_TO_MAKE_PAIRS.format(directory=folder)
        )
    return _source(None, build, folder, there)


def check_there(source: str) -> None:
    """Say at once that a folder of this machine is not there; patterns and addresses pass.

    Raises:
        DataError: tells how one is made.
    """
    if is_pattern(source) or is_remote(source) or Path(folder := local_path(source)).is_dir():
        return
    raise DataError(f"no pairs dataset: {folder} does not exist. " + HOW_TO_MAKE_PAIRS.format(directory=folder))


def is_pattern(source: str) -> bool:
    """Whether a source names shards, and not the folder that holds them."""
    if Path(local_path(source)).is_dir():
        return False
    return "{" in source or _is_glob(source) or re.search(r"\.tar($|[?#])", source) is not None


def _is_glob(source: str) -> bool:
    """Whether it matches what there is. In a URL ? begins a query, and a host may be an address in brackets."""
    signs = r"[*\[]" if is_remote(source) else r"[*?\[]"
    return re.search(signs, re.sub(r"^[^/]*://[^/]*", "", source)) is not None


def expand_braces(pattern: str) -> list[str]:
    """Write out ``{000000..000012}`` (both ends included, leading zeros kept) and ``{a,b}``, the last brace quickest.

    Raises:
        RequestError: for a brace without its partner, braces inside braces, a range backwards, or far too many names.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            if "{" in part or "}" in part:
                raise RequestError(f"{pattern}: braces must come in pairs, and not inside each other")
            choices.append([part])
            continue
        ends = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", part)
        if ends is None:
            choices.append(part.split(","))
            continue
        first, last = int(ends[1]), int(ends[2])
        if last < first or last - first >= MOST_SHARDS:
            raise RequestError(f"{pattern}: {{{part}}} must count upwards, over fewer than {MOST_SHARDS:,} numbers")
        width = max(map(len, ends.groups())) if any(len(e) > 1 and e[0] == "0" for e in ends.groups()) else 0
        choices.append([str(n).zfill(width) for n in range(first, last + 1)])
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > MOST_SHARDS:
        raise RequestError(f"{pattern} means {total:,} files, more than {MOST_SHARDS:,}")
    return ["".join(words) for words in itertools.product(*choices)]


def _matching(pattern: str) -> list[DataFile]:
    files: list[DataFile] = []
    for one in expand_braces(pattern):
        if not _is_glob(one):
            files.append(DataFile(one if is_remote(one) else local_path(one)))
        elif is_remote(one):
            system, path = filesystem(one)
            found = attempt(one, lambda system=system, path=path: system.glob(path))
            files += [DataFile(system.unstrip_protocol(name)) for name in sorted(found)]
        else:
            files += [DataFile(path) for path in sorted(glob.glob(local_path(one)))]  # noqa: PTH207 - absolute patterns too
    if not files:
        raise DataError(f"no pairs dataset: nothing matches {pattern}")
    return files


def _with_names(files: Sequence[DataFile]) -> dict[str, DataFile]:
    """Name in the dataset -> file."""
    seen: set[str] = set()
    for file in files:
        if file.place in seen:
            raise DataError(f"{file.place} is named twice by the pattern; every shard must be named once")
        seen.add(file.place)
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        places = [file.place.split("/") for file in files]
        common = next(n for n, parts in enumerate(zip(*places, strict=False)) if len(set(parts)) > 1)
        names = ["/".join(parts[common:]) for parts in places]
    return dict(zip(names, files, strict=True))


def _listing(folder: str, needed: bool) -> dict[str, DataFile] | None:
    """Name -> file of the shards in a folder; None where it cannot be listed and need not be."""
    try:
        return {file.name: file for file in listed(folder)}
    except FileNotFoundError as error:
        if not needed:
            return None
        raise DataError(
            f"no pairs dataset: {folder} does not exist, or its server does not list it and there is no build.json. "
            f"Name the shards ({joined(folder, 'pairs-{000000..000012}.tar')}), or put the dataset's build.json and "
            "index.parquet beside them. " + HOW_TO_MAKE_PAIRS.format(directory="DIRECTORY")
        ) from error


def _is_unfinished(folder: str) -> bool:
    journal = joined(folder, ".mining")
    if not is_remote(folder):
        return Path(journal).is_dir()
    system, path = filesystem(journal)
    try:
        return bool(system.exists(path))
    except Exception:  # a server that refuses to answer has no journal to show
        return False


def _read_build(folder: str) -> dict[str, Any] | None:
    """build.json of a folder, checked; None where there is none."""
    place = joined(folder, "build.json")
    try:
        encoded = read_bytes(place, MOST_BUILD_BYTES)
    except FileNotFoundError:
        return None
    try:
        content = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no json ({error}): build or copy the dataset again") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != BUILD_SCHEMA:
        raise DataError(
            f"{place} has schema {shown(schema)}, but this version reads {BUILD_SCHEMA!r}; "
            "build the dataset again with this version's data_pipeline.build"
        )
    shards = content.get("shards")
    if not isinstance(shards, list) or not all(map(_is_entry, shards)):
        raise DataError(f"{place} does not list the shards with name, samples, bytes and sha256; copy it again")
    if not shards:
        raise DataError(
            f"{folder} is a finished dataset without any pair: every video was rejected, see rejected.jsonl"
        )
    return content


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(name), str) for name in ("name", "sha256"))
        and all(type(entry.get(name)) is int for name in ("samples", "bytes"))
        and 0 <= entry["samples"] * SAMPLE_BYTES <= entry["bytes"] < 1 << 63
        and Path(entry["name"]).name == entry["name"]
    )


def _source(
    asked: dict[str, DataFile] | None,
    build: dict[str, Any] | None,
    folder: str | None,
    there: dict[str, DataFile] | None,
) -> Source:
    """Put together what was asked for, what build.json lists, and what is there.

    Args:
        asked: name -> file of a pattern; None: the whole folder.
        build: of the folder, or None.
        folder: that holds all shards, or None.
        there: name -> file of what the folder holds; None where only asking for each file can tell.
    """
    entries = {} if build is None else {entry["name"]: entry for entry in build["shards"]}
    names = list(asked or entries or there or ())
    for name in (*names, *(there or ())):
        if entries and name not in entries:
            raise DataError(
                f"{name} is not listed in {joined(folder, 'build.json')}: it belongs to another dataset. Move it away, "
                "or build the dataset again"
            )
    shards, damaged = [], []
    for name in names:
        entry = entries.get(name)
        place = asked[name].place if asked is not None else joined(folder, name)
        try:
            found = there.get(name) if there is not None else _found(place, known=entry is not None)
            if found is not None and entry is None and found.bytes is None:
                found = described(place)  # a web server lists names only
        except FileNotFoundError:
            found = None
        samples = entry["samples"] if entry is not None else None
        if found is None:
            damaged.append(Damage(name, None, f"{place} does not exist or cannot be reached", samples))
        elif entry is not None and found.bytes not in (None, entry["bytes"]):
            why = f"{place} has {found.bytes} bytes, and build.json says {entry['bytes']}: copy it again"
            damaged.append(Damage(name, None, why, samples))
        elif entry is not None:
            shards.append(Shard(name, place, entry["sha256"], entry["bytes"], samples))
        else:
            shards.append(Shard(name, place, bytes=found.bytes, stamp=found.stamp))
    if build is None:
        return Source(tuple(shards), tuple(damaged), None, folder)
    samples_of = {name: entry["samples"] for name, entry in entries.items()}
    return Source(tuple(shards), tuple(damaged), DataFile(joined(folder, "index.parquet")), folder, samples_of)


def _found(place: str, known: bool) -> DataFile:
    """A file that nobody listed. A remote one that build.json knows is not asked for: fetching it will tell."""
    return DataFile(place) if known and is_remote(place) else described(place)
