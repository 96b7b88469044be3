"""Small clips with exact annotations, and records to feed to single steps."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import av
import numpy as np
import pytest

from data_pipeline.records import (
    Detection,
    Entity,
    Frame,
    FramePair,
    Match,
    Shot,
    Video,
    VideoFacts,
    VideoFile,
    encode_mask,
    mask_box,
)

COLOURS = {"dog": (200, 40, 40), "teapot": (40, 60, 200), "cat": (230, 180, 40), "fish": (60, 180, 90)}


def write_video(
    path: Path, pictures: np.ndarray, fps: int = 8, codec: str = "libx264", options: dict[str, str] | None = None
) -> None:
    """pictures: uint8 (frames, height, width, 3)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = pictures.shape[2], pictures.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.options = options or {}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def draw_clip(
    names: tuple[str, ...], *, size: int = 96, num_frames: int = 12, seed: int = 0, speed: int = 2, start: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """Ellipses with a light stripe that move to the right. Returns pictures (F, H, W, 3) and masks (F, subjects, H,
    W)."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(90, 160, (size // 8, size // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    rows, columns = np.mgrid[:size, :size]
    pictures = np.repeat(ground[None], num_frames, 0)
    masks = np.zeros((num_frames, len(names), size, size), dtype=bool)
    high = size // (2 * len(names)) - 2
    for frame in range(num_frames):
        for i, name in enumerate(names):
            y, x = (2 * i + 1) * size // (2 * len(names)), size // 4 + start + speed * frame
            mask = ((rows - y) / high) ** 2 + ((columns - x) / (size // 5)) ** 2 < 1
            masks[frame, i] = mask
            pictures[frame][mask] = COLOURS.get(name, (120, 30, 150))
            pictures[frame][mask & (np.abs(rows - y) < 3)] = (240, 240, 240)
    return pictures, masks


def annotate(names: tuple[str, ...], masks: np.ndarray, frames: range | list[int] | None = None) -> dict:
    """The sidecar of a clip with these masks (F, subjects, H, W)."""
    num_frames, _, height, width = masks.shape
    entries = []
    for index in range(num_frames) if frames is None else frames:
        objects = []
        for i in range(len(names)):
            ys, xs = np.nonzero(masks[index, i])
            if len(ys):
                box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
                objects.append({"id": i, "box": box, "mask_rle": encode_mask(masks[index, i])})
        entries.append({"index": index, "time": index / 8, "objects": objects})
    objects = [{"id": i, "name": name, "attributes": {"category": name}} for i, name in enumerate(names)]
    schema = "data_pipeline.annotations/1"
    return {
        "schema": schema,
        "width": width,
        "height": height,
        "fps": 8,
        "num_frames": num_frames,
        "objects": objects,
        "frames": entries,
    }


@pytest.fixture
def write_clip() -> Callable[..., Path]:
    """Writes clip.mp4 with its caption and its annotations; returns the path of the video."""

    def write(
        folder: Path,
        name: str = "clip_000000",
        names: tuple[str, ...] = ("dog", "teapot"),
        caption: str | None = None,
        annotated: range | list[int] | None = None,
        **drawing: int,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        pictures, masks = draw_clip(names, **drawing)
        path = folder / f"{name}.mp4"
        write_video(path, pictures)
        text = " and ".join(f"a {subject}" for subject in names) + " on the beach" if caption is None else caption
        if text:
            path.with_suffix(".txt").write_text(text)
        sidecar = path.with_name(f"{name}.annotations.json")
        sidecar.write_text(json.dumps(annotate(names, masks, annotated)))
        return path

    return write


def entity_of(phrase: str = "dog", position: int = 2) -> Entity:
    return Entity(phrase=phrase, head=phrase.split()[-1], mention=f"a {phrase}", position=position)


@pytest.fixture
def make_pair() -> Callable[..., FramePair]:
    """Makes a pair of given pictures, of a video that does not exist; keywords change fields of the video."""

    def make(reference: np.ndarray, target: np.ndarray, **video: object) -> FramePair:
        height, width = reference.shape[:2]
        facts = VideoFacts(
            codec="h264",
            container="mp4",
            width=width,
            height=height,
            rotation=0,
            time_base=0.125,
            stamps=tuple(range(12)),
        )
        file = VideoFile(name="clip.mp4", key="clip", path=Path("clip.mp4"), caption="a dog on the beach")
        values = {"file": file, "caption": file.caption, "sha256": "0" * 64, "facts": facts, "reader": "pyav"}
        return FramePair(
            video=Video(**{**values, "annotations": None, **video}),
            shot=Shot(first=0, last=11, start=0.0, end=1.375),
            reference=Frame(index=3, time=0.375, image=reference),
            target=Frame(index=8, time=1.0, image=target),
        )

    return make


def detection_of(mask: np.ndarray, phrase: str = "dog", **changes: object) -> Detection:
    """A detection whose box is the tight box of its mask."""
    return Detection(**{"entity": entity_of(phrase), "box": mask_box(mask), "score": 1.0, "mask": mask, **changes})


SCRIPTS = {
    "German": ("Mädchen", "Hündchn"),
    "Chinese": ("红色的狗", "沙滩上球"),
    "Japanese": ("赤い犬", "ねこが"),
    "Korean": ("강아지", "고양이"),
    "Cyrillic": ("собака", "рыжего"),
    "Arabic": ("قطة", "كلب"),
    "Hebrew": ("כלב", "ילד"),
    "Hindi": ("कल", "जल"),
    "Thai": ("หมา", "แมว"),
    "emoji": ("\U0001f415", "\U0001f408"),
}


@pytest.fixture(params=SCRIPTS)
def script_text(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Two texts of one script and one length."""
    return SCRIPTS[request.param]


@pytest.fixture
def make_entity() -> Callable[..., Entity]:
    """``entity_of`` for tests, which cannot import this file."""
    return entity_of


@pytest.fixture
def make_detection() -> Callable[..., Detection]:
    """``detection_of`` for tests."""
    return detection_of


@pytest.fixture
def make_match() -> Callable[..., Match]:
    """A match of two masks; keywords change both detections."""

    def make(reference: np.ndarray, target: np.ndarray, phrase: str = "dog", **changes: object) -> Match:
        first, second = (detection_of(mask, phrase, **changes) for mask in (reference, target))
        return Match(reference=first, target=second, similarity=0.9)

    return make


class SmallHub:
    """A hub on this machine, asked by huggingface_hub itself. repositories: hub id -> file -> content. asked: paths of
    the files that were downloaded. closed: repositories whose terms nobody has accepted.
    """

    COMMIT = "c" * 40

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.closed: set[str] = set()
        hub = self

        class Answers(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                kind, content = hub.answer(self.path, download=self.command == "GET")
                closed = any(name in self.path for name in hub.closed)
                self.send_response(403 if closed else 200 if content is not None else 404)
                if closed or content is None:
                    self.send_header("X-Error-Code", "GatedRepo" if closed else "RepoNotFound")
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content or b"")))
                self.send_header("X-Repo-Commit", hub.COMMIT)
                self.send_header("ETag", f'"{hashlib.sha1(content or b"").hexdigest()}"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content or b"")

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *words: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, *, download: bool) -> tuple[str, bytes | None]:
        parts = unquote(path.partition("?")[0]).strip("/").split("/")
        own = self.repositories.get("/".join(parts[2:4] if parts[0] == "api" else parts[:2]))
        if own is None:
            return "text/plain", None
        if parts[0] == "api" and "tree" in parts:
            files = [{"type": "file", "path": name, "size": len(own[name]), "oid": "0" * 40} for name in own]
            return "application/json", json.dumps(files).encode()
        if parts[0] == "api":
            siblings = [{"rfilename": name, "size": len(content)} for name, content in own.items()]
            return "application/json", json.dumps({"id": "x/y", "sha": self.COMMIT, "siblings": siblings}).encode()
        name = "/".join(parts[4:])
        if download:
            self.asked.append(name)
        return "application/octet-stream", own.get(name)


@pytest.fixture
def small_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SmallHub]:
    """A hub with nothing in it yet, and an empty cache for what is downloaded from it."""
    from huggingface_hub import constants

    hub = SmallHub()
    address = f"http://127.0.0.1:{hub.server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
