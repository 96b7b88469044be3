"""The same steps on Ray: one session for all tests of this file, because starting one takes seconds."""

import os
import re
import sys
from dataclasses import dataclass

import pytest

from data_pipeline import extras, run_ray
from data_pipeline.assemble import ShardPlan
from data_pipeline.build import main
from data_pipeline.errors import InputError, OutputError, SettingsError
from data_pipeline.journal import Journal
from data_pipeline.pairs_format import tar_member
from data_pipeline.records import VideoFile
from data_pipeline.run import split_finished
from data_pipeline.run_ray import RayOptions, check_ray, group_steps, ray_session, run_on_ray, write_on_ray
from data_pipeline.step import Step
from data_pipeline.world import write_clips

# Ray's own, on itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::UserWarning:ray")

# Workers import the steps by name: they have to be in a file on their path.
STEPS = """
import os, time
from dataclasses import dataclass
from data_pipeline.records import EncodedPair
from data_pipeline.errors import ClipError, InputError
from data_pipeline.step import Step

@dataclass(kw_only=True)
class Light(Step):
    def setup(self):
        self.ready = True
    def process(self, record):
        assert self.ready
        if record.key == "hangs":
            time.sleep(60)
        if record.key == "dies":
            os._exit(11)
        if record.key == "bad":
            raise ClipError("bad clip", value=3)
        return (record.key, record.key + "-b") if record.key == "two" else record.key

@dataclass(kw_only=True)
class Model(Step):
    model_device = "cpu"
    broken: bool = False
    def setup(self):
        if self.broken:
            raise InputError("no weights here")
    def process_many(self, records):
        if "broken" in records:
            raise KeyError("oops")
        return [record.upper() for record in records]

@dataclass(kw_only=True)
class Encode(Step):
    def process(self, record):
        return EncodedPair(samples=({"key": record},), blocks=record.encode())
"""


@pytest.fixture(scope="module")
def ray_steps(tmp_path_factory):
    """The module of steps, and a running Ray of two workers."""
    folder = tmp_path_factory.mktemp("steps")
    (folder / "ray_steps.py").write_text(STEPS)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *([before] if before else [])])
    sys.path.insert(0, str(folder))
    try:
        import ray_steps

        with ray_session(RayOptions(address="local", workers=2), [[Plain()]] * 6):
            yield ray_steps
    finally:
        sys.path.remove(str(folder))
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture
def make_files(tmp_path):
    def make(*keys):
        files = []
        for key in keys:
            path = tmp_path / "videos" / f"{key}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"x")
            files.append(VideoFile(name=path.name, key=key, path=path, caption="a dog"))
        return files

    return make


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "out")
    journal.start({})
    return journal


@pytest.mark.slow
def test_every_clip_has_its_outcome_whatever_happens_to_it(ray_steps, make_files, journal, capsys, monkeypatch):
    files = make_files("a", "bad", "broken", "dies", "hangs", "two", "z")
    steps = [ray_steps.Light(), ray_steps.Model(), ray_steps.Encode()]
    run_on_ray(steps, files, journal, RayOptions(address="local", workers=2, batch_clips=3, timeout=3.0))
    markers = {file.key: journal.read(file) for file in files}
    assert [key for key, marker in markers.items() if marker["kept"]] == ["a", "two", "z"]
    assert journal.blocks("a") == b"A"
    assert [sample["key"] for sample in markers["two"]["samples"]] == ["TWO", "TWO-B"]
    reasons = {key: (marker["stage"], marker["reason"]) for key, marker in markers.items() if not marker["kept"]}
    assert reasons == {
        "bad": ("light", "bad clip"),
        "broken": ("model", "unexpected error"),
        "dies": ("light", "the worker died"),
        "hangs": ("light", "took too long"),
    }
    shown = capsys.readouterr()
    assert "broken.mp4 is rejected after an unexpected error" in shown.out + shown.err
    # The next run tries those again whose reason may not have been theirs; without any it starts no actor.
    finished, waiting = split_finished(files, journal)
    assert [file.key for file in waiting] == ["broken", "dies", "hangs"]
    monkeypatch.delattr("ray.data.from_items")
    others = [file for file in files if file not in waiting]
    run_on_ray(steps, others, journal, RayOptions(address="local"), quiet=True)
    assert len(finished) == len(others) == 4


@pytest.mark.slow
def test_a_disk_that_cannot_be_written_to_stops_the_run(ray_steps, make_files, journal):
    [file] = make_files("a")
    journal._path(file.key, ".json").parent.write_text("a file where a folder should be")
    with pytest.raises(OutputError, match="cannot make the folder"):
        run_on_ray(
            [ray_steps.Light(), ray_steps.Encode()], [file], journal, RayOptions(address="local", workers=1), quiet=True
        )


@pytest.mark.slow
def test_weights_that_are_missing_stop_the_run(ray_steps, make_files, journal):
    files = make_files("a", "b")
    steps = [ray_steps.Light(), ray_steps.Model(broken=True), ray_steps.Encode()]
    with pytest.raises(InputError, match="no weights here"):
        run_on_ray(steps, files, journal, RayOptions(address="local", workers=1), quiet=True)
    assert [journal.read(file) for file in files] == [None, None]


@pytest.mark.slow
def test_a_shard_that_cannot_be_written_stops_the_run(ray_steps, make_files, journal):
    [file] = make_files("a")
    journal.commit(file, {"kept": True, "samples": [{}]}, blocks=tar_member("a.json", b"{}"))
    (journal.out / "pairs-000000.tar").mkdir()
    with pytest.raises(OutputError, match="cannot write .*pairs-000000.tar"):
        list(write_on_ray(journal, [ShardPlan("pairs-000000.tar", ("a",), 1)]))


@pytest.mark.slow
def test_the_same_dataset_as_on_one_machine(ray_steps, tmp_path):
    write_clips(tmp_path / "videos", 5, split="held_out", workers=0)
    (tmp_path / "videos/empty.mp4").write_bytes(b"")
    command = ["--videos", str(tmp_path / "videos"), "--quiet", "--pairs-per-clip", "2", "--pairs-per-shard", "3"]
    command += ["--detector", "embedded", "--segmenter", "embedded"]
    assert main([*command, "--out", str(tmp_path / "here"), "--workers", "0"]) == 0
    assert main([*command, "--out", str(tmp_path / "there"), "--workers", "2", "--ray", "local"]) == 0
    names = sorted(path.name for path in (tmp_path / "here").iterdir() if path.is_file() and path.suffix != ".html")
    assert len([name for name in names if name.endswith(".tar")]) > 1
    for name in set(names) - {"build.json"}:
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


@dataclass(kw_only=True)
class Plain(Step):
    pass


@dataclass(kw_only=True)
class OnDevice(Step):
    model_device = "cuda:0"


def test_neighbours_without_a_model_share_their_actors():
    steps = [Plain(), Plain(), OnDevice(), OnDevice(), Plain(), Plain()]
    assert [len(group) for group in group_steps(steps)] == [2, 1, 1, 2]
    with pytest.raises(SettingsError, match="last step cannot have a model, but on_device has one"):
        group_steps([Plain(), OnDevice()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "on Ray workers must be at least 1, got 0"),
        ({"model_workers": 0}, "on Ray model_workers must be at least 1, got 0"),
        ({"batch_clips": 0}, "on Ray batch_clips must be at least 1, got 0"),
        ({"gpu_share": 1.5}, r"gpu_share must lie in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_options(settings, message):
    with pytest.raises(SettingsError, match=message):
        RayOptions(address="local", **settings)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"CPU": 4.0, "GPU": 8.0}, "the actors need 6 CPUs, but has 4 on Ray at 'head:6379': lower --workers"),
        ({"CPU": 8.0}, "the actors need 1 GPUs, but has 0"),
    ],
)
def test_a_cluster_that_is_too_small_is_not_waited_for(there, message):
    options = RayOptions(address="head:6379", workers=2, gpu_share=0.5)
    groups = [[Plain()], [OnDevice()], [OnDevice()], [Plain()]]
    with pytest.raises(InputError, match=re.escape(message)):
        run_ray.check_resources(options, groups, there)


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'--ray auto: ray is not installed: pip install "\.\[ray\]", in'):
        check_ray(RayOptions(address="auto"))


def test_no_cluster_at_the_address(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(**options):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "init", refuse)
    with (
        pytest.raises(InputError, match="cannot reach a Ray cluster at 'head:6379': nobody there"),
        run_ray.ray_session(RayOptions(address="head:6379"), [[Plain()]]),
    ):
        pass


def test_options_of_ray_without_ray(capsys, tmp_path):
    assert main(["--videos", str(tmp_path), "--batch-clips", "4"]) == 2
    assert "--batch-clips is for a run on Ray: give --ray local or --ray ADDRESS" in capsys.readouterr().err
