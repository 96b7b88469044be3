import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import ClipError, InputError
from data_pipeline.importers.images import (
    CocoFile,
    corners,
    list_pictures,
    read_images,
    read_metadata,
    row_caption,
    row_subjects,
)
from data_pipeline.importers.items import place_of
from data_pipeline.importers.pictures import to_box


def test_pictures_are_listed_in_order_and_hidden_ones_are_not(tmp_path):
    for name in ("b.JPG", "a/c.png", "a.webp", ".hidden.png", ".trash/d.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert list_pictures(tmp_path) == ["a.webp", "a/c.png", "b.JPG"]


def test_what_is_not_listed_is_told(tmp_path, monkeypatch):
    for name in ("in/a.png", "in/begun/.mining/b.png", "in/begun/c.png", "in/done/build.json", "in/done/report/d.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/e.png").touch()
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    notes = []
    assert list_pictures(tmp_path / "in", notes) == ["a.png"]
    assert notes == ["1 link to folders not followed, the first one 'link'"]
    (tmp_path / "in/a.png").unlink()
    with pytest.raises(InputError, match="in subfolders too; 1 link to folders not followed, the first one 'link'"):
        list_pictures(tmp_path / "in")

    def forbidden(folder, onerror):
        onerror(PermissionError(13, "Permission denied", f"{folder}/locked"))
        return ()

    monkeypatch.setattr(os, "walk", forbidden)
    with pytest.raises(InputError, match="the folder .*/in/locked cannot be read: Permission denied"):
        list_pictures(tmp_path / "in")


@given(st.lists(st.floats(1, 200), min_size=4, max_size=4))
def test_corners_of_a_box(box):
    x1, y1, x2, y2 = corners(box)
    assert (x1, y1) == tuple(box[:2])
    assert (x2, y2) == (box[0] + box[2], box[1] + box[3])
    assert to_box([x1, y1, x2, y2], (500, 500), False, {})[0][0] == box[0] / 500


@pytest.mark.parametrize("box", [None, "1234", [1, 2, 3], [1, 2, 3, "4"], 7])
def test_what_is_no_box_is_left_for_the_check_to_refuse(box):
    assert corners(box) is box
    with pytest.raises(ClipError, match="unreadable box"):
        to_box(corners(box), (500, 500), False, {})


def test_one_caption_under_both_names_is_one_caption():
    assert row_caption({"text": "a  dog", "caption": "a dog"}) == "a dog"
    assert row_caption({"text": None}) == ""
    with pytest.raises(ClipError, match="unreadable item"):
        row_caption({"text": 3})


def test_categories_under_either_name():
    for name in ("category", "categories"):
        [subject] = row_subjects({"objects": {"bbox": [[1, 2, 3, 4]], name: [" red  ball"]}})
        assert (subject.phrase, subject.box) == ("red ball", [1, 2, 4, 6])
    assert row_subjects({"text": "a dog"}) is None


def test_cells_of_a_csv(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text('\ufefffile_name,text,boxes\na.png,"a dog, asleep","[[1, 2, 3, 4]]"\nb.png,,\nc.png,x,[1\n,y,\n')
    rows = [row for _, row in read_metadata(path)]
    assert rows[0] == {"file_name": "a.png", "text": "a dog, asleep", "boxes": [[1, 2, 3, 4]]}
    assert rows[1] == {"file_name": "b.png"}
    assert [row.evidence["error"][:20] for row in rows[2:]] == ["the column boxes of ", "a row without file_n"]
    path.write_bytes(b"file_name,text\na.png,\xd1\xee\xe1\xe0\xea\xe0\n")
    with pytest.raises(InputError, match="is neither UTF-8, UTF-16 nor Windows-1252: line 2 has the bytes d1 ee"):
        list(read_metadata(path))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_as_programs_write_them(tmp_path, separator):
    path, notes = tmp_path / "metadata.csv", []
    cells = [["File_Name", " Text", "boxes"], ["a.png", "a caf\u00e9", '"[[1, 2, 3, 4]]"']]
    path.write_bytes("\r\n".join(separator.join(row) for row in cells).encode("cp1252"))
    row = {"file_name": "a.png", "text": "a caf\u00e9", "boxes": [[1, 2, 3, 4]]}
    assert list(read_metadata(path, notes)) == [(2, row)]
    assert notes == [f"{path} is no UTF-8 and was read as Windows-1252; save it as UTF-8 if letters look wrong"]


def test_a_row_that_would_lose_something_is_an_error(tmp_path):
    path = tmp_path / "metadata.csv"
    path.write_text("file_name,text\na.png,a dog, a cat\n")
    with pytest.raises(InputError, match="line 2 has 3 fields, but the table has 2 columns: a text with a comma"):
        list(read_metadata(path))
    path.write_text('file_name,text\na.png,"a dog\nb.png,a cat\n')
    with pytest.raises(InputError, match="line 2: a quote is opened and never closed"):
        list(read_metadata(path))


def test_of_several_captions_the_first_is_taken_and_other_types_are_refused():
    assert row_caption({"text": ["", "a dog", "a cat"]}) == "a dog"
    for value in ({"en": "a dog"}, float("nan"), b"a dog", "['a dog', 'b']"):
        with pytest.raises(ClipError, match="unreadable item"):
            row_caption({"text": value})


def test_captions_beside_pictures_in_other_encodings(tmp_path):
    for name, content in (("a", b"a caf\xe9"), ("b", b"\xd1\xee\xe1\xe0\xea\xe0"), ("c", "a cup".encode("utf-16"))):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(content)
    notes = []
    first, second, third = read_images(tmp_path, None, None, normalised=False, notes=notes)
    assert (first.caption, third.caption) == ("a caf\u00e9", "a cup")
    assert (second.name, second.reason) == ("b.png", "no caption")
    assert second.evidence["found"].startswith("caption file is neither UTF-8, UTF-16")
    assert [note[:58] for note in notes] == ["1 picture: caption file is no UTF-8 and was read as Window"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_coco_with_a_byte_order_mark(tmp_path, encoding):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 4, "height": 4}, {"id": 2, "file_name": "z.png"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    path, notes = tmp_path / "coco.json", []
    path.write_bytes(json.dumps(content).encode(encoding))
    [subject] = CocoFile(path, ["a.png"], notes).read("a.png")[0]
    assert (subject.phrase, subject.box) == ("dog", [0, 0, 2, 2])
    assert notes == [f"1 image of {path} without a picture, the first one 'z.png'"]


@pytest.mark.parametrize("called", ["sub\\caf\u00e9.png", "./sub/cafe\u0301.png", ".\\sub\\cafe\u0301.png"])
def test_pictures_by_names_that_were_written_elsewhere(tmp_path, called):
    picture = tmp_path / "sub" / "caf\u00e9.png"
    picture.parent.mkdir()
    Image.new("RGB", (4, 4)).save(picture)
    picture.with_suffix(".txt").write_text("a dog")
    rows = tmp_path / "metadata.jsonl"
    rows.write_text(json.dumps({"File_Name": called}))
    coco = tmp_path / "coco.json"
    content = {
        "images": [{"id": 1, "file_name": "sub/caf\u00e9.png", "width": 4, "height": 4}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    coco.write_text(json.dumps(content))
    [item] = read_images(tmp_path, rows, coco, normalised=False)
    assert (item.target, item.caption, item.subjects[0].phrase) == (called, "a dog", "dog")
    assert place_of(tmp_path, item.target, allow_absolute=False).samefile(picture)
    with pytest.raises(ClipError, match="path outside the folder of pictures"):
        place_of(tmp_path, f"..\\{called}", allow_absolute=True)


def test_several_captions_are_told(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows, notes = tmp_path / "metadata.jsonl", []
    rows.write_text(json.dumps({"file_name": "a.png", "text": ["a dog", "a cat"]}))
    [item] = read_images(tmp_path, rows, None, normalised=False, notes=notes)
    assert item.caption == "a dog"
    assert notes == ["1 picture: several captions, of which the first was taken"]


def test_a_name_without_room_for_a_sidecar(tmp_path):
    name = f"{'a' * 240}.png"
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = tmp_path / "metadata.jsonl"
    rows.write_text(json.dumps({"file_name": name, "text": "a dog"}))
    assert [item.caption for item in read_images(tmp_path, rows, None, normalised=False)] == ["a dog"]


def test_a_line_that_is_no_object(tmp_path):
    path = tmp_path / "metadata.jsonl"
    path.write_text('\ufeff{"file_name": "a.png"}\n\n[1]\n{"file_name": 3}\n{"a"\n')
    found = list(read_metadata(path))
    assert [number for number, _ in found] == [1, 3, 4, 5]
    assert found[0][1] == {"file_name": "a.png"}
    assert all(isinstance(row, ClipError) for _, row in found[1:])


def test_every_suffix_that_is_listed_opens(tmp_path):
    from data_pipeline.importers.images import SUFFIXES
    from data_pipeline.importers.pictures import open_picture

    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        Image.new("RGB", (4, 4)).save(path)
        assert open_picture(path, path.name, 16, "refuse").size == (4, 4)
    assert json.dumps(list_pictures(tmp_path)).count("a.") == len(SUFFIXES)
