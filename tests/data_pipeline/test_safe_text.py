import pytest
from jinja2 import UndefinedError

from data_pipeline.errors import ClipError, InputError
from data_pipeline.safe_text import Html, html, printable, visible, visible_line
from msdiffusion.errors import DataError, warn_caller

SHOWN = {
    "a\x1b[31mb": r"a\x1b[31mb",
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "\r\x08\x00\x7f": r"\x0d\x08\x00\x7f",
    "\x9b2J\x85": r"\x9b2J\x85",  # control characters of 8 bits
    "a\u202etxt.exe\u2066": r"a\u202etxt.exe\u2066",  # right to left
    "\u2028\u2029": r"\u2028\u2029",
    "name\udcff.mp4": r"name\xff.mp4",  # a byte of a file's name
    "\ud800": r"\ud800",
    "dög 🐕 狗 שלום": "dög 🐕 狗 שלום",
    "tab\tand\nlines": "tab\tand\nlines",
    "": "",
}


@pytest.mark.parametrize("text", SHOWN)
def test_control_characters_are_shown(text):
    assert visible(text) == SHOWN[text]
    assert visible(visible(text)) == SHOWN[text]
    visible(text).encode()


def test_one_line_stays_one():
    assert visible_line("a\nb\x1bc") == r"a\nb\x1bc"


@pytest.mark.parametrize("error", [InputError("a\x1bb"), DataError("a\x1bb"), ClipError("a\x1bb")])
def test_every_error_of_ours_can_be_printed(error):
    assert str(error) == r"a\x1bb"
    assert error.args[0] == "a\x1bb"


def test_what_was_measured_can_be_printed_too():
    assert ClipError("too long", of="\x1b", n=3).told == r"too long: of \x1b, n 3"
    assert ClipError("too long").told == "too long"


def test_warnings_can_be_printed():
    with pytest.warns(UserWarning, match=r"a\\x1bb"):
        warn_caller("a\x1bb")


def test_every_value_of_a_page_is_escaped():
    text = "<b title='x'>&\"\udcff"
    assert html("<p>{{ text }}</p>", text=text) == "<p>&lt;b title=&#39;x&#39;&gt;&amp;&#34;?</p>"
    assert html("{{ a }}{{ b }}", a=html("<i>{{ text }}</i>", text="<"), b=3) == "<i>&lt;</i>3"
    assert html('<a title="{{ text }}">', text='"onclick="x') == '<a title="&#34;onclick=&#34;x">'
    assert html("{{ text }}", text=str(Html("<i>"))) == "&lt;i&gt;"
    assert html("{{ text }}", text="{{ 7 * 7 }}") == "{{ 7 * 7 }}"


def test_a_value_that_is_missing_is_an_error():
    with pytest.raises(UndefinedError, match="'text' is undefined"):
        html("{{ text }}")


def test_half_a_character_of_a_file_name_does_no_harm():
    assert printable("a\udcffb") == "a?b"
    assert printable("dög 🐕") == "dög 🐕"


def test_an_error_keeps_both_ends_of_what_is_endless():
    from data_pipeline.errors import InputError
    from msdiffusion.errors import RequestError

    for kind in (InputError, RequestError):
        text = str(kind(f"the caption {'a' * 50_000} is long: shorten it"))
        assert len(text) < 2100
        assert text.startswith("the caption aaa")
        assert text.endswith("aaa is long: shorten it")
        assert "[... of 50,032 characters ...]" in text
        assert str(kind("short")) == "short"
