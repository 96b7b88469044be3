import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import ClipError
from data_pipeline.importers.pictures import open_picture, read_mask, to_box
from data_pipeline.records import box_in_pixels, encode_mask
from data_pipeline.steps.write_shards import encode_png

SIDES = st.integers(3, 5000)


@st.composite
def pixel_boxes(draw, over=0.0):
    """(width, height) and a box of at least a pixel, over the edges by at most ``over``."""
    size = draw(SIDES), draw(SIDES)
    box = []
    for side in size:
        low = draw(st.floats(-over, side - 1))
        box.append((low, draw(st.floats(max(low, 0) + 1.001, max(side + over, max(low, 0) + 1.001)))))
    (x1, x2), (y1, y2) = box
    return size, [x1, y1, x2, y2]


@given(pixel_boxes())
def test_pixels_and_fractions_of_one_box_are_one_box(drawn):
    (width, height), box = drawn
    if box[2] > width or box[3] > height or max(box) <= 1:
        return
    found, cut = to_box(box, (width, height), normalised=False, where={})
    assert not cut
    np.testing.assert_allclose(np.multiply(found, [width, height] * 2), box, atol=1e-6)
    fractions = [value / side for value, side in zip(box, [width, height] * 2, strict=True)]
    again, cut_again = to_box(fractions, (width, height), normalised=True, where={})
    np.testing.assert_allclose(again, found, atol=1e-9)
    assert not cut_again


@given(pixel_boxes(over=1.0))
def test_a_pixel_over_the_edge_is_cut_and_said(drawn):
    (width, height), box = drawn
    if all(0 <= value <= 1 for value in box):
        return
    try:
        found, cut = to_box(box, (width, height), normalised=False, where={})
    except ClipError as error:  # what is left inside is thinner than a pixel
        assert error.reason == "box smaller than a pixel"
        assert min(min(box[2], width) - max(box[0], 0), min(box[3], height) - max(box[1], 0)) < 1
        return
    assert 0 <= found[0] < found[2] <= 1
    assert 0 <= found[1] < found[3] <= 1
    over = max(-box[0], -box[1], box[2] - width, box[3] - height)
    assert cut == (over > 1e-6 * max(width, height))
    x1, y1, x2, y2 = box_in_pixels(found, width, height)
    assert x2 > x1
    assert y2 > y1


@given(pixel_boxes(), st.integers(0, 3), st.floats(1.01, 1e9))
def test_more_than_a_pixel_over_the_edge_is_refused(drawn, corner, over):
    (width, height), box = drawn
    box[corner] = -over if corner < 2 else (width, height)[corner - 2] + over
    with pytest.raises(ClipError, match="box beyond its picture"):
        to_box(box, (width, height), normalised=False, where={})


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_fractions_are_never_taken_for_pixels(values):
    with pytest.raises(ClipError, match="fractions where pixels are expected"):
        to_box(values, (640, 480), normalised=False, where={})


@given(st.integers(1, 12), st.integers(1, 12), st.randoms(use_true_random=False))
def test_a_mask_is_the_same_in_every_form(height, width, random):
    mask = np.array([[random.random() < 0.5 for _ in range(width)] for _ in range(height)])
    for form in (mask.tolist(), mask.astype(int).tolist(), (mask * 255).tolist(), encode_mask(mask)):
        np.testing.assert_array_equal(read_mask(form, None, (width, height), None), mask)
    np.testing.assert_array_equal(read_mask((mask * 7).tolist(), None, (width, height), 7), mask)


def test_a_mask_of_another_size_is_refused(tmp_path):
    Image.new("1", (3_000, 3_000)).save(tmp_path / "mask.png")
    with pytest.raises(ClipError, match="another size") as refused:
        read_mask("mask.png", tmp_path / "mask.png", (8, 8), None)
    assert refused.value.evidence["mask"] == [3_000, 3_000]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_a_transparent_channel_that_hides_nothing_is_no_fault(tmp_path, mode):
    path = tmp_path / "picture.png"
    if mode == "P":
        Image.new("RGB", (8, 8), (0, 128, 255)).convert("P").save(path, transparency=200)  # a colour it does not use
    elif mode == "PA":
        path = tmp_path / "picture.tif"
        Image.new("LA", (8, 8), (9, 255)).save(path)
    else:
        Image.new(mode, (8, 8), (0, 128, 255, 255) if mode == "RGBA" else (9, 255)).save(path)
    assert open_picture(path, "picture", 100, "refuse").pixels.shape == (8, 8, 3)


@pytest.mark.parametrize("name", ["grey.png", "bits.png", "print.jpg", "map.bmp", "scan.tif", "web.webp", "one.gif"])
def test_what_opens(tmp_path, name):
    mode = {"grey": "L", "bits": "1", "print": "CMYK", "one": "P"}.get(name.split(".")[0], "RGB")
    Image.new(mode, (9, 7)).save(tmp_path / name)
    found = open_picture(tmp_path / name, name, 63, "refuse")
    assert found.pixels.shape == (7, 9, 3)
    assert found.size == (9, 7)


def test_the_largest_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((7, 9, 4), np.uint8) + 255))
    assert open_picture(tmp_path / "a.png", "a", 63, "refuse").size == (9, 7)
    with pytest.raises(ClipError, match="picture too large") as refused:
        open_picture(tmp_path / "a.png", "a", 62, "refuse")
    assert refused.value.evidence == {"picture": "a", "size": [9, 7], "max_pixels": 62, "max_side": 65_500}


def test_a_bomb_is_refused_by_its_header(tmp_path):
    header = bytearray(encode_png(np.zeros((1, 1, 4), np.uint8)))
    header[16:24] = (30_000).to_bytes(4, "big") * 2  # the sides that it claims
    import zlib

    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(header)
    with pytest.raises(ClipError) as refused:
        open_picture(tmp_path / "bomb.png", "bomb", 64_000_000, "refuse")
    assert refused.value.reason in ("picture too large", "unreadable picture")
    assert "size" in refused.value.evidence or "DecompressionBombError" in refused.value.evidence["error"]


def test_a_picture_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)

    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", forbidden)
    with pytest.raises(ClipError, match="unreadable picture") as refused:
        open_picture(path, "a.png", 100, "refuse")
    assert refused.value.evidence["error"] == "Permission denied"
