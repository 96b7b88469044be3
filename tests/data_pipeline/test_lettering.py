import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from data_pipeline import lettering
from data_pipeline.lettering import draw_text, joins, text_box, text_width


def drawn(text, size=12):
    picture = Image.new("L", (400, 40), 255)
    draw_text(ImageDraw.Draw(picture), (10, 10), text, size, 0)
    return np.asarray(picture)


def parts(text):
    """The parts of a text from left to right, each with the family of its font."""
    return [(font.getname()[0], part) for font, part in lettering._pieces(text, 12)]


def test_every_script_has_letters_of_its_own(script_text):
    first, second = map(drawn, script_text)
    assert not np.array_equal(first, second)  # boxes would be alike
    missing = drawn("\ue000" * len(script_text[0]))
    assert not np.array_equal(first, missing)
    known = frozenset().union(*map(lettering._characters, lettering._files()))
    assert set(map(ord, "".join(script_text))) <= known


def test_ascii_is_drawn_as_ever():
    text, font = "a dog & a cat [clip_1; 0.93]", ImageFont.load_default(size=12)
    picture = Image.new("L", (400, 40), 255)
    draw = ImageDraw.Draw(picture)
    draw.text((10, 10), text, font=font, fill=0)
    assert np.array_equal(drawn(text), np.asarray(picture))
    assert text_box((10, 10), text, 12) == draw.textbbox((10, 10), text, font=font)
    assert text_width(text, 12) == font.getlength(text)


def test_one_text_takes_as_many_fonts_as_it_needs():
    assert parts("a dog \U0001f415 und Mädchen 狗") == [
        ("DejaVu Sans", "a dog "),
        ("Noto Emoji", "\U0001f415"),
        ("DejaVu Sans", " und Mädchen "),
        ("Noto Sans CJK SC", "狗"),
    ]


def test_what_belongs_together_is_drawn_in_one_font():
    family, hand, flag = "\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea"
    for text in (family, hand, flag):
        assert [part for _, part in parts(text)] == [text]
    assert text_width(family, 12) < 1.5 * text_width("\U0001f467", 12)  # one picture, not two
    assert joins("\u0301")
    assert not joins("a")


def test_arabic_is_shaped_and_goes_from_right_to_left():
    assert features.check("raqm"), "Pillow without libraqm draws Arabic letter by letter, from left to right"
    assert text_width("كلب", 12) < sum(text_width(letter, 12) for letter in "كلب")
    assert [part for _, part in parts("قطة \U0001f408 سوداء")] == [" سوداء", "\U0001f408", "قطة "]
    assert [part for _, part in parts("dog \U0001f408 سوداء")] == ["dog ", "\U0001f408", " سوداء"]


def test_the_box_holds_all_that_is_drawn(script_text):
    text = f"{script_text[0]} a {script_text[1]}"
    rows, columns = np.nonzero(drawn(text) < 255)
    left, top, right, bottom = text_box((10, 10), text, 12)
    assert left - 1 <= columns.min()
    assert columns.max() <= right + 1
    assert top - 1 <= rows.min()
    assert rows.max() <= bottom + 1


def test_nothing_that_no_font_has_stops_the_drawing():
    for text in ("\ue000\U000e0001", "\U0010ffff", "a\u0301\u0302\u0303", "\u200d", "é\tb", "a\nb", "é\nb", ""):
        assert drawn(text).shape == (40, 400)
        assert text_width(text, 12) >= 0


def test_matplotlib_is_not_loaded_for_its_font():
    code = "import sys, data_pipeline.lettering as l; l.text_width('狗 собака', 12); print('matplotlib' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
