"""Looks through a dataset for damage, and remembers what it found.

Training that leaves out damaged pairs must leave out the same ones in every process and after every restart. So damage
is looked for ahead, never skipped on the way: what a look through the dataset found can be kept in ``damaged.json``
beside it, and training with ``skip_damaged`` then believes that list.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipeline.pairs_format import MOST_BUILD_BYTES
from msdiffusion.errors import DataError, RequestError, shown
from msdiffusion.files import file_sha256
from msdiffusion.training.pairs.columns import PATIENCE_SECONDS, from_index, open_shard
from msdiffusion.training.pairs.data_files import is_remote, joined, local_path, read_bytes
from msdiffusion.training.pairs.remote import ShardCache
from msdiffusion.training.pairs.shards import OpenShard, read_pair, read_record
from msdiffusion.training.pairs.sources import Damage, Shard, Source, locate
from msdiffusion.training.pairs.tar_index import KeyColumn

DAMAGE_SCHEMA = "msdiffusion.damaged/1"
FILE_NAME = "damaged.json"


@dataclass(frozen=True)
class Verification:
    """What a look through a dataset found."""

    source: str
    """As it was given."""
    folder: str | None
    """That holds all shards, where it is one."""
    shards: dict[str, int | None]
    """Name -> bytes of every shard that was looked at; None for one that is missing."""
    states: dict[str, str]
    """Name -> what changes with the content of each shard that is there: the time of change of a local one, the sha256
    of build.json or else the server's stamp of a remote one."""
    pairs: int
    """That can be used."""
    damaged: tuple[Damage, ...]
    """In the order of the shards."""
    deep: bool
    """Whether pictures were decoded."""


def verify(
    source: str, *, deep: bool = False, cache: ShardCache | None = None, progress: bool = True, workers: int = 1
) -> Verification:
    """Look through every shard of a dataset.

    Of each shard: is it there, has it the size and the number of samples of build.json and the keys of index.parquet,
    is it a complete tar file; a remote one is fetched and its sha256 compared. Of each pair: has it its members, can
    its json be read and does it follow the schema.

    Args:
        deep: also decode every picture and mask, and compare the sha256 of local shards. Takes about as long as an
            epoch of loading.
        cache: where remote shards are kept; the default one if None.
        workers: processes; they share the cache.

    Raises:
        RequestError: if the source cannot be understood, or ``workers`` is below 1.
        DataError: if there is no dataset, it was never finished, or build.json or index.parquet is damaged.
    """
    if workers < 1:
        raise RequestError(f"workers must be at least 1, got {workers}")
    found = locate(str(source))
    cache = cache or ShardCache()
    states = _states(found)  # before anything is read: a shard that changes meanwhile is then noticed
    jobs = list(_jobs(found, cache, deep))
    damaged = list(found.damaged)
    pairs = 0
    with _mapping(workers) as run:
        results = run(_examine, jobs)
        for count, damages in tqdm(
            results, total=len(jobs), desc="looking for damage", unit="shard", delay=PATIENCE_SECONDS,
            disable=not progress,
        ):  # fmt: skip
            pairs += count
            damaged += damages
    shards: dict[str, int | None] = {damage.shard: None for damage in found.damaged}
    shards |= {shard.name: shard.bytes for shard in found.shards}
    return Verification(str(source), found.folder, shards, states, pairs, tuple(damaged), deep)


def _states(source: Source) -> dict[str, str]:
    states = {}
    for shard in source.shards:
        if shard.file.is_remote:
            states[shard.name] = shard.sha256 or shard.stamp
            continue
        try:
            states[shard.name] = f"changed {Path(local_path(shard.place)).stat().st_mtime_ns}"
        except OSError:  # removed since it was found, or a disk that fails: whoever reads it says so
            states[shard.name] = "unknown"
    return states


def known_damage(source: Source, cache: ShardCache | None) -> tuple[Damage, ...] | None:
    """The damage that an earlier look through the dataset has written down; None where nothing is written.

    Raises:
        DataError: if the list is damaged, or was made before the shards changed.
    """
    if source.folder is None:
        return None
    path = _place_of_list(source.folder, cache)
    try:
        content = json.loads(read_bytes(str(path), MOST_BUILD_BYTES))
    except FileNotFoundError:
        return None
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}): remove it, or look for damage again") from error
    if not isinstance(content, dict) or content.get("schema") != DAMAGE_SCHEMA:
        schema = content.get("schema") if isinstance(content, dict) else None
        raise DataError(f"{path} has schema {shown(schema)}, but this version reads {DAMAGE_SCHEMA!r}: remove it")
    seen, states, damages = (content.get(name) for name in ("shards", "states", "damaged"))
    complete = isinstance(seen, dict) and isinstance(states, dict) and isinstance(damages, list)
    if not complete or not all(map(_is_damage, damages)):
        raise DataError(f"{path} is not complete: remove it, or look for damage again")
    now: dict[str, int | None] = {shard.name: shard.bytes for shard in source.shards}
    now |= {damage.shard: None for damage in source.damaged}
    states_now = _states(source)
    changed = [
        name
        for name, size in now.items()
        if name not in seen or seen[name] != size or states.get(name) != states_now.get(name)
    ]
    if changed:
        raise DataError(
            f"{path} was written before {changed[0]} became what it is now ({len(changed)} shards differ); look for "
            "damage again (python -m msdiffusion.training.catalogue DATASET --deep --write), or remove that file"
        )
    return tuple(Damage(**damage) for damage in damages if damage["shard"] in now)


def _is_damage(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in fields(Damage)}:
        return False
    texts = isinstance(entry["shard"], str) and isinstance(entry["reason"], str)
    return texts and isinstance(entry["key"], str | None) and isinstance(entry["pairs"], int | None)


def write_damage(found: Verification, cache: ShardCache | None) -> Path:
    """Keep what was found where ``known_damage`` looks for it: beside local shards, in the cache for remote ones.

    Raises:
        RequestError: if the shards lie in several folders.
        DataError: if the file cannot be written.
    """
    if found.folder is None:
        raise RequestError(f"{found.source} names shards in several folders; write a list for each folder")
    path = _place_of_list(found.folder, cache)
    content = {
        "schema": DAMAGE_SCHEMA,
        "source": found.source,
        "deep": found.deep,
        "shards": found.shards,
        "states": found.states,
        "damaged": [asdict(damage) for damage in found.damaged],
    }
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error
    return path


def _place_of_list(folder: str, cache: ShardCache | None) -> Path:
    if not is_remote(folder):
        return Path(joined(folder, FILE_NAME))
    digest = hashlib.sha256(folder.encode()).hexdigest()[:24]
    return (cache or ShardCache()).folder / f".{digest}-{FILE_NAME}"


@dataclass(frozen=True)
class _Job:
    shard: Shard
    cache: ShardCache | None
    deep: bool
    keys: KeyColumn | None
    """Of index.parquet for this shard."""


def _jobs(source: Source, cache: ShardCache | None, deep: bool) -> Iterator[_Job]:
    columns = from_index(source, cache)
    for number, shard in enumerate(source.shards):
        keys = None
        if columns is not None:
            first, end = np.searchsorted(columns.shard, [number, number + 1])
            keys = columns.keys.take(np.arange(first, end))
        yield _Job(shard, cache, deep, keys)


@contextmanager
def _mapping(workers: int) -> Iterator[Callable]:
    if workers == 1:
        yield map
        return
    # started afresh: a fork of a process that has threads (fsspec's, tqdm's) may hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool.map


def _examine(job: _Job) -> tuple[int, list[Damage]]:
    """(pairs that can be used, damage) of one shard."""
    shard = job.shard
    try:
        opened = open_shard(shard, job.cache)
    except DataError as error:
        return 0, [Damage(shard.name, None, str(error), shard.samples)]
    with opened:
        if why := _wrong_as_a_whole(job, opened):
            return 0, [Damage(shard.name, None, f"{shard.place} {why}", len(opened))]
        reasons = {place: f"{shard.place}: pair {opened.table.keys[place]!r} {what}"
                   for place, what in opened.table.incomplete()}  # fmt: skip
        for place in range(len(opened)):
            if place not in reasons and (why := _wrong_with(opened, place, job.deep)):
                reasons[place] = why
        damages = [Damage(shard.name, opened.table.keys[place], reasons[place], 1) for place in sorted(reasons)]
        return len(opened) - len(damages), damages


def _wrong_as_a_whole(job: _Job, opened: OpenShard) -> str | None:
    if job.keys is not None:
        held = opened.table.keys
        if not (np.array_equal(held.ends, job.keys.ends) and np.array_equal(held.content, job.keys.content)):
            return "holds other keys than index.parquet says: copy both again"
    # a remote shard was hashed when it was fetched
    if job.deep and job.shard.sha256 is not None and not job.shard.file.is_remote:
        found = file_sha256(local_path(job.shard.place))
        if found != job.shard.sha256:
            return f"has sha256 {found[:12]}..., and build.json says {job.shard.sha256[:12]}...: copy it again"
    return None


def _wrong_with(opened: OpenShard, place: int, deep: bool) -> str | None:
    """What is wrong with a pair that has its members, or None."""
    location = opened.location(place)
    try:
        record = read_record(location)
        if deep:
            read_pair(location)
            if all("target_mask_rle" in subject for subject in record["subjects"]):
                read_pair(location, "target")
    except DataError as error:
        return str(error)
    return None
