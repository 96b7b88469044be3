"""What this package raises on purpose.

MiningError <- SettingsError(ValueError), InputError(ValueError) <- MissingModelError, ModelNeededError; OutputError;
ClipError.
"""

from __future__ import annotations

from typing import Any

from data_pipeline.safe_text import error_text, visible


class MiningError(Exception):
    """Everything this package raises on purpose. Its text may be printed: names of files in it do nothing there."""

    def __str__(self) -> str:
        return error_text(super().__str__())


class SettingsError(MiningError, ValueError):
    """A setting is wrong, or two settings disagree: nothing has been done yet."""


class InputError(MiningError, ValueError):
    """The run cannot start: a folder, a table or a checkpoint is missing or unreadable."""


class MissingModelError(InputError):
    """A model of the hub is not on this machine and cannot be had."""


class ModelNeededError(InputError):
    """A network that nobody had thought to be needed is needed by a clip. step: whose ``model_needed`` was wrong."""

    def __init__(self, message: str, step: str = "") -> None:
        super().__init__(message)
        self.step = step


class OutputError(MiningError):
    """The results cannot be written (a full disk, a folder without permission): the run stops, and can go on later."""


class ClipError(MiningError):
    """One clip cannot be used: a step turns this into ``Rejected`` and the run goes on.

    reason: short and countable, the same words for every clip of its kind. evidence: what was measured, JSON values.
    """

    def __init__(self, reason: str, **evidence: Any) -> None:
        super().__init__(reason)
        self.reason = reason
        self.evidence = evidence

    @property
    def told(self) -> str:
        """The reason with the beginning of all that was measured, for a message."""
        values = ", ".join(f"{name} {str(value)[:80]}" for name, value in self.evidence.items())
        return visible(f"{self.reason}: {values}" if values else self.reason)
