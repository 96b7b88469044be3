"""LightningCLI whose command line means what it says: where a run goes on from, and with which settings."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from data_pipeline.errors import InputError
from data_pipeline.models.weights import check_plain, load_pickle
from data_pipeline.safe_text import visible
from msdiffusion.errors import MSDiffusionError, RequestError, WeightsError, refused_weights
from msdiffusion.files import check_folder
from msdiffusion.places import find_config
from msdiffusion.training.learning.structure import asked_structure, check_structure
from msdiffusion.training.run.foreign_words import in_one_sentence
from msdiffusion.training.run.run_folder import ADAPTER_FOLDER, BEST, BEST_FOLDER, FOLDER, LAST, existing

NAMES = {"last": LAST, "best": BEST}
"""What ``--ckpt_path`` may be besides a file: a name to the file in the run's ``checkpoints``."""


_STATE = {
    "pytorch-lightning_version": str,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
"""What Lightning reads in a checkpoint that a run goes on from."""


class RunParser(LightningArgumentParser):
    """Says what is wrong in one sentence, without a screen of usage over it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the command; exit status 2. The parsers of objects within raise, as ever, and are told by this one."""
        if not self.exit_on_error:
            super().error(message, ex)
        sys.stderr.write(visible(f"error: {in_one_sentence(message)}\n"))
        raise SystemExit(2)


class RunCLI(LightningCLI):
    """The command line of runs.

    ``--ckpt_path last`` and ``best`` are files of the run's directory, for every command; ``auto`` is ``last`` where
    there is one, for jobs that are put back into a queue. The settings of the model are always those of the command
    line: Lightning's own lets those in the file win. What differs is told, or refused where the weights would not fit.

    Raises:
        RequestError: there is no such checkpoint, ``fit`` is asked to go on from weights alone, or a setting that
            decides which weights there are, or which optimizer's state, is another one.
        WeightsError: the file is no checkpoint.
    """

    def init_parser(self, **settings: Any) -> LightningArgumentParser:
        """The parser of the command or of one of its subcommands."""
        self.parser_class = RunParser
        return super().init_parser(**settings)

    def _parse_ckpt_path(self) -> None:
        command = self.config.get("subcommand")
        if not command:
            return
        settings = self.config[command]
        given = settings.get("ckpt_path")
        if given is None:
            if command != "fit":
                _tell_untrained(command, settings)
            elif not settings.trainer.get("fast_dev_run") and (
                earlier := existing(Path(settings.trainer.get("default_root_dir") or ".") / FOLDER / LAST)
            ):
                _tell(
                    f"this is a new run: {earlier} and what else an earlier one has left get other names (last.1.ckpt, "
                    "best.1, ...); --ckpt_path last would go on with it"
                )
            return
        path = find_checkpoint(str(given), settings.trainer.get("default_root_dir"), fit=command == "fit")
        settings["ckpt_path"] = None if path is None else str(path)
        if path is None or not path.is_file():  # some strategies write folders, which hold no settings
            return
        saved = read_settings(path)
        if command == "fit" and saved["weights_only"]:
            raise RequestError(
                f"{path} holds weights alone, nothing to go on from: take --ckpt_path last; or start a new run from "
                "these weights, with --model.init_args.adapter and the run's folder best/"
            )
        model = settings.get("model")
        model = model.as_dict() if hasattr(model, "as_dict") else dict(model or {})
        asked = _plain(model.get("init_args") or {})
        if isinstance(saved["adapter_config"], str) and "base_model" in asked:
            best = path.parent.parent / BEST_FOLDER if path.parent.name == FOLDER else Path("RUN", BEST_FOLDER)
            check_structure(
                str(path),
                saved["settings"],
                saved["adapter_config"],
                asked,
                asked_structure(asked),
                resume=command == "fit",
                best=f"--model.init_args.adapter {best}",
            )
        if command == "fit" and saved["lacks"]:
            raise RequestError(
                f"{path} has no {', '.join(saved['lacks'])}, so no run can go on from it: take another checkpoint, or "
                "start a new run from its weights, with --model.init_args.adapter and an adapter's folder"
            )
        differing = differences(saved["settings"], model)
        if differing:
            _tell(f"{path} was written with other settings; those given now hold: {'; '.join(differing)}")

    def before_instantiate_classes(self) -> None:
        """Try whether the run's folder can be written, before anything is loaded.

        Raises:
            RequestError: it cannot.
        """
        command = self.config.get("subcommand")
        trainer = self.config[command].trainer if command in ("fit", "predict") else {}
        root = str(trainer.get("default_root_dir") or ".")
        if command in ("fit", "predict") and not trainer.get("fast_dev_run") and "://" not in root:
            check_folder(root, "trainer.default_root_dir")

    def instantiate_classes(self) -> None:
        """Make the objects of the config.

        Raises:
            MSDiffusionError: what one of ours says in its constructor. jsonargparse keeps only the text of an error
                where a setting may be of several types, as strategies, loggers and callbacks may.
        """
        refusals: list[MSDiffusionError] = []

        def make(class_type: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return class_type(*args, **kwargs)
            except MSDiffusionError as refusal:
                refusals.append(refusal)
                raise

        self.parser.add_instantiator(make, object)  # after Lightning's own for model and data, which go first
        try:
            super().instantiate_classes()
        except ValueError as error:
            for refusal in reversed(refusals):
                # of another type that was tried, or of another setting, it would not be the reason
                if not isinstance(error, MSDiffusionError) and str(refusal).partition("\n")[0] in str(error):
                    raise refusal from error
            raise

    def instantiate_trainer(self, **settings: Any) -> pl.Trainer:
        """Make the trainer; ``val_check_interval`` counts steps of the optimizer, as everything else in a config does.

        Lightning counts batches, of which several make a step where gradients are accumulated.
        """
        config = self._get(self.config_init, "trainer", default={})
        interval, batches = config.get("val_check_interval"), config.get("accumulate_grad_batches") or 1
        if isinstance(interval, int) and not isinstance(interval, bool) and batches > 1:
            settings["val_check_interval"] = interval * batches  # the saved config keeps what was given
        return super().instantiate_trainer(**settings)

    def before_fit(self) -> None:
        """Say for whom a run on several machines waits."""
        nodes = self.trainer.num_nodes
        if nodes > 1:
            _tell(
                f"trainer.num_nodes is {nodes}: this run waits until it is started on {nodes - 1} more machine"
                f"{'s' if nodes > 2 else ''}; on this one alone: --trainer.num_nodes 1"
            )

    def _run_subcommand(self, subcommand: str) -> None:
        """A run that is refused before its first step leaves no folder that it made for its log."""
        folders = [Path(folder) for folder in _log_folders(self.trainer)] if self.trainer.is_global_zero else []
        made = [place for folder in folders for place in [*reversed(folder.parents), folder] if _made(place)]
        try:
            super()._run_subcommand(subcommand)
        except Exception:
            for folder in folders if not self.trainer.global_step else ():
                if folder in made and not _others_log(folder):
                    shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            for place in reversed(made):
                with contextlib.suppress(OSError):  # something lies there
                    place.rmdir()

    def after_fit(self) -> None:
        """Say what the run has left, and what it is good for."""
        if self.trainer.fast_dev_run:
            return  # what lies there is an earlier run's
        root = Path(self.trainer.default_root_dir)
        left = [
            root / name for name in (BEST_FOLDER, ADAPTER_FOLDER) if (root / name / "adapter.safetensors").is_file()
        ]
        if left:
            last = "; to train on: --ckpt_path last" if (root / FOLDER / LAST).exists() else ""
            _tell(f'the adapter is in {left[0]}: MSDiffusion.from_pretrained("{left[0]}"){last}')

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict" and not self.config[subcommand].get("return_predictions"):
            arguments["return_predictions"] = False  # they are written batch by batch; nobody reads a list here
        return arguments


def read_run(config: str, arguments: Sequence[str]) -> LightningCLI:
    """Trainer, model and data module of a config and more settings, as ``lightning fit`` makes them; nothing runs."""
    # the command line is ours, and given as a list
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    return LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        run=False,
        parser_class=RunParser,
        args=["-c", find_config(config), *arguments],
    )


def _log_folders(trainer: pl.Trainer) -> list[str]:
    """Local folders of the trainer's loggers."""
    folders = [getattr(logger, "log_dir", None) for logger in trainer.loggers]
    return [folder for folder in folders if folder and "://" not in folder]


def _made(place: Path) -> bool:
    """Make a folder; False where there is one already, which another process may have made at the same time."""
    try:
        place.mkdir()
    except OSError:
        return False
    return True


def _others_log(folder: Path) -> bool:
    """Whether TensorBoard's files, which have host and process in their names, tell of another process."""
    mine = f".{socket.gethostname()}.{os.getpid()}."
    return any(mine not in path.name for path in folder.glob("events.out.tfevents.*"))


def find_checkpoint(name: str, root: str | None, fit: bool) -> Path | None:
    """The checkpoint that ``--ckpt_path`` means.

    Args:
        name: "last", "best", "auto", or a path.
        root: the trainer's ``default_root_dir``; None: where the command stands.
        fit: whether training shall go on from it.

    Returns:
        A file or folder that exists; None for "auto" where there is none yet.

    Raises:
        RequestError: there is none; the message lists those that are.
    """
    folder = Path(root or ".") / FOLDER
    if name == "auto":
        if not fit:
            raise RequestError("--ckpt_path auto is for fit alone: give last, best, or a file")
        return existing(folder / LAST)
    path = existing(folder / NAMES[name]) if name in NAMES else existing(Path(name))
    if path is not None:
        if path.is_dir() and (path / "adapter.safetensors").is_file():
            raise RequestError(
                f"--ckpt_path {name} is the folder of an adapter, which holds no state of a run: go on with a run's "
                f"checkpoints/{LAST}, or begin a new run from these weights: --model.init_args.adapter {name}"
            )
        return path
    asked = f"--ckpt_path {name}" + (f" needs {folder / NAMES[name]}" if name in NAMES else " is no file")
    present = sorted(str(file) for file in folder.glob("*.ckpt")) if folder.is_dir() else []
    there = f"there are {', '.join(present)}" if present else f"there is no checkpoint in {folder}"
    advice = "; leave it out to start anew, or give --ckpt_path auto" if fit else ""
    if name == "best" and present:
        advice = (
            "; the best weights are written at the first validation (trainer.val_check_interval): take last" + advice
        )
    where = "" if present else " (--trainer.default_root_dir says which run is meant)"
    raise RequestError(f"{asked}, which does not exist; {there}{where}{advice}")


def read_settings(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without reading its tensors.

    Returns:
        "settings": the model's hyperparameters; "adapter_config": the text of the adapter's config, None where there is
        no adapter; "weights_only": whether it lacks the optimizer; "step"; "lacks": the parts of a run's state that are
        not there, or are something else.

    Raises:
        WeightsError: the file is no checkpoint of Lightning, or not safe to open, or its weights are no plain tensors.
    """
    try:
        checkpoint = load_pickle(path)
    except InputError as error:
        folder = " (to go on from an adapter's folder: --model.init_args.adapter FOLDER)"
        advice = folder if path.suffix == ".safetensors" else ""
        raise WeightsError(f"no checkpoint that can be read: {error}{advice}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise WeightsError(f"{path} is no checkpoint of a training run: it lacks its state_dict")
    with refused_weights():
        check_plain(checkpoint["state_dict"], path)
    return {
        "settings": dict(checkpoint.get("hyper_parameters") or {}),
        "adapter_config": checkpoint.get("adapter_config"),
        "weights_only": "optimizer_states" not in checkpoint,
        "step": checkpoint.get("global_step"),
        "lacks": [name for name, kind in _STATE.items() if not isinstance(checkpoint.get(name), kind)],
    }


def differences(saved: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Settings that a checkpoint and a command line both have, with unequal values: "name was A, now B".

    Args:
        saved: hyperparameters in the checkpoint; of LightningCLI, with the class under "_class_path".
        model: the config's "model": "class_path" and "init_args".
    """
    found = []
    now = {"_class_path": model.get("class_path"), **(model.get("init_args") or {})}
    for name, value in saved.items():
        if name in now and _plain(value) != _plain(now[name]):
            found.append(f"{'class' if name == '_class_path' else name} was {_plain(value)}, now {_plain(now[name])}")
    return found


def _plain(value: Any) -> Any:
    """A value as a config file has it: tuples as lists, namespaces as dictionaries, without Nones in them."""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _tell_untrained(command: str, settings: Any) -> None:
    arguments = (settings.get("model") or {}).get("init_args") or {}
    if "adapter" in arguments and arguments["adapter"] is None:
        _tell(
            f"{command} without --ckpt_path and without model.init_args.adapter: this is a new adapter that has "
            "learned nothing; --ckpt_path best takes the run's best weights"
        )


@rank_zero_only
def _tell(message: str) -> None:
    sys.stderr.write(visible(f"note: {message}\n"))
