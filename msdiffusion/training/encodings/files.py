"""Files of encodings made ahead: one safetensors file per shard and part, written whole, read pair by pair.

    PAIRS/encodings/latents-0123456789ab/manifest.json           what made them, see ``PartKey``
    PAIRS/encodings/latents-0123456789ab/pairs-000000.safetensors

Tensors of a file, n pairs with m subjects together, rows in the order of the shard:

    places                        int32 (n,)       number of each pair in its shard, increasing
    latents:    mean.HxW, deviation.HxW            (pairs of this size, C, h, w), H W pixels; size, row int32 (n,)
    references: image_tokens                       (m, N, D); subjects int32 (n + 1,), where each pair's begin
    text:       prompt_states, pooled              (distinct captions, L, X), (distinct captions, P); caption int32 (n,)
                phrase_embeddings                  (distinct phrases, E); phrase int32 (m,); subjects int32 (n + 1,)

Shape letters: C latent channels, h w latent rows and columns, L text tokens, X cross-attention width, P pooled width,
N encoder tokens, D encoder width, E phrase width, s subjects of one pair.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msdiffusion.errors import DataError
from msdiffusion.files import share
from msdiffusion.training.encodings.keys import SCHEMA
from msdiffusion.training.pairs.sources import Shard
from msdiffusion.training.samples.encoded import Part

SUFFIX = ".safetensors"


def file_name(shard: Shard) -> str:
    """Name of the file of a shard, in the folder of its part."""
    return shard.name.removesuffix(".tar") + SUFFIX


class PartWriter:
    """Gathers one part of the pairs of a shard, in their order."""

    def __init__(self, part: Part, dtype: torch.dtype) -> None:
        self.part, self.dtype = part, dtype
        self._places: list[int] = []
        self._tensors: dict[str, list[Tensor]] = {}
        self._numbers: dict[str, list[int]] = {"subjects": [0]}
        self._known: dict[str, dict[Any, int]] = {"caption": {}, "phrase": {}}

    @property
    def num_bytes(self) -> int:
        """Of the encodings so far; the places beside them are a few bytes per pair."""
        return sum(tensor.nbytes for tensors in self._tensors.values() for tensor in tensors)

    def add_latents(self, place: int, size: tuple[int, int], mean: Tensor, deviation: Tensor | None) -> None:
        """A pair whose training picture has this (height, width) in pixels; latents (C, h, w)."""
        self._places.append(place)
        row = len(self._tensors.get(f"mean.{size[0]}x{size[1]}", ()))
        self._keep(f"mean.{size[0]}x{size[1]}", mean)
        if deviation is not None:
            self._keep(f"deviation.{size[0]}x{size[1]}", deviation)
        for name, number in (("height", size[0]), ("width", size[1]), ("row", row)):
            self._numbers.setdefault(name, []).append(number)

    def add_references(self, place: int, image_tokens: Tensor) -> None:
        """A pair with image tokens (s, N, D)."""
        self._places.append(place)
        for tokens in image_tokens:
            self._keep("image_tokens", tokens)
        self._numbers["subjects"].append(self._numbers["subjects"][-1] + len(image_tokens))

    def add_text(
        self,
        place: int,
        caption: str,
        phrases: Sequence[str],
        states: Tensor,
        pooled: Tensor | None,
        embeddings: Tensor,
    ) -> None:
        """A pair with prompt states (L, X), pooled ones (P,) and phrase embeddings (s, E)."""
        self._places.append(place)
        if caption not in self._known["caption"]:
            self._keep("prompt_states", states)
            if pooled is not None:
                self._keep("pooled", pooled)
        self._number("caption", caption)
        for phrase, embedding in zip(phrases, embeddings, strict=True):
            if phrase not in self._known["phrase"]:
                self._keep("phrase_embeddings", embedding)
            self._number("phrase", phrase)
        self._numbers["subjects"].append(self._numbers["subjects"][-1] + len(phrases))

    def save(self, path: Path, under: str, stamp: dict[str, str]) -> None:
        """Write the file under a temporary name, then give it its own, so that half a file is never taken for one.

        Args:
            under: name of the temporary one.
            stamp: see ``shard_stamp``.
        """
        tensors = {name: torch.stack(rows) for name, rows in self._tensors.items()}
        for name, numbers in {**self._numbers, "places": self._places}.items():
            tensors[name] = torch.tensor(numbers, dtype=torch.int32)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(under)
        try:
            save_file(tensors, temporary, metadata={"schema": SCHEMA, "part": self.part, **stamp})
            share(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _keep(self, name: str, values: Tensor) -> None:
        # a copy: a row of a batch would hold the whole batch in memory
        self._tensors.setdefault(name, []).append(values.detach().to("cpu", self.dtype, copy=True))

    def _number(self, name: str, what: str) -> None:
        number = self._known[name].setdefault(what, len(self._known[name]))
        self._numbers.setdefault(name, []).append(number)


COLUMNS = {
    "latents": ("height", "width", "row"),
    "references": ("subjects",),
    "text": ("subjects", "caption", "phrase"),
}
"""Columns of numbers of each part, beside its places."""


class PartFile:
    """A file that is open: memory-mapped, so that a pair costs no more than its own bytes.

    Raises:
        DataError: if it is missing, no such file, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        self.stamp: dict[str, str] = self._file.metadata() or {}
        if self.stamp.get("schema") != SCHEMA:
            raise DataError(f"{path} has format {self.stamp.get('schema')!r}, this version reads {SCHEMA!r}")
        self._names = frozenset(self._file.keys())
        self._numbers: dict[str, np.ndarray] = {}
        part = self.stamp.get("part")
        if part not in COLUMNS:
            raise DataError(f"{path} has part {part!r}, but encodings are of {', '.join(COLUMNS)}")
        for name in ("places", *COLUMNS[part]):
            self._check_column(name)
        self.places = self._small("places")
        if (np.diff(self.places) <= 0).any():
            raise DataError(f"{path} is damaged: its places do not increase")

    def read(self, place: int) -> dict[str, Tensor]:
        """Fields of ``EncodedSample`` of the pair at this place of the shard.

        Raises:
            DataError: if the file does not know it.
        """
        index = int(np.searchsorted(self.places, place))
        if index == len(self.places) or self.places[index] != place:
            raise DataError(f"{self.path} has no pair number {place} of its shard")
        try:
            return self._read(index)
        except (SafetensorError, IndexError, ValueError) as error:  # of numbers beyond the end, or tensors missing
            raise DataError(f"{self.path} is damaged: pair number {place} cannot be read ({error})") from None

    def _read(self, index: int) -> dict[str, Tensor]:
        part = self.stamp["part"]
        if part == "latents":
            return self._latents(index)
        first, end = self._small("subjects")[index : index + 2].tolist()
        if part == "references":
            return {"image_tokens": self._file.get_slice("image_tokens")[first:end]}
        caption = int(self._small("caption")[index])
        fields = {"prompt_states": self._file.get_slice("prompt_states")[caption]}
        if "pooled" in self._names:
            fields["pooled"] = self._file.get_slice("pooled")[caption]
        phrases = self._file.get_slice("phrase_embeddings")
        rows = self._small("phrase")[first:end].tolist()
        fields["phrase_embeddings"] = torch.stack([phrases[row] for row in rows])
        return fields

    def _latents(self, index: int) -> dict[str, Tensor]:
        height, width, row = (int(self._small(name)[index]) for name in ("height", "width", "row"))
        fields = {"latent_mean": self._file.get_slice(f"mean.{height}x{width}")[row]}
        if f"deviation.{height}x{width}" in self._names:
            fields["latent_deviation"] = self._file.get_slice(f"deviation.{height}x{width}")[row]
        return fields

    def _check_column(self, name: str) -> None:
        """Raise DataError for a column that is not there, or holds what is no number of a row: -1 would be the last."""
        if name not in self._names:
            raise DataError(f"{self.path} is damaged: it has no {name}")
        column = self._file.get_slice(name)
        kind, shape = column.get_dtype(), column.get_shape()
        if kind != "I32" or len(shape) != 1:
            raise DataError(f"{self.path} is damaged: {name} must be one row of int32, it is {kind} of shape {shape}")
        if shape[0] and self._small(name).min() < 0:
            raise DataError(f"{self.path} is damaged: {name} holds numbers below 0")

    def _small(self, name: str) -> np.ndarray:
        """A column of numbers, kept."""
        if name not in self._numbers:
            self._numbers[name] = self._file.get_tensor(name).numpy()
        return self._numbers[name]


def shard_stamp(shard: Shard, content: Path | None = None) -> dict[str, str]:
    """What a file of encodings remembers of its shard, so that a changed shard is noticed.

    Args:
        shard: one that is not on this disk, with the sha256 of its build.json or the stamp that a server gave it.
        content: the file itself, where it is on this disk: then it is asked, whatever build.json says of it.
    """
    stamp = {"shard": shard.name}
    if content is None:
        if shard.sha256 is not None:
            return stamp | {"sha256": shard.sha256}
        return stamp | {"server": f"{shard.bytes} {shard.stamp}"}
    status = content.stat()
    with content.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return stamp | {"sha256": digest, "bytes": str(status.st_size), "changed": str(status.st_mtime_ns)}


def is_of(stamp: dict[str, str], shard: Shard, content: Path | None = None) -> bool:
    """Whether a stamp was made of this shard as it is now. A file of unchanged size and date is not read again.

    Arguments as of ``shard_stamp``.
    """
    if content is not None:
        status = content.stat()
        if (stamp.get("bytes"), stamp.get("changed")) == (str(status.st_size), str(status.st_mtime_ns)):
            return stamp.get("shard") == shard.name
    now = shard_stamp(shard, content)
    return all(stamp.get(name) == now.get(name) for name in ("shard", "sha256", "server"))
