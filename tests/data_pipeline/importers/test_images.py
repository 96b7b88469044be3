import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.importers.images import corners, list_pictures, read_metadata, row_caption, row_subjects
from data_pipeline.importers.pictures import to_box
from data_pipeline.records import ClipError, InputError


def test_pictures_are_listed_in_order_and_hidden_ones_are_not(tmp_path):
    for name in ("b.JPG", "a/c.png", "a.webp", ".hidden.png", ".trash/d.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert list_pictures(tmp_path) == ["a.webp", "a/c.png", "b.JPG"]


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
    path.write_bytes(b"file_name,text\n\xff\xfe,x\n")
    with pytest.raises(InputError, match="cannot read"):
        list(read_metadata(path))


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
