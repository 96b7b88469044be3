"""The rows differ from MS-Diffusion in what they say, and in nothing else."""

import json

import pytest
import yaml

from msdiffusion.bench.rows import REFERENCE_ROW, RESAMPLER, ROWS, training_arguments
from msdiffusion.places import REPOSITORY

CONFIG = yaml.safe_load((REPOSITORY / "configs" / "msd.yaml").read_text())


def test_every_row_of_the_issue_is_there():
    assert list(ROWS) == [
        "ms_diffusion",
        "learned_queries",
        "no_masks",
        "ip_adapter_plus",
        "ip_adapter",
        "same_frame",
        "subject_masks",
        "auto_layout",
        "adapter_off",
        "true_renders",
        "shipped",
    ]
    assert ROWS[REFERENCE_ROW].training == {}


def test_rows_draw_with_an_adapter_that_someone_trains():
    for name, row in ROWS.items():
        if row.training is not None:
            assert row.adapter_of == name
        elif row.adapter_of not in (None, "shipped"):
            assert ROWS[row.adapter_of].training is not None
        assert (row.drawing is None) == (row.adapter_of is None)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.training])
def test_settings_of_a_row_exist_in_the_classes(name):
    """Every setting is an argument of the module or the data module, and differs from configs/msd.yaml."""
    import inspect

    from msdiffusion.training.datamodule import PairsDataModule
    from msdiffusion.training.module import MSDiffusionModule

    classes = {"model": MSDiffusionModule, "data": PairsDataModule}
    for key, value in ROWS[name].training.items():
        part, init_args, setting = key.split(".")
        assert init_args == "init_args"
        assert setting in inspect.signature(classes[part]).parameters
        assert CONFIG[part]["init_args"].get(setting) != value


def test_resamplers_have_the_size_of_the_config():
    assert CONFIG["model"]["init_args"]["resampler"] == RESAMPLER


def test_arguments_are_what_a_shell_would_be_given():
    arguments = training_arguments(ROWS["learned_queries"], {"trainer.max_steps": 7, "data.init_args.pairs": "a b"})
    assert arguments[:4] == ["--trainer.max_steps", "7", "--data.init_args.pairs", "a b"]
    assert arguments[4] == "--model.init_args.resampler"
    assert json.loads(arguments[5]) == {**RESAMPLER, "grounding": False}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.training])
@pytest.mark.usefixtures("forked_processes")
def test_settings_of_a_row_arrive_through_the_command_line(name):
    """`lightning fit --print_config` shows what a row is trained with, beside everything of configs/msd.yaml."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "msdiffusion.training", "fit", "-c", "configs/msd.yaml"]
    shown = subprocess.run(
        [*command, *training_arguments(ROWS[name], {"trainer.max_steps": 7}), "--print_config"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    parsed = yaml.safe_load(shown[shown.index("# pytorch_lightning") :])
    assert parsed["trainer"]["max_steps"] == 7
    expected = {part: dict(CONFIG[part]["init_args"]) for part in ("model", "data")}
    for key, value in ROWS[name].training.items():
        part, _, setting = key.split(".")
        expected[part][setting] = value
    for part, settings in expected.items():
        for setting, value in settings.items():
            assert parsed[part]["init_args"][setting] == value, (part, setting)
