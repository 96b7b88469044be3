import shutil

import numpy as np
import pytest
import torch

from msdiffusion.training.catalogue import read_catalogue
from msdiffusion.training.samples.encoded import EncodedSample
from msdiffusion.training.samples.mixture import MixedStore, Mixture


@pytest.fixture(scope="module")
def catalogues(pairs_dir, few_pairs_dir):
    return [read_catalogue(str(folder)) for folder in (few_pairs_dir, pairs_dir)]


@pytest.fixture(scope="module")
def mixture(catalogues):
    return Mixture(catalogues)


def test_pairs_are_counted_through(mixture, catalogues):
    assert len(mixture) == 28
    assert mixture.starts.tolist() == [0, 4, 28]
    for index, (number, place) in {0: (0, 0), 3: (0, 3), 4: (1, 0), 27: (1, 23)}.items():
        assert mixture.locate(index) == (number, place)
        catalogue = catalogues[number]
        assert mixture.key(index) == catalogue.keys[place]
        assert mixture.record(index) == catalogue.record(place)
        assert mixture.read(index).caption == catalogue.read(place).caption
        assert mixture.size(index) == (96, 64)
        assert mixture.shard_name(index) == catalogue.shards[catalogue.shard[place]].place
    assert mixture.sizes.shape == (28, 2)


def test_shards_are_counted_through(mixture):
    assert mixture.shards.tolist() == [0] * 4 + [1] * 10 + [2] * 10 + [3] * 4


def test_indices_are_split(mixture):
    first, second = mixture.split(np.array([1, 3, 4, 27]))
    assert first.tolist() == [1, 3]
    assert second.tolist() == [0, 23]
    assert [part.tolist() for part in mixture.split(np.array([5]))] == [[], [1]]


def test_the_digest_is_of_the_keys(mixture, pairs_dir, tmp_path):
    everything = np.arange(24)
    copy = Mixture([read_catalogue(str(shutil.copytree(pairs_dir, tmp_path / "copy")))])
    original = Mixture([read_catalogue(str(pairs_dir))])
    assert copy.digest(everything) == original.digest(everything)
    assert copy.digest(everything[1:]) != original.digest(everything)
    assert mixture.digest(np.arange(28)) != original.digest(everything)


def test_what_is_asked_for_ahead_reaches_its_catalogue(mixture, catalogues, monkeypatch):
    asked = []
    for number, catalogue in enumerate(catalogues):
        monkeypatch.setattr(catalogue, "prefetch", lambda part, n=number: asked.append((n, part.tolist())))
    mixture.prefetch(np.array([20, 2, 5]))
    assert asked == [(0, [2]), (1, [16, 1])]
    asked.clear()
    mixture.prefetch(np.array([9]))
    assert asked == [(1, [5])]


def test_a_mixed_store_reads_from_the_right_one(mixture):
    class Store:
        def __init__(self, name, *parts):
            self.name, self.parts = name, frozenset(parts)

        def read(self, index):
            return EncodedSample(torch.tensor([self.name, index]), None, None, None, None, None)

    store = MixedStore(mixture, [Store(0, "latents", "text"), Store(1, "latents")])
    assert store.parts == {"latents"}
    assert store.read(3).latent_mean.tolist() == [0, 3]
    assert store.read(4).latent_mean.tolist() == [1, 0]
