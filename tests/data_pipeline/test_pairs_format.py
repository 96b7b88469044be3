"""What the whole table in tests/test_strangers_pairs.py does not show."""

import io

import pytest

from data_pipeline.pairs_format import BLANK_REFERENCE, KEY, MEMBER, HeaderFile, fault_of_text, is_size, most_bytes
from data_pipeline.sources import make_keys


def test_keys_that_mining_makes_are_keys():
    names = ["a.mp4", "sub/b c.mp4", "../x.mp4", "ä.mp4", "狗.mp4", "x" * 300 + ".mp4", "a.b.mp4", "\x1b[2J.mp4"]
    keys = make_keys(names)
    assert all(KEY.fullmatch(key) for key in keys.values())
    assert len(set(keys.values())) == len(names)


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "..", "a b", "a\n", "ä", "\u0661", "x" * 201, "a\\b", "~", "a:b"])
def test_what_is_no_key(key):
    assert not KEY.fullmatch(key)
    assert not MEMBER.fullmatch(f"{key}/x.json")


@pytest.mark.parametrize(
    "name", ["a.reference_01.png", "a.reference_.png", "a.reference_100000.png", "a.JSON", "a.json "]
)
def test_what_is_no_member(name):
    assert not MEMBER.fullmatch(name)


def test_sizes():
    assert is_size(1, 65_500) and is_size(16_384, 16_384)
    for width, height in ((0, 5), (-1, 5), (65_501, 1), (30_000, 30_000), (True, 5), (5.0, 5), ("5", 5), (None, 5)):
        assert not is_size(width, height)
    assert most_bytes("json") < most_bytes("target.jpg")


def test_texts():
    assert fault_of_text("abc", 3) == ""
    assert fault_of_text("abcd", 3) == "has 4 characters, more than the 3 that are read"
    assert fault_of_text(None, 3) == "is no text"


def test_a_header_is_not_read_whole_if_it_is_long():
    file = HeaderFile(io.BytesIO(b"abc"))
    assert file.read(2) == b"ab"
    for size in (-1, 1 << 30):
        with pytest.raises(ValueError, match="a header says that it has"):
            file.read(size)


def test_the_blank_reference_is_small():
    assert len(BLANK_REFERENCE) <= 512
