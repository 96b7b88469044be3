import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ClipError, InputError
from data_pipeline.texts import as_caption, clean_caption, decode_text, open_text, read_csv, read_json_lines, read_text

WESTERN = st.text(alphabet=[*map(chr, range(32, 127)), "\n"], min_size=1)


@given(
    st.text(alphabet=st.characters(exclude_characters="\0\ufeff", exclude_categories=["Cs"])),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
)
def test_unicode_comes_back_as_it_was_written(text, encoding):
    assert decode_text(text.encode(encoding), "a.txt") == text


@given(WESTERN, st.sampled_from("\u00e9\u00fc\u00df\u2019\u20ac\u2026"), WESTERN)
def test_western_letters_of_windows_come_back_with_a_note(before, letter, after):
    notes = []
    assert decode_text((before + letter + after).encode("cp1252"), "a.txt", notes) == before + letter + after
    assert notes == ["a.txt is no UTF-8 and was read as Windows-1252; save it as UTF-8 if letters look wrong"]


@pytest.mark.parametrize(
    "text",
    [
        "\u201ccaf\u00e9\u201d \u2013 na\u00efve\u2026 10 \u20ac",
        "cr\u00e9\u00e9e, \u00ab \u00e0 \u00bb",
        "Stra\u00dfe \u00fcber \u00d6l",
        "ma\u00f1ana \u00bfqu\u00e9?",
        "sm\u00f8rrebr\u00f8d p\u00e5 \u00f8en",
    ],
)
def test_western_texts(text):
    assert decode_text(text.encode("cp1252"), "a.txt") == text


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("\u0421\u043e\u0431\u0430\u043a\u0430 \u0431\u0435\u0436\u0438\u0442", "cp1251", "is neither UTF-8, UTF-16"),
        ("\u0421\u043e\u0431\u0430\u043a\u0430", "koi8-r", "is neither UTF-8, UTF-16"),
        ("\u03c3\u03ba\u03cd\u03bb\u03bf\u03c2", "cp1253", "is neither UTF-8, UTF-16"),
        ("\u72d7\u5728\u8dd1", "gbk", "is neither UTF-8, UTF-16"),
        ("\u72ac\u304c\u8d70\u308b\u3002", "shift-jis", "is neither UTF-8, UTF-16"),
        ("a \u4e00 dog", "utf-16-le", "looks like UTF-16 without a byte-order mark"),
        ("a dog", "utf-32-le", "looks like UTF-16 without a byte-order mark"),
    ],
)
def test_other_encodings_are_an_error_and_no_wrong_letters(tmp_path, text, encoding, message):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=rf"a\.txt {message}.*; save it as UTF-8|a\.txt {message}.*: save it as UTF-8"):
        open_text(path)


def test_a_damaged_place_in_utf8_is_an_error_with_its_line():
    content = "caf\u00e9\ncaf\u00e9\n".encode() + b"caf\xe9\n"
    with pytest.raises(InputError, match="a.txt is damaged UTF-8, or in .* own: line 3 has the bytes e9 0a; save it"):
        decode_text(content, "a.txt")


def test_a_mark_that_is_a_lie():
    with pytest.raises(InputError, match="a.txt begins as UTF-16 but is none"):
        decode_text(b"\xff\xfea", "a.txt")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_where_every_second_byte_says_so(tmp_path, encoding):
    notes = []
    assert decode_text("a caf\u00e9\u2019s dog".encode(encoding), "a.txt", notes) == "a caf\u00e9\u2019s dog"
    assert notes == []
    path = tmp_path / "table.csv"
    path.write_bytes("video,caption\na.mp4,a dog\n".encode(encoding))
    assert list(read_csv(path, ("video", "caption"))) == [(2, {"video": "a.mp4", "caption": "a dog"})]
    with pytest.raises(InputError, match="a.txt begins as UTF-16-.E but is none .*: save it as UTF-8"):
        decode_text("a dog".encode(encoding) + b"\n", "a.txt")


def test_text_of_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.texts.BLOCK", 3)
    path = tmp_path / "a.txt"
    path.write_text("\u72d7\u00e9\U0001f415" * 5, encoding="utf-8")
    assert read_text(path) == "\u72d7\u00e9\U0001f415" * 5


def rows_of(tmp_path, content, needed=("video", "caption")):
    path = tmp_path / "table.csv"
    path.write_bytes(content.encode())
    return list(read_csv(path, needed))


@pytest.mark.parametrize(
    ("content", "row"),
    [
        ("video;caption\na.mp4;a dog, a cat\n", (2, "a.mp4", "a dog, a cat")),
        ("video\tcaption\na.mp4\ta dog; a cat, \n", (2, "a.mp4", "a dog; a cat, ")),
        ('video, caption\na.mp4, "a dog, a cat"\n', (2, "a.mp4", "a dog, a cat")),
        ("\n\nvideo,caption\r\n\r\na.mp4,a dog\r\n", (5, "a.mp4", "a dog")),
        ("video,caption\ra.mp4,a dog\r", (2, "a.mp4", "a dog")),
        ("sep=;\nvideo;caption\na.mp4;a dog, a cat\n", (3, "a.mp4", "a dog, a cat")),
        ('video,caption\na.mp4,"two\nlines, here"\n', (2, "a.mp4", "two\nlines, here")),
        ('video,caption\na.mp4,a "big" dog\n', (2, "a.mp4", 'a "big" dog')),
        ('video,caption\na.mp4,"a ""big"" dog"\n', (2, "a.mp4", 'a "big" dog')),
        ("caption,id,video\na dog,7,a.mp4\n", (2, "a.mp4", "a dog")),
        ('video,caption\na.mp4,"as in b.mp4, but\nnot c.mp4"\n', (2, "a.mp4", "as in b.mp4, but\nnot c.mp4")),
        ("\ufeff\ufeffvideo,caption\na.mp4,a dog\n", (2, "a.mp4", "a dog")),
        ("video,caption,\na.mp4,a dog,\n,,\n", (2, "a.mp4", "a dog")),
        ("video,caption,note\na.mp4,a dog\n", (2, "a.mp4", "a dog")),
    ],
)
def test_a_row_of_a_table(tmp_path, content, row):
    [(line, found)] = rows_of(tmp_path, content)
    assert (line, found["video"], found["caption"]) == row


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "video,caption\na.mp4,x\nb.mp4,a man in a hat, a dog and a cat\n",
            "line 3 has 3 fields, but the table has 2 columns: a text with a comma in it needs quotes round it",
        ),
        ("video;caption\na.mp4;a hat; a dog\n", "line 2 has 3 fields, .* a text with a semicolon in it needs quotes"),
        ("video\tcaption\na.mp4\ta hat\ta dog\n", "line 2 has 3 fields, .* a text with a tab in it needs quotes"),
        ("video,caption\na.mp4,a man\nin a hat\n", "line 3 has 1 of 2 fields: without caption"),
        ('video,caption\na.mp4,"a dog\nb.mp4,a cat\n', "line 2: a quote is opened and never closed"),
        (
            'video,caption\na.mp4,"a dog\nb.mp4,"a cat"\n',
            "lines 2 to 3: text follows a closing quote: a quote is left open",
        ),
        (
            'video,caption\na.mp4,"a dog\nb.mp4,a cat\nc.mp4,"\n',
            "line 2: a quote is left open; it takes in the row of b.mp4",
        ),
        ('caption,video\n"a dog,a.mp4\na cat,b.mp4\n",c.mp4\n', "line 2: a quote is left open; .* the row of b.mp4"),
        ('video,caption\na.mp4,"Big" dog\n', "line 2: text follows a closing quote: .*are not doubled"),
        ('video,caption\na.mp4,"' + "x" * 140_000, "line 2: field larger than field limit .*; is a quote left open?"),
        ("video,caption,Caption\na,b,c\n", "table.csv: two columns are called caption"),
        ("clip|text\na|b\n", "table.csv needs the columns video and caption; found clip|text"),
        ("clip;text\na;b\n", "table.csv needs the columns video and caption; found clip, text"),
        ("\n\n", "table.csv needs the columns video and caption; found none"),
    ],
)
def test_a_table_that_would_lose_something_is_an_error(tmp_path, content, message):
    with pytest.raises(InputError, match=message.replace("|", r"\|")):
        rows_of(tmp_path, content)


def test_lines_of_json(tmp_path):
    path = tmp_path / "a.jsonl"
    values = [{"a": "x\u2028y\x85z"}, {"a": 2}]
    text = "\r\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    path.write_bytes((f"\ufeff{text}\n\n\ufeff{{}}\n" + "[" * 100_000 + "\n{").encode())
    found = list(read_json_lines(path))
    assert found[:3] == [(1, values[0]), (2, values[1]), (4, {})]
    assert [(line, str(error)[:18]) for line, error in found[3:]] == [
        (5, "line 5 is no json:"),
        (6, "line 6 is no json:"),
    ]


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (None, ""),
        (" a  dog\n", "a dog"),
        (["", None, "a dog", "a cat"], "a dog"),
        ([], ""),
        ("[music] a dog", "[music] a dog"),
        ("[a dog]", "[a dog]"),
        ("(a dog)", "(a dog)"),
        ("'a dog'", "'a dog'"),
        ("Nan bakes a cake", "Nan bakes a cake"),
        ("7", "7"),
    ],
)
def test_captions(value, caption):
    assert as_caption(value, "caption") == caption


@pytest.mark.parametrize(
    "value",
    [
        *({}, 3, 1.5, float("nan"), True, b"a dog", [b"a dog"], [["a"]], ["a", 3], ["nan"]),
        *("['a', 'b']", '["a", null]', "{'a': 1}", "('a', 'b')", "b'a dog'", 'b"a dog"', "NaN", "None", "null"),
    ],
)
def test_what_is_no_caption(value):
    with pytest.raises(ClipError) as caught:
        as_caption(value, "text")
    assert caught.value.evidence["error"].startswith("text ")


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_a_clean_caption_can_be_written_anywhere(text):
    cleaned = clean_caption(text)
    assert cleaned.encode("utf-8").decode() == clean_caption(cleaned)
    assert "\n" not in cleaned


def test_a_file_that_cannot_be_read_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="^cannot read .*: Is a directory$"):
        read_text(tmp_path)


def test_a_caption_of_a_megabyte_is_refused_before_anybody_reads_it():
    assert as_caption("a" * 10_000, "caption") == "a" * 10_000
    for text in ("a" * 1_000_000, ["a dog", "a" * 10_001], "[" * 500_000 + "]" * 500_000):
        with pytest.raises(ClipError) as caught:
            as_caption(text, "caption")
        assert "characters, more than the 10,000 that are read" in caught.value.evidence["error"]
