import hashlib
import json
import multiprocessing
import pickle
import shutil
import tarfile
import warnings

import numpy as np
import pytest

from msdiffusion.errors import DataError
from msdiffusion.training import catalogue as catalogue_module
from msdiffusion.training.catalogue import main, read_catalogue, split_by_key
from msdiffusion.training.damage import verify
from msdiffusion.training.shards import find_shards, index_shards, read_pair

BOX = (0.25, 0.25, 0.75, 0.75)


def same_pair(first, second):
    assert (first.key, first.caption, first.phrases) == (second.key, second.caption, second.phrases)
    np.testing.assert_array_equal(first.boxes, second.boxes)
    np.testing.assert_array_equal(np.asarray(first.target), np.asarray(second.target))
    assert len(first.references) == len(second.references)
    for one, other in zip(first.references, second.references, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_reads_every_pair_by_number(pairs_dir):
    catalogue = read_catalogue(str(pairs_dir))
    locations = index_shards(find_shards(pairs_dir))
    assert len(catalogue) == 24
    assert catalogue.shard_sizes.tolist() == [10, 10, 4]
    assert (catalogue.shard.dtype, catalogue.place.dtype) == (np.int32, np.int32)
    assert list(catalogue.keys) == [location.key for location in locations]
    for i in np.random.default_rng(0).permutation(24):
        same_pair(catalogue.read(i), read_pair(locations[i]))
        assert catalogue.record(i)["key"] == catalogue.keys[i]
