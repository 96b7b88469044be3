"""Every file of configs/ is one complete run: it parses, and the model, data and callbacks it names can be made."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
OVERLAYS = sorted((REPOSITORY / "configs" / "strategies").glob("*.yaml"))
"""Given after a run's config, they change its strategy; tests/msdiffusion/training/test_strategies.py parses them."""
CONFIGS = sorted(set((REPOSITORY / "configs").rglob("*.yaml")) - set(OVERLAYS))


@pytest.fixture
def parse(monkeypatch):
    """Function: arguments of `lightning` -> the LightningCLI, with everything made but the trainer, and nothing run."""
    monkeypatch.setattr("sys.argv", ["lightning"])  # LightningCLI warns where both it and its caller have arguments
    from msdiffusion.training.cli import main
    from msdiffusion.training.run.run_cli import RunCLI

    made = []
    monkeypatch.setattr(RunCLI, "instantiate_trainer", lambda cli: None)
    monkeypatch.setattr(RunCLI, "_run_subcommand", lambda cli, subcommand: made.append(cli))

    def run(*arguments):
        main(arguments)
        return made.pop()

    return run


def test_there_are_configs():
    names = {str(path.relative_to(REPOSITORY / "configs")) for path in CONFIGS}
    assert {"msd.yaml", "msd_sdxl.yaml"} <= names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(REPOSITORY / "configs")))
def test_every_config_is_a_run(path, parse):
    cli = parse("fit", "-c", str(path))
    settings = cli.config["fit"]
    assert settings["model"]["class_path"] == f"{type(cli.model).__module__}.{type(cli.model).__qualname__}"
    assert cli.datamodule is not None
    assert type(settings["seed_everything"]) is int, "a run that is not seeded cannot be repeated"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model.init_args.learning_rat", "1e-4"),
        ("--model.init_args.learning_rate", "fast"),
        ("--model.init_args.attention", "flash"),
        ("--data.init_args.nothing", "1"),
    ],
)
def test_typing_errors_are_told(parse, arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        parse("fit", "-c", str(REPOSITORY / "configs" / "msd.yaml"), *arguments)
    assert exit.value.code == 2
    assert arguments[0].rpartition(".")[2] in capsys.readouterr().err


def test_a_number_out_of_range_is_told_without_a_traceback(parse, capsys):
    with pytest.raises(SystemExit) as exit:
        parse("fit", "-c", str(REPOSITORY / "configs" / "msd.yaml"), "--model.init_args.ema_decay", "1.5")
    assert exit.value.code == 2
    assert "ema_decay must be in [0, 1), got 1.5" in capsys.readouterr().err


def test_the_papers_recipe(parse):
    """Section "training" of the paper and the official training script."""
    settings = parse("fit", "-c", str(REPOSITORY / "configs" / "msd_sdxl.yaml")).config["fit"]
    trainer, model, data = settings["trainer"], settings["model"]["init_args"], settings["data"]["init_args"]
    assert trainer["max_steps"] == 120_000
    assert data["batch_size"] * trainer["devices"] * trainer["num_nodes"] == 128
    assert trainer["gradient_clip_val"] == 1.0
    assert data["resolution"] == 512
    assert (model["learning_rate"], model["weight_decay"]) == (1e-4, 0.01)
    drops = [model[f"drop_{what}"] for what in ("image", "text", "both", "grounding")]
    assert drops == [0.05, 0.05, 0.05, 0.10]
    assert (model["warmup_steps"], model["decay"], model["ema_decay"]) == (0, "none", 0.0)
    assert (model["box_loss_weight"], model["timestep_exponent"]) == (1.0, 1.0)
    assert "stable-diffusion-xl-base-1.0" in model["base_model"]
    assert "bigG" in model["image_encoder"]


def test_the_defaults_of_the_resampler_are_the_papers():
    from msdiffusion.adapter.resampler import ResamplerParams

    params = ResamplerParams(image_width=1664, phrase_width=768, output_width=2048)
    assert (params.width, params.depth, params.heads, params.head_width, params.tokens) == (1280, 4, 20, 64, 16)
