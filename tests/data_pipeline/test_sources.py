import csv
import json
import os
import unicodedata

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline import captions
from data_pipeline.captions import read_captions
from data_pipeline.errors import InputError
from data_pipeline.file_names import SUFFIXES, beside, path_parts
from data_pipeline.sources import find_videos, make_keys


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
        ("captions.xlsx", "", "is .csv, .tsv, .jsonl, .parquet, got captions.xlsx"),
        (
            "captions.csv",
            "file,text\na.mp4,dog\n",
            "captions.csv needs the columns video and caption; found file, text$",
        ),
        ("captions.csv", "file;text\na.mp4;dog\n", "needs the columns video and caption; found file, text$"),
        ("captions.csv", "Video\ttext\na.mp4\tdog\n", "needs the columns video and caption; found video, text$"),
        ("captions.csv", "", "needs the columns video and caption; found none"),
        ("captions.csv", "video,caption\n", "captions.csv has no rows"),
        (
            "captions.csv",
            "video,caption\na.mp4,dog\na.mp4,cat\n",
            "line 3: a.mp4 has two different captions, the other one in .*line 2",
        ),
        ("captions.jsonl", "{}{", "line 1 is no json"),
        ("captions.jsonl", "[1]", r"line 1 must be an object with the columns video and caption, got list \[1\]"),
        ("captions.jsonl", '{"video": "a.mp4"}', "line 1 needs the columns video and caption; found video"),
        (
            "captions.jsonl",
            '{"video": "a.mp4", "caption": "x", "Caption": "y"}',
            "line 1: two columns are called caption",
        ),
        ("captions.csv", "video,caption\n,a dog\n", "line 2: video must be a file name, got str ''"),
        (
            "captions.csv",
            "video,caption\nx,\u0421\u043e\u0431\u0430\u043a\u0430\n".encode("cp1251"),
            "line 2 has the bytes d1 ee",
        ),
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
    assert read_captions(path)["a.mp4"].caption == ""


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


def test_half_a_surrogate_pair_becomes_a_character_that_can_be_written(folder):
    (folder / "a.json").write_text('{"caption": "a \\ud83d dog \\ud83d\\udc15"}')
    assert find_videos(folder)[0].caption == "a \ufffd dog \U0001f415"


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


# --------------------------------------------------------------------------------------------------------------- tables


def captions_of(folder, table, notes=None):
    return {file.name: file.caption for file in find_videos(folder, table, notes) if file.caption}


@pytest.mark.parametrize("header", ["video{}caption", "Video{}CAPTION", " video {} Caption ", '"video"{}"caption"'])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_tables_as_programs_write_them(folder, tmp_path, header, separator, encoding):
    table = tmp_path / "captions.csv"
    text = f'{header.format(separator)}\r\na.mp4{separator}"a caf\u00e9, a dog; a\tcat"\r\n\r\n{separator}\r\n'
    table.write_bytes(text.encode(encoding))
    notes = []
    assert captions_of(folder, table, notes) == {"a.mp4": "a caf\u00e9, a dog; a cat"}
    assumed = f"{table} is no UTF-8 and was read as Windows-1252; save it as UTF-8 if letters look wrong"
    assert notes == ([assumed] if encoding == "cp1252" else [])


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ({"en": "a dog"}, "caption must be a text, got dict {'en': 'a dog'}"),
        (float("nan"), "caption must be a text, got float nan"),
        (3, "caption must be a text, got int 3"),
        (True, "caption must be a text, got bool True"),
        ([1, 2], "caption must be a text, got int 1"),
        ([["a dog"]], "caption must be a text, got list \\['a dog'\\]"),
        (b"a dog", "caption must be a text, got bytes b'a dog'"),
        ("['a dog', 'b']", "caption is a list written as a text"),
        ("b'a dog'", "caption is a bytes written as a text"),
        ("nan", "caption is 'nan', which stands for a missing value: leave it empty"),
    ],
)
def test_a_caption_that_is_no_text_is_refused(folder, tmp_path, suffix, caption, message):
    if isinstance(caption, bytes) and suffix == "jsonl":
        pytest.skip("json has no bytes")
    table = write_rows(tmp_path / f"captions.{suffix}", [{"video": "a.mp4", "caption": caption}])
    with pytest.raises(InputError, match=rf"captions.{suffix}, (line|row) 1: {message}"):
        find_videos(folder, table)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_of_several_captions_the_first_that_is_not_empty_is_taken(folder, tmp_path, suffix):
    rows = [{"video": "a.mp4", "caption": ["", "a  dog", "a cat"]}, {"video": "b.mp4", "caption": ["a cup"]}]
    rows.append({"video": "c.MKV", "caption": []})
    table, notes = write_rows(tmp_path / f"captions.{suffix}", rows), []
    assert captions_of(folder, table, notes) == {"a.mp4": "a dog", "b.mp4": "a cup"}
    assert notes == [f"1 row of {table} with several captions: the first of each was taken"]
    (folder / "deep/c.json").write_text('{"caption": ["a hat", "a coat"]}')
    file = find_videos(folder, table)[2]
    assert (file.caption, file.notes) == ("a hat", ("several captions, of which the first was taken",))


def test_an_open_quote_takes_in_no_row_unnoticed(folder, tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text('video,caption\na,"a dog\nb,a cat\ndeep/c,"\n')
    with pytest.raises(InputError, match="line 2: a quote is left open; it takes in the row of b$"):
        find_videos(folder, table)
    table.write_text('video,caption\na,"a dog,\nasleep, and a cat"\n')
    assert captions_of(folder, table) == {"a.mp4": "a dog, asleep, and a cat"}


# ------------------------------------------------------------------------------------------------------------------ ids


@pytest.mark.parametrize(
    "called",
    [
        "a",
        "./a",
        "./a.mp4",
        ".\\a.mp4",
        " a.mp4 ",
        "\ufeffa.mp4",
        "videos/a.mp4",
        "C:\\data\\videos\\a.mp4",
        "/somewhere/else/a.mp4",
        "file:///data/a.mp4",
        "{folder}/a.mp4",
    ],
)
def test_what_people_call_a_video(folder, tmp_path, called):
    rows = [{"video": called.format(folder=folder), "caption": "a dog"}]
    assert captions_of(folder, write_rows(tmp_path / "captions.jsonl", rows)) == {"a.mp4": "a dog"}


@pytest.mark.parametrize("called", ["deep/c.MKV", "deep\\c", "c", "c.MKV", "videos/deep/c.MKV"])
def test_what_people_call_a_video_in_a_subfolder(folder, tmp_path, called):
    table = write_rows(tmp_path / "captions.jsonl", [{"video": called, "caption": "a dog"}])
    assert captions_of(folder, table) == {"deep/c.MKV": "a dog"}


def test_whole_numbers_are_names(tmp_path):
    for name in ("7.mp4", "0012.mp4"):
        (tmp_path / name).write_bytes(b"x")
    rows = [{"caption": "a dog", "video": 7}, {"caption": "a cat", "video": 12}]
    for suffix in ("parquet", "jsonl"):
        table, notes = write_rows(tmp_path / f"captions.{suffix}", rows), []
        assert captions_of(tmp_path, table, notes) == {"7.mp4": "a dog"}
        assert notes == [f"1 row of {table} without a video, the first one '12'; is it '0012.mp4'?"]
    with pytest.raises(InputError, match="row 1: video must be a file name, got float 7.5"):
        find_videos(tmp_path, write_rows(tmp_path / "captions.parquet", [{"caption": "a", "video": 7.5}]))


@pytest.mark.parametrize(("in_table", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_both_forms_of_unicode_are_one_name(tmp_path, in_table, on_disk):
    name, other = (unicodedata.normalize(form, "caf\u00e9") for form in (in_table, on_disk))
    video = tmp_path / f"{other}.mp4"
    video.write_bytes(b"x")
    table = write_rows(tmp_path / "captions.jsonl", [{"video": f"{name}.mp4", "caption": "a cup"}])
    assert list(captions_of(tmp_path, table).values()) == ["a cup"]
    (tmp_path / f"{name}.txt").write_text("from the sidecar")
    assert find_videos(tmp_path)[0].caption == "from the sidecar"
    sidecar = tmp_path / f"{name}.annotations.json"
    sidecar.write_text("{}")
    assert beside(video, ".annotations.json") == sidecar


def test_a_row_that_fits_two_videos_is_not_used_and_told(folder, tmp_path):
    for name in ("a.mov", "x/d.mp4", "y/d.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    called = ["a", "d.mp4", "y/d.mp4", "B.mp4", "b"]
    table = write_rows(tmp_path / "captions.jsonl", [{"video": name, "caption": name} for name in called])
    notes = []
    assert captions_of(folder, table, notes) == {"b.mp4": "b", "y/d.mp4": "y/d.mp4"}
    assert notes == [
        f"1 row of {table} without a video, the first one 'B.mp4'; is it 'b.mp4'?",
        f"2 rows of {table} not used: more than one video fits the first one, 'a': 'a.mov' and 'a.mp4'; write "
        "the path below the folder, with its suffix",
    ]


def test_a_surer_name_comes_first_and_equal_ones_must_agree(folder, tmp_path):
    rows = [{"video": "train/a.mp4", "caption": "another's"}, {"video": "videos/a.mp4", "caption": "a dog"}]
    table, notes = write_rows(tmp_path / "captions.jsonl", rows), []
    assert captions_of(folder, table, notes) == {"a.mp4": "a dog"}
    assert notes == [f"1 row of {table} without a video, the first one 'train/a.mp4'; is it 'a.mp4'?"]
    write_rows(table, [{"video": f"{part}/a.mp4", "caption": part} for part in ("train", "test")])
    with pytest.raises(InputError, match="line 1, and .*line 2: 'train/a.mp4' and 'test/a.mp4' both fit 'a.mp4', with"):
        find_videos(folder, table)


def test_a_table_of_other_videos_says_what_is_near(folder, tmp_path):
    (folder / "v1.2.mp4").write_bytes(b"x")
    for called, near in (("A.MP4", "a.mp4"), ("a.avi", "a.mp4"), ("V1.2", "v1.2.mp4")):
        table = write_rows(tmp_path / "captions.jsonl", [{"video": called, "caption": "x"}])
        with pytest.raises(InputError) as caught:
            find_videos(folder, table)
        assert str(caught.value).endswith(f"it has '{called}', the folder 'a.mp4'; is it '{near}'?")
    table = write_rows(tmp_path / "captions.jsonl", [{"video": "other.mp4", "caption": "x"}])
    with pytest.raises(InputError, match="it has 'other.mp4', the folder 'a.mp4'$"):
        find_videos(folder, table)


def test_parts_of_paths():
    assert path_parts("C:\\a\\.\\b.jpg") == path_parts("./a//b.jpg") == ["a", "b.jpg"]


# ---------------------------------------------------------------------------------------------------------------- files


def test_every_kind_of_video_is_found_and_what_is_left_out_is_told(tmp_path):
    for suffix in (*SUFFIXES, ".ogv", ".gif", ".zip", ".txt"):
        (tmp_path / f"clip{suffix}").write_bytes(b"x")
    (tmp_path / "UPPER.MTS").write_bytes(b"x")
    for name in (".Trash-1000/files/a.mp4", "$RECYCLE.BIN/b.wmv", "Trash/d.mp4", ".c.mp4", "@eaDir/clip.mp4/thumb.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    notes = []
    found = {file.name for file in find_videos(tmp_path, None, notes)}
    assert found == {f"clip{suffix}" for suffix in SUFFIXES} | {"UPPER.MTS"}
    assert {".ts", ".flv", ".wmv", ".mpg", ".mpeg", ".3gp", ".mts", ".m2ts"} < set(SUFFIXES)
    assert notes == [
        "left out: 5 videos hidden or in a trash, the first one '$RECYCLE.BIN/b.wmv'",
        "left out: files that may be videos or hold some, but are of no kind that is read: 1 .gif, 1 .ogv, 1 .zip",
    ]


def test_a_folder_of_nothing_but_left_out_files_says_so(tmp_path):
    (tmp_path / ".a.mp4").write_bytes(b"x")
    with pytest.raises(InputError, match="no videos in .*; left out: 1 video hidden or in a trash"):
        find_videos(tmp_path)


def test_a_folder_that_is_itself_hidden_is_read(tmp_path):
    folder = tmp_path / ".cache/clips"
    folder.mkdir(parents=True)
    (folder / "a.mp4").write_bytes(b"x")
    assert [file.name for file in find_videos(folder)] == ["a.mp4"]


# ------------------------------------------------------------------------------------------------------------- sidecars


@pytest.mark.parametrize(
    ("ending", "content", "caption", "note"),
    [
        (
            "txt",
            "a caf\u00e9".encode("cp1252"),
            "a caf\u00e9",
            "caption file is no UTF-8 and was read as Windows-1252; ",
        ),
        ("txt", "a dog".encode("utf-16-le"), "a dog", None),
        ("txt", "a dog".encode("utf-32-le"), None, "caption file looks like UTF-16 without a byte-order mark"),
        ("txt", bytes(range(256)), None, "caption file is neither UTF-8, UTF-16 nor Windows-1252"),
        ("txt", b"['a dog']", None, "caption file that cannot be used: caption is a list written as a text"),
        ("txt", b"a dog " * 200_000, None, "caption file of more than 1048576 bytes"),
        ("json", b'{"caption": 3}', None, "caption file that cannot be used: caption must be a text, got int 3"),
        ("json", b'{"caption": NaN}', None, "caption file that cannot be used: caption must be a text, got float nan"),
        ("json", b'{"text": "a dog"}', None, 'json without "caption"'),
        ("json", b'["a dog"]', None, 'json without "caption"'),
        ("json", b"{", None, "caption file that is no json (JSONDecodeError)"),
        ("json", '{"caption": "a caf\u00e9"}'.encode("utf-16"), "a caf\u00e9", None),
    ],
)
def test_what_was_assumed_of_a_caption_file_or_why_it_is_unusable(folder, ending, content, caption, note):
    (folder / f"a.{ending}").write_bytes(content)
    file = find_videos(folder)[0]
    assert file.caption == caption
    assert [text[: len(note or "")] for text in file.notes] == ([] if note is None else [note])


def test_links_to_folders_are_left_out_and_told(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.mp4").touch()
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / ".hidden").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="left out: 1 link to folders, not followed, the first one 'link'"):
        find_videos(folder)
    (folder / "a.mp4").symlink_to(tmp_path / "elsewhere/b.mp4")
    (folder / "folder.mp4").symlink_to(tmp_path / "elsewhere")  # it has the name of a video, and is rejected as one
    notes = []
    assert [file.name for file in find_videos(folder, notes=notes)] == ["a.mp4", "folder.mp4"]
    assert notes == ["left out: 1 link to folders, not followed, the first one 'link'"]


def test_a_caption_that_is_forbidden_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.txt").write_text("a dog")

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(captions, "_read_small", forbidden)
    [file] = find_videos(tmp_path)
    assert (file.caption, file.notes) == (None, ("caption file that cannot be read: no permission",))
