import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from msdiffusion.errors import DataError, RequestError
from msdiffusion.training.dataset import PairsCollator, PairsDataModule, PairsDataset
from msdiffusion.training.shards import find_shards, index_shards


def mean_colors(pictures):
    """Stands in for the image encoder's preprocessing: (N, 3, 2, 2), each picture's own colour."""
    colors = [np.asarray(picture)[..., :3].mean((0, 1)) / 127.5 - 1 for picture in pictures]
    return torch.tensor(np.array(colors), dtype=torch.float32)[:, :, None, None].expand(-1, -1, 2, 2)


def attached(datamodule):
    """Give a data module the one thing it needs of a trainer."""
    datamodule.trainer = SimpleNamespace(lightning_module=SimpleNamespace(prepare_references=mean_colors))
    datamodule.setup("fit")
    return datamodule


@pytest.fixture(scope="module")
def locations(pairs_dir):
    return index_shards(find_shards(pairs_dir))


def test_sample_at_training_resolution(locations):
    sample = PairsDataset(locations, 32, 4, augment=False)[1]
    assert sample.target.shape == (32, 32, 3)
    assert sample.target.dtype == np.uint8
    assert sample.original_size == (64, 96)
    assert sample.crop_top_left == (0, 8)
    assert sample.phrases == ("dog", "cat")
    # 96 x 64 becomes 48 x 32, the crop takes x from 8 to 40: .05 * 48 = 2.4 is cut to 8, .45 * 48 = 21.6
    np.testing.assert_allclose(sample.boxes[0], [0, 0.25, (21.6 - 8) / 32, 0.75], atol=1e-6)


@pytest.mark.parametrize("flip_probability", [0.0, 1.0])
def test_boxes_and_references_stay_with_their_subjects(locations, flip_probability):
    torch.manual_seed(0)
    dataset = PairsDataset(locations, 64, 4, crop="random", flip_probability=flip_probability)
    orders = set()
    for sample in (dataset[i] for i in range(len(dataset)) for _ in range(4)):
        orders.add(sample.phrases)
        for phrase, box, reference, name in zip(
            sample.phrases, sample.boxes, sample.references, sample.reference_ids, strict=True
        ):
            x1, y1, x2, y2 = np.round(box * 64).astype(int)
            inside = sample.target[y1 + 3 : y2 - 3, x1 + 3 : x2 - 3].astype(float)
            color = np.asarray(reference)[0, 0, :3].astype(float)
            assert np.abs(inside - color).max() < 20, "the box is not on its subject"
            assert name.endswith(f"/{sample.key}/{('dog', 'cat').index(phrase)}")
    assert {("dog", "cat"), ("cat", "dog")} <= orders, "the order is not shuffled"


def test_crop_condition_is_that_of_the_flipped_picture(locations):
    torch.manual_seed(1)
    plain = PairsDataset(locations, 64, 4, crop="random")
    flipped = PairsDataset(locations, 64, 4, crop="random", flip_probability=1.0)
    for i in range(8):
        state = torch.get_rng_state()
        (top, left) = plain[i].crop_top_left
        torch.set_rng_state(state)
        assert flipped[i].crop_top_left == (top, 96 - 64 - left)


def test_validation_samples_never_change(locations):
    dataset = PairsDataset(locations, 64, 4, augment=False)
    for i in (0, 1):
        first, second = dataset[i], dataset[i]
        np.testing.assert_array_equal(first.target, second.target)
        np.testing.assert_array_equal(first.boxes, second.boxes)
        assert first.phrases == second.phrases


def test_no_more_subjects_than_asked_for(locations):
    dataset = PairsDataset(locations, 64, 1)
    chosen = {dataset[1].phrases for _ in range(20)}
    assert chosen == {("dog",), ("cat",)}


def test_memory_cache_gives_the_same_and_keeps_to_its_size(locations):
    cached, fresh = (PairsDataset(locations, 64, 4, augment=False, cache_bytes=size) for size in (2**24, 0))
    for _ in range(2):
        for i in range(len(locations)):
            np.testing.assert_array_equal(cached[i].target, fresh[i].target)
    assert len(cached._cache) == len(locations)
    assert not fresh._cache
    small = PairsDataset(locations, 64, 4, augment=False, cache_bytes=100_000)
    for i in range(len(locations)):
        small[i]
    assert 0 < sum(pair.num_bytes for pair in small._cache.values()) <= 100_000


def test_cached_pairs_are_not_changed_by_reading_them(locations):
    torch.manual_seed(0)
    dataset = PairsDataset(locations, 64, 4, crop="random", flip_probability=0.5, cache_bytes=2**24)
    before = dataset[1]
    boxes, target = dataset._cache[1].boxes.copy(), dataset._cache[1].target.copy()
    for _ in range(10):
        dataset[1]
    np.testing.assert_array_equal(dataset._cache[1].boxes, boxes)
    np.testing.assert_array_equal(dataset._cache[1].target, target)
    assert before.key == dataset[1].key


def test_batch_is_padded(locations):
    dataset = PairsDataset(locations, 64, 3, augment=False)
    batch = PairsCollator(3, mean_colors)([dataset[0], dataset[1]])
    assert len(batch) == 2
    assert batch.targets.shape == (2, 3, 64, 64)
    assert -1 <= batch.targets.min() < -0.9 < 0.9 < batch.targets.max() <= 1
    assert batch.present.tolist() == [[True, False, False], [True, True, False]]
    assert batch.phrases == [["dog", "", ""], ["dog", "cat", ""]]
    assert batch.reference_ids[0] == [f"{locations[0].shard}/clip_000000/0", "", ""]
    assert torch.all(batch.boxes[~batch.present] == 0)
    assert torch.all(batch.references[~batch.present] == 0)
    torch.testing.assert_close(batch.references[1, :2], mean_colors(dataset[1].references))
    assert batch.original_sizes.tolist() == [[64, 96], [64, 96]]
    assert batch.crops_top_left.tolist() == [[0, 16], [0, 16]]


def test_batch_moves_to_a_device_whole(locations):
    batch = PairsCollator(2, mean_colors)([PairsDataset(locations, 64, 2, augment=False)[0]])
    moved = batch.to("meta")
    assert moved.targets.is_meta
    assert moved.boxes.is_meta
    assert moved.references.is_meta
    assert moved.captions == batch.captions


def test_loaders_cover_the_dataset_once(pairs_dir):
    datamodule = attached(PairsDataModule(str(pairs_dir), 64, batch_size=4, validation_fraction=0.2))
    training = [key for batch in datamodule.train_dataloader() for key in batch.keys]
    validation = [key for batch in datamodule.val_dataloader() for key in batch.keys]
    assert len(set(training)) == len(training) == len(datamodule.training) // 4 * 4
    assert validation == [location.key for location in datamodule.validation.locations]
    assert not set(training) & set(validation)


def test_the_seed_decides_the_order(pairs_dir):
    def order(seed):
        loader = attached(PairsDataModule(str(pairs_dir), 64, batch_size=4, seed=seed)).train_dataloader()
        return [key for batch in loader for key in batch.keys]

    assert order(0) == order(0) != order(1)


def test_separate_validation_directory(pairs_dir):
    datamodule = attached(PairsDataModule(str(pairs_dir), 64, validation_pairs=str(pairs_dir), batch_size=4))
    assert len(datamodule.training) == len(datamodule.validation) == 24


def test_two_datasets_with_the_same_keys_share_no_reference(pairs_dir, tmp_path):
    other = shutil.copytree(pairs_dir, tmp_path / "other")
    datamodule = attached(PairsDataModule(str(pairs_dir), 64, validation_pairs=str(other), batch_size=4))
    training, validation = datamodule.training[0], datamodule.validation[0]
    assert training.key == validation.key
    assert not set(training.reference_ids) & set(validation.reference_ids)


def test_without_validation(pairs_dir):
    datamodule = attached(PairsDataModule(str(pairs_dir), 64, validation_fraction=0, batch_size=4))
    assert datamodule.val_dataloader() == []
    assert datamodule.validation_samples(4) == []


def test_validation_samples_are_the_first_ones(pairs_dir):
    datamodule = attached(PairsDataModule(str(pairs_dir), 64, validation_pairs=str(pairs_dir), batch_size=4))
    samples = datamodule.validation_samples(3)
    assert datamodule.collate(samples).keys == ["clip_000000", "clip_000001", "clip_000002"]
    assert len(datamodule.validation_samples(100)) == 24


def test_worker_processes(pairs_dir):
    datamodule = attached(PairsDataModule(str(pairs_dir), 64, batch_size=4, num_workers=1, validation_fraction=0))
    assert sum(len(batch) for batch in datamodule.train_dataloader()) == 24


def test_missing_dataset(tmp_path):
    with pytest.raises(DataError, match=r"(?s)nowhere does not exist.*python -m data_pipeline\.build"):
        attached(PairsDataModule(str(tmp_path / "nowhere"), 64))


def test_dataset_smaller_than_a_batch(pairs_dir):
    with pytest.raises(DataError, match="24 pairs to train on, fewer than one batch of 64"):
        attached(PairsDataModule(str(pairs_dir), 64, batch_size=64, validation_fraction=0))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_subjects": 0}, "max_subjects must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"cache_megabytes": -1}, "cache_megabytes must be at least 0"),
        ({"resolution": 60}, "multiple of 8, got 60"),
        ({"flip_probability": 1.5}, r"flip_probability must be in \[0, 1\], got 1.5"),
        ({"minimum_visible": -0.1}, "minimum_visible must be in"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\)"),
        ({"crop": "left"}, "crop must be 'random' or 'center', got 'left'"),
    ],
)
def test_bad_settings_are_told_at_construction(setting, message):
    with pytest.raises(RequestError, match=message):
        PairsDataModule(**{"pairs": "somewhere", "resolution": 64} | setting)


def test_unknown_reference_frame_is_refused(pairs_dir):
    with pytest.raises(RequestError, match="reference_frame must be 'other' or 'target', got 'same'"):
        PairsDataModule(str(pairs_dir), resolution=32, reference_frame="same")
