"""The `lightning` command: `lightning fit -c configs/msd.yaml`.

pytorch-lightning installs no console script of its own; ours is LightningCLI with the model and the data named by
`class_path` in the config file, so one command trains the adapter and every part of the embedded base.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from data_pipeline.extras import missing_extras
from data_pipeline.safe_text import visible
from msdiffusion.environment import prepare_environment


def _checked(arguments: Sequence[str] | None) -> Sequence[str] | None:
    """The command line, seen to be right as far as that goes without torch, with configs' files in place of names.

    Raises:
        SystemExit: 2 where it is wrong; the message went to stderr.
    """
    from msdiffusion.errors import MSDiffusionError, RequestError
    from msdiffusion.training.setting_names import check_arguments, pairs_of, with_configs

    try:
        if told := missing_extras("training"):
            raise RequestError(told)
        given = sys.argv[1:] if arguments is None else arguments
        check_arguments(given)
        pairs = pairs_of(given) if arguments is None else None  # in a program they may be made meanwhile
        if pairs:
            from msdiffusion.training.pairs.sources import check_there

            check_there(pairs)
    except MSDiffusionError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if arguments is None:
        sys.argv[1:] = with_configs(sys.argv[1:])  # where Lightning looks, and the processes that it starts
    else:
        arguments = with_configs(arguments)
    return arguments


def _quieten() -> None:
    """No advice of libraries that a user can do nothing about."""
    for message in (
        ".*does not have many workers.*",
        # between Lightning and torch
        r".*isinstance\(treespec, LeafSpec\).*",
        # a short run is no mistake
        ".*is smaller than the logging interval.*",
        # said of the processes of local_sgd, of which only the first validates
        ".*It is recommended to use `self.log.*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    # Lightning advertises other packages there
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `lightning fit|validate|test|predict -c CONFIG [--key value ...]`.

    An error that this project, or its user, can do something about is told in one message. With MSD_TRACEBACK=1 in the
    environment Python's traceback comes instead.

    Args:
        arguments: command line without the program's name; sys.argv when None.

    Raises:
        SystemExit: 2 for a wrong setting, dataset or model; 1 for a run that could not go on; 128 and the signal's
            number for one that was stopped, its state written.
    """
    arguments = _checked(arguments)
    prepare_environment()
    _quieten()
    import pytorch_lightning as pl
    from pytorch_lightning.cli import SaveConfigCallback

    from msdiffusion.errors import TrainingError
    from msdiffusion.training.processes import process_rank
    from msdiffusion.training.run.failures import FailureGuard, RunStoppedError
    from msdiffusion.training.run.foreign_words import our_error, told_by_lightning
    from msdiffusion.training.run.pictures import PredictionPictures
    from msdiffusion.training.run.run_cli import RunCLI
    from msdiffusion.training.run.run_folder import EarlierRun

    guard = FailureGuard()
    try:
        RunCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # One process of a group keeps the record; the others have no logger and would write where they stand.
            save_config_callback=SaveConfigCallback if process_rank() == 0 else None,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [guard, PredictionPictures(), EarlierRun()]},
            args=arguments,
        )
    except RunStoppedError as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.number) from None
    except Exception as error:
        told = our_error(guard.explain(error) or error)
        text = told_by_lightning(error) if told is None else str(told)
        if text is None or os.environ.get("MSD_TRACEBACK"):
            raise
        print(visible(f"error: {text}"), file=sys.stderr)
        raise SystemExit(1 if isinstance(told, TrainingError) else 2) from error
