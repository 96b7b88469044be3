import json

import av
import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.records import DetectedPair, Rejected
from data_pipeline.steps.match_subjects import MIN_SIMILARITY, MatchSubjects, assign, is_mutual_best

RED, BLUE, GREEN = (210, 30, 30), (30, 30, 210), (30, 200, 60)
STRIPED, BANDED = ((210, 30, 30), (240, 240, 240)), ((210, 30, 30), (30, 30, 30))


def picture(*colours):
    """A column of squares, and their masks. Two colours: the first one with two lines of the second."""
    image = np.full((40 * len(colours), 40, 3), 128, dtype=np.uint8)
    masks = np.zeros((len(colours), *image.shape[:2]), dtype=bool)
    for i, colour in enumerate(colours):
        masks[i, 40 * i + 5 : 40 * i + 35, 5:35] = True
        ground, lines = colour if isinstance(colour[0], tuple) else (colour, colour)
        image[masks[i]] = ground
        for row in (12, 24):
            image[40 * i + row : 40 * i + row + 4, 5:35] = lines
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
    assert lost.evidence["similarity"] < lost.evidence["min_similarity"] == 0.7
    assert len(match((RED, BLUE), (RED, GREEN), min_similarity=-1).matches) == 2


def places(pair):
    """Reference square -> target square."""
    return dict(zip(rows(pair, "reference"), rows(pair, "target"), strict=True))


@pytest.mark.parametrize("cups", [(RED, STRIPED), (STRIPED, RED), (STRIPED, BANDED)])
def test_two_red_cups_of_different_look_that_swap_places(match, cups):
    names = (("red cup", "red cup"),) * 2
    assert places(match(cups, cups, phrases=names)) == {0: 0, 1: 1}
    assert places(match(cups, cups[::-1], phrases=names)) == {0: 1, 1: 0}


def test_a_cup_that_leaves_the_frame_is_not_matched_to_another(match):
    names = (("red cup", "red cup"), ("red cup",))
    for leaving, staying in ((RED, STRIPED), (STRIPED, RED), (BANDED, STRIPED)):
        pair = match((leaving, staying), (staying,), phrases=names)
        assert places(pair) == {1: 0}
        [lost] = pair.dropped
        assert lost.reason == "more of its phrase in one of the frames"
        assert lost.evidence == {"reference": 2, "target": 1}


def test_nor_to_one_that_enters(match):
    """The plain cup leaves, a striped one enters, and is alike enough for the threshold; but the banded one that stays
    is more like the one that left.
    """
    pair = match((RED, BANDED), (BANDED, STRIPED), min_similarity=0.3)
    assert places(pair) == {1: 0}
    [lost] = pair.dropped
    assert lost.reason == "more like another one of its phrase"
    assert 0.3 < lost.evidence["similarity"] < lost.evidence["better"]
    assert places(match((RED, BANDED), (BANDED, STRIPED), min_similarity=0.3, mutual_best=False)) == {0: 1, 1: 0}


def test_cups_that_look_alike_all_stay(match):
    alike = [(210, 30, 30), (212, 28, 30), (208, 33, 32)]
    pair = match(alike, alike[::-1])
    assert len(pair.matches) == 3
    assert pair.dropped == ()
    assert min(found.similarity for found in pair.matches) > 0.98


def test_mutual_best_and_its_margin():
    similarity = np.array([[0.90, 0.80], [0.95, 0.60]])
    assert is_mutual_best(similarity, 1, 0)
    assert not is_mutual_best(similarity, 0, 0)  # the second row is better for its column
    assert not is_mutual_best(similarity, 0, 1)  # the first column is better for its row
    assert is_mutual_best(similarity, 0, 0, 0.06)
    assert not is_mutual_best(similarity, 0, 0, 0.04)
    assert is_mutual_best(np.array([[0.9, 0.9]]), 0, 1)


def test_the_assignment_has_the_highest_sum_and_settles_ties():
    # The best single pair (0, 0) belongs to no best assignment.
    assert assign(np.array([[0.9, 0.8], [0.85, 0.1]])) == [(0, 1), (1, 0)]
    assert assign(np.full((3, 3), 0.5)) == [(0, 0), (1, 1), (2, 2)]
    noise = np.random.default_rng(0).normal(0, 1e-8, (4, 4))
    assert assign(0.5 + noise) == [(i, i) for i in range(4)]
    assert assign(np.array([[0.1], [0.2], [0.2]])) == [(1, 0)]
    assert assign(np.zeros((0, 3))) == []


def test_all_cutouts_of_a_pair_are_embedded_in_one_call(match, monkeypatch):
    from data_pipeline.models.embedder import HistogramEmbedder

    calls, embed = [], HistogramEmbedder.embed
    monkeypatch.setattr(
        HistogramEmbedder, "embed", lambda self, cutouts: calls.append(len(cutouts)) or embed(self, cutouts)
    )
    pair = match((RED, BLUE, GREEN), (RED, BLUE), phrases=(("dog", "cat", "fish"), ("dog", "cat")))
    assert len(pair.matches) == 2
    assert calls == [4]  # the fish has nothing to be compared with
    rejected = match((RED,), (BLUE,), phrases=(("dog",), ("cat",)))
    assert rejected.reason == "no subject matched in both frames"
    assert calls == [4]


def test_object_numbers_decide_over_looks(match):
    pair = match((RED, BLUE), (RED, BLUE), ids=([1, 2], [2, 1]))
    assert dict(zip(rows(pair, "reference"), rows(pair, "target"), strict=True)) == {0: 1, 1: 0}
    assert max(found.similarity for found in pair.matches) < 0.6
    assert pair.dropped == ()


def test_another_object_of_the_same_name(match):
    rejected = match((RED,), (RED,), ids=([1], [2]))
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "no subject matched in both frames"
    assert rejected.evidence["subjects"][0]["reason"] == "another object of this name in each frame"


def test_tracks_that_are_in_one_frame_only_are_told_beside_those_that_match(match):
    pair = match((RED, BLUE), (RED, BLUE), ids=([1, 2], [2, 3]))
    assert places(pair) == {1: 0}
    assert [(lost.phrase, lost.reason, lost.evidence) for lost in pair.dropped] == [
        ("dog", "in one frame only", {"object": 1, "reference": 1, "target": 0}),
        ("dog", "in one frame only", {"object": 3, "reference": 0, "target": 1}),
    ]
    # One that leaves is told once, not as "more of its phrase" too.
    [lost] = match((RED, BLUE), (BLUE,), ids=([1, 2], [2])).dropped
    assert lost.evidence == {"object": 1, "reference": 1, "target": 0}


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


def test_the_threshold_is_the_embedder_s(tmp_path):
    weights = tmp_path / "weights.pt"
    weights.touch()
    for embedder in ("histogram", "timm:resnet18", "transformers:some/model", "dinov2:small", "clip:large"):
        step = MatchSubjects(embedder=embedder)
        assert step.settings()["min_similarity"] == MIN_SIMILARITY[embedder.partition(":")[0]]
    assert MatchSubjects(embedder="timm:resnet18", checkpoint=weights, min_similarity=0.1).min_similarity == 0.1


def test_wrong_settings(tmp_path):
    for name in ("dinov2", "timm:", "keras:vgg"):
        with pytest.raises(
            SettingsError, match=f"embedder must be histogram, timm:NAME, .* or clip:SIZE, got '{name}'"
        ):
            MatchSubjects(embedder=name)
    with pytest.raises(SettingsError, match="'dinov2:tiny' is not known; there are dinov2:small, dinov2:base"):
        MatchSubjects(embedder="dinov2:tiny")
    with pytest.raises(SettingsError, match=r"min_similarity is a cosine, in \[-1, 1\], got 2"):
        MatchSubjects(min_similarity=2)
    with pytest.raises(SettingsError, match="tie_margin is a difference of cosines"):
        MatchSubjects(tie_margin=-0.1)
    with pytest.raises(InputError, match="--embedder-checkpoint: no file at"):
        MatchSubjects(embedder="timm:resnet18", checkpoint=tmp_path / "x.pt")
    with pytest.raises(SettingsError, match="--embedder-checkpoint is for timm:NAME; the embedder is 'histogram'"):
        MatchSubjects(checkpoint=tmp_path / "x.pt")


@pytest.fixture(scope="module")
def real_pairs(shared_dir):
    """Clip -> the two annotated frames, each a picture with the name and mask of every subject."""
    videos = shared_dir / "media/videos"
    table = json.loads((videos / "captions_and_boxes.json").read_text())["videos"]
    pairs = {}
    for clip in ("01_dog", "02_cups", "05_default_juggle"):
        wanted = {entry["frame"]: entry for entry in table[clip]["annotations"]}
        pairs[clip] = []
        with av.open(str(videos / table[clip]["file"])) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index in wanted:
                    numbers = np.asarray(Image.open(videos / wanted[index]["mask_png"]))
                    subjects = [(one["name"], numbers == one["id"]) for one in wanted[index]["objects"]]
                    pairs[clip].append((frame.to_ndarray(format="rgb24"), subjects))
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize("embedder", ["histogram", "timm:tf_efficientnet_lite2"])
def test_real_clips(shared_dir, real_pairs, make_pair, make_entity, make_detection, embedder):
    """Given boxes and masks of the real clips: what is there twice is matched with itself, and with nothing else."""
    weights = shared_dir / "media/weights/encoder/tf_efficientnet_lite2_timm.pth"
    step = MatchSubjects(embedder=embedder, checkpoint=weights if embedder.startswith("timm") else None)
    step.setup()
    entities = tuple(make_entity(name) for name in ("woman", "man", "dog", "ball", "cup"))
    seen = {}
    for clip, ((picture_a, first), (picture_b, last)) in real_pairs.items():
        found = [tuple(make_detection(mask, name) for name, mask in subjects) for subjects in (first, last)]
        record = DetectedPair(
            frames=make_pair(picture_a, picture_b), entities=entities, reference=found[0], target=found[1]
        )
        seen[clip] = sorted(match.reference.entity.phrase for match in step.process(record).matches)
    assert seen == {
        "01_dog": ["dog", "woman"],
        "02_cups": ["ball", "cup", "cup", "cup"],
        "05_default_juggle": ["ball", "man"],
    }
