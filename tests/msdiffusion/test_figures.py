import numpy as np
import pytest
import torch
from PIL import Image

from msdiffusion.errors import LayoutError
from msdiffusion.figures import COLORS, as_picture, draw_boxes, draw_layout, enlarge, picture_cell

GREY = Image.new("RGB", (64, 32), (128, 128, 128))


def test_small_pictures_are_enlarged_by_whole_numbers():
    assert draw_layout(GREY).size == (512, 256)
    assert draw_layout(GREY, side=30).size == (64, 32)
    assert draw_layout(Image.new("L", (300, 400))).size == (300, 400)


def test_boxes_are_outlined_in_the_colour_of_their_subject():
    drawn = draw_layout(GREY, boxes=[(0, 0, 0.5, 1), None, (0.5, 0, 1, 1)], side=32)
    assert drawn.getpixel((0, 16)) == COLORS[0]
    assert drawn.getpixel((31, 16)) == COLORS[0]
    assert drawn.getpixel((63, 16)) == COLORS[2]
    assert drawn.getpixel((16, 16)) == (128, 128, 128)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_maps_are_painted_where_they_are_high(kind):
    maps = np.zeros((2, 4, 8), dtype=bool)
    maps[0, :, :2] = True
    maps[1, :, 6:] = True
    drawn = np.asarray(draw_layout(GREY, maps=kind(maps), side=32)).astype(int)
    for column, color in ((2, COLORS[0]), (61, COLORS[1])):
        expected = 128 + (np.array(color) - 128) * 0.65
        assert np.abs(drawn[16, column] - expected).max() <= 2
    assert (drawn[:, 30:34] == 128).all()


def test_phrases_are_written():
    assert draw_layout(GREY, phrases=["dog"]).tobytes() != draw_layout(GREY).tobytes()
    boxes = [(0.5, 0.5, 1, 1)]
    assert draw_layout(GREY, boxes=boxes, phrases=["dog"]).tobytes() != draw_layout(GREY, boxes=boxes).tobytes()


def test_other_maps_are_refused():
    with pytest.raises(LayoutError, match=r"\(subjects, rows, columns\), got \(4, 4\)"):
        draw_layout(GREY, maps=np.zeros((4, 4)))
    with pytest.raises(LayoutError, match="from 0 to 2"):
        draw_layout(GREY, maps=np.array([[[0, 2]]]))


def test_boxes_are_drawn_where_they_are():
    sheet = np.asarray(draw_boxes([(0.5, 0.0, 1.0, 0.5)], ["dog"], side=100))
    outline = np.array(COLORS[0])
    np.testing.assert_array_equal(sheet[25, 50], outline)
    assert not (sheet[:, :49] == outline).all(-1).any()


def test_enlarging_keeps_pixels_crisp_at_whole_multiples():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    large = np.asarray(enlarge(picture, 192))
    np.testing.assert_array_equal(large, np.asarray(picture).repeat(3, 0).repeat(3, 1))
    assert enlarge(Image.new("RGB", (80, 40)), 192).size == (192, 192)


def test_pixels_become_pictures():
    pixels = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1).expand(3, 2, 4)
    picture = as_picture(pixels)
    assert picture.size == (4, 2)
    assert picture.getpixel((0, 0)) == (0, 128, 255)


def test_cells_take_pictures_of_any_size():
    assert picture_cell(Image.new("RGB", (1, 300)), 128).size == (128, 128)
