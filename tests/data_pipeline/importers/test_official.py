import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import InputError
from data_pipeline.importers import official
from data_pipeline.importers.items import Broken
from data_pipeline.importers.official import check_items_file, read_official

TEXT = st.text(max_size=5)
JSON = st.none() | st.booleans() | st.integers() | TEXT | st.lists(TEXT | st.floats(0, 1), max_size=3)
ITEMS = st.lists(st.dictionaries(TEXT, JSON | st.dictionaries(TEXT, JSON, max_size=2), max_size=3), max_size=4)


@given(ITEMS, st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_a_list_is_read_in_pieces_of_any_size(tmp_path_factory, items, block, indent, plain):
    path = tmp_path_factory.getbasetemp() / "items.json"
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=plain), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "BLOCK", block)
        assert list(official._read_json(path)) == items


@given(ITEMS.filter(bool), st.data())
def test_a_list_that_breaks_off_is_never_taken_for_a_shorter_one(tmp_path_factory, items, data):
    text = json.dumps(items)
    path = tmp_path_factory.getbasetemp() / "items.json"
    path.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.raises(InputError):
        list(official._read_json(path))


def test_items_are_read_one_at_a_time(tmp_path):
    """A fault at the end of a file does not keep the items before it."""
    path = tmp_path / "items.json"
    path.write_text('[{"a": 1}, {"b": 2}, oops')
    items = read_official(path, normalised=False)
    assert isinstance(next(items), Broken)
    assert isinstance(next(items), Broken)
    with pytest.raises(InputError, match="item 2 is no json"):
        next(items)


@pytest.mark.parametrize("name", ["items.pkl", "items.PICKLE", "items.pt", "items.npy", "items.joblib"])
def test_files_that_run_code_are_refused_unread(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (exit, (3,))

    import pickle

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"write its items as json .* give the \.jsonl"):
        check_items_file(tmp_path / name)
