import numpy as np
import pytest

from data_pipeline.records import DetectedPair, InputError, Rejected, SettingsError
from data_pipeline.steps.match_subjects import MatchSubjects

RED, BLUE, GREEN = (210, 30, 30), (30, 30, 210), (30, 200, 60)


def picture(*colours):
    """A column of squares, and their masks."""
    image = np.full((40 * len(colours), 40, 3), 128, dtype=np.uint8)
    masks = np.zeros((len(colours), *image.shape[:2]), dtype=bool)
    for i, colour in enumerate(colours):
        masks[i, 40 * i + 5 : 40 * i + 35, 5:35] = True
        image[masks[i]] = colour
    return image, masks


@pytest.fixture
def match(make_pair, make_detection, make_entity):
    def run(reference, target, phrases=(("dog",) * 9,) * 2, ids=None, **settings):
        (first, first_masks), (second, second_masks) = picture(*reference), picture(*target)
        found = []
        for side, masks in enumerate((first_masks, second_masks)):
            numbers = ids[side] if ids else [None] * len(masks)
            found.append(
                tuple(
                    make_detection(mask, phrase, object_id=number)
                    for mask, phrase, number in zip(masks, phrases[side], numbers, strict=False)
                )
            )
        names = list(dict.fromkeys([*phrases[0], *phrases[1]]))
        step = MatchSubjects(**settings)
        step.setup()
        entities = tuple(make_entity(name) for name in names)
        return step.process(
            DetectedPair(frames=make_pair(first, second), entities=entities, reference=found[0], target=found[1])
        )

    return run


def rows(pair, side):
    """Which square of the column each match is."""
    return [round(getattr(match, side).box[1] * getattr(match, side).mask.shape[0]) // 40 for match in pair.matches]


def test_instances_of_one_phrase_are_paired_by_their_looks(match):
    pair = match((RED, BLUE, GREEN), (GREEN, RED, BLUE))
    assert dict(zip(rows(pair, "reference"), rows(pair, "target"), strict=True)) == {0: 1, 1: 2, 2: 0}
    assert min(found.similarity for found in pair.matches) > 0.95


def test_the_threshold(match):
    pair = match((RED, BLUE), (RED, GREEN))
    assert rows(pair, "reference") == [0]
    [lost] = pair.dropped
    assert lost.reason == "too unlike in the two frames"
    assert lost.evidence["similarity"] < 0.6
    assert len(match((RED, BLUE), (RED, GREEN), min_similarity=-1).matches) == 2


def test_object_numbers_decide_over_looks(match):
    pair = match((RED, BLUE), (RED, BLUE), ids=([1, 2], [2, 1]))
    assert dict(zip(rows(pair, "reference"), rows(pair, "target"), strict=True)) == {0: 1, 1: 0}
    assert max(found.similarity for found in pair.matches) < 0.6


def test_another_object_of_the_same_name(match):
    rejected = match((RED,), (RED,), ids=([1], [2]))
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "no subject matched in both frames"
    assert rejected.evidence["subjects"][0]["reason"] == "another object of this name in each frame"


def test_phrases_do_not_mix(match):
    pair = match((RED, BLUE), (RED, BLUE), phrases=(("dog", "cat"), ("cat", "dog")), min_similarity=-1)
    assert dict(zip(rows(pair, "reference"), rows(pair, "target"), strict=True)) == {0: 1, 1: 0}


def test_a_phrase_in_one_frame_only(match):
    pair = match((RED, BLUE), (RED,), phrases=(("dog", "cat"), ("dog",)))
    assert [found.reference.entity.phrase for found in pair.matches] == ["dog"]
    [lost] = pair.dropped
    assert (lost.phrase, lost.reason, lost.evidence) == ("cat", "in one frame only", {"reference": 1, "target": 0})


def test_nothing_matches(match):
    rejected = match((RED,), (BLUE,))
    assert isinstance(rejected, Rejected)
    assert rejected.evidence["subjects"][0]["reason"] == "too unlike in the two frames"


def test_a_phrase_of_the_caption_that_is_nowhere_is_no_loss(match):
    assert match((RED,), (RED,), phrases=(("dog", "beach"), ("dog", "beach"))).dropped == ()


def test_wrong_settings(tmp_path):
    for name in ("dinov2", "timm:", "keras:vgg"):
        with pytest.raises(
            SettingsError, match=f"embedder must be histogram, timm:NAME or transformers:NAME, got '{name}'"
        ):
            MatchSubjects(embedder=name)
    with pytest.raises(SettingsError, match=r"min_similarity is a cosine, in \[-1, 1\], got 2"):
        MatchSubjects(min_similarity=2)
    with pytest.raises(InputError, match="--embedder-checkpoint: no file at"):
        MatchSubjects(embedder="timm:resnet18", checkpoint=tmp_path / "x.pt")
