import csv
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.records import InputError
from data_pipeline.sources import clean_caption, decode_text, find_videos, make_keys, read_captions


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "a.mp4", "deep/c.MKV", "notes.md"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "videos"


def test_videos_come_in_the_order_of_their_names(folder):
    assert [file.name for file in find_videos(folder)] == ["a.mp4", "b.mp4", "deep/c.MKV"]
    assert [file.key for file in find_videos(folder)] == ["a", "b", "deep_c"]


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match="no folder of videos at .*nowhere"):
        find_videos(tmp_path / "nowhere")


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(InputError, match="needs a folder"):
        find_videos(tmp_path / "a.mp4")


def test_folder_without_videos(tmp_path):
    (tmp_path / "readme.txt").write_text("nothing")
    with pytest.raises(InputError, match=r"no videos in .*looked for \*\.mp4"):
        find_videos(tmp_path)


def test_captions_beside_the_videos(folder):
    (folder / "a.txt").write_text(" a  dog\n")
    (folder / "b.json").write_text('{"caption": "a cat"}')
    (folder / "deep/c.txt").write_text("\n")
    assert [file.caption for file in find_videos(folder)] == ["a dog", "a cat", None]


@pytest.mark.parametrize("content", ["not json", "[1]", '{"text": "a cat"}', '{"caption": 3}'])
def test_an_unusable_caption_file_is_no_caption(folder, content):
    (folder / "a.json").write_text(content)
    assert find_videos(folder)[0].caption is None


ROWS = [{"video": "a.mp4", "caption": "from, the table"}, {"video": "c.MKV", "caption": "deep"}]


@pytest.fixture(params=["csv", "jsonl", "parquet"])
def table(request, tmp_path):
    path = tmp_path / f"captions.{request.param}"
    if request.param == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["video", "caption"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif request.param == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def test_a_table_wins_over_the_file_beside_the_video(folder, table):
    (folder / "a.txt").write_text("from the file")
    (folder / "b.txt").write_text("not in the table")
    assert [file.caption for file in find_videos(folder, table)] == ["from, the table", "not in the table", "deep"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "no captions table"),
        ("captions.xlsx", "", "is .csv, .jsonl or .parquet"),
        (
            "captions.csv",
            "file,text\na.mp4,dog\n",
            r"row 1: needs the columns video and caption, found \['file', 'text'\]",
        ),
        ("captions.csv", "video,caption\na.mp4,dog\na.mp4,cat\n", "row 2: a.mp4 has two different captions"),
        ("captions.jsonl", "{}{", "line 1: not json"),
        ("captions.jsonl", "[1]", "row 1: needs the columns video and caption, found list"),
        ("captions.csv", b"video,caption\n\xff\xfe,dog\n", "cannot read the captions table .* can't decode"),
        ("captions.parquet", "not parquet", "cannot read the captions table"),
        ("captions.csv", "video,caption\nother.mp4,dog\n", "no row of the captions table names a video"),
    ],
)
def test_an_unusable_table_says_what_is_wrong(folder, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        find_videos(folder, path)


def test_a_file_name_that_occurs_twice_needs_its_path(folder, tmp_path):
    (folder / "deep/a.mp4").write_bytes(b"x")
    table = tmp_path / "captions.csv"
    table.write_text("video,caption\na.mp4,outer\n")
    assert {file.name: file.caption for file in find_videos(folder, table)}["a.mp4"] == "outer"
    assert {file.name: file.caption for file in find_videos(folder, table)}["deep/a.mp4"] is None


def test_an_empty_cell_is_no_caption(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_text("video,caption\na.mp4,\n")
    assert read_captions(path) == {"a.mp4": ""}


def test_keys_have_no_dots_and_are_unique():
    names = [
        "clip.mp4",
        "a b.mp4",
        "a_b.mp4",
        "v1.2.mp4",
        "x" * 99 + ".mp4",
        "y-swapped.mp4",
        "z-pair2.mp4",
        "Clip.mp4",
    ]
    keys = make_keys(names)
    assert keys["v1.2.mp4"] == "v1_2"
    assert keys["a b.mp4"].startswith("a_b-")
    assert not keys["y-swapped.mp4"].endswith("-swapped")
    assert not keys["z-pair2.mp4"].endswith("-pair2")
    assert len({key.lower() for key in keys.values()}) == len(names)
    assert all("." not in key and len(key) <= 60 for key in keys.values())


def test_whatever_has_the_name_of_a_video_is_found(folder, tmp_path):
    os.mkfifo(folder / "pipe.mp4")
    (folder / "nowhere.mp4").symlink_to(tmp_path / "nowhere")
    (folder / "itself.mp4").symlink_to(folder / "itself.mp4")
    (folder / "folder.mp4").mkdir()
    (folder / "folder.mp4/inside.mp4").write_bytes(b"x")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "linked.mp4").symlink_to(folder / "a.mp4")
    names = ["a.mp4", "b.mp4", "deep/c.MKV", "folder.mp4", "folder.mp4/inside.mp4", "itself.mp4", "linked.mp4"]
    assert [file.name for file in find_videos(folder)] == [*names, "nowhere.mp4", "pipe.mp4"]


def test_a_folder_that_cannot_be_read_is_in_the_list(folder, monkeypatch):
    # Root may read everything, so the refusal is played.
    original = os.scandir
    (folder / "locked").mkdir()

    def scan(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert [file.name for file in find_videos(folder)] == ["a.mp4", "b.mp4", "deep/c.MKV", "locked"]
    with pytest.raises(InputError, match="locked cannot be read: give permission"):
        find_videos(folder / "locked")


def test_names_can_always_be_written(folder):
    odd = [b"\xff.mp4", b"\\xff.mp4", b"caf\xe9.mp4", "new\nline \U0001f388.mp4".encode()]
    for name in odd:
        (folder / os.fsdecode(name)).write_bytes(name)
    files = find_videos(folder)
    assert len(files) == 3 + len(odd)
    assert len({file.name for file in files}) == len({file.key for file in files}) == len(files)
    assert all(file.name.encode("utf-8") and file.path.is_file() for file in files)
    assert {"caf\\xe9.mp4", "\\xff.mp4", "\\xff.mp4~", "new\nline \U0001f388.mp4"} < {file.name for file in files}


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ("a caf\u00e9".encode(), "a caf\u00e9"),
        ("a caf\u00e9".encode("latin-1"), "a caf\u00e9"),
        ("a caf\u00e9".encode("utf-8-sig"), "a caf\u00e9"),
        ("a caf\u00e9".encode("utf-16"), "a caf\u00e9"),
        ("a \U0001f415\x00 dog".encode(), "a \U0001f415 dog"),
        (b"\x00\n", None),
    ],
)
def test_encodings_of_captions(folder, content, caption):
    (folder / "a.txt").write_bytes(content)
    assert find_videos(folder)[0].caption == caption
    assert decode_text(content) is not None


def test_half_a_surrogate_pair_becomes_a_character_that_can_be_written(folder):
    (folder / "a.json").write_text('{"caption": "a \\ud83d dog \\ud83d\\udc15"}')
    assert find_videos(folder)[0].caption == "a \ufffd dog \U0001f415"
    assert clean_caption("\udc00").encode("utf-8")


def test_caption_files_that_cannot_be_read(folder):
    (folder / "a.json").write_text("[" * 100_000)
    (folder / "b.txt").mkdir()
    (folder / f"{'x' * 251}.mp4").write_bytes(b"x")
    assert [file.caption for file in find_videos(folder)] == [None] * 4


def test_a_table_with_a_byte_order_mark_and_rows_that_occur_twice(folder, tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text("video,caption\na.mp4,a dog\na.mp4, a  dog\n", encoding="utf-8-sig")
    assert find_videos(folder, table)[0].caption == "a dog"
    lines = tmp_path / "captions.jsonl"
    lines.write_text('{"video": "a.mp4", "caption": "a dog"}\n' * 2, encoding="utf-8-sig")
    assert find_videos(folder, lines)[0].caption == "a dog"


def test_separators_of_unicode_inside_a_caption_do_not_end_a_line_of_json(folder, tmp_path):
    lines = tmp_path / "captions.jsonl"
    rows = [{"video": "a.mp4", "caption": "a\u2028dog\x85and\u2029a cat"}, {"video": "b.mp4", "caption": "a cup"}]
    lines.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n", encoding="utf-8")
    assert find_videos(folder, lines)[0].caption == "a dog and a cat"
