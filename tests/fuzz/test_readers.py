"""Damaged files for every reader of our own: each is read, or refused by an error of ours that says so shortly.

``make fuzz`` tries them for FUZZ_SECONDS (60) a reader, prints how many, and leaves what fell in ``found``; without it
each reader gets its corpus and a few. What fell once lies in ``corpus/READER`` and is tried for ever; all of it is
harmless.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data_pipeline.captions import read_captions
from data_pipeline.errors import ClipError, MiningError
from data_pipeline.importers.images import read_images
from data_pipeline.importers.official import read_official
from data_pipeline.models.annotations import AnnotationSource, read_mask, read_sidecar
from data_pipeline.shard_reader import Shard, index_rows, read_build, rejected_videos
from msdiffusion.adapter.config import AdapterConfig
from msdiffusion.errors import MSDiffusionError
from msdiffusion.request.provenance import SCHEMA, read_request
from msdiffusion.request.request_file import open_request, read_request_file

HERE = Path(__file__).parent
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
FEW = 25
LONGEST = 5.0
"""Seconds of the processor that one file may take."""
MOST_MEMORY = 1 << 30
"""Bytes that reading one file may add to the process's peak."""
SIZE = (48, 32)
FRAMES = 10


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mutations = _load(HERE / "mutations.py")
strangers = _load(HERE.parent / "test_strangers_pairs.py")


@dataclass(frozen=True)
class Reader:
    """file: name of the damaged file in a folder that ``prepare`` has filled."""

    file: str
    inputs: Callable[[], st.SearchStrategy[bytes]]
    read: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda folder: None


def picture(size: tuple[int, int] = SIZE, colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def put_pictures(folder: Path) -> None:
    for name in ("dog.png", "cat.png"):
        (folder / name).write_bytes(picture())


# ------------------------------------------------------------------------------------------------------ the requests

REQUESTS = """\
defaults:
  steps: 20
  guidance_scale: 7.5
pictures:
  - name: beach
    prompt: a dog and a cat on the beach
    images: [dog.png, [cat.png, dog.png]]
    boxes: [[0, 0.25, 0.5, 0.75], [0.5, 0.25, 1, 0.75]]
    phrases: [dog, cat]
    subject_scales: [0.5, 1.0]
    seed: 3
  - prompt: a dog
    images: [dog.png]
    masks: [dog.png]
    auto_layout: true
"""
REQUEST = {
    "prompt": "a dog and a cat", "phrases": ["dog", "cat"], "negative_prompt": None, "steps": 5, "guidance_scale": 7.5,
    "scale": 1.0, "subject_scales": None, "subject_windows": None, "height": 64, "width": 64, "auto_layout": False,
    "auto_layout_threshold": None, "auto_layout_start": None, "seed": 1, "masks": None,
    "boxes": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]],
    "images": [[{"path": "dog.png", "sha256": hashlib.sha256(picture()).hexdigest()}],
               [{"path": "cat.png", "sha256": hashlib.sha256(picture()).hexdigest(),
                 "content": base64.b64encode(picture()).decode()}]],
}  # fmt: skip
RECORD = {
    "schema": SCHEMA,
    "model": {
        **dict.fromkeys(("adapter", "adapter_sha256", "adapter_config", "base_model", "image_encoder"), "x"),
        "base_config": None,
        "dtype": "float32",
    },
    "hooks": {"safety_checker": None, "watermark": None},
    "batch": {"size": 1, "position": 0},
    "made_with": dict.fromkeys(("msdiffusion", "torch", "diffusers", "device", "processor", "arithmetic"), "1"),
    "left_out": [],
    "flagged": False,
    "request": REQUEST,
}


def with_record(text: str) -> bytes:
    information = PngImagePlugin.PngInfo()
    information.add_itxt("msdiffusion", text.replace("\0", "?"))
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=information)
    return buffer.getvalue()


def read_requests(path: Path) -> None:
    for entry in read_request_file(path):
        open_request(entry.arguments)


# --------------------------------------------------------------------------------------------------------- the pairs


def members() -> dict[str, bytes]:
    sample = strangers.make_sample("a", ("dog", "cat"))
    return {
        f"a.{suffix}": json.dumps(content).encode() if suffix == "json" else content
        for suffix, content in sample.items()
    }


def written(folder: Path, name: str) -> bytes:
    """A file of a small dataset that all readers take."""
    strangers.Dataset(rejected=[REJECTED]).write(folder / "data")
    return (folder / "data" / name).read_bytes()


REJECTED = {
    "video": "c.mp4",
    "key": "c",
    "stage": "read_videos",
    "reason": "unreadable video",
    "evidence": {"frames": 0},
}


def dataset_beside(name: str) -> Callable[[Path], None]:
    """A dataset without that file."""

    def prepare(folder: Path) -> None:
        strangers.Dataset(rejected=[REJECTED]).write(folder / "data")
        for path in (folder / "data").iterdir():
            if path.name != name:
                path.rename(folder / path.name)

    return prepare


def read_shard(path: Path) -> None:
    for read in (read_shard_in_mining, strangers.read_all):
        try:
            read(path)
        except (MSDiffusionError, MiningError) as error:
            check_message(error)


def read_shard_in_mining(path: Path) -> None:
    shard = Shard(path)
    for key in shard.keys:
        shard.read(key)


def read_index(path: Path) -> None:
    for read in (
        lambda: list(index_rows(path.parent, read_build(path.parent))),
        lambda: strangers.read_all(path.parent),
    ):
        try:
            read()
        except (MSDiffusionError, MiningError) as error:
            check_message(error)


def read_description(path: Path) -> None:
    for read in (lambda: read_build(path.parent), lambda: strangers.read_all(path.parent)):
        try:
            read()
        except (MSDiffusionError, MiningError) as error:
            check_message(error)


def seed_of(name: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return written(Path(folder), name)


def rows_of_index() -> list[dict]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(io.BytesIO(seed_of("index.parquet"))).to_pylist()


# --------------------------------------------------------------------------------------- tables, captions, annotations

CAPTIONS = 'video,caption\nclip.mp4,"a dog, and a cat"\nother.mp4,a teapot\nthird.mp4,a hat\n'
SIDECAR = {
    "schema": "data_pipeline.annotations/1",
    "width": SIZE[0],
    "height": SIZE[1],
    "objects": [{"id": 1, "name": "dog", "attributes": {"color": "red"}}, {"id": 2, "name": "cat"}],
    "frames": [
        {"index": 0, "objects": [{"id": 1, "box": [1, 2, 30, 20]}, {"id": 2, "box": [5, 5, 40, 30]}]},
        {"index": 5, "objects": [{"id": 1, "box": [1, 2, 30, 20],
                                  "mask_rle": {"size": [32, 48], "counts": [100, 50, 1386]}}]},
    ],
}  # fmt: skip
CATEGORIES = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
COCO = {
    "images": [
        {"id": 1, "file_name": "clip/00000.jpg", "width": 48, "height": 32},
        {"id": 2, "file_name": "clip/00005.jpg", "width": 48, "height": 32},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 20, 20], "track_id": 4, "iscrowd": 0,
         "segmentation": [[1, 1, 20, 1, 20, 20]]},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [5, 2, 20, 20],
         "segmentation": {"size": [32, 48], "counts": "PPYo0"}},
    ],
    "categories": CATEGORIES,
}  # fmt: skip
YOUTUBE_VIS = {
    "videos": [{"id": 1, "file_names": [f"clip/{number:05}.jpg" for number in range(3)], "width": 48, "height": 32}],
    "annotations": [
        {"id": 1, "video_id": 1, "category_id": 1, "bboxes": [[1, 2, 20, 20], None, [3, 2, 20, 20]], "iscrowd": 0,
         "segmentations": [{"size": [32, 48], "counts": [100, 50, 1386]}, None, None]},
    ],
    "categories": CATEGORIES,
}  # fmt: skip
OURS = {
    "videos": {
        "clip": {
            "file": "clip.mp4",
            "width": 48,
            "height": 32,
            "annotations": [{"frame": 0, "objects": {"1": "dog"}, "mask_png": "dog.png"}],
        }
    }
}
DAVIS = {"masks": ".", "videos": {"clip": {"1": "dog", "2": "cat"}}}
ITEMS = [
    {
        "image_file": "dog.png",
        "caption": "a dog and a cat",
        "boxes": [[0, 0, 20, 20], [10, 10, 40, 30]],
        "phrases": ["dog", "cat"],
        "masks": [None, {"size": [32, 48], "counts": [100, 50, 1386]}],
    }
] * 2
PICTURES = {
    "images": [{"id": 1, "file_name": "dog.png", "width": 48, "height": 32}],
    "annotations": COCO["annotations"][:1],
    "categories": CATEGORIES,
}
METADATA = [
    {"file_name": "dog.png", "text": "a dog", "boxes": [[0, 0, 20, 20]], "phrases": ["dog"]},
    {"file_name": "cat.png", "caption": "a cat", "objects": {"bbox": [[1, 1, 9, 9]], "category": ["cat"]}},
]


def lines(rows: list[dict]) -> st.SearchStrategy[bytes]:
    """Of a jsonl file."""
    return mutations.edits.map(
        lambda changes: b"\n".join(
            mutations.as_json(row)
            for row in (lambda found: found if isinstance(found, list) else [found])(mutations.edited(rows, changes))
        )
    )


def read_annotations(path: Path) -> None:
    annotations = read_sidecar(path, *SIZE, FRAMES)
    for objects in annotations.frames.values():
        for found in objects:
            read_mask(found, *SIZE)


def read_corpus(path: Path) -> None:
    source = AnnotationSource(path)
    for name in ("clip.mp4", "other.mp4"):
        try:
            source.read(path.parent / name, name, *SIZE, FRAMES)
        except ClipError as error:
            check_message(error)


def document_or_bytes(document: object) -> st.SearchStrategy[bytes]:
    return mutations.documents(document) | mutations.damaged(json.dumps(document).encode())


def config() -> dict:
    return json.loads((HERE.parents[1] / "checkpoints/tiny/config.json").read_text())


READERS = {
    "request_yaml": Reader(
        "requests.yaml",
        lambda: mutations.texts(REQUESTS) | mutations.damaged(REQUESTS.encode()),
        read_requests,
        put_pictures,
    ),
    "request_json": Reader(
        "requests.json",
        lambda: document_or_bytes(
            {"defaults": {"steps": 20}, "pictures": [{**REQUEST, "images": ["dog.png", "cat.png"]}]}
        ),
        read_requests,
        put_pictures,
    ),
    "png": Reader(
        "drawn.png",
        lambda: mutations.pictures_with_text(with_record, RECORD) | mutations.damaged(with_record(json.dumps(RECORD))),
        read_request,
        put_pictures,
    ),
    "adapter_config": Reader("config.json", lambda: document_or_bytes(config()), AdapterConfig.read),
    "shard": Reader(
        "pairs-000000.tar",
        lambda: mutations.archives(members, "a.json") | mutations.damaged(seed_of("pairs-000000.tar")),
        read_shard,
    ),
    "index": Reader(
        "index.parquet",
        lambda: mutations.tables(rows_of_index()) | mutations.damaged(seed_of("index.parquet")),
        read_index,
        dataset_beside("index.parquet"),
    ),
    "build": Reader(
        "build.json",
        lambda: document_or_bytes(json.loads(seed_of("build.json"))),
        read_description,
        dataset_beside("build.json"),
    ),
    "rejected": Reader(
        "rejected.jsonl", lambda: lines([REJECTED] * 2), lambda path: list(rejected_videos(path.parent))
    ),
    "captions_csv": Reader(
        "captions.csv", lambda: mutations.texts(CAPTIONS) | mutations.damaged(CAPTIONS.encode()), read_captions
    ),
    "captions_jsonl": Reader(
        "captions.jsonl", lambda: lines([{"video": "clip.mp4", "caption": ["a dog", "a hat"]}] * 2), read_captions
    ),
    "captions_parquet": Reader(
        "captions.parquet", lambda: mutations.tables([{"video": "clip.mp4", "caption": "a dog"}] * 2), read_captions
    ),
    "sidecar": Reader("clip.annotations.json", lambda: document_or_bytes(SIDECAR), read_annotations),
    "coco": Reader("coco.json", lambda: document_or_bytes(COCO), read_corpus),
    "youtube_vis": Reader("vis.json", lambda: document_or_bytes(YOUTUBE_VIS), read_corpus),
    "corpus": Reader("corpus.json", lambda: document_or_bytes(OURS), read_corpus, put_pictures),
    "davis": Reader("davis.json", lambda: document_or_bytes(DAVIS), read_corpus),
    "items_json": Reader("items.json", lambda: document_or_bytes(ITEMS), lambda path: list(read_official(path, False))),
    "items_jsonl": Reader("items.jsonl", lambda: lines(ITEMS), lambda path: list(read_official(path, False))),
    "pictures_jsonl": Reader(
        "metadata.jsonl",
        lambda: lines(METADATA),
        lambda path: list(read_images(path.parent, path, None, False)),
        put_pictures,
    ),
    "pictures_coco": Reader(
        "coco.json",
        lambda: document_or_bytes(PICTURES),
        lambda path: list(read_images(path.parent, None, path, False)),
        put_pictures,
    ),
}


def check_message(error: Exception) -> None:
    text = str(error)
    assert text.strip(), f"{type(error).__name__} says nothing"
    assert len(text) < 3000, f"{len(text)} characters: {text[:200]!r}"


def peak_memory(anew: bool = False) -> int:
    """Bytes that this process had at most, since it was last asked for anew. 0 where there is no Linux to tell."""
    if not Path("/proc/self/clear_refs").exists():
        return 0
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def try_input(reader: Reader, folder: Path, content: bytes) -> None:
    """Reads it; AssertionError, or whatever else is none of our errors, for what must not be."""
    (folder / reader.file).write_bytes(content)
    start, before = time.process_time(), peak_memory(anew=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader.read(folder / reader.file)
        except (MSDiffusionError, MiningError) as error:
            check_message(error)
    taken = time.process_time() - start
    assert taken < LONGEST, f"took {taken:.1f} s"
    grown = peak_memory() - before
    assert grown < MOST_MEMORY, f"took {grown / 2**20:.0f} MiB"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.mark.parametrize(
    "path", sorted((HERE / "corpus").glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_corpus(path: Path, folder: Path) -> None:
    """What fell once."""
    reader = READERS[path.parent.name]
    reader.prepare(folder)
    try_input(reader, folder, path.read_bytes())


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = READERS[name]
    reader.prepare(folder)
    tried, fallen = 0, folder.parent / "fallen"

    def run(number: int, examples: int) -> None:
        @seed(number)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        @given(reader.inputs())
        def check(content: bytes) -> None:
            nonlocal tried
            tried += 1
            fallen.write_bytes(content)
            try_input(reader, folder, content)

        check()

    end, number = time.monotonic() + SECONDS, 0
    try:
        run(number, FEW)
        while time.monotonic() < end:
            number += 1
            run(number, 500)
    except BaseException:
        if SECONDS:
            kept = HERE / "found" / name
            kept.parent.mkdir(exist_ok=True)
            shutil.copy(fallen, kept)
        raise
    finally:
        if SECONDS:
            with capsys.disabled():
                print(f"\n{name}: {tried:,} files")
