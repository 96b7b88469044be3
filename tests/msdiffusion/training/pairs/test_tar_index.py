import io
import os
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msdiffusion.errors import DataError
from msdiffusion.training.pairs.tar_index import KeyColumn, walk_shard

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=20)


def walk(path):
    with path.open("rb") as file:
        return walk_shard(file.fileno(), path.name)


def write_tar(path, members, format=tarfile.USTAR_FORMAT, **attributes):
    """members: (name, content) each."""
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for attribute, value in attributes.items():
                setattr(member, attribute, value)
            archive.addfile(member, io.BytesIO(content))
    return path


def contents(path, table):
    """key -> suffix -> content, by the table."""
    whole = path.read_bytes()
    return {
        key: {suffix: whole[o : o + size] for suffix, (o, size) in table.members(place).items()}
        for place, key in enumerate(table.keys)
    }


@given(texts=TEXTS, data=st.data())
def test_a_column_is_a_list_of_strings(texts, data):
    column = KeyColumn.of(texts)
    assert list(column) == texts
    assert list(column.encoded()) == [text.encode() for text in texts]
    assert [column[i] for i in range(len(texts))] == texts
    assert column[1:-1] == texts[1:-1]
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=30)) if texts else []
    assert list(column.take(np.array(rows, dtype=np.int64))) == [texts[row] for row in rows]
    more = data.draw(TEXTS)
    assert list(KeyColumn.joined([column, KeyColumn.of([]), KeyColumn.of(more)])) == texts + more


@given(texts=TEXTS)
def test_the_first_repeated_key_is_found(texts):
    repeated = next((i for i, text in enumerate(texts) if text in texts[:i]), None)
    expected = None if repeated is None else (texts.index(texts[repeated]), repeated)
    assert KeyColumn.of(texts).first_repeated() == expected


def test_taking_from_a_column_in_pieces_gives_the_same(monkeypatch):
    monkeypatch.setattr("msdiffusion.training.pairs.tar_index._AT_ONCE", 3)
    texts = [str(i) * (i % 4) for i in range(20)]
    rows = np.random.default_rng(0).integers(0, 20, 17)
    assert list(KeyColumn.of(texts).take(rows)) == [texts[row] for row in rows]
    assert list(KeyColumn.of(texts)) == texts


@pytest.mark.parametrize("number", [2, -3])
def test_a_column_ends_somewhere(number):
    with pytest.raises(IndexError, match="there are 2 keys"):
        KeyColumn.of(["a", "b"])[number]


def test_keys_that_are_no_unicode_survive():
    key = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert list(KeyColumn.of([key])) == [key]


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from("abcdefgh"),
        st.sampled_from(["json", "target.jpg", "reference_0.png", "reference_1.png", "npy"]),
        st.binary(max_size=1500),
    ),
    min_size=1,
    max_size=20,
    unique_by=lambda member: member[:2],
)


@given(members=MEMBERS, format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
       start=st.sampled_from(["", "x-", "y" * 120]), time=st.sampled_from([0, 1.5]))  # fmt: skip
def test_members_of_any_order_and_dialect_are_found(members, format, start, time, tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "p.tar"
    start = start[:60] if format == tarfile.USTAR_FORMAT else start  # which has no long names
    mtime = time if format == tarfile.PAX_FORMAT else 0  # a fraction of a second makes an extended header there
    write_tar(path, [(f"{start}{k}.{suffix}", content) for k, suffix, content in members], format, mtime=mtime)
    expected = {}
    for key, suffix, content in members:
        expected.setdefault(start + key, {})[suffix] = content
    found = contents(path, walk(path))
    assert found == expected
    assert list(found) == list(expected)


def test_folders_and_links_are_no_members(tmp_path):
    path = tmp_path / "p.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("f", tarfile.DIRTYPE), ("f/../link.json", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
        member = tarfile.TarInfo("a.json")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"{}"))
    assert contents(path, walk(path)) == {"a": {"json": b"{}"}}


def test_incomplete_pairs_are_named(tmp_path):
    whole = ["json", "target.jpg", "reference_0.png"]
    pairs = {
        "whole": [*whole, "reference_1.png", "note.txt"],
        "no_json": whole[1:],
        "no_target": [whole[0], whole[2]],
        "gap": [*whole, "reference_2.png"],
        "no_reference": whole[:2],
        "odd_name": [*whole, "reference_01.png"],
    }
    path = write_tar(tmp_path / "p.tar", [(f"{key}.{suffix}", b"") for key in pairs for suffix in pairs[key]])
    table = walk(path)
    assert [(table.keys[place], what) for place, what in table.incomplete()] == [
        ("no_json", "has no json"),
        ("no_target", "has no target.jpg"),
        ("gap", "has reference_2.png, but 2 references in all"),
    ]


def test_a_member_that_is_there_twice_is_refused(tmp_path):
    path = write_tar(tmp_path / "p.tar", [("a.json", b"1"), ("b.json", b""), ("a.json", b"2")])
    with pytest.raises(DataError, match=r"p\.tar holds 'a\.json' twice"):
        walk(path)


@pytest.mark.parametrize("content", [b"no tar file", b"", b"x" * 4096])
def test_a_file_that_is_no_tar_is_refused(tmp_path, content):
    path = tmp_path / "p.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"p\.tar (is not a complete tar file|is cut off)"):
        walk(path)


def test_an_empty_shard_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no pair"):
        walk(write_tar(tmp_path / "p.tar", []))


@given(data=st.data())
def test_a_shard_cut_off_anywhere_is_refused(data, pairs_dir, tmp_path_factory):
    whole = (pairs_dir / "pairs-000002.tar").read_bytes()
    with tarfile.open(pairs_dir / "pairs-000002.tar") as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + -(-last.size // 512) * 512
    path = tmp_path_factory.mktemp("cut") / "p.tar"
    # at most 511 bytes of the end mark are left: a tar file may end with one empty block
    path.write_bytes(
        whole[: data.draw(st.one_of(st.integers(0, end + 511), st.integers(0, end // 512).map(lambda n: n * 512)))]
    )
    with pytest.raises(DataError, match=r"p\.tar is (cut off|not a complete tar file)"):
        walk(path)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_damaged_header_in_the_middle_is_refused(tmp_path, format):
    path = write_tar(tmp_path / "p.tar", [(f"{i}.json", b"x" * 700) for i in range(5)], format, mtime=1.5)
    with tarfile.open(path) as archive:
        member = archive.getmembers()[3]
        offset = member.offset_data - 512  # of its own header; an extended one comes before it
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"is damaged after byte {member.offset}"):
        walk(path)


def test_the_position_of_the_file_stays(pairs_dir):
    with (pairs_dir / "pairs-000000.tar").open("rb") as file:
        file.seek(77)
        walk_shard(file.fileno(), "p")
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 77
