import subprocess
import sys

import pytest
import torch

from msdiffusion.cli import main


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
        ([str(tiny_model_dir), "--out", str(tmp_path / "file")], "is a file (--to official writes files)"),
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
