"""How long a training process takes to know a dataset of any size, and how much memory that keeps.

    python benchmarks/training_catalogue.py --pairs 3600000

Writes a dataset of empty shards (sparse files: they take no room) with a real build.json and a real index.parquet into
a temporary folder, and reads its catalogue in a new process. The second part walks the headers of one shard of real
members, as it is done when a shard is opened, or for a whole dataset that has no index.

Seconds are CPU seconds, which change less than the wall clock's when other work runs on the machine. Memory is what the
process holds more than before, and the most it ever held.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

PER_SHARD = 1000
SHARD_BYTES = 300_000_000
SUFFIXES = ("target.jpg", "reference_0.png", "reference_1.png", "json")


def write_dataset(folder: Path, shards: int) -> None:
    """build.json, index.parquet, and sparse files in place of the shards."""
    import pyarrow
    import pyarrow.parquet

    entries = []
    schema = pyarrow.schema(
        {"key": pyarrow.string(), "shard": pyarrow.string(), "caption": pyarrow.string(), "width": pyarrow.int32(),
         "height": pyarrow.int32()}
    )  # fmt: skip
    with pyarrow.parquet.ParquetWriter(folder / "index.parquet", schema) as index:
        for number in range(shards):
            name = f"pairs-{number:06d}.tar"
            rows = [
                {"key": f"webvid_{number * PER_SHARD + i:09d}-pair1", "shard": name, "width": 1280, "height": 720,
                 "caption": "a dog and a teapot on the beach"}
                for i in range(PER_SHARD)
            ]  # fmt: skip
            index.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            with (folder / name).open("wb") as shard:
                shard.truncate(SHARD_BYTES)
            entries.append({"name": name, "samples": PER_SHARD, "bytes": SHARD_BYTES, "sha256": "0" * 64})
    (folder / "build.json").write_text(json.dumps({"schema": "data_pipeline.build/1", "shards": entries}))


def held() -> float:
    """Megabytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def measure(folder: str) -> None:
    """Prints the rows about the catalogue of a folder."""
    import pickle

    import pyarrow.parquet  # noqa: F401 - its own memory is not the catalogue's

    from msdiffusion.training.catalogue import read_catalogue, split_by_key

    before = held()
    start = time.process_time()
    catalogue = read_catalogue(folder)
    print(f"| `read_catalogue`, {len(catalogue):,} pairs in {len(catalogue.shards):,} shards | "
          f"{time.process_time() - start:.1f} s |")  # fmt: skip
    print(f"| memory it keeps; most that the process held | {held() - before:.0f} MB; "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6:.0f} MB |")  # fmt: skip
    print(f"| sent to a loading process that is started afresh | {len(pickle.dumps(catalogue, 5)) / 1e6:.0f} MB |")
    start = time.process_time()
    split_by_key(catalogue, 0.01)
    print(f"| `split_by_key` | {time.process_time() - start:.1f} s |")


def measure_walk(folder: Path) -> None:
    """Prints the row about the headers of one shard; the median of nine walks."""
    from msdiffusion.training.pairs.tar_index import walk_shard

    path = folder / "walk.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for i in range(PER_SHARD):
            for suffix in SUFFIXES:
                member = tarfile.TarInfo(f"webvid_{i:09d}.{suffix}")
                member.size = 3000
                archive.addfile(member, io.BytesIO(bytes(3000)))
    times = []
    with path.open("rb") as file:
        for _ in range(9):
            start = time.process_time()
            walk_shard(file.fileno(), path.name)
            times.append(time.process_time() - start)
    print(f"| headers of one shard of {PER_SHARD * len(SUFFIXES):,} members | {1000 * sorted(times)[4]:.0f} ms |")


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description="time and memory of the catalogue of a large dataset")
    parser.add_argument("--pairs", type=int, default=3_600_000, help="a multiple of 1000 (default 3600000)")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    print("| what | CPU seconds, memory |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder), options.pairs // PER_SHARD)
        subprocess.run([sys.executable, __file__, "--measure", folder], check=True)
        measure_walk(Path(folder))


if __name__ == "__main__":
    main()
