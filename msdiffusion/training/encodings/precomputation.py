"""Encoding the pairs of one dataset ahead of training: reading them, asking the frozen networks, writing files.

Shape letters: s subjects of one pair, H W height and width of the training picture, h w input of the image encoder.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from msdiffusion.adapter.config import AdapterConfig
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.errors import DataError, RequestError
from msdiffusion.training.encodings.files import PartWriter, file_name, shard_stamp
from msdiffusion.training.encodings.frozen import LongCaptions
from msdiffusion.training.encodings.keys import PartKey, part_keys
from msdiffusion.training.encodings.store import MANIFEST, content_of, encodings_root, unusable
from msdiffusion.training.pairs.shards import phrases_and_boxes
from msdiffusion.training.pairs.sources import Shard
from msdiffusion.training.samples.dataset import PairsDataset
from msdiffusion.training.samples.encoded import Part

PROBED = 8
"""Pairs that are encoded to see how many bytes a pair takes."""
REMEMBERED_BYTES = 256 * 2**20
"""Of prompts, and again of phrases: those beyond are encoded again where another shard has them."""


@dataclass(frozen=True)
class ReadPair:
    """A pair as the encoders want it; None where its part is not asked for."""

    place: int
    """In its shard."""
    caption: str
    phrases: tuple[str, ...]
    size: tuple[int, int]
    """(height, width) in pixels of the training picture."""
    target: Tensor | None
    """float32 (3, H, W) in [-1, 1]."""
    references: Tensor | None
    """float32 (s, 3, h, w), as the image encoder takes them."""


class PairReader:
    """Reads pairs for the encoders, in loading workers: ``torch.utils.data`` calls it a dataset.

    Args:
        dataset: all pairs of one catalogue, without augmentation: the centre, as training crops where its encodings
            may be made ahead.
    """

    def __init__(self, dataset: PairsDataset, prepare_references: Any, parts: Sequence[Part]) -> None:
        self.dataset, self.parts, self.prepare_references = dataset, parts, prepare_references
        [self.catalogue] = dataset.pairs.catalogues

    def __getitems__(self, indices: Sequence[int]) -> list[ReadPair] | str:
        """The pairs with these numbers; a message where one cannot be read, because workers garble exceptions."""
        try:
            return [self.read(index) for index in indices]
        except DataError as error:
            return str(error)

    def read(self, index: int) -> ReadPair:
        """One pair.

        Raises:
            DataError: if it is damaged.
        """
        place = int(self.catalogue.place[index])
        width, height = self.dataset.size_of(index)
        if self.parts == ["text"]:
            record = self.catalogue.record(index)
            phrases, _ = phrases_and_boxes(record)
            return ReadPair(place, record["caption"], phrases, (height, width), None, None)
        pair = self.catalogue.read(index, self.dataset.settings.reference_frame)
        target = None
        if "latents" in self.parts:
            pixels = torch.tensor(self.dataset.centred_target(pair, index))
            target = pixels.permute(2, 0, 1).float() / 127.5 - 1
        references = self.prepare_references(list(pair.references)) if "references" in self.parts else None
        return ReadPair(place, pair.caption, pair.phrases, (height, width), target, references)


class PairEncoder:
    """Asks the frozen networks about pairs and hands the answers to writers."""

    def __init__(self, backbone: Backbone, features: str) -> None:
        self.backbone, self.features = backbone, features
        self._prompts = Remembered(REMEMBERED_BYTES)
        self._phrases = Remembered(REMEMBERED_BYTES)
        self.long_captions = LongCaptions(backbone)

    def encode(self, pairs: Sequence[ReadPair], writers: dict[Part, PartWriter]) -> None:
        """Adds these pairs to the writers."""
        if writer := writers.get("latents"):
            answers: dict[int, tuple[Tensor, Tensor | None]] = {}
            for size in {pair.size for pair in pairs}:
                rows = [row for row, pair in enumerate(pairs) if pair.size == size]
                pixels = torch.stack([pairs[row].target for row in rows]).to(self.backbone.device)
                mean, deviation = self.backbone.latent_posterior(pixels)
                for i, row in enumerate(rows):
                    answers[row] = (mean[i], None if deviation is None else deviation[i])
            for row, pair in enumerate(pairs):
                writer.add_latents(pair.place, pair.size, *answers[row])
        if writer := writers.get("references"):
            counts = [len(pair.references) for pair in pairs]
            pixels = torch.cat([pair.references for pair in pairs]).to(self.backbone.device)
            chunks = [self.backbone.encode_references(chunk, self.features) for chunk in pixels.split(len(pairs))]
            for pair, tokens in zip(pairs, torch.cat(chunks).split(counts), strict=True):
                writer.add_references(pair.place, tokens)
        if writer := writers.get("text"):
            prompts = self._prompts.ask([pair.caption for pair in pairs], self._encode_prompts)
            phrases = self._phrases.ask([phrase for pair in pairs for phrase in pair.phrases], self._encode_phrases)
            for pair in pairs:
                states, *pooled = prompts[pair.caption]
                embeddings = torch.stack([phrases[phrase][0] for phrase in pair.phrases])
                writer.add_text(
                    pair.place, pair.caption, pair.phrases, states, pooled[0] if pooled else None, embeddings
                )

    def _encode_prompts(self, prompts: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
        answers = [part.cpu() for part in self.long_captions.encode(prompts) if part is not None]
        return zip(*answers, strict=True)

    def _encode_phrases(self, phrases: Sequence[str]) -> Iterator[tuple[Tensor, ...]]:
        return ((row,) for row in self.backbone.encode_phrases(phrases).cpu())


class Remembered:
    """Answers about texts, so that each is encoded once; where there are too many, those asked for longest ago go."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self._bytes = max_bytes, 0
        self._known: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    def ask(self, texts: Sequence[str], encode: Any) -> dict[str, tuple[Tensor, ...]]:
        """The answers to all texts.

        Args:
            encode: function: distinct texts -> their answers, one after the other.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for text, answer in zip(new, encode(new) if new else (), strict=True):
            # copies: a row of a batch would hold the whole batch in memory
            self._known[text] = tuple(row.clone() for row in answer)
            self._bytes += sum(row.nbytes for row in answer)
        answers = {}
        for text in texts:
            self._known.move_to_end(text)
            answers[text] = self._known[text]
        while self._bytes > self.max_bytes:
            self._bytes -= sum(row.nbytes for row in self._known.popitem(last=False)[1])
        return answers


@dataclass(frozen=True)
class Task:
    """One shard, of which some parts are still to be encoded."""

    shard: Shard
    indices: Sequence[int]
    """Of its pairs in the catalogue."""
    parts: list[Part]


class Precomputation:
    """Encodes one catalogue.

    Args:
        dataset: all pairs of the catalogue, not augmented.
        prepare_references: pictures -> what the image encoder takes.
        dtype: name of the files' number type.
        out: see ``encodings_root``.
        workers: loading processes; 0 loads in this one.
        share: (k, n): shards k, k + n, k + 2 n, ... alone, where n processes divide the work.

    Raises:
        RequestError: if the shards are remote and there is no ``out``.
    """

    def __init__(
        self,
        dataset: PairsDataset,
        backbone: Backbone,
        config: AdapterConfig,
        prepare_references: Any,
        *,
        parts: Sequence[Part],
        dtype: str,
        out: str | None,
        workers: int,
        batch_size: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        [catalogue] = dataset.pairs.catalogues
        root = encodings_root(catalogue, out)
        if root is None:
            raise RequestError(
                f"{catalogue.shards[0].place} is not on this machine: say with --out where the encodings go, and give "
                "training the same folder as --data.init_args.encodings_folder"
            )
        self.dataset, self.prepare_references, self.catalogue, self.root = dataset, prepare_references, catalogue, root
        self.dtype, self.workers, self.batch_size, self.share = dtype, workers, batch_size, share
        self.torch_dtype: torch.dtype = getattr(torch, dtype)
        keys = part_keys(dataset.settings, backbone, config)
        self.keys: dict[Part, PartKey] = {part: keys[part] for part in parts}
        self.folders = {part: root / f"{part}-{key.fingerprint(dtype)}" for part, key in self.keys.items()}
        self.encoder = PairEncoder(backbone, config.reference_features)

    def tasks(self) -> list[Task]:
        """What is still to be done."""
        found, start = [], 0
        for number, (shard, size) in enumerate(zip(self.catalogue.shards, self.catalogue.shard_sizes, strict=True)):
            indices = range(start, start := start + int(size))
            if number % self.share[1] != self.share[0]:
                continue
            places = self.catalogue.place[indices.start : indices.stop]
            parts = [
                part for part, folder in self.folders.items() if unusable(folder / file_name(shard), shard, places)
            ]
            if parts:
                found.append(Task(shard, indices, parts))
        return found

    def bytes_per_pair(self) -> dict[Part, float]:
        """Seen on some pairs, spread evenly. Of text it is a bound: repetitions are written once."""
        count = min(PROBED, len(self.catalogue))
        indices = [round(i * (len(self.catalogue) - 1) / max(1, count - 1)) for i in range(count)]
        total = dict.fromkeys(self.folders, 0)
        reader = PairReader(self.dataset, self.prepare_references, list(self.folders))
        for index in indices:
            writers = {part: PartWriter(part, self.torch_dtype) for part in self.folders}
            self.encoder.encode([reader.read(index)], writers)
            for part, writer in writers.items():
                total[part] += writer.num_bytes
        return {part: size / count for part, size in total.items()}

    def check_room(self, tasks: Sequence[Task]) -> str:
        """How much will be written, in words.

        Raises:
            RequestError: if the disk has less.
        """
        sizes, lines, together = self.bytes_per_pair(), [], 0.0
        for part, size in sizes.items():
            pairs = sum(len(task.indices) for task in tasks if part in task.parts)
            together += size * pairs
            bound = "at most " if part == "text" else ""
            lines.append(
                f"  {part}: {bound}{_amount(size)} per pair ({self.dtype}, seen on {min(PROBED, len(self.catalogue))} "
                f"pairs) x {pairs:,} pairs = {_amount(size * pairs)}"
            )
        existing = next(folder for folder in (self.root, *self.root.resolve().parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        lines.append(f"  together {_amount(together)}; {_amount(free)} are free at {existing}")
        if together > 0.98 * free:
            raise RequestError(
                "\n".join(["the encodings do not fit on the disk:", *lines])
                + "\nleave parts out (--parts), take --dtype bfloat16, or write elsewhere (--out DIR, and "
                "--data.init_args.encodings_folder DIR in training)"
            )
        return "\n".join(lines)

    def run(self, tasks: Sequence[Task], progress: bool = True) -> None:
        """Encode; a bar shows pairs and the time that is left.

        Raises:
            DataError: if a pair cannot be read, naming it. What was finished before is kept.
        """
        mark = f"{self.share[0]}of{self.share[1]}"
        for part, folder in self.folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.rglob(f"*.{mark}.tmp"):  # of a process that was killed
                left.unlink()
            partial = folder / f"{MANIFEST}.{mark}.tmp"
            partial.write_text(json.dumps(self.keys[part].manifest(self.dtype), indent=2), encoding="utf-8")
            partial.replace(folder / MANIFEST)
        total = sum(len(task.indices) for task in tasks)
        with tqdm(total=total, desc="encoding", unit="pair", disable=not progress, dynamic_ncols=True) as shown:
            for number, task in enumerate(tasks):
                self.catalogue.prefetch([i for later in tasks[number : number + 2] for i in later.indices])
                # before the pairs are read: a shard that changes meanwhile is then noticed
                stamp = shard_stamp(task.shard, content_of(task.shard))
                writers = {part: PartWriter(part, self.torch_dtype) for part in task.parts}
                for pairs in self._batches(task):
                    self.encoder.encode(pairs, writers)
                    shown.update(len(pairs))
                for part, writer in writers.items():
                    path = self.folders[part] / file_name(task.shard)
                    writer.save(path, f"{path.name}.{mark}.tmp", stamp)
        if told := self.encoder.long_captions.told():
            warnings.warn(told, stacklevel=2)

    def _batches(self, task: Task) -> Iterator[list[ReadPair]]:
        indices = task.indices
        batches = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        reader = PairReader(self.dataset, self.prepare_references, task.parts)
        loader = DataLoader(reader, batch_sampler=batches, num_workers=self.workers, collate_fn=lambda pairs: pairs)
        for pairs in loader:
            if isinstance(pairs, str):
                raise DataError(pairs)
            yield pairs


def _amount(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
