import gc
import importlib.util
import sys
from dataclasses import dataclass

import pytest

from data_pipeline import run as runner
from data_pipeline.errors import ClipError, MiningError, OutputError
from data_pipeline.journal import Journal
from data_pipeline.options import make_parser, make_steps
from data_pipeline.records import EncodedPair, Rejected, VideoFile
from data_pipeline.run import preloads, run
from data_pipeline.step import Step


@dataclass(kw_only=True)
class Pass(Step[VideoFile, VideoFile]):
    def process(self, record):
        return record


@dataclass(kw_only=True)
class Judge(Step[VideoFile, EncodedPair]):
    def process(self, record):
        if "bug" in record.name:
            raise KeyError("oops")
        if "bad" in record.name:
            raise ClipError("bad clip", value=3)
        if "no" in record.name:
            return Rejected("not wanted", {"value": 4})
        return EncodedPair(samples=({"key": record.key},), blocks=record.key.encode())


@pytest.fixture
def files(tmp_path):
    made = []
    for name in ("a", "bad", "bug", "no", "z"):
        path = tmp_path / "videos" / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        made.append(VideoFile(name=path.name, key=name, path=path, caption="a dog"))
    return made


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "out")
    journal.start({})
    return journal


def test_a_run_leaves_a_marker_for_every_clip_and_says_what_was_unexpected(files, journal, capsys):
    run([Pass(), Judge()], files, journal, workers=0, timeout=1)
    assert [journal.read(file)["kept"] for file in files] == [True, False, False, False, True]
    assert journal.blocks("a") == b"a"
    shown = capsys.readouterr()
    assert "bug.mp4 is rejected after an unexpected error" in shown.out + shown.err


def test_clips_that_fell_out_through_no_fault_of_theirs_are_tried_again(files, journal, monkeypatch):
    run([Judge()], files, journal, workers=0, timeout=1, quiet=True)
    assert journal.read(files[2])["reason"] == "unexpected error"
    seen = []
    monkeypatch.setattr(Judge, "process", lambda self, record: seen.append(record.name) or Rejected("mended"))
    run([Judge()], files, journal, workers=0, timeout=1, quiet=True)
    assert seen == ["bug.mp4"]
    assert journal.read(files[2])["reason"] == "mended"


def test_many_unexpected_errors_in_a_row_stop_the_run(files, journal, monkeypatch):
    monkeypatch.setattr(runner, "MOST_UNEXPECTED", 2)
    monkeypatch.setattr(Judge, "process", lambda self, record: {}["oops"])
    with pytest.raises(MiningError, match="2 clips in a row ended in an unexpected error(?s:.*)KeyError: 'oops'"):
        run([Judge()], files, journal, workers=0, timeout=1, quiet=True)


def test_models_on_a_gpu_share_nothing_by_forking():
    @dataclass(kw_only=True)
    class Model(Step):
        preload = ("json",)
        device: str

        @property
        def model_device(self):
            return self.device

    assert preloads([Model(device="cpu"), Pass()]) == ("json",)
    assert preloads([Model(device="cuda:0"), Pass()]) == ()


def test_workers_share_the_libraries_of_the_models_that_were_chosen():
    def preloaded(*options):
        return preloads(make_steps(make_parser().parse_args(["--videos", "x", *options])))

    names = preloaded("--detector", "embedded", "--segmenter", "embedded")
    assert {"transformers.models.grounding_dino.modeling_grounding_dino", "data_pipeline.models.sam"} < set(names)
    assert "data_pipeline.models.language_loaded" in names
    assert "data_pipeline.models.language" in preloaded("--language-model", "xx_none")
    # The server of the workers says nothing about a name that cannot be imported.
    assert all(importlib.util.find_spec(name) for name in names)
    unused = preloaded("--detector", "annotations", "--segmenter", "annotations")
    assert not any(name.startswith(("transformers", "data_pipeline.models.sam")) for name in unused)


def test_setting_up_collects_no_garbage_and_afterwards_it_is_collected(files, journal, monkeypatch):
    seen = []
    monkeypatch.setattr(Judge, "setup", lambda self: seen.append(gc.isenabled()), raising=False)
    run([Judge()], files[:1], journal, workers=0, timeout=1, quiet=True)
    assert (seen, gc.isenabled()) == ([False], True)


def test_finished_clips_are_not_mined_again(files, journal, monkeypatch):
    run([Judge()], files[:2], journal, workers=0, timeout=1, quiet=True)
    seen = []
    monkeypatch.setattr(Judge, "process", lambda self, record: seen.append(record.name) or Rejected("no"))
    run([Judge()], files, journal, workers=0, timeout=1, quiet=True)
    assert seen == ["bug.mp4", "no.mp4", "z.mp4"]
    run([Judge()], files, journal, workers=0, timeout=1, quiet=True)
    assert len(seen) == 3


STEP = """
import os, time
from dataclasses import dataclass
from data_pipeline.records import EncodedPair
from data_pipeline.step import Step

@dataclass(kw_only=True)
class Decode(Step):
    def process(self, record):
        if record.key == "bad":
            time.sleep(60)
        if record.key == "bug":
            os._exit(11)
        return EncodedPair(samples=({"key": record.key},), blocks=b"x")
"""


def test_a_decoder_that_hangs_or_dies_takes_one_clip_with_it(files, journal, tmp_path, monkeypatch):
    (tmp_path / "hanging_step.py").write_text(STEP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hanging_step", raising=False)
    import hanging_step

    run([Pass(), hanging_step.Decode()], files, journal, workers=1, timeout=3, quiet=True)
    markers = [journal.read(file) for file in files]
    assert [marker["kept"] for marker in markers] == [True, False, False, True, True]
    assert (markers[1]["stage"], markers[1]["reason"]) == ("decode", "took too long")
    assert (markers[2]["stage"], markers[2]["reason"]) == ("decode", "the worker died")
    assert markers[2]["evidence"] == {"detail": "exit code 11"}


def test_a_disk_that_cannot_be_written_to_stops_the_run_and_the_next_one_goes_on(files, journal, tmp_path, monkeypatch):
    (tmp_path / "plain_step.py").write_text(STEP)
    monkeypatch.syspath_prepend(tmp_path)
    import plain_step

    waiting = [file for file in files if file.key in ("a", "z")]
    blocked = journal._path("z", ".json").parent
    blocked.write_text("a file where a folder should be")
    with pytest.raises(OutputError, match="cannot make the folder"):
        run([plain_step.Decode()], waiting, journal, workers=1, timeout=20, quiet=True)
    assert journal.read(waiting[0])["kept"]
    assert journal.read(waiting[1]) is None
    blocked.unlink()
    run([plain_step.Decode()], waiting, journal, workers=1, timeout=20, quiet=True)
    assert [journal.read(file)["kept"] for file in waiting] == [True, True]
