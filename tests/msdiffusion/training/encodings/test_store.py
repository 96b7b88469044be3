import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from msdiffusion.training.catalogue import read_catalogue
from msdiffusion.training.encodings import store as encoding_store
from msdiffusion.training.encodings.files import PartWriter, file_name, shard_stamp
from msdiffusion.training.encodings.store import ShardEncodings, content_of, encodings_root, incomplete, unusable
from msdiffusion.training.samples.mixture import MixedStore, Mixture


def encode(catalogue, folder, value=0.0, without=()):
    """Files whose tokens say which pair they are of."""
    for number, shard in enumerate(catalogue.shards):
        writer = PartWriter("references", torch.float32)
        for index in np.flatnonzero(catalogue.shard == number):
            if index not in without:
                writer.add_references(int(catalogue.place[index]), torch.full((2, 1, 1), value + float(index)))
        path = folder / file_name(shard)
        writer.save(path, f"{path.stem}.tmp", shard_stamp(shard, content_of(shard)))
    return folder


@pytest.fixture
def catalogue(pairs_dir):
    return read_catalogue(str(pairs_dir), progress=False)


def test_pairs_are_read_in_any_order_with_few_open_files(catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding_store, "OPEN_FILES", 2)
    store = ShardEncodings({"references": encode(catalogue, tmp_path)}, catalogue)
    for index in (23, 0, 11, 5, 22, 10):
        sample = store.read(index)
        assert sample.image_tokens.flatten().tolist() == [index, index]
        assert sample.latent_mean is sample.prompt_states is None
        assert len(store._files) <= 2


def test_it_is_sent_to_other_processes_without_its_files(catalogue, tmp_path):
    store = ShardEncodings({"references": encode(catalogue, tmp_path)}, catalogue)
    store.read(3)
    other = pickle.loads(pickle.dumps(store))
    assert not other._files
    assert torch.equal(other.read(3).image_tokens, store.read(3).image_tokens)
    assert len(pickle.dumps(store)) < 10_000


def test_what_is_missing_is_told(catalogue, tmp_path):
    folder = encode(catalogue, tmp_path / "whole")
    assert incomplete(folder, catalogue) is None
    lacking = encode(catalogue, tmp_path / "lacking", without=(12, 13))
    assert incomplete(lacking, catalogue) == "2 pairs of shard pairs-000001.tar were not encoded"
    (folder / "pairs-000001.safetensors").unlink()
    assert incomplete(folder, catalogue) == "shard pairs-000001.tar was not encoded"
    (folder / "pairs-000000.safetensors").write_bytes(b"broken")
    assert "(2 of 3 shards have such a problem)" in incomplete(folder, catalogue)
    shard = catalogue.shards[1]
    assert unusable(lacking / file_name(shard), shard, np.array([0, 1])) is None  # nobody needs the others


def test_a_shard_that_was_changed_in_place_is_noticed_though_its_build_json_stays(finished_dir, tmp_path):
    catalogue = read_catalogue(str(finished_dir), progress=False)
    assert catalogue.shards[0].sha256 is not None
    folder = encode(catalogue, tmp_path / "out")
    assert incomplete(folder, catalogue) is None
    path = finished_dir / "pairs-000001.tar"
    content, before = path.read_bytes(), path.stat()
    path.write_bytes(content.replace(b"on the beach", b"in the city!"))
    os.utime(path, ns=(before.st_mtime_ns + 1, before.st_mtime_ns + 1))
    changed = read_catalogue(str(finished_dir), progress=False)
    assert incomplete(folder, changed) == "shard pairs-000001.tar was changed since"
    path.write_bytes(content)  # another date, the same content: as after a copy
    assert incomplete(folder, read_catalogue(str(finished_dir), progress=False)) is None


def test_where_encodings_lie(catalogue, pairs_dir, tmp_path):
    assert encodings_root(catalogue) == pairs_dir / "encodings"
    elsewhere = encodings_root(catalogue, tmp_path)
    assert elsewhere.parent == tmp_path and elsewhere.name.startswith(pairs_dir.name)


def test_two_datasets_of_one_name_have_their_own_folders(pairs_dir, tmp_path):
    import shutil

    roots = set()
    for parent in ("a", "b"):
        copy = Path(shutil.copytree(pairs_dir, tmp_path / parent / "pairs"))
        roots.add(encodings_root(read_catalogue(str(copy), progress=False), tmp_path / "out"))
    assert len(roots) == 2


def test_a_mixture_has_the_parts_that_all_have(catalogue, tmp_path):
    class Half:
        parts = frozenset({"text"})

    first = ShardEncodings({"references": encode(catalogue, tmp_path / "a")}, catalogue)
    second = ShardEncodings({"references": encode(catalogue, tmp_path / "b", value=100)}, catalogue)
    mixture = Mixture([catalogue, catalogue])
    both = MixedStore(mixture, [first, second])
    assert both.parts == {"references"}
    assert both.read(24).image_tokens.flatten().tolist() == [100, 100]
    less = MixedStore(mixture, [first, Half()])
    assert less.parts == frozenset()
    assert less.read(3).image_tokens is None
