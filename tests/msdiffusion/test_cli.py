import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image

from data_pipeline.cutout import make_parser
from msdiffusion.cli import build_parser, main
from msdiffusion.places import CONFIGS, REPOSITORY, config_names


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["convert", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments):
    code = (
        "import sys; from msdiffusion.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'spacy', 'PIL', 'numpy'} & sys.modules.keys()))"
    )
    out = subprocess.check_output([sys.executable, "-c", code, *arguments], text=True)
    assert out.strip().endswith("[]")


COMMANDS = (
    *([], ["generate"], ["convert"], ["configs"], ["evaluate"], ["demo"], ["bench"], ["bench", "world"]),
    ["bench", "explore"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_for_users(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert not any(word in text for word in ("`", "Args:", "Raises:", "imported", "None.", "Path"))


def test_configs_are_listed_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(config_names()), "a line each"
    assert all(len(line.split()) > 4 for line in lines), "with what it is for"
    assert main(["configs", "msd.yaml", "strategies/sharded.yaml"]) == 0
    assert capsys.readouterr().out.split() == ["msd.yaml", "strategies/sharded.yaml"]
    for name in ("msd.yaml", "strategies/sharded.yaml"):
        assert (tmp_path / name).read_bytes() == (CONFIGS / name).read_bytes()
    (tmp_path / "msd.yaml").write_text("mine")
    assert main(["configs", "msd_sdxl.yaml", "msd.yaml"]) == 2
    assert "msd.yaml is there already: give another --out, or remove it" in capsys.readouterr().err
    assert (tmp_path / "msd.yaml").read_text() == "mine"
    assert not (tmp_path / "msd_sdxl.yaml").exists(), "looked at all of them first"
    assert main(["configs", "msd.yaml", "--out", "msd.yaml"]) == 2
    assert "--out must be a folder, but 'msd.yaml' is a file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["msd.yml", "", "/etc/passwd", "../setup.cfg", "strategies", "nothing"])
def test_only_configs_that_come_along_are_copied(name, tmp_path, capsys):
    assert main(["configs", name, "--out", str(tmp_path / "x")]) == 2
    assert f"no config {name!r} comes along: " in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_cutout_is_a_process_of_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr("subprocess.call", lambda call: calls.append(call) or 2)
    assert main(["cutout", "a.jpg", "--out", "x", "--box", "0,0,1,1"]) == 2
    assert calls == [[sys.executable, "-m", "data_pipeline.cutout", "a.jpg", "--out", "x", "--box", "0,0,1,1"]]


def test_the_package_runs_as_a_module():
    call = [sys.executable, "-m", "msdiffusion", "--version"]
    assert subprocess.check_output(call, text=True).startswith("msdiffusion ")


def test_something_is_said_before_heavy_libraries_are_loaded(tmp_path, tiny_model_dir):
    """Whatever is slow begins with a line about it."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = """
import builtins, sys
from msdiffusion.cli import main
real = builtins.__import__
def guarded(name, *rest, **more):
    if name.split(".")[0] in ("torch", "spacy", "diffusers", "transformers"):
        raise SystemExit(7)
    return real(name, *rest, **more)
builtins.__import__ = guarded
main(sys.argv[1:])
"""
    for command, told in (
        (f"generate --prompt dog --image {tmp_path / 'a.png'} --out {tmp_path / 'b.png'}", "reading the phrases"),
        (f"generate --prompt dog --phrase dog --image {tmp_path / 'a.png'} --out {tmp_path / 'b.png'}", "loading"),
        (f"convert {tiny_model_dir} --out {tmp_path / 'c'}", "loading"),
        (f"evaluate --model {tiny_model_dir} --out {tmp_path / 'c'}", "loading"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=False
        )
        assert done.returncode == 7
        assert told in done.stderr


def test_the_page_on_photographs_is_short_and_its_commands_are_ours():
    text = (REPOSITORY / "docs" / "photographs.md").read_text()
    assert len(text.split()) <= 1200
    lines = text.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("msdiffusion ")]
    assert len(commands) >= 6
    for command in commands:
        if command[0] == "cutout":
            make_parser().parse_args(command[1:])
        else:
            build_parser().parse_args(command)


def test_without_a_command_all_are_listed(capsys):
    assert main([]) == 2
    told = capsys.readouterr().err
    assert all(f"    {name} " in told for name in ("generate", "convert", "cutout", "evaluate", "bench", "demo"))
    assert "lightning fit" in told


def test_every_option_has_its_text():
    parsers = [build_parser()]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action.choices, dict):
                parsers += action.choices.values()
            elif action.option_strings:
                assert action.help, action.option_strings
    assert len(parsers) == 10


def test_help_tells_defaults(capsys):
    for command, told in (
        (["generate"], "or 7.5"),
        (["evaluate"], "at once (default: 16)"),
        (["convert"], ": folder)"),
    ):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        assert told in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["evaluate", "demo"])
def test_commands_of_other_files_run_with_their_options(name, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(f"msdiffusion.commands.{name}.run", seen.append)
    assert main([name, "--out", str(tmp_path)]) == 0
    assert seen[0].out == tmp_path


def test_convert_reads_the_official_file(golden_tensors, official_adapter_file, tiny_model_dir, tmp_path, capsys):
    """Only configs of the frozen models are read, so their folders need no weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPVisionConfig

    from msdiffusion.adapter.adapter import MSAdapter

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
    silent = [argument for argument in call if argument not in ("--head-width", "16")]
    assert main(silent) == 0
    assert "64 was taken, as in the release, but this adapter is of another size" in capsys.readouterr().err
    assert main([*call[:-3], str(tiny_model_dir / "base"), *call[-2:]]) == 2
    assert "use the base model that it was trained on" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nothing.bin"), *call[2:]]) == 2
    assert "no such file" in capsys.readouterr().err


def test_convert_goes_both_ways(tiny_model_dir, tmp_path, capsys):
    """Folder to official file to folder: the weights come back to the bit, and what the file can't say is told."""
    from safetensors.torch import load_file

    from msdiffusion.adapter.adapter import MSAdapter

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
    assert "license:" not in (tmp_path / "again" / "README.md").read_text(), "whose weights they are, we don't know"
    assert "heads" not in capsys.readouterr().err
    assert main([*call, "--license", "openrail++"]) == 0
    assert "license: openrail++\n" in (tmp_path / "again" / "README.md").read_text()
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
        ([str(tiny_model_dir), "--out", str(tmp_path / "file")], "--out must be a folder, but"),
        (
            [str(tiny_model_dir), "--head-width", "16", "--out", str(tmp_path / "folder")],
            "head_width is for the official ms_adapter.bin",
        ),
        (
            [str(tiny_model_dir), "--to", "official", "--license", "mit", "--out", str(tmp_path / "ms_adapter.bin")],
            "--license is for the model card",
        ),
        (
            [str(tmp_path / "ablation"), "--to", "official", "--out", str(tmp_path / "ms_adapter.bin")],
            'regions "everywhere" is an ablation that the official code cannot run',
        ),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "ms_adapter.bin").exists()
