"""The `lightning` command: `lightning fit -c configs/msd.yaml`.

pytorch-lightning installs no console script of its own; ours is LightningCLI with the model and the data named by
`class_path` in the config file, so one command trains the adapter and every part of the embedded base.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `lightning fit|validate|test|predict -c CONFIG [--key value ...]`.

    Args:
        arguments: command line without the program's name; sys.argv when None.
    """
    # Threads that spin while they wait make everything beside them 5 to 7 times slower (docs/training.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import warnings

    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    import pytorch_lightning as pl
    from pytorch_lightning.cli import LightningCLI, SaveConfigCallback

    from msdiffusion.errors import MSDiffusionError
    from msdiffusion.training.local_sgd import process_rank

    try:
        LightningCLI(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # One process of a group keeps the record; the others have no logger and would write where they stand.
            save_config_callback=SaveConfigCallback if process_rank() == 0 else None,
            save_config_kwargs={"overwrite": True},
            args=list(arguments) if arguments is not None else None,
        )
    except (MSDiffusionError, ValueError) as error:
        # What the constructor of a model or data module raises arrives as the cause of a ValueError of jsonargparse.
        ours: BaseException | None = error
        while ours is not None and not isinstance(ours, MSDiffusionError):
            ours = ours.__cause__
        if ours is None:
            raise
        print(f"error: {ours}", file=sys.stderr)
        raise SystemExit(2) from error
