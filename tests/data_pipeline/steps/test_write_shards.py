import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import SettingsError
from data_pipeline.records import TrainingPair, cut_out, decode_mask
from data_pipeline.steps.write_shards import WriteShards

MASK = np.zeros((32, 48), dtype=bool)
MASK[4:20, 6:30] = True
OTHER = np.roll(MASK, 9, axis=1)


@pytest.fixture
def pair(make_pair, make_match):
    rng = np.random.default_rng(0)
    smooth = [np.kron(rng.integers(0, 256, (4, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(2)]
    match = make_match(MASK, OTHER, attributes={"main_color": "red"})
    return TrainingPair(frames=make_pair(*smooth), matches=(match,))


def members(encoded):
    with tarfile.open(fileobj=io.BytesIO(encoded.blocks + bytes(1024))) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_files_of_a_sample(pair):
    files = members(WriteShards().process(pair))
    assert list(files) == ["clip.target.jpg", "clip.reference_0.png", "clip.json"]
    target = Image.open(io.BytesIO(files["clip.target.jpg"]))
    assert (target.format, target.size, target.mode) == ("JPEG", (48, 32), "RGB")
    assert np.abs(np.asarray(target).astype(int) - pair.frames.target.image).mean() < 3
    reference = np.asarray(Image.open(io.BytesIO(files["clip.reference_0.png"])))
    assert np.array_equal(reference, cut_out(pair.frames.reference.image, MASK, pair.matches[0].reference.box))


def test_metadata(pair):
    step = WriteShards(pipeline={"version": "0.1.0", "settings_hash": "abc"})
    encoded = step.process(pair)
    [sample] = encoded.samples
    assert json.loads(members(encoded)["clip.json"]) == json.loads(json.dumps(sample))
    assert list(sample) == ["schema", "key", "caption", "width", "height", "subjects", "source", "pipeline"]
    assert sample["schema"] == "msdiffusion.pairs/1"
    assert (sample["key"], sample["width"], sample["height"]) == ("clip", 48, 32)
    assert sample["pipeline"] == {"version": "0.1.0", "settings_hash": "abc"}
    assert sample["source"] == {
        "video": "clip.mp4",
        "sha256": "0" * 64,
        "pair": 0,
        "frame_reference": 3,
        "frame_target": 8,
        "t_reference": 0.375,
        "t_target": 1.0,
        "shot": [0.0, 1.375],
    }
    [subject] = sample["subjects"]
    assert subject["phrase"] == "dog"
    assert subject["mention"] == "a dog"
    assert subject["reference_box"] == [0.125, 0.125, 0.625, 0.625]
    assert subject["target_box"] == [0.3125, 0.125, 0.8125, 0.625]
    assert np.array_equal(decode_mask(subject["reference_mask_rle"]), MASK)
    assert np.array_equal(decode_mask(subject["target_mask_rle"]), OTHER)
    assert (subject["detection_score"], subject["match_similarity"], subject["area"]) == (1.0, 0.9, 0.25)
    assert subject["attributes"] == {"main_color": "red"}


def test_both_directions(pair):
    encoded = WriteShards(both_directions=True).process(pair)
    first, second = encoded.samples
    assert (first["key"], second["key"]) == ("clip", "clip-swapped")
    assert first["subjects"][0]["target_box"] == second["subjects"][0]["reference_box"]
    assert (second["source"]["frame_reference"], second["source"]["frame_target"]) == (8, 3)
    assert [name.split(".")[0] for name in members(encoded)] == ["clip"] * 3 + ["clip-swapped"] * 3


def test_a_further_pair_of_a_clip_has_a_key_of_its_own(pair):
    further = replace(pair, frames=replace(pair.frames, number=2))
    first, second = WriteShards(both_directions=True).process(further).samples
    assert (first["key"], second["key"]) == ("clip-pair2", "clip-pair2-swapped")
    assert first["source"]["pair"] == 2


def test_the_same_pair_gives_the_same_bytes(pair):
    assert WriteShards().process(pair).blocks == WriteShards().process(pair).blocks
    with tarfile.open(fileobj=io.BytesIO(WriteShards().process(pair).blocks + bytes(1024))) as archive:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in archive} == {(0, 0, "", 0o644)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs_per_shard": 0}, "pairs_per_shard must be at least 1, got 0"),
        ({"jpeg_quality": 101}, r"jpeg_quality must lie in 1..100, got 101"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingsError, match=message):
        WriteShards(**settings)
