"""Wrong calls of the ``msdiffusion`` command, one table: each ends in one sentence, before torch is loaded.

This file imports nothing heavy: a process of its own runs the table and looks at what it has loaded.
"""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from msdiffusion.cli import main

ROOT = Path(__file__).parents[2]
HEAVY = ("diffusers", "pytorch_lightning", "spacy", "torch", "transformers")
DRAW = "generate --prompt dog --image {t}/a.png --phrase dog --box 0,0,1,1"
WRONG = [
    ("generate --prompt x --image {t}/a.png --box 0,0,1,1 --model embeded --out {t}/o.png", "did you mean embedded?"),
    # words that the shell has cut at their blanks
    ("generate --prompt a cat --image {t}/a.png --out {t}/o.png",
     "there is no 'cat': what has blanks in it needs quotes, "
     '--prompt "a cat"'),
    ("generate --image {t}/a.png --out {t}/o.png --prompt a cat on the beach", '--prompt "a cat on the beach"'),
    ("generate --prompt dog --image {t}/a.png --box 0 0 .5 .5 --out {t}/o.png", "--box 0,0,.5,.5"),
    ("generate --prompt dog --image {t}/a.png --box 0, 0, .5, .5 --out {t}/o.png", "--box 0,0,.5,.5"),
    ("generate --prompt dog --image {t}/a.png {t}/b.png --out {t}/o.png",
     "--image takes one: --image {t}/a.png --image"),
    ("generate --prompt dog --image {t}/a.png --phrase red dog --out {t}/o.png",
     '--phrase red --phrase dog, or with its '
     'blanks --phrase "red dog"'),
    ("generate --prompt dog --negative-prompt bad cat --out {t}/o.png", '--negative-prompt "bad cat"'),
    ("evaluate --model my model --out {t}/e", '--model "my model"'),
    # names of options, abbreviated or misspelled
    *((f"{DRAW} --out {{t}}/o.png {short}", f"did you mean {full}?") for short, full in (
        ("--ste 3", "--steps"), ("--num-image 3", "--num-images"), ("--subject-scale 3", "--subject-scales"),
        ("--guidance 3", "--guidance-scale"), ("--heigth 64", "--height"), ("--auto-layou", "--auto-layout"),
    )),
    ("evaluate --out {t}/e --subj 3", "there is no '--subj': did you mean --subjects?"),
    ("bench world --out {t}/b --training-seed 3", "did you mean --training-seeds?"),
    ("bench explore --out {t}/b --picture 3", "did you mean --pictures?"),
    ("bench explor --out {t}/b", "did you mean explore?"),
    ("demo --out {t}/d --clip 3", "did you mean --clips?"),
    ("convert {t}/folder --out {t}/c --licens x", "did you mean --license?"),
    ("convert {t}/folder --out {t}/c --to officia", "did you mean official?"),
    ("--vers", "required: COMMAND"),
    ("generat --prompt x", "did you mean generate?"),
    ("evalute", "did you mean evaluate?"),
    ("train", "did you mean lightning fit -c configs/msd.yaml?"),
    ("mine", "did you mean python -m data_pipeline.build?"),
    ("bench wrld", "did you mean world? (msdiffusion bench --help"),
    ("generate --promt x --out a.png", "there is no '--promt': did you mean --prompt? (msdiffusion generate --help"),
    ("generate --out a.png dog.png", "there is no 'dog.png' ("),
    ("generate --dtype float61 --out a.png", "did you mean float16?"),
    ("convert a --out b --steps 3", "there is no '--steps' (msdiffusion convert --help"),
    ("generate --view a.png --out b.png", "give its --image first"),
    # what is missing
    ("generate", "required: --out"),
    ("evaluate", "required: --out"),
    ("bench", "required: BENCHMARK"),
    ("demo", "required: --out"),
    ("convert", "required: model, --out"),
    ("convert {t}/a.bin", "required: --out"),
    ("generate --out {t}/o.png --device", "--device: expected one argument"),
    # numbers
    (f"{DRAW} --out {{t}}/o.png --steps x", "--steps: invalid int value: 'x'"),
    (f"{DRAW} --out {{t}}/o.png --steps 2000", "steps must be at most 1000, got 2000"),
    (f"{DRAW} --out {{t}}/o.png --steps -1", "steps must be a whole number of at least 1, got -1"),
    (f"{DRAW} --out {{t}}/o.png --guidance-scale 1e30", "guidance_scale must be a number in [0, 1000], got 1e+30"),
    (f"{DRAW} --out {{t}}/o.png --guidance-scale nan", "guidance_scale must be a number in [0, 1000], got nan"),
    (f"{DRAW} --out {{t}}/o.png --scale 1e38", "scale must be a number in [0, 1000], got 1e+38"),
    (f"{DRAW} --out {{t}}/o.png --scale inf", "scale must be a number in [0, 1000], got inf"),
    (f"{DRAW} --out {{t}}/o.png --subject-scales 1e38", "subject_scales[0] must be a number in [0, 1000]"),
    (f"{DRAW} --out {{t}}/o.png --num-images 100000", "num_images must be at most 1000, got 100000"),
    (f"{DRAW} --out {{t}}/o.png --num-images 0", "num_images must be a whole number of at least 1, got 0"),
    (f"{DRAW} --out {{t}}/o.png --batch-size 100000", "--batch-size must be at most 256, got 100000"),
    (f"{DRAW} --out {{t}}/o.png --height 16384", "height must be at most 8192, got 16384"),
    (f"{DRAW} --out {{t}}/o.png --height 8192 --width 8192", "a picture of 8192 x 8192 (width x height) has 67,108,864 "
     "pixels; 16,777,216 are drawn at most: draw a smaller one"),
    (f"{DRAW} --out {{t}}/o.png --seed -1", "seed must be a whole number of at least 0, got -1"),
    (f"{DRAW} --out {{t}}/o.png --seed 1.5", "--seed: invalid int value: '1.5'"),
    (f"{DRAW} --out {{t}}/o.png --auto-layout-threshold 2",
     "auto_layout_threshold must be a number in [0, 1], got 2.0"),
    (f"{DRAW} --out {{t}}/o.png --auto-layout-start 0", "auto_layout_start must be a whole number of at least 1"),
    ("evaluate --out {t}/e --subjects 0", "--subjects must be a whole number of at least 1, got 0"),
    ("evaluate --out {t}/e --subjects 1000000000", "--subjects must be at most 100000, got 1000000000"),
    ("evaluate --out {t}/e --batch-size 0", "--batch-size must be a whole number of at least 1, got 0"),
    ("evaluate --out {t}/e --batch-size 100000", "--batch-size must be at most 256"),
    ("evaluate --out {t}/e --steps 2000", "--steps must be at most 1000, got 2000"),
    ("evaluate --out {t}/e --steps 0", "--steps must be a whole number of at least 1, got 0"),
    ("evaluate --out {t}/e --scale 0", "--scale must be above 0, got 0.0: 0 is the adapter off"),
    ("evaluate --out {t}/e --scale -1", "scale must be a number in [0, 1000], got -1.0"),
    ("evaluate --out {t}/e --scale nan", "scale must be a number in [0, 1000], got nan"),
    ("evaluate --out {t}/e --guidance-scale 1e30", "guidance_scale must be a number in [0, 1000]"),
    ("evaluate --out {t}/e --seed -1", "--seed must be a whole number of at least 0, got -1"),
    ("evaluate --out {t}/e --seed 99999999999999999999", "--seed must be at most 4611686018427387904"),
    ("evaluate --out {t}/e --precision half", "--precision: invalid choice: 'half'"),
    *((f"bench world --out {{t}}/b {option} {number}", f"{option} must be {told}, got {number}") for option, number,
     told in (
        ("--steps", 0, "a whole number of at least 1"), ("--steps", 10**9, "at most 100000"),
        ("--jobs", 0, "a whole number of at least 1"), ("--jobs", 1000, "at most 256"),
        ("--pictures", 10**9, "at most 100000"), ("--draw-batch", 0, "a whole number of at least 1"),
        ("--draw-batch", 100000, "at most 256"), ("--train-batch", -2, "a whole number of at least 1"),
        ("--seed", -1, "a whole number of at least 0"),
    )),
    ("bench world --out {t}/b --training-seeds 1 1", "--training-seeds must be different and not below 0, got [1, 1]"),
    ("bench world --out {t}/b --training-seeds -1", "--training-seeds must be different and not below 0, got [-1]"),
    ("bench world --out {t}/b --rows typo", "--rows: invalid choice: 'typo'"),
    ("bench explore --out {t}/b --pictures 0", "--pictures must be a whole number of at least 1, got 0"),
    ("bench explore --out {t}/b --draw-batch 0", "--draw-batch must be a whole number of at least 1, got 0"),
    ("bench explore --out {t}/b --seed -1", "--seed must be a whole number of at least 0, got -1"),
    ("bench explore --out {t}/b --draw-batch 257", "--draw-batch must be at most 256, got 257"),
    ("demo --out {t}/d --clips 0", "--clips must be a whole number of at least 1, got 0"),
    ("demo --out {t}/d --clips 1000000000", "--clips must be at most 100000"),
    ("demo --out {t}/d --train-steps 0", "--train-steps must be a whole number of at least 1, got 0"),
    ("demo --out {t}/d --subjects 1000000000", "--subjects must be at most 100000"),
    ("demo --out {t}/d --seed -1", "--seed must be a whole number of at least 0, got -1"),
    ("convert {t}/folder --out {t}/c --head-width x", "--head-width: invalid int value: 'x'"),
    # places to write to
    *((f"{command} --out {out}", told) for command in (
        "evaluate", "bench world", "bench explore", "demo", "convert {t}/folder", "generate --request {t}/no.yaml",
    ) for out, told in (
        ("{t}/file", "--out must be a folder, but "), ("{t}/file/x/y",
         "--out must be a folder, but '{t}/file' is a file"),
        ("''", "'' is no path: was a variable of the shell empty?"), ("/dev/null/x", "--out must be a folder"),
        (f"{{t}}/{'x' * 300}", "cannot be written: File name too long"),
    )),
    (f"{DRAW} --out {{t}}/file/o.png", "--out must lie in a folder, but '{t}/file' is a file: give another place"),
    (f"{DRAW} --out {{t}}/folder/x.png", "--out must be a file, but '{t}/folder/x.png' is a folder"),
    (f"{DRAW} --out ''", "'' is no path"),
    (f"{DRAW} --out {{t}}/o", "--out must end in one of .png"),
    (f"{DRAW} --out {{t}}/{'x' * 240}.png", "cannot be written: File name too long"),
    ("bench world --out {t}/b --document {t}/folder", "--document must be a file, but '{t}/folder' is a folder"),
    ("bench explore --out {t}/b --document {t}/file/x.md", "--document must lie in a folder, but '{t}/file' is a file"),
    ("convert {t}/folder --to official --out {t}/file/x.bin", "--out must lie in a folder, but '{t}/file' is a file"),
    ("demo --out {t}", "isn't empty and no demo made it"),
    (f"{DRAW} --out x.gif", "--out must end in one of .png"),
    # places to read from
    ("convert nowhere.bin --out {t}/c", "no such file or folder: 'nowhere.bin' (model)"),
    ("convert runs/a/b --out {t}/c", "no such file or folder: 'runs/a/b' (model)"),
    ("convert {t}/folder --base-model ./nowhere --out {t}/c", "no such file or folder: './nowhere' (--base-model)"),
    ("evaluate --model /nowhere --out {t}/e", "no such file or folder: '/nowhere' (--model)"),
    ("evaluate --judge ~/judge --out {t}/e", "no such file or folder: '"),
    (f"{DRAW} --out {{t}}/o.png --model a.ckpt", "no such file or folder: 'a.ckpt'"),
    (f"{DRAW} --out {{t}}/o.png --image-encoder ./a", "'./a' (--image-encoder)"),
    ("generate --prompt dog --image https://a.org/b.png --phrase dog --out {t}/o.png", "is the address 'https://a.org"),
    (f"{DRAW} --out {{t}}/o.png --steps 0", "steps must be a whole number"),
    (f"{DRAW} --out {{t}}/o.png --model ''", "--model is given by its folder, file or hub name, got ''"),
    (f"{DRAW} --out {{t}}/o.png --model {'x' * 300}", "--model: nothing can have the name 'xxx"),
    (f"{DRAW} --out {{t}}/o.png --base-model ''", "--base-model is given by its folder, file or hub name, got ''"),
    (f"{DRAW} --out {{t}}/o.png --model https://huggingface.co/a/b", "is an address: a hub repository is given as "
     "owner/name, here a/b"),
    ("evaluate --out {t}/e --model ''", "--model is given by its folder, file or hub name"),
    ("evaluate --out {t}/e --judge {t}/nope", "no such file or folder: '{t}/nope' (--judge)"),
    ("convert '' --out {t}/c", "model is given by its folder, file or hub name, got ''"),
    ("convert {t}/folder --out {t}/c --base-model {t}/nope", "no such file or folder: '{t}/nope' (--base-model)"),
    ("bench world --pairs TYPO --out {t}/b",
     "--pairs must be a dataset that data_pipeline.build has finished, but TYPO "
     "is no folder; without --pairs it is mined from 6000 clips"),
    ("bench world --pairs {t}/file --out {t}/b", "file is a file; without --pairs"),
    ("bench world --pairs {t}/folder --out {t}/b", "folder holds no build.json"),
    ("bench world --out {t}/b --model {t}/nope", "nope/base/model_index.json is missing"),
    ("bench explore --out {t}/b --model {t}/nope", "nope/base/model_index.json is missing"),
    ("demo --out {t}/d --model {t}/nope", "nope/adapter.safetensors is missing"),
    ("generate --prompt dog --image '' --phrase dog --out {t}/o.png",
     "images[0] must be the path of a picture, got ''"),
    ("generate --prompt dog --image {t}/folder --phrase dog --out {t}/o.png",
     "is a folder: give the file of one picture"),
    ("generate --prompt dog --image {t}/a.png --phrase '' --out {t}/o.png", "phrases[0] is ''"),
    ("generate --request {t}/nope.yaml --out {t}/o", "no such file: {t}/nope.yaml"),
    ("generate --request {t}/folder --out {t}/o", "no such file: {t}/folder"),
    ("generate --request {t}/a.png --out {t}/o", "a.png cannot be read as text in UTF-8"),
    ("generate --request {t}/tab.yaml --out {t}/o",
     "tab.yaml, line 2: a tab is there, which YAML takes neither for blanks "
     "nor in front: put blanks in its place"),
    ("generate --request {t}/many.json --out {t}/o",
     "pictures has 100001 entries; 100000 are drawn at most: use several"),
    ("generate --request {t}/long.yaml --out {t}/o",
     "of YAML 1,048,576 are read at most: put what repeats under defaults, or "
     "write it as .json"),
    ("generate --request '' --out {t}/o", "'' is no path"),
    ("generate --from-png {t}/nope.png --out {t}/o.png", "no such file: {t}/nope.png"),
    ("generate --from-png {t}/a.png --out {t}/o.png", "has no metadata of msdiffusion"),
    ("generate --from-png {t}/file --out {t}/o.png", "is not a PNG that can be read"),
    ("generate --from-png {t}/batch.png --out {t}/o.png", "batch.size is 1024, more than 256"),
    ("generate --from-png {t}/large.png --out {t}/o.png",
     "a picture of 16384 x 16384 (width x height) has 268,435,456"),
    ("generate --from-png {t}/both.png --out {t}/o.png",
     "256 pictures of 1024 x 1024 (width x height) have 268,435,456 "
     "pixels; 67,108,864 are drawn at once at most: 64 such pictures, which the batch size says"),
    ("generate --from-png {t}/steps.png --out {t}/o.png", "steps must be at most 1000, got 2000"),
    ("generate --from-png {t}/guidance.png --out {t}/o.png", "guidance_scale must be a number in [0, 1000], got 1e+30"),
]  # fmt: skip
assert len(WRONG) > 130


def run(command: str, folder: Path) -> tuple[int, str]:
    """Exit status, and what was said."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            status = main(shlex.split(command.replace("{t}", str(folder))))
        except SystemExit as end:
            status = end.code
    return status, told.getvalue()


def prepare(folder: Path) -> Path:
    """What the table speaks of."""
    (folder / "file").write_text("x")
    (folder / "folder" / "x.png").mkdir(parents=True)
    picture = Image.new("RGB", (8, 8), "red")
    picture.save(folder / "a.png")
    (folder / "tab.yaml").write_text("pictures:\n\t- prompt: a dog\n")
    (folder / "many.json").write_text(json.dumps({"pictures": [{}] * 100_001}))
    (folder / "long.yaml").write_text("pictures:\n" + "  - {prompt: a dog}\n" * 60_000)
    for name, size, batch, more in (
        ("batch", 64, 1024, {}),
        ("large", 16384, 1, {}),
        ("both", 1024, 256, {}),
        ("steps", 64, 1, {"steps": 2000}),
        ("guidance", 64, 1, {"guidance_scale": 1e30}),
    ):
        info = PngInfo()
        info.add_text("msdiffusion", json.dumps(record(folder, {"height": size, "width": size, **more}, batch)))
        picture.save(folder / f"{name}.png", pnginfo=info)
    return folder


def record(folder: Path, request: dict, batch: int) -> dict:
    """A record as a PNG of a stranger may have it."""
    from msdiffusion.files import file_sha256
    from msdiffusion.request.provenance import REQUEST_KEYS, SCHEMA

    given = {"prompt": "dog", "phrases": ["dog"], "boxes": [[0, 0, 1, 1]], "seed": 0, **request}
    reference = {"path": "a.png", "sha256": file_sha256(folder / "a.png")}
    model = ("adapter", "adapter_sha256", "adapter_config", "base_model", "image_encoder", "dtype")
    return {
        "schema": SCHEMA,
        "request": {**dict.fromkeys(REQUEST_KEYS), **given, "images": [[reference]]},
        "left_out": [],
        "flagged": False,
        "model": {**dict.fromkeys(model, "float32"), "base_config": None},
        "hooks": {"safety_checker": None, "watermark": None},
        "batch": {"size": batch, "position": 0},
        "made_with": dict.fromkeys(("msdiffusion", "torch", "diffusers", "device"), "1"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize(("command", "told"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_command_is_one_sentence(command, told, folder):
    before = sorted(folder.rglob("*"))
    status, said = run(command, folder)
    assert status == 2
    assert told.replace("{t}", str(folder)) in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 2, "one sentence, and perhaps a note before it"
    assert sorted(folder.rglob("*")) == before, "nothing is left behind"


def test_wrong_commands_load_nothing_heavy(folder):
    """Nor do they need the network: the libraries that would ask a hub aren't loaded."""
    code = (
        "import importlib.util, sys; from pathlib import Path\n"
        f"spec = importlib.util.spec_from_file_location('table', {__file__!r})\n"
        "table = importlib.util.module_from_spec(spec); spec.loader.exec_module(table)\n"
        "for command, _ in table.WRONG: assert table.run(command, Path(sys.argv[1]))[0] == 2, command\n"
        "print(sorted({*table.HEAVY, 'huggingface_hub'} & sys.modules.keys()))"
    )
    call = [sys.executable, "-c", code, str(folder)]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_escape_sequences_of_paths_reach_no_terminal(tmp_path):
    """What a command prints of a path; wrong flags, too."""
    place = tmp_path / "x\x1b[31mRED"
    for command in (
        f"configs msd.yaml --out '{place}'",
        "generate --out a.png --bogus\x1b[31m",
        f"evaluate --out '{place}' --device tpu",
    ):
        _, said = run(command, tmp_path)
        assert "\\x1b[31m" in said or "tpu" in said
        assert "\x1b" not in said
    assert (place / "msd.yaml").is_file()


def test_programs_that_pip_installs_take_no_code_from_where_one_stands(tmp_path):
    """Nor do the processes that they start: cutout is one."""
    (tmp_path / "PIL.py").write_text("print('taken')")
    code = (
        "import sys; sys.path[:] = sys.path[1:]; from msdiffusion.cli import main; sys.exit(main(['cutout', '--help']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "taken" not in done.stdout
    assert "--box" in done.stdout


def test_a_reader_that_is_gone_ends_a_command_quietly():
    command = f"{sys.executable} -m msdiffusion configs | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_letters_that_a_terminal_cannot_encode_are_written_out(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    call = [sys.executable, "-m", "msdiffusion", "configs", "msd.yaml", "--out", str(tmp_path / "\u72d7")]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "\\u72d7" in done.stdout
