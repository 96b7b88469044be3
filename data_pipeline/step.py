"""What a step of the pipeline is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from data_pipeline.errors import ClipError, InputError
from data_pipeline.records import Rejected

if TYPE_CHECKING:
    from data_pipeline.models.hub import HubModel

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(kw_only=True)
class Step(Generic[In, Out]):
    """One step: a dataclass whose fields are its settings, checked in ``__post_init__``, so a wrong one fails before
    any work.

    A step is pickled into every worker before ``setup`` and never after it. A field with ``metadata={"hashed": False}``
    does not change the dataset (a path to write to, say) and stays out of the settings that are compared and recorded.
    Fields with ``init=False`` are what ``setup`` loads.
    """

    @property
    def preload(self) -> tuple[str, ...]:
        """Modules that ``setup`` will need and that are slow to import: the runner may import them once for all
        workers. A step that always needs the same ones has them as a class attribute.
        """
        return ()

    @property
    def name(self) -> str:
        """``CutShots`` -> ``cut_shots``: the name of the file, of the stage in reports, and of the settings."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    path_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that are text and may name a file or a folder; those that are paths are known without it."""

    @property
    def model_device(self) -> str:
        """The device that the step's model runs on ("cpu", "cuda:0"), "" for a step without a model. On a cluster a
        step with a model has workers of its own; the others share one with their neighbours.
        """
        return ""

    def model_files(self) -> dict[str, Path]:
        """Files and folders whose content shapes the dataset, by a name: the settings that name one that is here."""
        from data_pipeline.models.hub import in_cache

        named = {f.name for f in fields(self) if "Path" in str(f.type)} | set(self.path_settings)
        values = {name: value for name, value in self.settings().items() if name in named and value}
        # "transformers:FOLDER" names a folder too.
        places = {name: Path(value.partition(":")[2] if ":" in value else value) for name, value in values.items()}
        downloads = {name: in_cache(model) for name, model in self.downloads().items()}
        return {name: place for name, place in (places | downloads).items() if place and os.path.exists(place)}  # noqa: PTH110

    def downloads(self) -> dict[str, HubModel]:
        """Models of the hub that ``setup`` loads, by the setting that names each; fetched before any worker starts."""
        return {}

    def place_of(self, setting: str) -> str:
        """Where the model is that a setting names: that itself, or where it was downloaded to."""
        from data_pipeline.models.hub import place_of

        model = self.downloads().get(setting)
        return str(getattr(self, setting) if model is None else place_of(model))

    def setup(self) -> None:
        """Once per worker: heavy imports and weights. SettingsError or InputError if something is missing."""

    def set_up(self) -> None:
        """``setup``, whose InputError says what to do if it is about a file of a download."""
        from data_pipeline.models.hub import in_cache

        try:
            self.setup()
        except InputError as error:
            for place in map(in_cache, self.downloads().values()):
                if place and str(place) in str(error):
                    # Of a snapshot, which is made of links, the whole repository.
                    broken = place.resolve() if place.is_file() else place.parents[1]
                    raise InputError(
                        f"{error}\nif the download was cut off, delete {broken} and run the same command again"
                    ) from error
            raise

    def process(self, record: In) -> Out | Rejected:
        """The next record, or why the clip goes no further; instead of ``Rejected`` a ``ClipError`` may be raised."""
        if type(self).process_many is Step.process_many:
            raise NotImplementedError
        return self.process_many([record])[0]

    def process_many(self, records: Sequence[In]) -> list[Out | Rejected]:
        """``process`` for several records, in their order; one that cannot be used never fails the others.

        A step overrides either; where its model takes batches, this one.
        """
        results: list[Out | Rejected] = []
        for record in records:
            try:
                results.append(self.process(record))
            except ClipError as error:
                results.append(Rejected(error.reason, error.evidence))
        return results

    def settings(self) -> dict[str, Any]:
        """The settings that shape the dataset, as JSON values."""
        chosen = (f for f in fields(self) if f.init and f.metadata.get("hashed", True))
        return {f.name: _as_json(getattr(self, f.name)) for f in chosen}


def _as_json(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, tuple | frozenset | set):
        return sorted(value) if not isinstance(value, tuple) else list(value)
    return value
