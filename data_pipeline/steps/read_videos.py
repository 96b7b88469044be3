"""Step 1: open a video, check it, and put its caption and annotations beside it."""

import hashlib
import os
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.records import Rejected, Video, VideoFile
from data_pipeline.step import Step

HDR = ("tonemap", "reject", "keep")
INTERLACED = ("deinterlace", "reject", "keep")


@dataclass(kw_only=True)
class ReadVideos(Step[VideoFile, Video]):
    """Rejects what is no regular file, a clip without a caption, an empty or unreadable file, and annotations that
    disagree with their video.

    reader: "auto", "decord" or "pyav" (data_pipeline/models/video_reader.py tells them apart). annotations: whether
    to read the boxes and masks that came with the videos; annotations_file: a corpus file or folder, else the sidecars;
    annotations_required: whether a clip without any is rejected.
    caption_required: if not, the caption of a clip that has none is "", and a later step has to write one. hdr: whether
    PQ and HLG are tone-mapped to BT.709, rejected, or kept as they are coded. interlaced: whether such clips are
    deinterlaced, rejected or kept as they are.
    """

    reader: str = "auto"
    annotations: bool = True
    annotations_file: Path | None = None
    annotations_required: bool = True
    caption_required: bool = True
    hdr: str = "tonemap"
    interlaced: str = "deinterlace"

    def __post_init__(self) -> None:
        if self.reader not in ("auto", "decord", "pyav"):
            raise SettingsError(f"reader must be auto, decord or pyav, got {self.reader!r}")
        if self.hdr not in HDR:
            raise SettingsError(f"hdr must be one of {', '.join(HDR)}, got {self.hdr!r}")
        if self.interlaced not in INTERLACED:
            raise SettingsError(f"interlaced must be one of {', '.join(INTERLACED)}, got {self.interlaced!r}")
        if self.annotations_file is not None and not self.annotations_file.exists():
            raise InputError(f"no annotations file or folder at {self.annotations_file}")

    def setup(self) -> None:
        """Loads the readers and the corpus file."""
        from data_pipeline.models import video_reader
        from data_pipeline.models.annotations import AnnotationSource
        from data_pipeline.models.video_pictures import PictureRules

        rules = PictureRules(hdr=self.hdr, interlaced=self.interlaced)
        self._probe = partial(video_reader.probe, rules=rules)
        self._choose = video_reader.choose_reader
        self._source = AnnotationSource(self.annotations_file) if self.annotations else None

    def process(self, file: VideoFile) -> Video | Rejected:
        """The opened video."""
        try:
            kind = kind_of(file.path)
            if kind == "folder" and not os.access(file.path, os.R_OK | os.X_OK):
                return Rejected("unreadable folder")
            # A pipe would be waited for; a device may never end.
            if kind != "file":
                return Rejected("not a regular file", {"kind": kind})
            if not file.caption and self.caption_required:
                needed = {"needed": f"{Path(file.name).stem}.txt, .json, or a row of the captions table"}
                return Rejected("no caption", needed | ({"found": "; ".join(file.notes)} if file.notes else {}))
            size, sha256 = hash_file(file.path)
        except OSError as error:
            return Rejected("unreadable video", {"error": f"{type(error).__name__}: {error.strerror}"})
        if not size:
            return Rejected("empty file", {"bytes": 0})
        facts = self._probe(file.path)
        annotations = None
        if self._source is not None:
            try:
                annotations = self._source.read(file.path, file.name, facts.width, facts.height, len(facts.stamps))
            except OSError:  # a name so long that a sidecar beside it cannot exist
                annotations = None
            if annotations is None and self.annotations_required:
                return Rejected("no annotations", self._source.needed(file.name))
        return Video(
            file=file,
            caption=file.caption or "",
            sha256=sha256,
            facts=facts,
            reader=self._choose(self.reader, file.path, facts),
            annotations=annotations,
            notes=(*file.notes, *facts.notes, *(annotations.notes if annotations else ())),
        )


def kind_of(path: Path) -> str:
    """What is at the end of a path and its links: "file", "folder", "pipe" or "device"; OSError if nothing is."""
    mode = path.stat().st_mode
    kinds = {"file": stat.S_ISREG, "folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO}
    return next((kind for kind, fits in kinds.items() if fits(mode)), "device")


def hash_file(path: Path) -> tuple[int, str]:
    """Bytes of a file, and their SHA-256 in hex digits."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
