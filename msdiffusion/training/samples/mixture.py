"""Several catalogues of pairs, counted through as one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from msdiffusion.training.catalogue import Catalogue
from msdiffusion.training.pairs.shards import Pair
from msdiffusion.training.samples.encoded import EncodedSample, EncodingStore, Part

CHUNK = 65536
"""Keys that are hashed at once: of millions of pairs, no copy is made. A part of what the digest means."""


class Mixture:
    """The pairs of all catalogues: those of the first, then those of the second, and so on."""

    def __init__(self, catalogues: Sequence[Catalogue]) -> None:
        self.catalogues = tuple(catalogues)
        self.starts = np.cumsum([0, *map(len, self.catalogues)])

    def __len__(self) -> int:
        """Number of pairs."""
        return int(self.starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the catalogue, index in it) of a pair; IndexError if there is none of that number."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} pairs, so no number {index}")
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, index - int(self.starts[number])

    def read(self, index: int, reference_frame: str = "other") -> Pair:
        """The pair, see ``read_pair``."""
        number, place = self.locate(index)
        return self.catalogues[number].read(place, reference_frame)

    def record(self, index: int) -> dict[str, Any]:
        """Its json."""
        number, place = self.locate(index)
        return self.catalogues[number].record(place)

    def key(self, index: int) -> str:
        """Its key, unique in its catalogue."""
        number, place = self.locate(index)
        return str(self.catalogues[number].keys[place])

    def shard_name(self, index: int) -> str:
        """Where its shard lies; different for different catalogues."""
        number, place = self.locate(index)
        catalogue = self.catalogues[number]
        return str(catalogue.shards[catalogue.shard[place]].place)

    def size(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels of its target."""
        number, place = self.locate(index)
        width, height = self.catalogues[number].sizes[place].tolist()
        return width, height

    @property
    def sizes(self) -> np.ndarray:
        """int32 (len(self), 2), (width, height) of all targets."""
        return np.concatenate([catalogue.sizes for catalogue in self.catalogues])

    @property
    def shards(self) -> np.ndarray:
        """int64 (len(self),), number of each pair's shard, counted through."""
        columns, before = [], 0
        for catalogue in self.catalogues:
            columns.append(catalogue.shard.astype(np.int64) + before)
            before += len(catalogue.shards)
        return np.concatenate(columns)

    def digest(self, indices: np.ndarray) -> str:
        """A name for the keys of these pairs, in this order: increasing."""
        digest = hashlib.sha256()
        for catalogue, part in zip(self.catalogues, self.split(indices), strict=True):
            for start in range(0, len(part), CHUNK):
                keys = catalogue.keys.take(part[start : start + CHUNK])
                digest.update(keys.ends.astype("<i8").tobytes())
                digest.update(keys.content.tobytes())
        return digest.hexdigest()[:16]

    def split(self, indices: np.ndarray) -> list[np.ndarray]:
        """Increasing indices of pairs -> their indices in each of the catalogues."""
        edges = np.searchsorted(indices, self.starts)
        return [
            indices[first:end] - start
            for start, first, end in zip(self.starts[:-1], edges[:-1], edges[1:], strict=True)
        ]

    def prefetch(self, indices: np.ndarray) -> None:
        """Start to fetch what these pairs need, where it is not on this machine."""
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        for number in np.unique(numbers):
            self.catalogues[number].prefetch(indices[numbers == number] - self.starts[number])


class MixedStore:
    """The stores of all catalogues of a mixture, as one."""

    def __init__(self, mixture: Mixture, stores: Sequence[EncodingStore]) -> None:
        self._starts = mixture.starts
        self._stores = tuple(stores)
        self._parts = frozenset.intersection(*(store.parts for store in stores))

    @property
    def parts(self) -> frozenset[Part]:
        """What every one of them holds; what only some hold is not read."""
        return self._parts

    def read(self, index: int) -> EncodedSample:
        """The encodings of a pair of the mixture."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._stores[number].read(index - int(self._starts[number])).only(self.parts)
