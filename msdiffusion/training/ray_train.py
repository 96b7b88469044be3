"""A training run on a Ray cluster: the `lightning` command in every worker of Ray Train.

    python -m msdiffusion.training.ray_train --workers 16 --gpus fit -c configs/msd_sdxl.yaml

Every node needs this package, the models and the run's folder (`trainer.default_root_dir`) under the same paths.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.extras import missing_extras
from msdiffusion.environment import prepare_environment
from msdiffusion.errors import RequestError
from msdiffusion.training.setting_names import check_arguments


def train_worker(settings: dict[str, object]) -> None:
    """What each worker runs: the command, with Ray's strategy in place of the config's.

    Args:
        settings: ``arguments`` of the `lightning` command, and the ``folder`` in which to run it.

    Raises:
        RuntimeError: the command refused its settings; the message went to this worker's output.
    """
    os.chdir(str(settings["folder"]))
    sys.argv[1:] = []  # Ray's own; LightningCLI warns where there are arguments twice
    from msdiffusion.training.cli import main

    try:
        main(list(settings["arguments"]))  # type: ignore[call-overload]
    except SystemExit as stop:
        # Ray takes the exit of a worker for a machine that broke down
        if stop.code:
            raise RuntimeError(f"the training command ended with status {stop.code}, see the message above") from stop


def worker_arguments(arguments: Sequence[str], resume: bool) -> list[str]:
    """The `lightning` command line of each worker.

    Args:
        arguments: as a user gives them, the subcommand first.
        resume: go on from the newest checkpoint in the run's folder, where there is one.
    """
    # as an object: Lightning would take a bare class name for the name of a strategy of its own
    ours = ["--trainer.strategy", '{"class_path": "ray.train.lightning.RayDDPStrategy"}', "--trainer.devices", "auto"]
    # "+": the config may have a plugin for the precision
    ours += ["--trainer.plugins+", "ray.train.lightning.RayLightningEnvironment"]
    if resume and not any(argument.split("=")[0] == "--ckpt_path" for argument in arguments):
        ours += ["--ckpt_path", "auto"]
    return [*arguments, *ours]


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the workers and waits for them. Returns the exit status."""
    prepare_environment()  # which the workers of this machine take over
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m msdiffusion.training.ray_train",
        description=(
            "Trains on a Ray cluster: the lightning command in every worker of Ray Train. Every node "
            "needs this package, the models and the run's folder (trainer.default_root_dir) under the "
            "same paths."
        ),
    )
    parser.add_argument("--workers", type=int, default=1, help="processes, one per GPU (default: 1)")
    parser.add_argument("--gpus", action="store_true", help="give each worker a GPU")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of each worker (default: 1)")
    parser.add_argument("--address", help="of a running cluster, e.g. auto (default: a new one on this machine)")
    parser.add_argument("--storage", help="folder that all nodes see, for Ray's own records (default: ~/ray_results)")
    parser.add_argument(
        "--max-failures",
        type=int,
        default=0,
        help="start again so often after a worker or a node was lost; above 0, every start goes on from the newest "
        "checkpoint in the run's folder (default: 0)",
    )
    options, rest = parser.parse_known_args(arguments)
    for name in ("workers", "cpus"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.max_failures < 0:
        parser.error(f"--max-failures must not be below 0, got {options.max_failures}")
    if not rest or rest[0].startswith("-"):
        parser.error("after the options comes the command of `lightning`, e.g. fit -c configs/msd.yaml")
    try:
        if told := missing_extras("ray", "training"):
            raise RequestError(told)
        check_arguments(rest)
    except RequestError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    try:
        import ray
        import ray.train
        from ray.train.torch import TorchTrainer
    except ImportError as error:  # Ray without its part Train
        parser.error(f'Ray Train is missing ({error}): pip install "ray[train]"')

    ray.init(address=options.address, log_to_driver=True)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"arguments": worker_arguments(rest, options.max_failures > 0), "folder": str(Path.cwd())},
        scaling_config=ray.train.ScalingConfig(
            num_workers=options.workers, use_gpu=options.gpus, resources_per_worker={"CPU": options.cpus}
        ),
        run_config=ray.train.RunConfig(
            storage_path=options.storage, failure_config=ray.train.FailureConfig(max_failures=options.max_failures)
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
