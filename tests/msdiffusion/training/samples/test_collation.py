import pickle

import numpy as np
import pytest
import torch

from msdiffusion.errors import DataError
from msdiffusion.training.catalogue import read_catalogue
from msdiffusion.training.samples.batch import LoadingFailure
from msdiffusion.training.samples.collation import PairsCollator
from msdiffusion.training.samples.dataset import PairsDataset
from msdiffusion.training.samples.draws import OBJECTIVE, SampleDraws, generator_for
from msdiffusion.training.samples.encoded import EncodedSample
from msdiffusion.training.samples.mixture import Mixture
from msdiffusion.training.samples.settings import SampleSettings

SHAPES = {(64, 64): (4, 8, 8)}


def mean_colors(pictures):
    """Stands in for the image encoder's preprocessing: (N, 3, 2, 2), each picture's own colour."""
    colors = [np.asarray(picture)[..., :3].mean((0, 1)) / 127.5 - 1 for picture in pictures]
    return torch.tensor(np.array(colors), dtype=torch.float32)[:, :, None, None].expand(-1, -1, 2, 2)


class Store:
    """Encodings of all parts, of one subject more than the last one had."""

    parts = frozenset({"latents", "references", "text"})

    def read(self, index):
        subjects = torch.ones(1 + index, 6)
        return EncodedSample(torch.ones(4, 8, 8), None, torch.ones(3, 5), None, subjects, subjects[:, None])


@pytest.fixture(scope="module")
def pairs(pairs_dir):
    return Mixture([read_catalogue(str(pairs_dir))])


@pytest.fixture(scope="module")
def dataset(pairs):
    return PairsDataset(pairs, np.arange(len(pairs)), SampleSettings(resolution=64, max_subjects=3))


def test_batch_is_padded(dataset, pairs):
    batch = PairsCollator(3, mean_colors, SHAPES)([dataset[0], dataset[1]])
    assert len(batch) == 2
    assert batch.size == (64, 64)
    assert batch.targets.shape == (2, 3, 64, 64)
    assert -1 <= batch.targets.min() < -0.9 < 0.9 < batch.targets.max() <= 1
    assert batch.present.tolist() == [[True, False, False], [True, True, False]]
    assert batch.phrases == [["dog", "", ""], ["dog", "cat", ""]]
    assert batch.reference_ids[0] == [f"{pairs.shard_name(0)}/clip_000000/0", "", ""]
    assert torch.all(batch.boxes[~batch.present] == 0)
    assert torch.all(batch.references[~batch.present] == 0)
    torch.testing.assert_close(batch.references[1, :2], mean_colors(dataset[1].references))
    assert batch.original_sizes.tolist() == [[64, 96], [64, 96]]
    assert batch.crops_top_left.tolist() == [[0, 16], [0, 16]]
    assert batch.numbers.tolist() == [0, 1]
    assert batch.numbers.dtype == torch.int64
    assert batch.weights.tolist() == [1, 1]
    assert batch.weights.dtype == torch.float32
    assert batch.encoded is None


def test_chance_of_a_batch_is_that_of_its_samples(pairs):

    dataset = PairsDataset(pairs, np.arange(24), SampleSettings(resolution=64, max_subjects=3, seed=5), augmented=True)
    collate = PairsCollator(3, mean_colors, SHAPES)
    together = collate([dataset[7, 3], dataset[8, 4]]).draws
    alone = collate([dataset[8, 4]]).draws
    expected = SampleDraws.draw([generator_for(5, OBJECTIVE, n) for n in (7, 8)], (4, 8, 8))
    for name in ("condition", "grounding", "timestep", "noise", "posterior", "offset"):
        torch.testing.assert_close(getattr(together, name), getattr(expected, name), rtol=0, atol=0)
        torch.testing.assert_close(getattr(together, name)[1:], getattr(alone, name), rtol=0, atol=0)


def test_what_was_encoded_ahead_replaces_the_pictures(dataset):
    def prepare(pictures):
        pytest.fail("references were prepared")

    encoded = dataset.reading(Store())
    batch = PairsCollator(3, prepare, SHAPES)([encoded[0], encoded[1]])
    assert batch.targets is None
    assert batch.references is None
    assert batch.size == (64, 64)
    assert batch.encoded.latent_mean.shape == (2, 4, 8, 8)
    assert batch.encoded.image_tokens.shape == (2, 3, 1, 6)
    assert batch.encoded.phrase_embeddings.sum(-1).tolist() == [[6, 0, 0], [6, 6, 0]]


def test_batch_moves_to_a_device_whole(dataset):
    batch = PairsCollator(2, mean_colors, SHAPES)([dataset[0]])
    moved = batch.to("meta")
    for name in ("targets", "boxes", "references", "numbers", "weights", "present", "original_sizes"):
        assert getattr(moved, name).is_meta, name
    assert moved.draws.noise.is_meta
    assert moved.captions == batch.captions
    assert not batch.targets.is_meta
    encoded = PairsCollator(3, mean_colors, SHAPES)([dataset.reading(Store())[0]]).to("meta")
    assert encoded.encoded.latent_mean.is_meta
    assert encoded.targets is None


@pytest.mark.gpu
def test_batch_is_pinned_whole(dataset):
    if not torch.cuda.is_available():
        pytest.skip("page-locked memory needs a CUDA device")
    pinned = PairsCollator(2, mean_colors, SHAPES)([dataset[0]]).pin_memory()
    assert pinned.targets.is_pinned()
    assert pinned.draws.noise.is_pinned()


def test_a_failure_takes_the_place_of_its_batch(dataset):
    failure = LoadingFailure("it is gone")
    assert PairsCollator(3, mean_colors, SHAPES)([dataset[0], failure]) is failure


def test_samples_encoded_in_part_are_refused(dataset):
    samples = [dataset.reading(Store())[0], dataset.reading(Store())[1]]
    object.__setattr__(samples[1].encoded, "prompt_states", None)
    with pytest.raises(DataError, match="1 of 2 pairs of a batch have no prompt_states"):
        PairsCollator(3, mean_colors, SHAPES)(samples)


def test_a_collator_is_small(dataset):
    assert len(pickle.dumps(PairsCollator(3, len, SHAPES))) < 500
