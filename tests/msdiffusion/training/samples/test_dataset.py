import pickle

import numpy as np
import pytest
import torch

from msdiffusion.errors import DataError
from msdiffusion.training.catalogue import read_catalogue
from msdiffusion.training.samples.augmentation import Augmentation
from msdiffusion.training.samples.batch import LoadingFailure
from msdiffusion.training.samples.dataset import PairsDataset
from msdiffusion.training.samples.draws import OBJECTIVE, VALIDATION, number_of
from msdiffusion.training.samples.encoded import EncodedSample
from msdiffusion.training.samples.mixture import Mixture
from msdiffusion.training.samples.settings import SampleSettings

LAYOUT = [(0.02 + 0.12 * i, 0.1, 0.12 + 0.12 * i, 0.9) for i in range(8)]
"""Eight subjects side by side."""


class Store:
    """Encodings whose numbers say what they are of."""

    def __init__(self, *parts):
        self.parts = frozenset(parts)

    def read(self, index):
        subjects = torch.arange(8.0)[:, None]
        return EncodedSample(
            latent_mean=torch.full((4, 2, 2), float(index)) if "latents" in self.parts else None,
            latent_deviation=None,
            prompt_states=torch.full((3, 5), float(index)) if "text" in self.parts else None,
            pooled=None,
            phrase_embeddings=subjects if "text" in self.parts else None,
            image_tokens=subjects[:, None] if "references" in self.parts else None,
        )


@pytest.fixture(scope="module")
def pairs(pairs_dir):
    return Mixture([read_catalogue(str(pairs_dir))])


@pytest.fixture
def crowd(shard_writer, tmp_path):
    """One pair of eight subjects."""
    write_shard, make_record = shard_writer
    record = make_record("crowd", LAYOUT[:4], (96, 64))
    record["subjects"] = [{"phrase": f"subject {i}", "target_box": list(box)} for i, box in enumerate(LAYOUT)]
    write_shard(tmp_path / "pairs-000000.tar", [("crowd", record)])
    return Mixture([read_catalogue(str(tmp_path))])


class Landscape(SampleSettings):
    """All pictures 96 x 64."""

    sizes = np.array([[96, 64]])


def make(pairs, resolution=64, max_subjects=4, *, validation=False, kind=SampleSettings, **settings):
    """A dataset of squares; settings of ``Augmentation`` are sorted out."""
    names = set(Augmentation.__dataclass_fields__) & set(settings)
    augmentation = Augmentation(**{name: settings.pop(name) for name in names})
    settings = kind(resolution=resolution, max_subjects=max_subjects, augmentation=augmentation, **settings)
    return PairsDataset(pairs, np.arange(len(pairs)), settings, augmented=not validation)


def test_sample_at_training_resolution(pairs):
    sample = make(pairs, 32, validation=True)[1]
    assert sample.target.shape == (32, 32, 3)
    assert sample.target.dtype == np.uint8
    assert sample.size == (32, 32)
    assert sample.original_size == (64, 96)
    assert sample.crop_top_left == (0, 8)
    assert sample.phrases == ("dog", "cat")
    # 96 x 64 becomes 48 x 32, the crop takes x from 8 to 40: .05 * 48 = 2.4 is cut to 8, .45 * 48 = 21.6
    np.testing.assert_allclose(sample.boxes[0], [0, 0.25, (21.6 - 8) / 32, 0.75], atol=1e-6)


@pytest.mark.parametrize("flip_probability", [0.0, 1.0])
@pytest.mark.parametrize("step", [0, 16])
def test_boxes_and_references_stay_with_their_subjects(pairs, flip_probability, step):
    dataset = make(pairs, bucket_step=step, crop="random", flip_probability=flip_probability)
    orders = set()
    for sample in (dataset[number, index] for index in range(len(dataset)) for number in range(4)):
        height, width = sample.size
        assert sample.target.shape == (height, width, 3)
        orders.add(sample.phrases)
        for phrase, box, reference, name in zip(
            sample.phrases, sample.boxes, sample.references, sample.reference_ids, strict=True
        ):
            x1, y1, x2, y2 = np.round(box * [width, height, width, height]).astype(int)
            inside = sample.target[y1 + 3 : y2 - 3, x1 + 3 : x2 - 3].astype(float)
            color = np.asarray(reference)[0, 0, :3].astype(float)
            assert np.abs(inside - color).max() < 24, "the box is not on its subject"
            assert name.endswith(f"/{sample.key}/{('dog', 'cat').index(phrase)}")
    assert {("dog", "cat"), ("cat", "dog")} <= orders, "the order is not shuffled"


def test_crop_condition_is_that_of_the_flipped_picture(pairs):
    plain = make(pairs, crop="random")
    flipped = make(pairs, crop="random", flip_probability=1.0)
    for i in range(8):
        (top, left) = plain[i].crop_top_left
        assert flipped[i].crop_top_left == (top, 96 - 64 - left)


EVERYTHING = {
    "crop": "random", "flip_probability": 0.5, "subject_dropout": 0.3, "box_jitter": 0.2,
    "reference_augmentation": 1.0, "reference_flip_probability": 0.5,
}  # fmt: skip


def same(first, second):
    np.testing.assert_array_equal(first.target, second.target)
    np.testing.assert_array_equal(first.boxes, second.boxes)
    assert (first.phrases, first.reference_ids) == (second.phrases, second.reference_ids)
    for one, other in zip(first.references, second.references, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_sample_depends_on_its_number_and_its_pair_alone(crowd):
    first, second = (make(crowd, 64, 8, **EVERYTHING) for _ in range(2))
    forwards = [first[number, 0] for number in range(10)]
    torch.manual_seed(1)
    backwards = [second[number, 0] for number in reversed(range(10))]
    for one, other in zip(forwards, reversed(backwards), strict=True):
        same(one, other)
        assert one.stream == (0, OBJECTIVE, one.number)
    assert len({sample.boxes.tobytes() for sample in forwards}) == 10


def test_one_setting_moves_nothing_that_another_decides(crowd):
    """Numbers are drawn whether a setting needs them or not."""
    with_all, without = make(crowd, 64, 8, **EVERYTHING), make(crowd, 64, 8, crop="random", flip_probability=0.5)
    for number in range(10):
        np.testing.assert_array_equal(with_all[number, 0].target, without[number, 0].target)
        full = [phrase for phrase in without[number, 0].phrases if phrase in with_all[number, 0].phrases]
        assert list(with_all[number, 0].phrases) == full


def test_eight_subjects(crowd):
    sample = make(crowd, 64, 8)[3, 0]
    assert sorted(sample.phrases) == [f"subject {i}" for i in range(1, 7)]  # the outer two are cut away by the square
    wide = make(crowd, 64, 8, kind=Landscape)[3, 0]
    assert sorted(wide.phrases) == [f"subject {i}" for i in range(8)]
    assert wide.phrases != tuple(sorted(wide.phrases))
    expected = np.array([LAYOUT[int(phrase[-1])] for phrase in wide.phrases])
    np.testing.assert_allclose(wide.boxes, expected, atol=1e-6)


def test_dropped_subjects_lose_box_and_reference_but_not_their_place_in_the_caption(crowd):
    dataset = make(crowd, 64, 8, kind=Landscape, subject_dropout=0.4)
    samples = [dataset[number, 0] for number in range(60)]
    counts = [len(sample.phrases) for sample in samples]
    assert min(counts) >= 1
    assert 8 * 0.6 - 0.8 < np.mean(counts) < 8 * 0.6 + 0.8
    for sample in samples:
        assert len(sample.boxes) == len(sample.references) == len(sample.phrases)
        assert sample.caption == samples[0].caption


def test_jitter_moves_boxes_and_not_pictures(crowd):
    plain, moved = make(crowd, 64, 8), make(crowd, 64, 8, box_jitter=0.1)
    np.testing.assert_array_equal(plain[1, 0].target, moved[1, 0].target)
    difference = np.abs(plain[1, 0].boxes - moved[1, 0].boxes)
    assert 0 < difference.max() < 0.1


def test_changed_references_have_other_names(pairs):
    dataset = make(pairs, reference_augmentation=1.0)
    first, second = dataset[5, 1], dataset[6, 1]
    assert not set(first.reference_ids) & set(second.reference_ids)
    assert np.asarray(first.references[0]).shape != np.asarray(make(pairs)[5, 1].references[0]).shape


def test_a_reference_is_mirrored_only_if_that_is_asked_for(shard_writer, tmp_path):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "pairs-000000.tar", [("one", make_record("one", LAYOUT[:1], (96, 64)))])
    pairs = Mixture([read_catalogue(str(tmp_path))])
    mirrored = make(pairs, reference_flip_probability=1.0)[0, 0].references[0]
    plain = make(pairs, flip_probability=1.0)[0, 0].references[0]
    original = pairs.read(0).references[0]
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(original))
    np.testing.assert_array_equal(np.asarray(mirrored), np.asarray(original)[:, ::-1])


def test_validation_samples_never_change(pairs):
    dataset = make(pairs, validation=True)
    for i in (0, 1):
        same(dataset[i], dataset[100 + i, i])
        assert dataset[i].stream == dataset[100 + i, i].stream == (0, VALIDATION, number_of(dataset[i].key))


def test_a_repetition_in_validation_does_not_count(pairs):
    dataset = make(pairs, validation=True)
    assert dataset[23, 0].weight == 1
    assert dataset[24, 0].weight == 0
    assert make(pairs)[24, 0].weight == 1, "in training, numbers go on for ever"


def test_no_more_subjects_than_asked_for(pairs):
    dataset = make(pairs, 64, 1)
    assert {dataset[number, 1].phrases for number in range(20)} == {("dog",), ("cat",)}


def test_memory_cache_gives_the_same_and_keeps_to_its_size(pairs):
    cached, fresh = (make(pairs, validation=True, cache_megabytes=size) for size in (16, 0))
    for _ in range(2):
        for i in range(len(pairs)):
            np.testing.assert_array_equal(cached[i].target, fresh[i].target)
    assert len(cached._cache) == len(pairs)
    assert not fresh._cache
    small = make(pairs, validation=True, cache_megabytes=0.1)
    for i in range(len(pairs)):
        small[i]
    assert 0 < sum(pair.num_bytes for pair in small._cache.values()) <= 100_000


def test_cached_pairs_are_not_changed_by_reading_them(pairs):
    dataset = make(pairs, **EVERYTHING, cache_megabytes=16)
    dataset[1]
    boxes, target = dataset._cache[1].boxes.copy(), dataset._cache[1].target.copy()
    reference = np.array(dataset._cache[1].references[0])
    for number in range(10):
        dataset[number, 1]
    np.testing.assert_array_equal(dataset._cache[1].boxes, boxes)
    np.testing.assert_array_equal(dataset._cache[1].target, target)
    np.testing.assert_array_equal(np.asarray(dataset._cache[1].references[0]), reference)


def test_encodings_follow_their_subjects_and_nothing_is_decoded(crowd, monkeypatch):
    dataset = make(crowd, 64, 8, subject_dropout=0.3).reading(Store("latents", "references", "text"))
    plain = make(crowd, 64, 8, subject_dropout=0.3)
    expected = [plain[number, 0] for number in range(5)]
    monkeypatch.setattr(Mixture, "read", lambda *_: pytest.fail("a picture was decoded"))
    for number, other in enumerate(expected):
        sample = dataset[number, 0]
        assert sample.target is None
        assert sample.references is None
        assert sample.phrases == other.phrases
        np.testing.assert_array_equal(sample.boxes, other.boxes)
        assert (sample.size, sample.original_size, sample.crop_top_left) == ((64, 64), (64, 96), other.crop_top_left)
        subjects = [float(phrase[-1]) for phrase in sample.phrases]
        assert sample.encoded.phrase_embeddings[:, 0].tolist() == subjects
        assert sample.encoded.image_tokens[:, 0, 0].tolist() == subjects


@pytest.mark.parametrize(
    ("parts", "target", "references"),
    [(("latents",), False, True), (("references", "text"), True, False), (("text",), True, True)],
)
def test_what_was_not_encoded_ahead_is_decoded(pairs, parts, target, references):
    dataset = make(pairs).reading(Store(*parts))
    sample, plain = dataset[2, 1], make(pairs)[2, 1]
    assert (sample.target is not None) == target
    assert (sample.references is not None) == references
    assert sample.phrases == plain.phrases
    if target:
        np.testing.assert_array_equal(sample.target, plain.target)
    assert dataset.reading(None)[2, 1].encoded is None


def test_what_cannot_be_read_is_handed_on_as_a_message(shard_writer, tmp_path):
    write_shard, make_record = shard_writer
    write_shard(tmp_path / "pairs-000000.tar", [(key, make_record(key, LAYOUT[:1], (96, 64))) for key in "ab"])
    pairs = Mixture([read_catalogue(str(tmp_path))])
    content = bytearray((tmp_path / "pairs-000000.tar").read_bytes())
    start = content.rindex(b"\xff\xd8\xff")  # the second JPEG
    content[start : start + 200] = bytes(200)
    (tmp_path / "pairs-000000.tar").write_bytes(content)
    dataset = make(pairs)
    fine, failed = dataset.__getitems__([(0, 0), (1, 1)])
    assert fine.key == "a"
    assert isinstance(failed, LoadingFailure)
    assert "'b'" in failed.message
    with pytest.raises(DataError, match="'b'"):
        dataset[1, 1]


def test_a_dataset_can_be_sent_to_another_process(pairs):
    dataset = make(pairs)
    content = pickle.dumps(dataset)
    assert len(content) < 20_000
    same(pickle.loads(content)[1, 1], dataset[1, 1])


@pytest.mark.parametrize("number", [-1, -3, 3, 10**9])
def test_a_number_that_no_pair_has_is_refused(number, pairs):
    """-1 is not the last one, drawn with chances of its own."""
    dataset = make(pairs)
    dataset.indices = dataset.indices[:3]
    with pytest.raises(IndexError, match=f"pairs are numbered from 0 to 2, so there is no number {number}"):
        dataset[number]
