import json

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.shardlists import expand_urls

from msdiffusion.errors import DataError, RequestError
from msdiffusion.training.pairs import sources
from msdiffusion.training.pairs.sources import expand_braces, is_pattern, locate


def names(source):
    return [shard.name for shard in source.shards]


@pytest.mark.parametrize("make_directory", [False, True])
def test_missing_dataset_says_which_command_makes_one(tmp_path, make_directory):
    directory = tmp_path / "pairs"
    if make_directory:
        directory.mkdir()
    with pytest.raises(
        DataError, match=r"(?s)no pairs dataset.*data_pipeline\.world.*data_pipeline\.build.*--out"
    ) as error:
        locate(str(directory))
    assert str(directory) in str(error.value)


def test_a_folder_means_its_shards_in_order_of_name(pairs_dir):
    found = locate(str(pairs_dir))
    assert names(found) == [f"pairs-00000{i}.tar" for i in range(3)]
    assert [shard.bytes for shard in found.shards] == [path.stat().st_size for path in sorted(pairs_dir.glob("*.tar"))]
    assert (found.index, found.listed, found.damaged) == (None, None, ())
    assert locate(f"file://{pairs_dir}") == found


def test_a_finished_dataset_knows_its_shards(finished_dir):
    found = locate(str(finished_dir))
    assert [shard.samples for shard in found.shards] == [10, 10, 4]
    assert all(len(shard.sha256) == 64 for shard in found.shards)
    assert found.index.place == str(finished_dir / "index.parquet")


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("pairs-000001.tar", [1]),
        ("pairs-{000001..000002}.tar", [1, 2]),
        ("pairs-00000{2,0}.tar", [2, 0]),
        ("*.tar", [0, 1, 2]),
        ("pairs-00000[01].tar", [0, 1]),
        ("pairs-00000?.tar", [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_patterns_choose_shards(pattern, numbers, finished, pairs_dir, finished_dir):
    found = locate(f"{finished_dir if finished else pairs_dir}/{pattern}")
    assert names(found) == [f"pairs-00000{number}.tar" for number in numbers]
    assert (found.index is not None) == finished
    assert found.damaged == ()


def test_a_folder_with_brackets_in_its_name_is_a_folder(pairs_dir, tmp_path):
    (tmp_path / "a[1]{b}").symlink_to(pairs_dir)
    assert len(locate(str(tmp_path / "a[1]{b}")).shards) == 3


def test_shards_of_several_folders_go_by_their_path(pairs_dir, tmp_path):
    for name in "ab":
        (tmp_path / name).symlink_to(pairs_dir)
    found = locate(f"{tmp_path}/{{a,b}}/pairs-00000{{0..1}}.tar")
    assert names(found) == [f"{f}/pairs-00000{n}.tar" for f in "ab" for n in (0, 1)]
    assert found.folder is None


def test_a_pattern_names_no_shard_twice(pairs_dir):
    with pytest.raises(DataError, match=r"pairs-000001\.tar is named twice"):
        locate(f"{pairs_dir}/pairs-00000{{1,1}}.tar")


def test_a_pattern_that_matches_nothing_is_told(pairs_dir):
    with pytest.raises(DataError, match=r"nothing matches .*x\*\.tar"):
        locate(f"{pairs_dir}/x*.tar")


def test_a_shard_that_a_pattern_names_must_be_there(pairs_dir):
    found = locate(f"{pairs_dir}/pairs-{{000002..000003}}.tar")
    assert names(found) == ["pairs-000002.tar"]
    [damage] = found.damaged
    assert (damage.shard, damage.key, damage.pairs) == ("pairs-000003.tar", None, None)
    assert "pairs-000003.tar does not exist" in damage.reason


def test_a_dataset_that_was_never_finished_is_refused(finished_dir):
    (finished_dir / ".mining").mkdir()
    assert len(locate(str(finished_dir)).shards) == 3  # the journal of a finished run may stay
    (finished_dir / "build.json").unlink()
    with pytest.raises(DataError, match=r"mining was interrupted.*same mining command again"):
        locate(str(finished_dir))


def test_build_and_shards_that_disagree_are_told(finished_dir):
    (finished_dir / "pairs-000001.tar").unlink()
    with (finished_dir / "pairs-000002.tar").open("ab") as file:
        file.write(b"more")
    found = locate(str(finished_dir))
    assert names(found) == ["pairs-000000.tar"]
    missing, longer = found.damaged
    assert (missing.shard, missing.pairs) == ("pairs-000001.tar", 10)
    assert "does not exist" in missing.reason
    assert (longer.shard, longer.pairs) == ("pairs-000002.tar", 4)
    assert "bytes, and build.json says" in longer.reason


@pytest.mark.parametrize("pattern", ["", "/other.tar"])
def test_a_shard_of_another_dataset_is_told(finished_dir, pattern):
    (finished_dir / "other.tar").write_bytes((finished_dir / "pairs-000000.tar").read_bytes())
    with pytest.raises(DataError, match=r"other\.tar is not listed in .*build\.json: it belongs to another dataset"):
        locate(f"{finished_dir}{pattern}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no json"),
        ("[]", "schema None"),
        ('{"schema": "data_pipeline.build/9"}', r"data_pipeline\.build/9.*reads 'data_pipeline\.build/1'"),
        ('{"schema": "data_pipeline.build/1", "shards": [{"name": "a.tar"}]}', "does not list the shards"),
        (json.dumps({"schema": "data_pipeline.build/1",
                     "shards": [{"name": "../a.tar", "samples": 1, "bytes": 1, "sha256": ""}]}), "does not list"),
        ('{"schema": "data_pipeline.build/1", "shards": []}', "without any pair"),
    ],
)  # fmt: skip
def test_a_build_json_that_cannot_be_used_is_refused(finished_dir, content, message):
    (finished_dir / "build.json").write_text(content)
    with pytest.raises(DataError, match=message):
        locate(str(finished_dir))


WORDS = st.text("ab0-", min_size=1, max_size=3)
RANGES = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 4)).map(
    lambda r: f"{{{min(r[:2]):0{r[2]}d}..{max(r[:2]):0{r[2]}d}}}"
)
CHOICES = st.lists(WORDS, min_size=2, max_size=3).map(lambda words: "{" + ",".join(words) + "}")


@given(st.lists(st.one_of(WORDS, RANGES, CHOICES), max_size=4).map("".join))
def test_braces_mean_what_they_mean_to_webdataset(pattern):
    assert expand_braces(pattern) == expand_urls(pattern)


@pytest.mark.parametrize("pattern", ["a{b", "a}b", "{a,{b,c}}", "{5..3}", "{0..10000000}", "{0..9999}{0..9999}"])
def test_braces_that_cannot_be_meant_are_refused(pattern):
    with pytest.raises(RequestError, match="braces|count upwards|means"):
        locate(f"x/{pattern}.tar")


# ------------------------------------------------------------------------------------------------------------ remote


@pytest.fixture
def in_memory():
    """folder -> URL of a copy in this process's memory."""
    system = fsspec.filesystem("memory")

    def copy(folder):
        for path in folder.iterdir():
            if path.is_file():
                system.pipe_file(f"/pairs/{path.name}", path.read_bytes())
        return "memory://pairs"

    yield copy
    system.rm("/pairs", recursive=True)


def test_a_url_of_a_folder_means_its_shards(pairs_dir, in_memory):
    found = locate(in_memory(pairs_dir))
    assert names(found) == [f"pairs-00000{i}.tar" for i in range(3)]
    assert found.shards[0].place == "memory://pairs/pairs-000000.tar"
    assert found.shards[0].stamp  # when it was written
    assert [s.name for s in locate("memory://pairs/*[12].tar").shards] == ["pairs-000001.tar", "pairs-000002.tar"]


def test_what_a_store_lists_is_compared_with_build_json(finished_dir, in_memory):
    url = in_memory(finished_dir)
    system = fsspec.filesystem("memory")
    system.rm("/pairs/pairs-000001.tar")
    system.pipe_file("/pairs/pairs-000002.tar", b"short")
    found = locate(url)
    assert names(found) == ["pairs-000000.tar"]
    assert [damage.shard for damage in found.damaged] == ["pairs-000001.tar", "pairs-000002.tar"]


def test_a_remote_dataset_that_was_never_finished_is_refused(pairs_dir, in_memory):
    url = in_memory(pairs_dir)
    fsspec.filesystem("memory").pipe_file("/pairs/.mining/settings.json", b"{}")
    with pytest.raises(DataError, match="mining was interrupted"):
        locate(url)


def test_a_store_that_refuses_to_answer_has_no_journal(pairs_dir, in_memory, monkeypatch):
    def refuse(*_):
        raise PermissionError("not yours")

    url = in_memory(pairs_dir)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "exists", refuse)
    assert len(locate(url).shards) == 3


def test_a_web_server_that_lists_its_folder(finished_dir, serve):
    server = serve(finished_dir)
    assert names(locate(server.url)) == [f"pairs-00000{i}.tar" for i in range(3)]
    (finished_dir / "build.json").unlink()
    found = locate(server.url)
    assert names(found) == [f"pairs-00000{i}.tar" for i in range(3)]
    # it lists no sizes, so each file was asked for its own
    assert [shard.bytes for shard in found.shards] == [p.stat().st_size for p in sorted(finished_dir.glob("*.tar"))]


def test_the_address_of_a_host_is_no_pattern():
    assert not is_pattern("http://[::1]:8000/pairs")
    assert not is_pattern("https://host/pairs?version=1")
    assert is_pattern("http://[::1]:8000/pairs/*")


def test_a_web_server_without_a_list_needs_build_json(finished_dir, serve, monkeypatch):
    server = serve(finished_dir)
    server.unlisted = True
    assert names(locate(server.url)) == [f"pairs-00000{i}.tar" for i in range(3)]
    (finished_dir / "build.json").unlink()
    with pytest.raises(DataError, match=r"its server does not list it.*Name the shards .*pairs-\{000000\.\.000012\}"):
        locate(server.url)
    found = locate(f"{server.url}/pairs-{{000001..000003}}.tar")
    assert names(found) == ["pairs-000001.tar", "pairs-000002.tar"]
    assert [damage.shard for damage in found.damaged] == ["pairs-000003.tar"]


def test_an_unknown_protocol_is_refused():
    with pytest.raises(RequestError, match=r"nowhere://x/pairs/build\.json cannot be read: Protocol not known"):
        locate("nowhere://x/pairs")


def test_a_tired_server_is_not_taken_for_an_unfinished_dataset(pairs_dir, serve, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    server = serve(pairs_dir)
    server.failures["build.json"] = 2
    assert len(locate(server.url).shards) == 3
    assert server.gets("build.json") == 3


def test_shards_are_found_where_a_url_has_a_query(finished_dir, serve):
    found = locate(f"{serve(finished_dir).url}/pairs-000001.tar?token=1")
    assert names(found) == ["pairs-000001.tar"]
    assert found.shards[0].samples == 10


def test_there_is_an_end_to_what_a_pattern_may_mean(monkeypatch):
    monkeypatch.setattr(sources, "MOST_SHARDS", 3)
    assert len(expand_braces("{0..2}")) == 3
    with pytest.raises(RequestError, match="fewer than 3"):
        expand_braces("{0..3}")
