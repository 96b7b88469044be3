import subprocess
import sys
from pathlib import Path

import pytest

from msdiffusion.errors import RequestError
from msdiffusion.training.setting_names import COMMANDS, check_arguments, pairs_of, parameters, with_configs

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MSD = ("-c", str(ROOT / "configs" / "msd.yaml"))


def said_of(*arguments):
    with pytest.raises(RequestError) as refused:
        check_arguments(arguments)
    message = str(refused.value)
    assert len(message) < 300 and "\n" not in message
    return message


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_passes(command, config):
    # those of strategies are added to another one
    check_arguments([command, *(MSD if config.parent.name == "strategies" else ()), "-c", str(config)])


def test_configs_that_come_along_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_arguments(["fit", "-c", "msd.yaml", "--config=strategies/sharded.yaml"])
    assert "did you mean --trainer.max_steps" in said_of("fit", "-cmsd.yaml", "--trainer.max_stepss", "3")
    assert "there is no config msd.yam: did you mean msd.yaml?" in said_of("fit", "-c", "msd.yam")
    msd, sharded = MSD[1], str(ROOT / "configs" / "strategies" / "sharded.yaml")
    arguments = ["fit", "-c", "configs/msd.yaml", "-cmsd.yaml", "-c=msd.yaml", "--config", "strategies/sharded.yaml"]
    arguments += ["--config=msd.yaml", "--trainer.default_root_dir", "msd.yaml", "-c", "mine.yaml", "-c", "a: {b: 1}"]
    assert with_configs(arguments) == [
        *("fit", "-c", msd, f"-c{msd}", f"-c={msd}", "--config", sharded),
        *(f"--config={msd}", "--trainer.default_root_dir", "msd.yaml", "-c", "mine.yaml", "-c", "a: {b: 1}"),
    ]
    (tmp_path / "msd.yaml").write_text("trainer: {max_steps: 3}")
    assert with_configs(["fit", "-c", "msd.yaml"]) == ["fit", "-c", "msd.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ckpt_path", "last"],
        ["--data.init_args.batch_size", "0", "--data.init_args.batch_size=2"],  # the last one holds
        ["--trainer.max_steps=3", "--trainer.gradient_clip_val", "-1"],
        ["--model.learning_rate", "1"],  # jsonargparse takes it without init_args
        ["--model.init_args.resampler.width", "3", "--data.init_args.pairs", '{"a": 1}'],
        ["--trainer.callbacks+", "RunCheckpoint", "--trainer.callbacks.every_n_steps", "2"],
        ["--trainer.logger", "WandbLogger", "--trainer.logger.project", "msd"],
        ["--print_config", "--seed_everything", "3"],
        ["--model", "SomebodysModule", "--model.size", "3"],
        ["--optimizer", "torch.optim.SGD", "--optimizer.momentum", ".9"],
        ["--trainer.max_stepss", "3", "--help"],
        ["-c", "trainer: {max_steps: 3}"],
    ],
)
def test_right_names_pass(arguments):
    check_arguments(["fit", *MSD, *arguments])


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (["--trainer.max_stepss", "3"], "--trainer.max_steps"),
        (["--trainer.max-steps=3"], "--trainer.max_steps"),
        (["--max_steps", "3"], "--trainer.max_steps"),
        (["--batch_size", "3"], "--data.init_args.batch_size"),
        (["--trainer.batch_size", "3"], "--data.init_args.batch_size"),
        (["--model.init_args.batch_size", "3"], "--data.init_args.batch_size"),
        (["--model.init_args.learning_rat", "1"], "--model.init_args.learning_rate"),
        (["--model.lr", "1"], "--model.init_args.learning_rate"),
        (["--data.init_args.resolutoin", "64"], "--data.init_args.resolution"),
        (["--ckpt-path", "last"], "--ckpt_path"),
        (["--resume", "last"], "--ckpt_path"),
        (["--trainer.gpus", "2"], "--trainer.devices"),
        (["--optimizer", "torch.optim.SGD", "--optimizer.momentun", "1"], "--optimizer.momentum"),
        (["-trainer.max_steps", "3"], None),
        (["--foo", "3"], None),
    ],
)
def test_a_wrong_option_is_told_with_the_nearest_right_one(arguments, right):
    message = said_of("fit", *MSD, *arguments)
    wrong = next(argument for argument in reversed(arguments) if argument.startswith("-")).split("=")[0]
    assert message.startswith(("unknown setting ", "unknown option ")) and wrong in message
    assert message.endswith(f"did you mean {right}?") or right is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trainer: {max_stepss: 3}", "unknown setting trainer.max_stepss in {}: did you mean trainer.max_steps?"),
        ("traner: {max_steps: 3}", "unknown setting traner in {}: did you mean trainer.max_steps?"),
        ("data: {init_args: {pair: x}}",
         "unknown setting data.init_args.pair in {}: did you mean data.init_args.pairs?"),
        ("model: {init_arg: {learning_rate: 1}}",
         "unknown setting model.init_arg in {}: did you mean model.init_args?"),
        ("trainer: {callbacks: [{class_path: msdiffusion.training.callbacks.RunCheckpoint, "
         "init_args: {every_n_step: 3}}]}",
         "unknown setting trainer.callbacks.RunCheckpoint.every_n_step in {}: did you mean "
         "trainer.callbacks.RunCheckpoint.every_n_steps?"),
        ("trainer: {callbacks: [{class_path: msdiffusion.training.callbacks.RunCheckpont}]}",
         "trainer.callbacks: there is no class msdiffusion.training.callbacks.RunCheckpont: did you mean "
         "msdiffusion.training.callbacks.RunCheckpoint?"),
        ("trainer: {callbacks: [{class_path: A, init_arg: {}}]}",
         "unknown setting trainer.callbacks.A.init_arg in {}: did you mean trainer.callbacks.A.init_args?"),
        ("model: {class_path: msdiffusion.training.modul.MSDiffusionModule}",
         "model: there is no class msdiffusion.training.modul.MSDiffusionModule: did you mean "
         "msdiffusion.training.module.MSDiffusionModule?"),
        ("a: [", "the config {} is not YAML, line 1: "),
        ("- 1", "the config {} holds no settings: "),
    ],
)  # fmt: skip
def test_a_wrong_name_in_a_config_is_told_with_its_file(tmp_path, monkeypatch, text, told):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    assert said_of("fit", *MSD, "-c", "c.yaml").startswith(told.replace("{}", "'c.yaml'"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "a command is missing: lightning fit|"),
        (["fitt", *MSD], "unknown command 'fitt': did you mean fit? lightning fit|"),
        (["fit", "-c"], "-c needs a config"),
        (
            ["fit", "configs/msd.yaml"],
            "nothing is expected at 'configs/msd.yaml' on the command line: a config is",
        ),
        (["fit", *MSD, "--data.init_args.batch_size", "-3"], "batch_size must be at least 1, got -3"),
        (["fit", *MSD, "--data.num_workers=-1"], "num_workers must be at least 0, got -1"),
        (["fit", *MSD, "--data.init_args.resolution", "100"], "resolution must be a multiple of 8, got 100"),
        (["fit", *MSD, "--data.bucket_step", "12"], "bucket_step must be a multiple of 8, or 0 for squares, got 12"),
        (["fit", *MSD, "more"], "nothing is expected at 'more'"),
        (["fit", "-c", "configs/msd.yml"], "there is no config configs/msd.yml: did you mean configs/msd.yaml?"),
        (["fit", "-cx"], "there is no config x: there are configs/msd.yaml, "),
        (["fit", "--config=x"], "there is no config x: "),
    ],
)
def test_a_wrong_command_line_is_told(monkeypatch, arguments, told):
    monkeypatch.chdir(ROOT)
    assert said_of(*arguments).startswith(told)


def test_what_cannot_be_found_out_is_left_to_others():
    assert parameters("nowhere.Thing", "model") is None
    assert parameters("collections.OrderedDict", "model") is None
    assert "learning_rate" in parameters("msdiffusion.training.module.MSDiffusionModule", "model")
    check_arguments(["--version"])
    check_arguments(["fit", "-c", "s3://bucket/config.yaml"])


def test_the_command_says_it_without_a_heavy_import():
    program = (
        "import sys\nfrom msdiffusion.training.cli import main\n"
        "try: main(['fit', '-c', 'configs/msd.yaml', '--trainer.max_stepss', '3'])\n"
        "except SystemExit as stop: assert stop.code == 2\n"
        "assert not {'torch', 'pytorch_lightning', 'transformers', 'jsonargparse'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: unknown setting --trainer.max_stepss: did you mean --trainer.max_steps?\n"


def test_pairs_that_are_not_there_are_told_before_torch_is_loaded(tmp_path):
    assert pairs_of(["fit", *MSD]) == "data/world/pairs"
    assert pairs_of(["fit", *MSD, "--data.init_args.pairs", "mine"]) == "mine"
    assert pairs_of(["fit", *MSD, "--print_config"]) is None
    code = (
        "import sys; from msdiffusion.training.cli import main\n"
        f"sys.argv[1:] = ['fit', '-c', 'msd.yaml', '--data.init_args.pairs', {str(tmp_path / 'none')!r}]\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "no pairs dataset: " in done.stderr
