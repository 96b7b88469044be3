"""What one unit of the world benchmark is, and which units a table needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from msdiffusion.bench.rows import ROWS


@dataclass(frozen=True)
class Settings:
    """Everything that decides the figures; written beside them."""

    model: str
    pairs: str
    steps: int
    train_batch: int
    pictures: int
    seed: int
    draw_batch: int
    precision: str

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Settings:
        """From the command line; paths absolute, so that a child process finds them."""
        asked = {field.name: getattr(options, field.name) for field in fields(cls)}
        return cls(**asked | {name: str(asked[name].resolve()) for name in ("model", "pairs")})


@dataclass(frozen=True)
class Unit:
    """One row with one training seed."""

    row: str
    training_seed: int

    def folder(self, out: Path) -> Path:
        """Where its adapter, pictures and measures are."""
        return out / "rows" / self.row / f"seed_{self.training_seed}"

    @property
    def needs(self) -> Unit | None:
        """The unit that trains the adapter it draws with, if that is another one."""
        source = ROWS[self.row].adapter_of
        return None if source in (None, "shipped", self.row) else Unit(source, self.training_seed)


def plan_units(rows: Sequence[str], training_seeds: Sequence[int]) -> list[Unit]:
    """The units of the asked rows, and of the rows whose adapters they need, in an order that works.

    A row that does not depend on a training is done once, whatever the number of training seeds.
    """
    units: dict[Unit, None] = {}
    for row in rows:
        seeds = training_seeds if ROWS[row].adapter_of not in (None, "shipped") else training_seeds[:1]
        for seed in seeds:
            unit = Unit(row, seed)
            if unit.needs is not None:
                units.setdefault(unit.needs)
            units.setdefault(unit)
    return list(units)
