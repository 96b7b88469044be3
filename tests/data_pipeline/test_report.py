import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline import report
from data_pipeline.assemble import IndexWriter, assemble
from data_pipeline.drawing import draw_preview
from data_pipeline.errors import InputError, OutputError
from data_pipeline.journal import Journal
from data_pipeline.records import TrainingPair, VideoFile
from data_pipeline.report import keep_notes, main, read_notes, render_report, write_report
from data_pipeline.steps.write_shards import WriteShards

STAGES = ("read_videos", "filter_pairs", "write_shards")
REASONS = (("read_videos", "empty file"), ("filter_pairs", "near-identical frames"))


@pytest.fixture
def finished(tmp_path, make_pair, make_match):
    """A dataset just before its report is written: 3 kept videos of two samples each, and 12 rejected ones of each of
    two reasons, of which those of the later one have a picture. Returns journal, files and the content of build.json.
    """
    rng = np.random.default_rng(0)
    mask = np.zeros((48, 48), dtype=bool)
    mask[10:30, 15:40] = True
    journal = Journal(tmp_path / "out")
    journal.start({})
    files = []

    def file(name):
        files.append(VideoFile(name=f"{name}.mp4", key=name, path=tmp_path / f"{name}.mp4", caption="a dog"))
        return files[-1]

    for number in range(3):
        found = file(f"kept{number}")
        frames = make_pair(*(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8) for _ in range(2)), file=found)
        pair = TrainingPair(frames=frames, matches=(make_match(mask, mask),))
        encoded = WriteShards(both_directions=True).process(pair)
        dropped = [{"phrase": "cat", "stage": "filter_pairs", "reason": "box too small", "evidence": {}}] * number
        lost = [{"number": 1, "stage": "filter_pairs", "reason": "near-identical frames", "evidence": {}}]
        seconds = {"read_videos": 0.1, "write_shards": 0.25}
        marker = {"kept": True, "samples": list(encoded.samples), "dropped": dropped, "lost_pairs": lost}
        journal.commit(found, {**marker, "seconds": seconds}, blocks=encoded.blocks)
    for stage, reason in REASONS:
        for number in range(12):
            found = file(f"bad_{stage}_{number:02d}")
            preview = draw_preview(frames) if stage == "filter_pairs" else b""
            why = {"kept": False, "stage": stage, "reason": reason, "evidence": {"number": number}}
            journal.commit(found, {**why, "seconds": {"read_videos": 0.1}}, preview=preview)
    build = {"schema": "data_pipeline.build/1", "settings": {stage: {} for stage in STAGES}, "versions": {"numpy": "2"}}
    build |= assemble(journal, files, per_shard=4)
    return journal, files, build


def written(out):
    """Everything that a report consists of."""
    return {path: path.read_bytes() for path in [out / "report.html", *sorted((out / "report").glob("*.png"))]}


def test_counts_and_what_the_page_says(finished):
    tally = write_report(*finished[:2], STAGES, finished[2])
    assert (tally.videos, tally.kept_videos, tally.samples, tally.subjects) == (27, 3, 6, 6)
    assert tally.reached == {"read_videos": 27, "filter_pairs": 15, "write_shards": 3}
    assert {stage: dict(counts) for stage, counts in tally.rejected.items() if counts} == {
        "read_videos": {"empty file": 12},
        "filter_pairs": {"near-identical frames": 12},
    }
    text = (finished[0].out / "report.html").read_text()
    assert "27 videos gave 6 samples with 6 subjects; 24 videos were rejected" in text
    assert '<td>box too small</td><td class="n">3</td>' in text
    assert '<td>near-identical frames</td><td class="n">3</td>' in text
    assert text.count("<svg") == 6


def test_what_is_out_of_the_ordinary_is_counted_over_kept_and_rejected_clips(finished):
    journal, files, build = finished
    for file, notes in ((files[0], ["HDR"]), (files[5], ["HDR", "interlaced"])):
        marker = journal.read(file)
        journal.commit(file, {**marker, "notes": notes}, blocks=journal.blocks(file.key) if marker["kept"] else b"")
    write_report(journal, files, STAGES, build)
    assert read_notes(journal.out)["clips"] == [["HDR", 2], ["interlaced", 1]]
    assert '<td>HDR</td><td class="n">2</td>' in (journal.out / "report.html").read_text()


def test_an_unexpected_error_shows_its_caption_and_the_error_in_words(finished, monkeypatch):
    journal, files, build = finished
    evidence = {"error": "IndexError: list index out of range", "caption": "women's hands " * 20, "traceback": "..."}
    entry = {"video": "a.mp4", "key": "bad_filter_pairs_00", "stage": "filter_pairs", "reason": "unexpected error"}
    (journal.out / "rejected.jsonl").write_text(json.dumps({**entry, "evidence": evidence}))
    keep_notes(journal, files)
    shown = []
    monkeypatch.setattr(report, "contact_sheet", lambda tiles: shown.extend(tiles) or Image.new("RGB", (9, 9)))
    render_report(journal.out, build)
    heading, (_, text) = shown[-2:]
    assert heading == "filter_pairs: unexpected error (1)"
    assert text.startswith("error: IndexError: list index out of range; caption: women's hands women's")
    assert text.endswith("wo ...\n[a.mp4]")


def test_the_same_bytes_from_the_dataset_alone(finished, capsys):
    journal, files, build = finished
    write_report(journal, files, STAGES, build)
    before = written(journal.out)
    assert len(before) == 3
    journal.close()
    # What the build adds after its report must not change the report.
    build["counts"]["reasons"] = {"read_videos": {"empty file": 12}}
    (journal.out / "build.json").write_text(json.dumps(build))
    for path in before:
        path.unlink()
    assert main([str(journal.out)]) == 0
    assert "6 samples with 6 subjects from 27 videos" in capsys.readouterr().out
    assert written(journal.out) == before


def test_pictures_of_a_few_rejected_clips_of_each_reason_are_kept(finished):
    journal, files, build = finished
    leftover = journal.out / "report" / "rejected" / "leftover.jpg"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"of an interrupted run")
    write_report(journal, files, STAGES, build)
    names = [path.stem for path in sorted((journal.out / "report" / "rejected").iterdir())]
    assert names == [f"bad_filter_pairs_{number:02d}" for number in range(report.EXAMPLES)]
    assert Image.open(journal.out / "report" / "kept.png").width == 1500
    assert Image.open(journal.out / "report" / "rejected.png").width == 1500


def test_a_dataset_without_notes_still_has_a_report(finished):
    journal, files, build = finished
    write_report(journal, files, STAGES, build)
    (journal.out / "report" / "notes.json").unlink()
    assert render_report(journal.out, build).samples == 6
    assert "box too small" not in (journal.out / "report.html").read_text()


def test_notes_of_another_kind(finished):
    journal, files, _ = finished
    keep_notes(journal, files)
    assert read_notes(journal.out)["seconds"] == {"read_videos": 2.7, "write_shards": 0.75}
    place = journal.out / "report" / "notes.json"
    place.write_text('{"schema": "data_pipeline.report/2"}')
    with pytest.raises(
        InputError, match=r"schema 'data_pipeline.report/2'; this program reads 'data_pipeline.report/1'"
    ):
        read_notes(journal.out)
    for content in ("{", "[" * 100_000):
        place.write_text(content)
        with pytest.raises(InputError, match="is no json .*: delete it"):
            read_notes(journal.out)


def test_a_file_where_the_pictures_go(finished):
    journal, files, build = finished
    (journal.out / "report").write_text("a file")
    for write in (lambda: keep_notes(journal, files), lambda: render_report(journal.out, build)):
        with pytest.raises(OutputError, match=r"cannot make the folder .*report.*Move away the file"):
            write()


def test_kept_samples_are_shown_evenly(finished, monkeypatch):
    shown = []
    original = report.draw_sample
    monkeypatch.setattr(report, "draw_sample", lambda sample: shown.append(sample.key) or original(sample))
    monkeypatch.setattr(report, "KEPT_SHOWN", 3)
    write_report(*finished[:2], STAGES, finished[2])
    assert shown == ["kept0", "kept1", "kept2"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("build.json", "has no build.json, so it is no finished dataset"),
        ("index.parquet", "no .*index.parquet: the dataset is not complete"),
        ("rejected.jsonl", "no .*rejected.jsonl: the dataset is not complete"),
        ("pairs-000000.tar", "no file at .*pairs-000000.tar"),
    ],
)
def test_an_incomplete_dataset_is_one_clear_error(finished, capsys, name, message):
    journal, files, build = finished
    write_report(journal, files, STAGES, build)
    (journal.out / "build.json").write_text(json.dumps(build))
    (journal.out / name).unlink()
    assert main([str(journal.out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error


def test_a_build_file_with_a_schema_only(finished, capsys):
    (finished[0].out / "build.json").write_text('{"schema": "data_pipeline.build/1"}')
    assert main([str(finished[0].out)]) == 2
    assert "build.json lacks settings, versions, counts, shards" in capsys.readouterr().err


def test_parts_of_two_datasets(finished):
    journal, files, build = finished
    keep_notes(journal, files)
    with pytest.raises(InputError, match=r"index.parquet has 6 rows, and build.json says 0 samples"):
        render_report(journal.out, {**build, "shards": []})
    others = [{**entry, "name": f"other-{entry['name']}"} for entry in build["shards"]]
    with pytest.raises(InputError, match="names a shard 'pairs-000000.tar' that build.json does not list"):
        render_report(journal.out, {**build, "shards": others})
    with pytest.raises(InputError, match="names a step 'read_videos' that build.json does not know"):
        render_report(journal.out, {**build, "settings": {"filter_pairs": {}}})


def test_a_broken_picture_of_a_rejected_clip(finished, capsys):
    journal, files, build = finished
    write_report(journal, files, STAGES, build)
    (journal.out / "build.json").write_text(json.dumps(build))
    (journal.out / "report" / "rejected" / "bad_filter_pairs_00.jpg").write_bytes(b"x")
    assert main([str(journal.out)]) == 2
    assert "bad_filter_pairs_00.jpg does not open" in capsys.readouterr().err


def test_nothing_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (out / "index.parquet").open("wb") as file, IndexWriter(file):
        pass
    (out / "rejected.jsonl").write_text(
        json.dumps({"video": "a\udcff.mp4", "key": "a", "stage": "read_videos", "reason": "empty file", "evidence": {}})
    )
    build = {"settings": {stage: {} for stage in STAGES}, "versions": {}, "counts": {"samples": 0}, "shards": []}
    tally = render_report(out, build)
    assert (tally.videos, tally.samples) == (1, 0)
    assert list((out / "report").iterdir()) == []
    assert "a?.mp4" in (out / "report.html").read_text()


def test_the_command_answers_at_once():
    code = """
import sys
for name in ("report", "inspect"):
    try:
        __import__(f"data_pipeline.{name}", fromlist=["main"]).main(["--help"])
    except SystemExit as stop:
        assert stop.code == 0
print("loaded:", *sorted({"torch", "spacy", "av", "decord", "pyarrow", "cv2", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_nothing_is_written_through_a_link(tmp_path):
    """A dataset of a stranger may have one in place of the report's folder."""
    from data_pipeline.report import _make_folder

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "report").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link to another folder"):
        _make_folder(tmp_path / "report")
