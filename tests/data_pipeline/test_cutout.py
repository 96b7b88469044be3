import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipeline import cutout
from data_pipeline.cutout import MIDDLE, boxes_of, cut_out, find_mask, is_cut, main
from data_pipeline.errors import MissingModelError, SettingsError
from data_pipeline.world import sample_scene


@pytest.fixture
def photo(tmp_path):
    """A photo with one thing, where it is (fractions), and its mask."""
    scene = sample_scene(np.random.default_rng(3), num_subjects=1, size=128)
    Image.fromarray(scene.image).save(tmp_path / "photo.png")
    return tmp_path / "photo.png", tuple(float(value) for value in scene.boxes[0]), scene.masks[0]


def comma(box):
    return ",".join(f"{value:.4f}" for value in box)


def test_a_thing_is_cut_out(photo, tmp_path, capsys):
    path, box, truth = photo
    command = [str(path), "--out", str(tmp_path / "out"), "--box", comma(box), "--segmenter", "embedded"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out' / 'photo.png'}\n"
    assert "of the photo, the network's own score" in captured.err
    assert "note:" not in captured.err
    result = np.asarray(Image.open(tmp_path / "out" / "photo.png"))
    assert result.shape[2] == 4
    assert set(np.unique(result[..., 3])) == {0, 255}
    assert not result[result[..., 3] == 0].any()
    height, width = truth.any(1).sum(), truth.any(0).sum()
    assert abs(result.shape[0] - height) <= 6 and abs(result.shape[1] - width) <= 6
    assert (result[..., 3] > 0).sum() == pytest.approx(truth.sum(), rel=0.15)
    assert main(command) == 2
    assert "is there already, and nothing is overwritten" in capsys.readouterr().err


def test_a_cut_out_is_cropped_and_empty_beside_the_thing():
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    mask = np.zeros((4, 5), bool)
    mask[1, 2] = mask[2, 3] = True
    found = cut_out(pixels, mask)
    assert found.tolist() == [[[*pixels[1, 2], 255], [0] * 4], [[0] * 4, [*pixels[2, 3], 255]]]


class Everything:
    """Finds a thing that fills the whole picture, or none."""

    def __init__(self, value):
        self.value = value

    def segment(self, requests):
        from dataclasses import replace

        [(frame, [thing])] = requests
        return [(replace(thing, mask=np.full(frame.image.shape[:2], self.value), mask_score=0.5),)]


def test_what_lies_beside_the_box_is_left_out():
    mask, score = find_mask(Everything(True), np.zeros((100, 200, 3), np.uint8), (0.25, 0.5, 0.75, 1.0))
    assert score == 0.5
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (47, 99, 45, 154)


def test_a_mask_along_the_edge_of_the_box_is_told(photo, tmp_path, monkeypatch, capsys):
    """By the way of the background, and of a thing that goes on beyond the box; not of a bust at the photo's edge."""
    monkeypatch.setattr(cutout, "load_segmenter", lambda *_: Everything(True))
    assert main([str(photo[0]), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert "photo.png the mask runs along the box's edge: it is the background, or the thing" in told
    assert "photo.png may be something else, so low a score has it" in told  # 0.5
    mask = np.zeros((100, 100), bool)
    mask[40:, 30:70] = True
    assert not is_cut(mask, (0.2, 0.3, 0.8, 1.0))
    assert not is_cut(mask, (0.0, 0.0, 1.0, 1.0))
    assert not is_cut(mask, (0.3, 0.4, 0.7, 1.0))
    assert is_cut(mask, MIDDLE)
    assert is_cut(~mask, (0.0, 0.0, 1.0, 1.0))


def test_a_box_with_nothing_in_it_is_told(photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cutout, "load_segmenter", lambda *_: Everything(False))
    assert main([str(photo[0]), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "error: nothing found in the box: picture" in error
    assert str(list(MIDDLE)) in error


def test_boxes_are_of_all_photos_or_of_each():
    assert boxes_of(None, 2) == [MIDDLE] * 2
    assert boxes_of(["0,0,.5,1"], 3) == [(0, 0, 0.5, 1)] * 3
    assert boxes_of(["0,0,.5,1", "0,0,1,1"], 2) == [(0, 0, 0.5, 1), (0, 0, 1, 1)]


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["0,0,1"], "must be four numbers"),
        (["left"], "must be four numbers"),
        (["0,0,640,480"], "these are pixels: divide them by width and height"),
        (["0.5,0,0.2,1"], "0 <= x1 < x2 <= 1"),
        (["nan,0,1,1"], "needed are fractions"),
        (["-0.1,0,1,1"], "needed are fractions"),
        (["0,0,1,1"] * 2, "once for each of the 3; it was given 2 times"),
    ],
)
def test_boxes_that_are_none_are_refused(texts, told):
    with pytest.raises(SettingsError, match=told):
        boxes_of(texts, 3)


def test_wrong_calls_are_told_before_anything_heavy_is_loaded(photo, tmp_path, capsys):
    path = str(photo[0])
    (tmp_path / "other").mkdir()
    Image.new("RGBA", (8, 8)).save(tmp_path / "other" / "photo.png")
    Image.new("I;16", (8, 8)).save(tmp_path / "grey.png")
    (tmp_path / "text.jpg").write_text("hello")
    out = ["--out", str(tmp_path / "out")]
    for command, told in (
        ([str(tmp_path / "none.jpg"), *out], "none.jpg: no such photo"),
        ([str(tmp_path), *out], "a folder: give the photos in it"),
        ([path, "--out", path], "--out must be a folder"),
        ([path, str(tmp_path / "other" / "photo.png"), *out], "would both become"),
        ([path, *out, "--box", "0,0,1"], "four numbers"),
        ([str(tmp_path / "other" / "photo.png"), *out], "transparent parts, so it is cut out already: use it as it is"),
        ([str(tmp_path / "grey.png"), *out], "more than 8 bits"),
        ([str(tmp_path / "text.jpg"), *out], "unreadable picture"),
        ([path, *out, "--segmenter-checkpoint", "none.pt"], "--segmenter-checkpoint: no file at none.pt"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.splitlines()[-1].startswith("msdiffusion cutout: error: ")
        assert not (tmp_path / "out").exists()


def test_weights_that_are_not_to_be_had_are_told_with_their_size(photo, tmp_path, monkeypatch, capsys):
    def nothing(models, say):
        raise MissingModelError(f"{[model.told() for model in models]} is not on this machine")

    monkeypatch.setattr("data_pipeline.models.hub.fetch", nothing)
    assert main([str(photo[0]), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "MobileSAM (dhkim2810/MobileSAM, 41 MB)" in told
    assert told.endswith("\n(a file that is here already: --segmenter-checkpoint FILE)\n")
    assert main([str(photo[0]), "--out", str(tmp_path / "out"), "--segmenter", "sam"]) == 2
    assert "SAM vit_b (ybelkada/segment-anything, 375 MB)" in capsys.readouterr().err


def test_a_photo_with_damaged_exif_data_is_cut_out(tmp_path, monkeypatch):
    """Orientation after a width as text, which pillow cannot write again."""
    entries = ((0x0100, 2, 4, b"abc\0"), (0x0112, 3, 1, b"\6\0\0\0"))
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + body + bytes(4)
    file = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(file, "JPEG", exif=exif)
    (tmp_path / "turned.jpg").write_bytes(file.getvalue())
    Image.new("RGB", (40, 20), "red").save(tmp_path / "broken.jpg", exif=b"Exif\0\0garbage")
    monkeypatch.setattr(cutout, "load_segmenter", lambda *_: Everything(True))
    photos = [str(tmp_path / "turned.jpg"), str(tmp_path / "broken.jpg")]
    assert main([*photos, "--out", str(tmp_path / "out"), "--box", "0,0,1,1"]) == 0
    assert Image.open(tmp_path / "out" / "turned.png").size == (20, 40)
    assert Image.open(tmp_path / "out" / "broken.png").size == (40, 20)


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from data_pipeline.cutout import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'segment_anything', 'timm', 'transformers'} & sys.modules.keys()))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert "`" not in out
    assert out.endswith("[]\n")
