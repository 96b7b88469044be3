"""Wrong calls of the commands of data_pipeline, one table: each ends in a line or two, before torch is loaded.

This file imports nothing heavy: a process of its own runs the table and looks at what it has loaded.
"""

import contextlib
import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline import build, convert, cutout, import_pairs, inspect, report
from data_pipeline.errors import OutputError
from data_pipeline.outputs import check_file, check_folder
from data_pipeline.world import __main__ as world

HEAVY = ("av", "cv2", "decord", "diffusers", "huggingface_hub", "spacy", "torch", "transformers")
DOORS = {
    "build": build, "convert": convert, "cutout": cutout, "import": import_pairs, "inspect": inspect, "report": report,
    "world": world,
}  # fmt: skip
A_FILE = "--out must be a folder, but '{t}/file' is a file: give another place"
WRONG = [
    # what is missing: one sentence, not all usage
    ("world", "the following arguments are required: --out"),
    ("cutout", "the following arguments are required: PHOTO, --out"),
    ("cutout {t}/a.png", "the following arguments are required: --out"),
    ("build", "the following arguments are required: --videos"),
    ("report", "the following arguments are required: DATASET"),
    ("inspect", "the following arguments are required: SHARD_OR_DATASET"),
    ("import", "the following arguments are required: --from, ITEMS_OR_DIR, --out"),
    ("convert", "the following arguments are required: model"),
    # names of options, abbreviated
    *((f"{command} {short} 3", f"did you mean {full} for {short}?") for command, short, full in (
        ("world --out {t}/w", "--cou", "--count"), ("world --out {t}/w", "--num-frame", "--num-frames"),
        ("cutout {t}/a.png --out {t}/c", "--segmente", "--segmenter"), ("build --videos {t}", "--worker", "--workers"),
        ("build --videos {t}", "--clip-time", "--clip-timeout"), ("inspect {t}", "--numb", "--number"),
        ("import --from images {t} --out {t}/i", "--max-pixel", "--max-pixels"),
    )),
    ("convert groundingdino --to hf a b --checkpoin 3", "unrecognized arguments: --checkpoin 3"),
    ("report {t} --x", "unrecognized arguments: --x"),
    # numbers
    *((f"world --out {{t}}/w {options}", told) for options, told in (
        ("--count 0", "count must be at least 1 and at most 1000000, got 0"),
        ("--count 1000000000", "count must be at least 1 and at most 1000000, got 1000000000"),
        ("--count x", "argument --count: invalid int value: 'x'"),
        ("--size 7", "size must be even, at least 16 and at most 2048 pixels, got 7"),
        ("--size 100000000", "at most 2048 pixels, got 100000000"),
        ("--num-frames 0", "need at least one frame and one frame per second"),
        ("--num-frames 100000000",
         "100000000 frames of 128 x 128 have 1,638,400,000,000 pixels; a clip is drawn in memory"),
        ("--num-subjects 9", "a scene holds 1 to 4 subjects, got 9"), ("--num-subjects 0",
         "a scene holds 1 to 4 subjects"),
        ("--seed -1", "seed must be at least 0"), ("--fps 0", "at 0 fps"), ("--fps 100000", "240 at most"),
        ("--workers -1", "workers must be at least 0 and at most 256, got -1"),
        ("--workers 1000000", "workers must be at least 0 and at most 256"), ("--split foo", "invalid choice: 'foo'"),
    )),
    ("build --videos {t} --workers -1", "--workers must be 0 or more, and 1024 at most, got -1"),
    ("build --videos {t} --workers 1000000", "--workers must be 0 or more, and 1024 at most, got 1000000"),
    ("build --videos {t} --clip-timeout 0", "--clip-timeout must lie above 0"),
    ("build --videos {t} --clip-timeout nan", "needs an ordinary number, got nan"),
    ("build --videos {t} --batch-clips 2", "--batch-clips is for a run on Ray"),
    *((f"import --from images {{t}} --out {{t}}/i {options}", told) for options, told in (
        ("--workers -1", "--workers must be 0 or more, and 1024 at most, got -1"),
        ("--workers 1000000", "1024 at most, got 1000000"), ("--mask-threshold 0",
         "--mask-threshold must be at least 1"),
        ("--item-timeout nan", "needs an ordinary number, got nan"), ("--item-timeout 0",
         "--item-timeout must lie above 0"),
        ("--images x", "--images belongs to --from official, not to --from images"), ("--boxes a",
         "invalid choice: 'a'"),
    )),
    ("inspect {t}/folder --number -1", "--number counts from 0, got -1"),
    ("inspect {t}/folder --number x", "argument --number: invalid int value: 'x'"),
    # devices
    ("cutout {t}/a.png --out {t}/c --device tpu", "--device is cpu, cuda, cuda:1 or mps, got 'tpu'"),
    ("cutout {t}/a.png --out {t}/c --device cuda:99999", "--device is cpu, cuda, cuda:1 or mps, got 'cuda:99999'"),
    # boxes
    ("cutout {t}/a.png --out {t}/c --box 0 0 1 1",
     "numbers that belong together have commas between them and no blanks"),
    ("cutout {t}/a.png --out {t}/c --box 0,0,2,1", "needed are fractions with 0 <= x1 < x2 <= 1"),
    # places to write to
    *((f"{command} --out {{t}}/{place}", A_FILE) for command in (
        "world", "cutout {t}/a.png", "build --videos {t}", "import --from images {t}/folder",
        "import --from official {t}/items.json --images {t}",
    ) for place in ("file", "file/x/y") if not command.startswith("world")),
    *((f"world --out {{t}}/{place}", A_FILE.removeprefix("--")) for place in ("file", "file/x/y")),
    *((f"{command} --out ''", "'' is no path: was a variable of the shell empty?") for command in (
        "world", "cutout {t}/a.png", "build --videos {t}", "import --from images {t}/folder", "inspect {t}",
    )),
    *((f"{command} --out {{t}}/{'x' * 300}", "cannot look at ") for command in (
        "cutout {t}/a.png", "build --videos {t}", "import --from images {t}/folder", "inspect {t}",
    )),
    ("inspect {t}/folder --out {t}/file/x.png", "--out must lie in a folder, but '{t}/file' is a file"),
    ("inspect {t}/folder --out {t}/folder", "--out must be a file, but '{t}/folder' is a folder"),
    ("convert groundingdino --to hf {t}/nope {t}/file", "file exists and is not empty: choose a new directory"),
    ("convert groundingdino --to hf {t}/nope {t}/file/x", "OUT must be a folder, but '{t}/file' is a file"),
    # places to read from
    ("cutout {t}/nope.png --out {t}/c", "nope.png: no such photo"),
    ("cutout {t}/folder --out {t}/c", "folder: a folder: give the photos in it"),
    ("cutout '' --out {t}/c", "'' is no path"),
    ("cutout {t}/a.png --out {t}/c --segmenter-checkpoint {t}/nope", "--segmenter-checkpoint: no file at {t}/nope"),
    ("cutout {t}/a.png --out {t}/c --segmenter foo", "invalid choice: 'foo'"),
    ("build --videos {t}/nope", "no folder of videos at {t}/nope"),
    ("build --videos {t}/file", "--videos needs a folder, but {t}/file is a file"),
    ("build --videos {t}/folder", "no videos in {t}/folder"),
    ("build --videos ''", "'' is no path"),
    ("build --videos {t} --detector foo", "invalid choice: 'foo'"),
    *((f"{command} {{t}}/nope", told) for command, told in (
        ("report", "no dataset at {t}/nope: it is no folder"), ("inspect", "no file at {t}/nope"),
        ("import --out {t}/i --from images", "no folder of pictures at {t}/nope"),
        ("import --out {t}/i --images {t} --from official", "items are read from .json, .jsonl, .parquet, got nope"),
    )),
    *((f"{command} {{t}}/file", told) for command, told in (
        ("report", "no dataset at {t}/file: it is no folder"), ("inspect", "file is no tar file"),
        ("import --out {t}/i --from images", "no folder of pictures at {t}/file"),
    )),
    *((f"{command} {{t}}/folder", "folder has no build.json, so it is no finished dataset") for command in
      ("report", "inspect", "inspect --list")),
    *((f"{command} ''", "'' is no path") for command in ("report", "inspect", "import --out {t}/i --from images")),
    ("import --from foo x --out y", "invalid choice: 'foo'"),
]  # fmt: skip
assert len(WRONG) > 90


def run(command: str, folder: Path) -> tuple[int, str]:
    """Exit status, and what was said."""
    told = io.StringIO()
    door, *arguments = shlex.split(command.replace("{t}", str(folder)))
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            status = DOORS[door].main(arguments)
        except SystemExit as end:
            status = end.code
    return status, told.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file").write_text("x")
    (folder / "items.json").write_text("[]")
    (folder / "folder").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    return folder


@pytest.mark.parametrize(("command", "told"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_command_is_a_line_or_two(command, told, folder):
    before = sorted(folder.rglob("*"))
    status, said = run(command, folder)
    assert status == 2
    assert told.replace("{t}", str(folder)) in said
    assert "usage:" not in said
    assert len(said.splitlines()) <= 3
    assert sorted(folder.rglob("*")) == before, "nothing is left behind"


def test_wrong_commands_load_nothing_heavy(folder):
    code = (
        "import importlib.util, sys; from pathlib import Path\n"
        f"spec = importlib.util.spec_from_file_location('table', {__file__!r})\n"
        "table = importlib.util.module_from_spec(spec); spec.loader.exec_module(table)\n"
        "for command, _ in table.WRONG: assert table.run(command, Path(sys.argv[1]))[0] == 2, command\n"
        "print(sorted(set(table.HEAVY) & sys.modules.keys()))"
    )
    call = [sys.executable, "-c", code, str(folder)]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_place_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    check_folder(tmp_path / "a" / "b")
    check_file(tmp_path / "a" / "b.png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="--out .* cannot be written: File name too long"):
        check_folder(tmp_path / ("x" * 300) / "y")
    with pytest.raises(OutputError, match="--out .* cannot be written: a name with a null"):
        check_folder(tmp_path / "a\0b")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OutputError, match="--out .* cannot be written: No space left on device"):
        check_folder(tmp_path)


def test_a_full_disk_leaves_no_half_clip(tmp_path, monkeypatch):
    from data_pipeline.world import clips

    def full(path, frames, fps):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clips, "write_video", full)
    status, said = run(f"world --out {tmp_path / 'w'} --count 1 --workers 0 --size 16 --num-frames 1", tmp_path)
    assert status == 2
    assert "cannot write" in said
    assert "No space left on device. The clips before it are kept" in said
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["world.settings"]


def test_escape_sequences_of_paths_reach_no_terminal(tmp_path):
    place = tmp_path / "x\x1b[31mRED"
    status, said = run(f"world --out '{place}' --count 1 --workers 0 --size 16 --num-frames 1", tmp_path)
    assert status == 0
    assert "\\x1b[31mRED" in said
    assert "\x1b[31m" not in said
    assert "\x1b" not in run("build --videos . --bogus\x1b[31m", tmp_path)[1]
