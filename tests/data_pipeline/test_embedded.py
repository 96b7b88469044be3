import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.embedded import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [[], ["train"], ["measure"]])
def test_help_is_quick_and_loads_no_network(command):
    code = (
        "import sys\nfrom data_pipeline.embedded import main\n"
        f"try:\n    main({[*command, '--help']!r})\nexcept SystemExit:\n    pass\n"
        "print('loaded:', *sorted({'torch', 'transformers', 'spacy', 'cv2', 'segment_anything'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "detector", "--frames", "0"], "frames must be at least 1, got 0"),
        (["train", "segmenter", "--steps", "0"], "steps must be at least 1, got 0"),
        (["train", "segmenter", "--batch-size", "-1"], "batch_size must be at least 1, got -1"),
        (["train", "segmenter", "--threads", "0"], "at least one processor core, got 0"),
        (["train", "detector", "--twins", "2"], "twins is a share"),
        (["train", "detector", "--seed", "-1"], "seed must be a whole number from 0 to 2**63 - 1, got -1"),
        (["train", "detector", "--workers", "-1"], "--workers must be 0 or more, got -1"),
        (["train", "detector", "--out", f"{__file__}/model"], "--out must be a folder, but "),
        (["train", "detector", "--initial", "nowhere"], "no state.pt in nowhere"),
        (["measure", "--clips", "0"], "at least one clip, got --clips 0"),
        (["measure", "--twins", "-1"], "--twins -1"),
        (["measure", "--seeds", "3", "-1"], "--seeds must be 0 or more, got 3 -1"),
        (["measure", "--models", "nowhere"], "nowhere"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(arguments, said, tmp_path, capsys):
    assert main([*arguments, "--work", str(tmp_path / "work")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("command", [["train", "detector"], ["measure"]])
def test_a_work_folder_that_is_a_file(command, tmp_path, capsys):
    (tmp_path / "work").write_text("a file")
    assert main([*command, "--work", str(tmp_path / "work")]) == 2
    assert f"--work must be a folder, but '{tmp_path / 'work'}' is a file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--work", "--initial"])
def test_a_broken_state_is_found_before_anything_is_rendered(option, tmp_path, capsys, monkeypatch):
    from data_pipeline.models.embedded import renderings

    monkeypatch.setattr(renderings, "render", lambda *_: pytest.fail("rendered"))
    run = tmp_path / "detector_run"
    run.mkdir()
    (run / "state.pt").write_bytes(b"half a sta")
    places = {"--work": str(tmp_path / "work"), option: str(tmp_path if option == "--work" else run)}
    assert main(["train", "detector", *(word for pair in places.items() for word in pair)]) == 2
    assert f"{run / 'state.pt'} does not open" in capsys.readouterr().err


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "captioner"])
    assert "captioner" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("part", ["detector", "segmenter"])
def test_train_and_go_on(part, tmp_path, capsys):
    command = ["train", part, "--frames", "6", "--batch-size", "2", "--workers", "0", "--work", str(tmp_path)]
    assert main([*command, "--steps", "2", "--out", str(tmp_path / "model")]) == 0
    assert "parameters in" in capsys.readouterr().out
    assert (tmp_path / "model/model.safetensors").is_file()
    # Another run goes on from what this one has learned.
    initial, other = str(tmp_path / f"{part}_run"), str(tmp_path / "other")
    assert main([*command, "--steps", "1", "--initial", initial, "--work", other]) == 0
    # A run of other settings does not go on in the same folder by mistake.
    for changes, told in (
        (["--steps", "3"], "steps: 2 then, 3 now"),
        (["--frames", "7"], "frames: 6 then, 7 now"),
        (["--twins", "0.5"], "twins: 0.2 then, 0.5 now"),
        (["--initial", initial], "initial: '' then, 'step 2, weights "),
    ):
        assert main([*command, "--steps", "2", *changes]) == 2
        assert f"other settings; use those again, take another folder, or delete it to begin anew:\n  {told}" in (
            capsys.readouterr().err
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_measure_mines_clips_and_writes_figures(tmp_path, capsys):
    figures, picture = tmp_path / "figures.json", tmp_path / "sheet.png"
    options = ["--clips", "3", "--twins", "1", "--seeds", "7", "--work", str(tmp_path / "work")]
    models = str(ROOT / "checkpoints/tiny/mining")
    assert main(["measure", "--models", models, *options, "--json", str(figures), "--pictures", str(picture)]) == 0
    table = capsys.readouterr().out
    content = json.loads(figures.read_text())
    assert content["clips"][0]["pairs"] == 3
    assert content["twins"][0]["pairs"] == 1
    assert content["clips"][0]["recall"] >= 0.5
    assert f"| all | {content['clips'][0]['objects']} |" in table
    assert picture.read_bytes()[1:4] == b"PNG"


def test_curves_are_drawn_from_the_logs(tmp_path, capsys):
    folder = tmp_path / "detector_run"
    folder.mkdir()
    (folder / "log.csv").write_text("step,frames_per_second,name,loss\n50,40.0,0.5,2.5\n100,40.0,0.25,1.5\n")
    picture = tmp_path / "curves.png"
    assert main(["curves", "--work", str(tmp_path), "--out", str(picture)]) == 0
    assert picture.read_bytes()[1:4] == b"PNG"
    assert main(["curves", "--work", str(tmp_path / "empty")]) == 2
    assert "train a part first" in capsys.readouterr().err
