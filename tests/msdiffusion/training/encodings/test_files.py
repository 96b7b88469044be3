import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from msdiffusion.errors import DataError
from msdiffusion.training.encodings.files import PartFile, PartWriter, file_name, is_of, shard_stamp
from msdiffusion.training.pairs.sources import Shard


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(writer, folder):
    path = folder / "pairs-000000.safetensors"
    writer.save(path, "temporary", {"shard": "pairs-000000.tar"})
    assert not (folder / "temporary").exists()
    return PartFile(path)


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=6), first=st.integers(0, 5))
def test_references_come_back_pair_by_pair(counts, first, tmp_path_factory):
    writer = PartWriter("references", torch.float32)
    tokens = [draw(count, 3, 2, seed=i) for i, count in enumerate(counts)]
    for i, values in enumerate(tokens):
        writer.add_references(first + 2 * i, values)
    file = saved(writer, tmp_path_factory.mktemp("files"))
    assert writer.num_bytes == sum(counts) * 3 * 2 * 4
    for i, values in enumerate(tokens):
        assert torch.equal(file.read(first + 2 * i)["image_tokens"], values)


def test_equal_texts_are_written_once(tmp_path):
    writer = PartWriter("text", torch.float32)
    states, embeddings = [draw(5, 4, seed=i) for i in range(2)], draw(3, 6)
    texts = [("a", [0, 1]), ("b", [2]), ("a", [1, 0, 1])]
    for place, (caption, words) in enumerate(texts):
        number = "ab".index(caption)
        phrases = [f"word {word}" for word in words]
        writer.add_text(place, caption, phrases, states[number], states[number][0], embeddings[words])
    file = saved(writer, tmp_path)
    assert writer.num_bytes == 2 * 5 * 4 * 4 + 2 * 4 * 4 + 3 * 6 * 4
    for place, (caption, words) in enumerate(texts):
        fields = file.read(place)
        assert torch.equal(fields["prompt_states"], states["ab".index(caption)])
        assert torch.equal(fields["pooled"], states["ab".index(caption)][0])
        assert torch.equal(fields["phrase_embeddings"], embeddings[words])


def test_a_text_without_a_pooled_prompt(tmp_path):
    writer = PartWriter("text", torch.float32)
    writer.add_text(0, "a", ["b"], draw(5, 4), None, draw(1, 6))
    assert set(saved(writer, tmp_path).read(0)) == {"prompt_states", "phrase_embeddings"}


@pytest.mark.parametrize("with_deviation", [True, False])
def test_latents_of_several_sizes(tmp_path, with_deviation):
    writer = PartWriter("latents", torch.float32)
    sizes = [(64, 32), (32, 64), (64, 32)]
    means = [draw(4, height // 8, width // 8, seed=i) for i, (height, width) in enumerate(sizes)]
    for place, (size, mean) in enumerate(zip(sizes, means, strict=True)):
        writer.add_latents(place, size, mean, 2 * mean if with_deviation else None)
    file = saved(writer, tmp_path)
    for place, mean in enumerate(means):
        fields = file.read(place)
        assert torch.equal(fields["latent_mean"], mean)
        assert ("latent_deviation" in fields) == with_deviation
        if with_deviation:
            assert torch.equal(fields["latent_deviation"], 2 * mean)


def test_rows_do_not_hold_their_batch_in_memory():
    writer = PartWriter("references", torch.float32)
    writer.add_references(0, draw(100, 1, 3, 2)[7])
    (kept,) = writer._tensors["image_tokens"]
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_a_pair_that_is_not_there_is_told(tmp_path):
    writer = PartWriter("references", torch.float32)
    writer.add_references(3, draw(1, 3, 2))
    file = saved(writer, tmp_path)
    for place in (2, 4):
        with pytest.raises(DataError, match=f"no pair number {place}"):
            file.read(place)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(DataError, match="cannot be read"):
        PartFile(path)
    path.write_bytes(b"no such file")
    with pytest.raises(DataError, match="cannot be read"):
        PartFile(path)
    save_file({"places": torch.zeros(1)}, path)
    with pytest.raises(DataError, match=r"has format None"):
        PartFile(path)


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path, monkeypatch):
    writer = PartWriter("references", torch.float32)
    writer.add_references(0, draw(1, 3, 2))

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("msdiffusion.training.encodings.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        writer.save(tmp_path / "a.safetensors", "a.tmp", {})
    assert not list(tmp_path.iterdir())


def test_the_stamp_of_a_shard(tmp_path):
    vouched = Shard("pairs-000000.tar", "/x/pairs-000000.tar", sha256="1" * 64, bytes=10)
    assert is_of(shard_stamp(vouched), vouched)
    assert not is_of(shard_stamp(vouched), Shard("pairs-000000.tar", "/x/pairs-000000.tar", sha256="2" * 64))
    assert not is_of(shard_stamp(vouched), Shard("pairs-000001.tar", "/x/pairs-000001.tar", sha256="1" * 64))
    served = Shard("pairs-000000.tar", "https://x/pairs-000000.tar", bytes=10, stamp="etag 1")
    assert is_of(shard_stamp(served), served)
    assert not is_of(shard_stamp(served), Shard("pairs-000000.tar", served.place, bytes=10, stamp="etag 2"))
    content = tmp_path / "pairs-000000.tar"
    content.write_bytes(b"content")
    found = Shard("pairs-000000.tar", str(content), bytes=7)
    stamp = shard_stamp(found, content)
    assert is_of(stamp, found, content)
    import os

    os.utime(content, ns=(1, 1))  # another date, the same content
    assert is_of(stamp, found, content)
    content.write_bytes(b"CONTENT")
    assert not is_of(stamp, found, content)
    # the sha256 of a build.json that came later says the same of the same content
    content.write_bytes(b"content")
    assert is_of(stamp, Shard("pairs-000000.tar", str(content), sha256=stamp["sha256"]))


def test_names_of_files_follow_their_shards():
    assert file_name(Shard("part/pairs-000000.tar", "/x/part/pairs-000000.tar")) == "part/pairs-000000.safetensors"


def test_places_are_numbers_of_the_shard(tmp_path):
    writer = PartWriter("references", torch.float32)
    for place in (1, 4):
        writer.add_references(place, draw(1, 3, 2))
    assert np.array_equal(saved(writer, tmp_path).places, [1, 4])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"places": None}, "is damaged: it has no places"),
        ({"subjects": None}, "is damaged: it has no subjects"),
        ({"caption": None}, "is damaged: it has no caption"),
        ({"places": torch.tensor([0.0, 1.0])}, "places must be one row of int32, it is F32"),
        ({"places": torch.zeros(1, 2, dtype=torch.int32)},
         r"places must be one row of int32, it is I32 of shape \[1, 2\]"),
        ({"places": torch.tensor([1, 0], dtype=torch.int32)}, "its places do not increase"),
        ({"places": torch.tensor([-1, 0], dtype=torch.int32)}, "places holds numbers below 0"),
        ({"caption": torch.tensor([-1, 0], dtype=torch.int32)}, "caption holds numbers below 0"),
         # the last one, unseen
        ({"phrase": torch.tensor([0, -2], dtype=torch.int32)}, "phrase holds numbers below 0"),
    ],
)  # fmt: skip
def test_damaged_columns_are_told_when_a_file_is_opened(changes, told, tmp_path):
    with pytest.raises(DataError, match=told):
        PartFile(rewritten(tmp_path, changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"caption": torch.tensor([7, 7], dtype=torch.int32)},
        {"phrase": torch.tensor([9, 9], dtype=torch.int32)},
        {"subjects": torch.tensor([0], dtype=torch.int32)},
        {"prompt_states": None},
    ],
)
def test_numbers_beyond_the_end_are_told_when_a_pair_is_read(changes, tmp_path):
    with pytest.raises(DataError, match="is damaged: pair number 1 cannot be read"):
        PartFile(rewritten(tmp_path, changes)).read(1)


def test_a_part_that_is_none_is_told(tmp_path):
    with pytest.raises(DataError, match="has part 'sound', but encodings are of latents, references, text"):
        PartFile(rewritten(tmp_path, {}, part="sound"))


def rewritten(folder, changes, **stamp):
    """A file of two texts with other tensors, None to leave one out."""
    writer = PartWriter("text", torch.float32)
    for place in range(2):
        writer.add_text(place, f"a {place}", ["b"], draw(5, 4), None, draw(1, 6))
    path = saved(writer, folder).path
    tensors = {name: tensor for name, tensor in {**load_file(path), **changes}.items() if tensor is not None}
    save_file(tensors, path, metadata={**PartFile(path).stamp, **stamp})
    return path
