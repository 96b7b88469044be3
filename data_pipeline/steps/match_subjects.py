"""Step 7: which detection in the target frame is the same subject as which one in the reference frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.records import DetectedPair, Detection, Dropped, Match, Rejected, TrainingPair, cut_out
from data_pipeline.step import Step

if TYPE_CHECKING:
    from data_pipeline.models.hub import HubModel

LIBRARIES = ("timm", "transformers", "dinov2", "clip")
# Where no threshold is given; what these numbers rest on is in docs/mining_measurements.md.
MIN_SIMILARITY = {"histogram": 0.7, "timm": 0.55, "transformers": 0.5, "dinov2": 0.5, "clip": 0.75}
ROUNDING = 1e-5
"""Similarities are rounded to this before they are compared: the last digits of a network's output say nothing."""


@dataclass(kw_only=True)
class MatchSubjects(Step[DetectedPair, TrainingPair]):
    """Pairs the instances of each phrase: by object number where the annotations track objects, else by appearance.

    The rules, in their order: docs/mining.md. A partner is better only if it is more similar by more than
    ``tie_margin``: three cups that look alike are as good as each other, and all stay. Where object numbers decide, the
    similarity is only recorded.

    embedder: "histogram", "timm:NAME", "transformers:NAME_OR_DIRECTORY", "dinov2:small" ("base", "large", "giant") or
    "clip:base" ("large"). checkpoint: local weights for timm. min_similarity: a cosine; None takes the embedder's from
    MIN_SIMILARITY.
    """

    preload: ClassVar[tuple[str, ...]] = ("scipy.optimize",)
    path_settings: ClassVar[tuple[str, ...]] = ("embedder",)

    embedder: str = "histogram"
    checkpoint: Path | None = None
    min_similarity: float | None = None
    mutual_best: bool = True
    tie_margin: float = 0.02
    device: str = "cpu"

    def __post_init__(self) -> None:
        library, _, model = self.embedder.partition(":")
        if self.embedder != "histogram" and (library not in LIBRARIES or not model):
            raise SettingsError(
                "embedder must be histogram, timm:NAME, transformers:NAME_OR_DIR, dinov2:SIZE or clip:SIZE, got "
                f"{self.embedder!r}"
            )
        if self.min_similarity is None:
            # Set here, so that the number that was used is recorded with the settings.
            self.min_similarity = MIN_SIMILARITY[library]
        if not -1 <= self.min_similarity <= 1:
            raise SettingsError(f"min_similarity is a cosine, in [-1, 1], got {self.min_similarity}")
        if not 0 <= self.tie_margin <= 1:
            raise SettingsError(f"tie_margin is a difference of cosines, in [0, 1], got {self.tie_margin}")
        if self.checkpoint is not None and library != "timm":
            raise SettingsError(f"--embedder-checkpoint is for timm:NAME; the embedder is {self.embedder!r}")
        if self.checkpoint is not None and not self.checkpoint.is_file():
            raise InputError(f"--embedder-checkpoint: no file at {self.checkpoint}")
        if library in ("dinov2", "clip"):
            from data_pipeline.models.embedder import hub_name

            hub_name(self.embedder)

    @property
    def model_device(self) -> str:
        """See Step."""
        return "" if self.embedder == "histogram" else self.device

    def downloads(self) -> dict[str, HubModel]:
        """See Step."""
        from data_pipeline.models.embedder import SHORT_NAMES, hub_name
        from data_pipeline.models.hub import transformers_model
        from data_pipeline.models.model_files import IMAGE_SETTINGS, TRANSFORMERS_MODEL, is_hub_id

        library, _, name = self.embedder.partition(":")
        if library in SHORT_NAMES:
            name = hub_name(self.embedder)
        elif library != "transformers":
            return {}
        return {"embedder": transformers_model(name, TRANSFORMERS_MODEL | IMAGE_SETTINGS)} if is_hub_id(name) else {}

    def setup(self) -> None:
        """Loads the embedder."""
        from data_pipeline.models.embedder import load_embedder

        name = f"transformers:{self.place_of('embedder')}" if self.downloads() else self.embedder
        self._embedder = load_embedder(name, self.checkpoint, self.device)

    def process(self, record: DetectedPair) -> TrainingPair | Rejected:
        """The pair with its matches, in the order of the caption, then from left to right in the target.

        All cut-outs of the pair are embedded in one call. Rejected if nothing matches.
        """
        asked = self._instances(record)
        vectors = self._embed(record, asked)
        matches: list[Match] = []
        dropped: list[Dropped] = []
        for phrase, reference, target in asked:
            if not reference or not target:
                seen = {"reference": len(reference), "target": len(target)}
                dropped.append(self._lost(phrase, "in one frame only", seen))
                continue
            first, second = (
                np.stack([vectors[id(found)] for found in detections]) for detections in (reference, target)
            )
            found, lost = self._match(phrase, reference, target, np.clip(first @ second.T, -1.0, 1.0))
            matches += sorted(found, key=lambda match: match.target.box)
            dropped += lost
        if not matches:
            lost_phrases = [{"phrase": lost.phrase, "reason": lost.reason, **lost.evidence} for lost in dropped]
            return Rejected("no subject matched in both frames", {"subjects": lost_phrases})
        return TrainingPair(frames=record.frames, matches=tuple(matches), dropped=tuple(dropped), served=record.served)

    @staticmethod
    def _instances(record: DetectedPair) -> list[tuple[str, list[Detection], list[Detection]]]:
        """Phrase, its detections in the reference and in the target; phrases that are nowhere are left out."""
        both = (record.reference, record.target)
        asked = [
            (entity.phrase, *([found for found in detections if found.entity == entity] for detections in both))
            for entity in record.entities
        ]
        return [(phrase, reference, target) for phrase, reference, target in asked if reference or target]

    def _embed(
        self, record: DetectedPair, asked: list[tuple[str, list[Detection], list[Detection]]]
    ) -> dict[int, np.ndarray]:
        compared = [
            (frame, found)
            for _, reference, target in asked
            if reference and target
            for frame, detections in ((record.frames.reference, reference), (record.frames.target, target))
            for found in detections
        ]
        if not compared:
            return {}
        vectors = self._embedder.embed([cut_out(frame.image, found.mask, found.box) for frame, found in compared])
        return {id(found): vector for (_, found), vector in zip(compared, vectors, strict=True)}

    def _match(
        self, phrase: str, reference: list[Detection], target: list[Detection], similarity: np.ndarray
    ) -> tuple[list[Match], list[Dropped]]:
        if all(found.object_id is not None for found in (*reference, *target)):
            return self._match_tracks(phrase, reference, target, similarity)
        matches, dropped = [], []
        for row, column in assign(similarity):
            value = float(similarity[row, column])
            if value < self.min_similarity:
                seen = {"similarity": round(value, 3), "min_similarity": self.min_similarity}
                dropped.append(self._lost(phrase, "too unlike in the two frames", seen))
            elif self.mutual_best and not is_mutual_best(similarity, row, column, self.tie_margin):
                better = max(similarity[row].max(), similarity[:, column].max())
                seen = {"similarity": round(value, 3), "better": round(float(better), 3)}
                dropped.append(self._lost(phrase, "more like another one of its phrase", seen))
            else:
                matches.append(Match(reference=reference[row], target=target[column], similarity=value))
        if len(reference) != len(target):
            seen = {"reference": len(reference), "target": len(target)}
            dropped.append(self._lost(phrase, "more of its phrase in one of the frames", seen))
        return matches, dropped

    def _match_tracks(
        self, phrase: str, reference: list[Detection], target: list[Detection], similarity: np.ndarray
    ) -> tuple[list[Match], list[Dropped]]:
        places = {found.object_id: column for column, found in enumerate(target)}
        matches = [
            Match(reference=found, target=target[column], similarity=float(similarity[row, column]))
            for row, found in enumerate(reference)
            if (column := places.get(found.object_id)) is not None
        ]
        if not matches:
            seen = {"reference": len(reference), "target": len(target)}
            return [], [self._lost(phrase, "another object of this name in each frame", seen)]
        both = {found.reference.object_id for found in matches}
        dropped = [
            self._lost(phrase, "in one frame only", {"object": found.object_id, **seen})
            for detections, seen in (
                (reference, {"reference": 1, "target": 0}),
                (target, {"reference": 0, "target": 1}),
            )
            for found in detections
            if found.object_id not in both
        ]
        return matches, dropped

    def _lost(self, phrase: str, reason: str, evidence: dict[str, float]) -> Dropped:
        return Dropped(phrase=phrase, stage=self.name, reason=reason, evidence=evidence)


def assign(similarity: np.ndarray) -> Sequence[tuple[int, int]]:
    """Pairs (row, column) of the assignment with the highest sum of similarities, ordered by row.

    similarity: (rows, columns), finite. Of several best assignments the same one is taken every time: similarities are
    rounded to 1e-5 before, and of equal ones those nearest to the given order count as better by less than that.
    """
    from scipy.optimize import linear_sum_assignment

    rows, columns = similarity.shape
    order = np.abs(np.arange(rows)[:, None] - np.arange(columns)[None, :]) / max(rows, columns) ** 2
    cost = -np.round(similarity.astype(np.float64) / ROUNDING) + order
    return [(int(row), int(column)) for row, column in zip(*linear_sum_assignment(cost), strict=True)]


def is_mutual_best(similarity: np.ndarray, row: int, column: int, tie_margin: float = 0.0) -> bool:
    """True if no other column is more similar to the row, and no other row to the column, by more than the margin."""
    best = max(similarity[row].max(), similarity[:, column].max())
    return bool(best - similarity[row, column] <= tie_margin + ROUNDING)
