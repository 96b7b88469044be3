"""Encodes the pairs of a training run ahead of it, once for all its epochs.

    python -m msdiffusion.training.precompute -c configs/msd.yaml
    python -m msdiffusion.training.precompute -c configs/msd.yaml --parts references,text --dtype bfloat16
    python -m msdiffusion.training.precompute -c configs/msd_sdxl.yaml --share 0/4    # and 1/4, 2/4, 3/4 elsewhere

Takes the config and the settings of ``lightning fit``, so that what is encoded is what the run asks for, and writes
PAIRS/encodings/PART-FINGERPRINT, a file per shard (see ``encoding_files``). Interrupted, it goes on where it was: whole
files are kept. Training finds them by itself (``data.init_args.encodings``). Every option that is not listed goes to
the config: ``--data.init_args.resolution 512``.
"""

# ruff: noqa: T201 - this is a command

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_pipeline.extras import missing_extras
from msdiffusion.environment import prepare_environment
from msdiffusion.errors import MSDiffusionError, RequestError
from msdiffusion.files import check_folder

if TYPE_CHECKING:
    from msdiffusion.training.datamodule import PairsDataModule
    from msdiffusion.training.module import MSDiffusionModule
    from msdiffusion.training.samples.augmentation import Augmentation
    from msdiffusion.training.samples.encoded import Part


def load_run(config: str, arguments: Sequence[str], device: str) -> tuple[PairsDataModule, MSDiffusionModule]:
    """Data module and model of a config, with what they need: shards indexed, networks loaded on a device.

    Args:
        device: "auto", "cpu", "cuda", "mps", ... (``trainer.accelerator``); the first one of its kind.

    Raises:
        RequestError: if the config is of another kind of training.
        DataError: if there are no pairs.
        WeightsError: if networks are missing.
    """
    from msdiffusion.training.datamodule import PairsDataModule
    from msdiffusion.training.module import MSDiffusionModule
    from msdiffusion.training.run.run_cli import read_run

    alone = ["--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.strategy", "auto"]
    cli = read_run(config, [*arguments, *alone, "--trainer.accelerator", device, "--trainer.logger", "false"])
    model, datamodule = cli.model, cli.datamodule
    if not isinstance(model, MSDiffusionModule) or not isinstance(datamodule, PairsDataModule):
        raise RequestError(
            f"{config} trains {type(model).__name__} on {type(datamodule).__name__}; only what MSDiffusionModule "
            "learns from PairsDataModule can be encoded ahead"
        )
    datamodule.trainer = model.trainer = cli.trainer
    cli.trainer.strategy.connect(model)
    # not for "fit": fewer pairs than one batch may be encoded
    datamodule.setup("validate")
    datamodule.setup("test")
    model.configure_model()
    return datamodule, model


def parts_to_encode(text: str, augmentation: Augmentation) -> list[Part]:
    """The parts of ``--parts``.

    Raises:
        RequestError: if one is unknown, or the settings of the data change it all the time.
    """
    from msdiffusion.training.encodings.keys import changing
    from msdiffusion.training.samples.encoded import PARTS

    asked = [name.strip() for name in text.split(",") if name.strip()]
    if not asked or set(asked) - set(PARTS):
        raise RequestError(f"--parts must be some of {', '.join(PARTS)}, with commas between them, got {text!r}")
    never = {part: reason for part, reason in changing(augmentation).items() if part in asked}
    if never:
        rest = [part for part in asked if part not in never]
        advice = f"--parts {','.join(rest)} encodes the rest ahead" if rest else "nothing is left to encode ahead"
        raise RequestError(
            f"{' and '.join(never)} cannot be made ahead, because {'; '.join(never.values())}: they would be the same "
            f"in every epoch. Change that, or: {advice}, and training does {' and '.join(never)} as before"
        )
    return [part for part in PARTS if part in asked]


def _share(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise argparse.ArgumentTypeError(f"must be K/N with K < N, as 0/4, got {text!r}")
    return int(first), int(count)


def _parser() -> argparse.ArgumentParser:
    from msdiffusion.training.samples.encoded import PARTS  # with torch, which the environment must be ready for

    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m msdiffusion.training.precompute",
        description="Encodes the pairs of a training run ahead of it. Further options are settings of the config, as "
        "for lightning fit.",
    )
    parser.add_argument("-c", "--config", required=True, help="config of lightning fit")
    parser.add_argument("--pairs", metavar="DIR", help="dataset to encode in place of the config's")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"what to encode (default: {','.join(PARTS)})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the files")
    parser.add_argument("--workers", type=int, default=0, help="loading processes (default 0: none beside this one)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: the best there is)")
    parser.add_argument("--out", metavar="DIR", help="folder of the encodings (default: beside the shards)")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs encoded together (default 32)")
    parser.add_argument("--share", type=_share, default=(0, 1), metavar="K/N", help="every N-th shard, from K on")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0, or 2 where it cannot be done."""
    if told := missing_extras("training"):
        print(f"error: {told}", file=sys.stderr)
        return 2
    prepare_environment()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.workers < 0 or options.batch_size < 1:
        parser.error("--workers must be at least 0, --batch-size at least 1")
    if options.pairs is not None:
        rest += ["--data.init_args.pairs", options.pairs]
    try:
        if options.out is not None:
            check_folder(options.out, "--out")
        from msdiffusion.training.encodings.precomputation import Precomputation
        from msdiffusion.training.setting_names import check_arguments

        check_arguments(["fit", "-c", options.config, *rest])

        datamodule, model = load_run(options.config, rest, options.device)
        parts = parts_to_encode(options.parts, datamodule.samples.augmentation)
        out = options.out or datamodule.source.encodings_folder
        for catalogue in datamodule.catalogues():
            work = Precomputation(
                datamodule.fixed_dataset(catalogue),
                model.backbone,
                model.adapter.config,
                model.prepare_references,
                parts=parts,
                dtype=options.dtype,
                out=out,
                workers=options.workers,
                batch_size=options.batch_size,
                share=options.share,
            )
            tasks = work.tasks()
            pairs = sum(len(task.indices) for task in tasks)
            print(f"{len(catalogue):,} pairs in {len(catalogue.shards)} shards; {pairs:,} pairs are to be encoded here")
            if tasks:
                print(work.check_room(tasks), flush=True)
                work.run(tasks)
            for folder in work.folders.values():
                print(f"{folder}")
    except (MSDiffusionError, ValueError) as error:
        from msdiffusion.training.run.foreign_words import our_error

        if (ours := our_error(error)) is None:
            raise
        print(f"error: {ours}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
