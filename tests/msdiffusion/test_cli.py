import subprocess
import sys

import pytest
import torch
from PIL import Image

import msdiffusion.generate
from msdiffusion.cli import DEFAULT_MODEL, main

PROMPT = "a dog and a teapot on the beach"


@pytest.fixture
def two(tmp_path):
    """Arguments of a good call."""
    Image.new("RGB", (20, 20), "red").save(tmp_path / "dog.png")
    Image.new("RGBA", (20, 20), "blue").save(tmp_path / "teapot.png")
    return [
        "--image", str(tmp_path / "dog.png"), "--box", "0,.25,.5,.75", "--phrase", "dog",
        "--image", str(tmp_path / "teapot.png"), "--box", ".5,.25,1,.75", "--phrase", "teapot",
        "--prompt", PROMPT, "--out", str(tmp_path / "out" / "picture.png"), "--seed", "0", "--quiet",
    ]  # fmt: skip


def test_generate_writes_the_picture(two, tiny_model_dir, tmp_path, capsys):
    assert main(["generate", *two, "--model", str(tiny_model_dir), "--steps", "2", "--device", "cpu"]) == 0
    out = tmp_path / "out" / "picture.png"
    assert capsys.readouterr().out.strip() == str(out)
    assert Image.open(out).size == (64, 64)


def test_generate_numbers_several_pictures(two, tiny_model_dir, tmp_path, capsys):
    options = ["--num-images", "2", "--steps", "1", "--height", "48", "--width", "72", "--subject-scales", "1,.5"]
    assert main(["generate", *two, *options, "--model", str(tiny_model_dir), "--auto-layout-start", "1"]) == 0
    names = [tmp_path / "out" / f"picture_{k}.png" for k in range(2)]
    assert capsys.readouterr().out.split() == [str(name) for name in names]
    assert [Image.open(name).size for name in names] == [(72, 48)] * 2


def replaced(arguments, name, value):
    position = arguments.index(name)
    return [*arguments[: position + 1], value, *arguments[position + 2 :]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: replaced(a, "--image", "nowhere.png"), "images[0]: no such file: nowhere.png"),
        (lambda a: replaced(a, "--box", "0,.25,1.5,.75"), "boxes[0] is (0.0, 0.25, 1.5, 0.75), which leaves"),
        (lambda a: replaced(a, "--box", "-0.1,.25,.5,.75"), "which leaves the picture"),
        (lambda a: replaced(a, "--box", "0.5,.25,.5,.75"), "which is empty"),
        (lambda a: replaced(a, "--box", "0.9,.25,.5,.75"), "reversed"),
        (lambda a: replaced(a, "--box", "nan,.25,.5,.75"), "not finite"),
        (lambda a: replaced(a, "--box", "0,.25,.5"), "four numbers"),
        (lambda a: replaced(a, "--box", "left"), "--box is 'left'"),
        (lambda a: replaced(a, "--prompt", ""), "the prompt is empty"),
        (lambda a: [*a, "--phrase", "beach"], "2 images, 2 boxes, 3 phrases"),
        (lambda a: [*a, "--box", "0,0,1,1"], "2 images, 3 boxes, 2 phrases"),
        (lambda a: [*a, "--height", "100"], "height is 100"),
        (lambda a: [*replaced(a, "--phrase", "cat"), "--auto-layout"], "'cat' is needed in the prompt"),
        (lambda a: replaced(a, "--out", "picture.doc"), "--out must end in one of .png"),
        (lambda a: [*a, "--subject-scales", "1"], "one number per image (2), got 1"),
        (lambda a: [*a, "--subject-scales", "-1,1"], "subject_scales[0]"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_loads_no_weights(two, edit, message, capsys, monkeypatch):
    monkeypatch.setattr(msdiffusion.generate.MSDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert main(["generate", *edit(two)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("msdiffusion: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_missing_model(two, tmp_path, capsys):
    assert main(["generate", *two, "--model", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_bad_input_loads_no_torch(two):
    code = (
        "import sys; from msdiffusion.cli import main; status = main(sys.argv[1:]);"
        "print(status, sorted({'torch', 'diffusers', 'spacy'} & sys.modules.keys()))"
    )
    call = [sys.executable, "-c", code, "generate", *replaced(two, "--box", "0,0,2,2")]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip() == "2 []"


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["convert", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys; from msdiffusion.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'spacy', 'PIL'} & sys.modules.keys()))"
    )
    out = subprocess.check_output([sys.executable, "-c", code, *arguments], text=True)
    assert out.strip().endswith("[]")


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["evaluate", "demo"])
def test_commands_of_other_files_run_with_their_options(name, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(f"msdiffusion.{name}.run", seen.append)
    assert main([name, "--out", str(tmp_path)]) == 0
    assert seen[0].out == tmp_path


def test_convert_reads_the_official_file(golden_tensors, official_adapter_file, tiny_model_dir, tmp_path, capsys):
    """Only configs of the frozen models are read, so their folders need no weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPVisionConfig

    from msdiffusion.adapter import MSAdapter

    _, config = golden_tensors("unet")
    with torch.device("meta"):
        UNet2DConditionModel(**config["unet_config"]).save_config(tmp_path / "base" / "unet")
    CLIPTextConfig(hidden_size=24).save_pretrained(tmp_path / "base" / "text_encoder")
    CLIPVisionConfig(hidden_size=48).save_pretrained(tmp_path / "encoder")
    call = [
        "convert", str(official_adapter_file), "--out", str(tmp_path / "ours"), "--head-width", "16",
        "--base-model", str(tmp_path / "base"), "--image-encoder", str(tmp_path / "encoder"),
    ]  # fmt: skip
    assert main(call) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "ours")
    adapter = MSAdapter.from_pretrained(tmp_path / "ours")
    assert adapter.config.base_model == str(tmp_path / "base")
    assert len(adapter.layers) == 11
    assert main([*call[:-3], str(tiny_model_dir / "base"), *call[-2:]]) == 2
    assert "use the base model that it was trained on" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nothing.bin"), *call[2:]]) == 2
    assert "no such file" in capsys.readouterr().err


def test_convert_goes_both_ways(tiny_model_dir, tmp_path, capsys):
    """Folder to official file to folder: the weights come back to the bit, and what the file can't say is told."""
    from safetensors.torch import load_file

    from msdiffusion.adapter import MSAdapter

    file = tmp_path / "new" / "ms_adapter.bin"
    assert main(["convert", str(tiny_model_dir), "--to", "official", "--out", str(file)]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(file)
    for word in ("'reference_fit': 'pad'", "'head_width': 16", "'scale': 0.8", "'base_model': 'base'"):
        assert word in printed.err
    torch.load(file, weights_only=True)
    names = ["--base-model", str(tiny_model_dir / "base"), "--image-encoder", str(tiny_model_dir / "image_encoder")]
    call = ["convert", str(file), "--out", str(tmp_path / "again"), "--head-width", "16", *names]
    assert main(call) == 0
    before = load_file(tiny_model_dir / "adapter.safetensors")
    after = load_file(tmp_path / "again" / "adapter.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (tmp_path / "again" / "README.md").is_file()
    # A folder copied by convert still finds its models.
    assert main(["convert", str(tiny_model_dir), "--out", str(tmp_path / "copy")]) == 0
    assert MSAdapter.from_pretrained(tmp_path / "copy").config.base_model == str(tiny_model_dir / "base")


def test_convert_refuses_places_and_ablations(tiny_model_dir, tmp_path, capsys):
    import shutil

    shutil.copytree(tiny_model_dir, tmp_path / "ablation")
    config = tmp_path / "ablation" / "config.json"
    config.write_text(config.read_text().replace('"regions": "boxes"', '"regions": "everywhere"'))
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([str(tiny_model_dir), "--to", "official", "--out", str(tmp_path / "folder")], "--out must end in .bin"),
        ([str(tiny_model_dir), "--out", str(tmp_path / "file")], "is a file (--to official writes files)"),
        (
            [str(tmp_path / "ablation"), "--to", "official", "--out", str(tmp_path / "ms_adapter.bin")],
            'regions "everywhere" is an ablation that the official code cannot run',
        ),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "ms_adapter.bin").exists()


def test_the_default_model_lies_in_the_repository():
    assert DEFAULT_MODEL.parts[-2:] == ("checkpoints", "tiny")


def test_a_device_that_is_not_there_is_one_line(tmp_path, capsys):
    picture = tmp_path / "dog.png"
    Image.new("RGB", (8, 8)).save(picture)
    out = tmp_path / "out.png"
    words = f"generate --image {picture} --box 0,0,1,1 --phrase dog --prompt dog --out {out} --device nowhere"
    assert main(words.split()) == 2
    assert "--device nowhere can't be used here" in capsys.readouterr().err


def test_subject_scales_that_are_no_numbers_say_so(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--subject-scales", "a,b"])
    assert "'a,b' must be numbers" in capsys.readouterr().err


def test_phrases_taken_from_the_prompt_are_shown(tiny_model_dir, tmp_path, capsys):
    """The match is by number and order only, so the user must see it."""
    picture = tmp_path / "dog.png"
    Image.new("RGB", (8, 8)).save(picture)
    request = ["--image", str(picture), "--box", "0,0,1,1", "--prompt", "a red car", "--out", str(tmp_path / "out.png")]
    assert main(["generate", *request, "--model", str(tiny_model_dir), "--steps", "1", "--quiet"]) == 0
    assert f"phrases from the prompt: {picture} = red car" in capsys.readouterr().err
