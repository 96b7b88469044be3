"""Step 8: leave out subjects and pairs that would teach something wrong."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from data_pipeline.errors import SettingsError
from data_pipeline.pairs_format import MOST_SUBJECTS
from data_pipeline.records import (
    LEAST_MASK_SCORE,
    Box,
    Detection,
    Dropped,
    FramePair,
    Match,
    Rejected,
    TrainingPair,
    box_area,
    box_in_pixels,
    box_iou,
    mask_box,
)
from data_pipeline.step import Step

FRACTIONS = [
    "min_score",
    "min_mask_score",
    "min_area",
    "max_area",
    "min_fill",
    "min_mask_agreement",
    "max_border",
    "max_clipped",
    "max_box_iou",
    "max_mask_overlap",
    "min_change",
]


@dataclass(kw_only=True)
class FilterPairs(Step[TrainingPair, TrainingPair]):
    """Rules about single subjects in either frame (``faults``), then about two subjects, then about the pair. What each
    setting bounds, and the reasons for its default: docs/mining.md.

    Of two subjects that are probably one thing detected twice (max_mask_overlap is of the smaller mask) the one with
    the lower score, then the smaller one, is left out. Boxes that overlap less than max_box_iou stay: the model must
    learn overlapping boxes. A pair of too little change is rejected: the answer would be to copy.
    """

    min_score: float = 0.3
    min_mask_score: float = LEAST_MASK_SCORE
    min_area: float = 0.01
    max_area: float = 0.7
    max_aspect: float = 4.0
    min_pixels: int = 200
    min_fill: float = 0.2
    min_mask_agreement: float = 0.7
    max_border: float = 0.3
    max_clipped: float = 0.6
    min_sharpness: float = 0.12
    max_box_iou: float = 0.9
    max_mask_overlap: float = 0.8
    min_change: float = 0.02
    min_subjects: int = 1
    max_subjects: int = 4

    def __post_init__(self) -> None:
        for name in FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.min_area >= self.max_area:
            raise SettingsError(f"min_area {self.min_area} must be below max_area {self.max_area}")
        if self.max_aspect < 1:
            raise SettingsError(f"max_aspect must be at least 1, got {self.max_aspect}")
        if not 1 <= self.min_subjects <= self.max_subjects:
            counts = f"{self.min_subjects} and {self.max_subjects}"
            raise SettingsError(f"need 1 <= min_subjects <= max_subjects, got {counts}")
        if self.max_subjects > MOST_SUBJECTS:
            raise SettingsError(
                f"max_subjects is {MOST_SUBJECTS} at most, got {self.max_subjects}: no reader takes more"
            )
        if self.min_sharpness < 0:
            raise SettingsError(f"min_sharpness must not be negative, got {self.min_sharpness}")
        if self.min_pixels < 1:
            raise SettingsError(f"min_pixels must be at least 1, got {self.min_pixels}")

    def setup(self) -> None:
        """Loads the measures."""
        from data_pipeline.models import picture_quality

        self._quality = picture_quality

    def process(self, pair: TrainingPair) -> TrainingPair | Rejected:
        """The pair with the subjects that pass, in their old order."""
        reference, target = pair.frames.reference.image, pair.frames.target.image
        dropped: list[Dropped] = []
        kept: list[Match] = []
        for match in pair.matches:
            faults = chain(self.faults(match.reference, reference), self.faults(match.target, target))
            fault = next(faults, None)
            if fault is None:
                kept.append(match)
            else:
                dropped.append(self._drop(match, *fault))
        kept, doubles = self._without_doubles(kept)
        dropped += doubles
        if len(kept) > self.max_subjects:
            by_area = sorted(kept, key=lambda match: -box_area(match.target.box))
            surplus = by_area[self.max_subjects :]
            evidence = {"subjects": len(kept), "max_subjects": self.max_subjects}
            dropped += [self._drop(match, "more subjects than max_subjects", evidence) for match in surplus]
            kept = [match for match in kept if match not in surplus]
        if len(kept) < self.min_subjects:
            left_out = [{"phrase": lost.phrase, "reason": lost.reason, **lost.evidence} for lost in dropped]
            reason = "no subject passed the filters" if not kept else "fewer subjects than min_subjects"
            return Rejected(reason, {"left": len(kept), "subjects": left_out})
        change = difference(pair.frames, kept)
        if change < self.min_change:
            return Rejected("near-identical frames", {"change": round(change, 4), "min_change": self.min_change})
        return replace(pair, matches=tuple(kept), dropped=(*pair.dropped, *dropped))

    def faults(self, found: Detection, image: np.ndarray) -> Iterator[tuple[str, dict[str, float]]]:
        """Faults of one detection in a frame, uint8 (height, width, 3): reason and measures, cheap ones first."""
        if found.score < self.min_score:
            yield "detection score too low", {"score": round(found.score, 3), "min_score": self.min_score}
        if found.mask_score is not None and found.mask_score < self.min_mask_score:
            yield "mask score too low", {"score": round(found.mask_score, 3), "min_mask_score": self.min_mask_score}
        area = box_area(found.box)
        if area < self.min_area:
            yield "box too small", {"area": round(area, 4), "min_area": self.min_area}
        if area > self.max_area:
            yield "box too large", {"area": round(area, 4), "max_area": self.max_area}
        height, width = found.mask.shape
        wide, high = (found.box[2] - found.box[0]) * width, (found.box[3] - found.box[1]) * height
        aspect = max(wide / high, high / wide)
        if aspect > self.max_aspect:
            yield "box too long and thin", {"aspect": round(aspect, 2), "max_aspect": self.max_aspect}
        pixels = int(found.mask.sum())
        if pixels < self.min_pixels:
            yield "too few pixels in the mask", {"pixels": pixels, "min_pixels": self.min_pixels}
        x1, y1, x2, y2 = box_in_pixels(found.box, width, height)
        fill = float(found.mask[y1:y2, x1:x2].mean()) if x1 < x2 and y1 < y2 else 0.0
        if fill < self.min_fill:
            yield "mask covers too little of its box", {"fill": round(fill, 3), "min_fill": self.min_fill}
        tight = mask_box(found.mask)
        agreement = box_iou(tight, found.box)
        if agreement < self.min_mask_agreement:
            measured = {"agreement": round(agreement, 3), "min_mask_agreement": self.min_mask_agreement}
            yield "mask and box disagree", measured
        border = border_contact(found.mask, tight)
        if border > self.max_border:
            yield "cut off at the frame's edge", {"contact": round(border, 3), "max_border": self.max_border}
        clipped = self._quality.clipped_share(image[found.mask])
        if clipped > self.max_clipped:
            yield "under- or over-exposed", {"clipped": round(clipped, 3), "max_clipped": self.max_clipped}
        sharpness = self._quality.sharpness(image[y1:y2, x1:x2])
        if sharpness < self.min_sharpness:
            yield "blurred", {"sharpness": round(sharpness, 3), "min_sharpness": self.min_sharpness}

    def _drop(self, match: Match, reason: str, evidence: dict[str, float]) -> Dropped:
        return Dropped(phrase=match.target.entity.phrase, stage=self.name, reason=reason, evidence=evidence)

    def _without_doubles(self, matches: list[Match]) -> tuple[list[Match], list[Dropped]]:
        kept: list[Match] = []
        dropped: list[Dropped] = []
        for match in sorted(matches, key=lambda match: (-match.target.score, -int(match.target.mask.sum()))):
            overlaps = [self._double(match, other) for other in kept]
            fault = next((overlap for overlap in overlaps if overlap is not None), None)
            if fault is None:
                kept.append(match)
            else:
                dropped.append(self._drop(match, "detected twice", fault))
        return [match for match in matches if match in kept], dropped

    def _double(self, match: Match, other: Match) -> dict[str, float] | None:
        for mine, theirs in ((match.target, other.target), (match.reference, other.reference)):
            overlap = box_iou(mine.box, theirs.box)
            if overlap > self.max_box_iou:
                return {"box_iou": round(overlap, 3), "max_box_iou": self.max_box_iou}
            shared = int((mine.mask & theirs.mask).sum()) / min(int(mine.mask.sum()), int(theirs.mask.sum()))
            if shared > self.max_mask_overlap:
                return {"mask_overlap": round(shared, 3), "max_mask_overlap": self.max_mask_overlap}
        return None


def border_contact(mask: np.ndarray, tight: Box) -> float:
    """Largest share of a side of the tight box that is mask on the frame's edge, in [0, 1]; 0 if it touches none."""
    height, width = mask.shape
    wide, high = (tight[2] - tight[0]) * width, (tight[3] - tight[1]) * height
    edges = ((mask[0], wide), (mask[-1], wide), (mask[:, 0], high), (mask[:, -1], high))
    return max(float(edge.sum()) / side for edge, side in edges)


def difference(frames: FramePair, matches: list[Match]) -> float:
    """Mean absolute difference of the two frames, 0 to 1, over all pixels inside a subject's box in either frame."""
    height, width = frames.target.image.shape[:2]
    inside = np.zeros((height, width), dtype=bool)
    for match in matches:
        for found in (match.reference, match.target):
            x1, y1, x2, y2 = box_in_pixels(found.box, width, height)
            inside[y1:y2, x1:x2] = True
    first, second = (frame.image[inside].astype(np.int16) for frame in (frames.reference, frames.target))
    return float(np.abs(first - second).mean() / 255)
