import pickle
from pathlib import Path

import pytest

from data_pipeline.errors import ClipError, InputError
from data_pipeline.importers.items import (
    Broken,
    ImportItem,
    ImportSubject,
    Spool,
    place_of,
    read_item,
    unit_of_boxes,
)
from data_pipeline.journal import fingerprint


def item(target: str = "a.png", **changes: object) -> ImportItem:
    subject = ImportSubject(
        phrase="dog", box=[1, 2, 30, 40], reference="b.png", reference_box=[0, 0, 9, 9], mask="m.png"
    )
    return ImportItem(**{"target": target, "caption": "a dog", "subjects": (subject,), **changes})


def spool_of(folder: Path, *items: ImportItem | Broken) -> Spool:
    path = folder / "items.jsonl"
    with path.open("wb") as file:
        spool = Spool(folder, path, file, allow_absolute=False)
        for each in items:
            spool.add(each)
    return spool


def test_what_is_written_down_is_read_back_in_any_order(tmp_path):
    given = [item("ä b.png", caption="ü"), item("\udcff.png"), item(size=(3, 4), normalised=True), item(subjects=())]
    files = spool_of(tmp_path, *given).files()
    for file, expected in reversed(list(zip(files, given, strict=True))):
        assert read_item(pickle.loads(pickle.dumps(file))) == expected
    assert len({file.key for file in files}) == 4


def test_broken_items_keep_their_place_and_their_reason(tmp_path):
    broken = Broken(name="line 7", reason="unreadable item", evidence={"error": "no json"})
    files = spool_of(tmp_path, item(), broken).files()
    assert [file.name for file in files] == ["a.png", "line 7"]
    with pytest.raises(ClipError, match="unreadable item") as raised:
        read_item(files[1])
    assert raised.value.evidence == {"error": "no json"}


def test_a_spool_that_has_gone(tmp_path):
    [file] = spool_of(tmp_path, item()).files()
    file.spool.unlink()
    with pytest.raises(InputError, match="run the same command again"):
        read_item(file)


@pytest.mark.parametrize("changed", ["a.png", "b.png", "m.png"])
def test_an_item_changes_with_every_file_that_it_names(tmp_path, changed):
    for name in ("a.png", "b.png", "m.png"):
        (tmp_path / name).write_text("before")
    [before] = spool_of(tmp_path, item()).files()
    [again] = spool_of(tmp_path, item()).files()
    (tmp_path / changed).write_text("afterwards")
    [after] = spool_of(tmp_path, item()).files()
    assert fingerprint(again) == fingerprint(before) != fingerprint(after)
    [other] = spool_of(tmp_path, item(normalised=True)).files()
    assert fingerprint(other) != fingerprint(after)


def test_names_without_letters_have_keys_of_their_own(tmp_path):
    files = spool_of(tmp_path, *(item(name) for name in (".png", "猫.png", "犬.png", "", "a/b.png", "a_b.png"))).files()
    keys = [file.key for file in files]
    assert len(set(keys)) == len(keys)
    assert all(key and key.isascii() for key in keys)


def test_links_that_stay_inside_are_followed(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "real.png").write_text("")
    (tmp_path / "pictures" / "link.png").symlink_to("real.png")
    (tmp_path / "alias").symlink_to(tmp_path / "pictures")  # the folder itself may be a link
    assert place_of(tmp_path / "alias", "link.png", False) == tmp_path / "alias" / "link.png"
    (tmp_path / "pictures" / "circle.png").symlink_to("circle.png")
    (tmp_path / "secret").write_text("")
    (tmp_path / "pictures" / "out").symlink_to(tmp_path)
    with pytest.raises(ClipError) as raised:
        place_of(tmp_path / "alias", "out/secret", False)
    assert raised.value.evidence == {"path": "out/secret", "allow": "--allow-absolute"}
    assert place_of(tmp_path / "alias", "out/secret", True).read_text() == ""


@pytest.mark.parametrize(
    ("box", "unit"),
    [
        ([0, 0, 1, 1], "fractions"),
        ([0.2, 0.1, 0.9, 1.0], "fractions"),
        ([-0.01, 0, 1.01, 1], ""),
        ([0, 0, 2, 2], ""),
        ([0, 0, 2.5, 2], "pixels"),
        ("0 0 1 1", ""),
        (None, ""),
        (["a", None, 1, 1], "fractions"),
    ],
)
def test_what_the_numbers_of_boxes_look_like(box, unit):
    assert unit_of_boxes(item(subjects=(ImportSubject(phrase="dog", box=box),))) == unit
