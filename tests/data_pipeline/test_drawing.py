import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_pipeline.drawing import LINES, _wrapped, beside, contact_sheet, draw_cut_out, draw_frame, draw_preview
from data_pipeline.lettering import text_width
from data_pipeline.records import DetectedPair, NamedPair, TrainingPair

MASK = np.zeros((40, 60), dtype=bool)
MASK[10:30, 20:50] = True
GREY = np.full((40, 60, 3), 128, dtype=np.uint8)


def test_a_frame_keeps_its_aspect_and_shows_box_and_mask():
    picture = draw_frame(GREY, [("dog", (1 / 3, 0.25, 5 / 6, 0.75), MASK)], height=80)
    assert picture.size == (120, 80)
    pixels = np.asarray(picture)
    assert pixels[5, 5].tolist() == [128, 128, 128]
    assert pixels[45, 80, 0] > pixels[45, 80, 1] + 30  # tinted
    assert np.array_equal(GREY, np.full_like(GREY, 128))  # the frame itself is untouched


def test_a_cut_out_on_its_board():
    cutout = Image.new("RGBA", (10, 30), (255, 0, 0, 255))
    pixels = np.asarray(draw_cut_out(cutout, 64))
    assert pixels.shape == (64, 64, 3)
    assert pixels[32, 32].tolist() == [255, 0, 0]
    assert pixels[32, 3, 0] == pixels[32, 3, 1]


def test_beside():
    row = beside([Image.new("RGB", (10, 20)), Image.new("RGB", (5, 12))], gap=3)
    assert row.size == (18, 20)


def test_tiles_wrap_into_rows_and_wide_ones_shrink():
    tiles = [(Image.new("RGB", (300, 50), "blue"), "a dog " * 60)] * 3 + [
        (Image.new("RGB", (2000, 100), "red"), "wide")
    ]
    sheet = contact_sheet(tiles, width=700)
    assert sheet.width == 700
    assert sheet.height > 2 * 50


def test_previews_of_every_stage(make_pair, make_detection, make_match):
    frames = make_pair(GREY, GREY)
    found = make_detection(MASK)
    box_only = replace(found, mask=None)
    records = [
        frames,
        NamedPair(frames=frames, entities=()),
        DetectedPair(frames=frames, entities=(), reference=(box_only,), target=(found,)),
        TrainingPair(frames=frames, matches=(make_match(MASK, MASK),)),
    ]
    sizes = {Image.open(io.BytesIO(draw_preview(record))).size for record in records}
    assert len(sizes) == 1


@pytest.mark.parametrize("record", [None, "file"])
def test_no_preview_before_frames_are_decoded(record):
    assert draw_preview(record) == b""


def test_headings_stand_on_lines_of_their_own():
    tile = (Image.new("RGB", (100, 50), "blue"), "dog")
    plain, headed = contact_sheet([tile, tile]), contact_sheet(["one", tile, "two", tile])
    assert headed.height > 2 * plain.height
    assert np.asarray(headed)[10:30, 10:60].min() < 100  # the words of the first one


def test_words_longer_than_a_tile_are_broken_not_lost():
    lines = _wrapped("short " + "x" * 60 + " end", 12, 160, most=9)
    assert lines[0] == "short"
    assert "".join(lines).replace(" ", "") == "short" + "x" * 60 + "end"
    assert all(text_width(line, 12) <= 160 for line in lines)
    assert len(_wrapped("word " * 200, 12, 160)) == LINES
    assert _wrapped("", 12, 160) == [""]
    assert _wrapped("a dog\n[clip 1]", 12, 160) == ["a dog", "[clip 1]"]
    assert _wrapped("one two three", 12, 40, most=2) == ["one", "two ..."]
    assert _wrapped("one two\n[1]", 12, 40, most=2) == ["one", "two ..."]


def test_a_caption_of_two_thousand_characters_without_a_space_is_wrapped_at_once():
    lines = _wrapped("狗在沙滩上" * 400, 12, 160)
    assert len(lines) == LINES
    assert lines[-1].endswith(" ...")
    assert all(140 <= text_width(line, 12) <= 160 for line in lines[:-1])


def test_what_belongs_together_is_not_broken():
    families = "\U0001f469\u200d\U0001f467\U0001f44d\U0001f3fd" * 30
    lines = _wrapped(families, 12, 100, most=9)
    assert len(lines) > 2
    for line in lines:
        assert line[0] in "\U0001f469\U0001f44d"
        assert line[-1] != "\u200d"


def test_phrases_and_captions_in_any_script_are_drawn(script_text):
    """Where Pillow's own font has a box for every letter, two texts of one length look the same."""
    first, second = script_text
    mask = np.zeros((168, 168), dtype=bool)
    grey = np.full((168, 168, 3), 128, dtype=np.uint8)
    frames = [draw_frame(grey, [(text, (0, 0, 1, 1), mask)]) for text in script_text]
    assert not np.array_equal(*map(np.asarray, frames))
    tile = Image.new("RGB", (160, 20))
    assert not np.array_equal(*(np.asarray(contact_sheet([(tile, text)])) for text in (first, second)))
