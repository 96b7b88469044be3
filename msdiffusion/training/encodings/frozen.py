"""What the frozen encoders say about prompts, phrases and references, each distinct one asked once.

Shape letters: N items, L encoder tokens, C cross-attention width, P pooled width, D encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from msdiffusion.backbone.backbone import Backbone
from msdiffusion.backbone.pretrained import withheld
from msdiffusion.errors import shown
from msdiffusion.request.phrases import beyond_limit


class LongCaptions:
    """Encodes captions, and counts those that are longer than the text encoder reads.

    diffusers would print the end of each, every time that it is encoded.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.tokenizer = backbone, backbone.tokenizer
        self._longer: dict[str, str] = {}

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """See ``Backbone.encode_prompts``. Takes note of those that are too long, each once."""
        for caption in captions:
            if caption not in self._longer and (rest := beyond_limit(self.tokenizer, caption)):
                self._longer[caption] = rest
        loggers = type(self.backbone.pipeline).encode_prompt.__module__, "transformers.tokenization_utils_base"
        with withheld(loggers, "input was truncated because CLIP", "Token indices sequence length is longer"):
            return self.backbone.encode_prompts(captions)

    def told(self) -> str | None:
        """How many there were; None for none."""
        if not self._longer:
            return None
        count, rest = len(self._longer), next(iter(self._longer.values()))
        counted = "1 caption is" if count == 1 else f"{count:,} captions are"
        return (
            f"{counted} longer than the {self.tokenizer.model_max_length} tokens that the text encoder reads: what "
            f"lies beyond was ignored, as {shown(rest)}"
        )


class FrozenEncodings:
    """Encodings of a frozen backbone, detached, on its device.

    Args:
        keep: remember every answer, in main memory, for the rest of the run. Right for small datasets: an answer is
            L x D numbers per reference and L x C per prompt. Otherwise only repetitions inside one call are saved.
    """

    def __init__(self, backbone: Backbone, keep: bool, features: str = "tokens") -> None:
        self.backbone = backbone
        self.features = features
        self.keep = keep
        self._prompts: dict[Hashable, tuple[Tensor, ...]] = {}
        self._phrases: dict[Hashable, tuple[Tensor, ...]] = {}
        self._references: dict[Hashable, tuple[Tensor, ...]] = {}
        self._zero_reference: Tensor | None = None
        self.long_captions = LongCaptions(backbone)

    @torch.no_grad()
    def prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """(states (N, L, C), pooled (N, P)) of the prompts; no pooled ones of Stable Diffusion 1.x."""

        def encode(rows: list[int]) -> tuple[Tensor, ...]:
            answers = self.long_captions.encode([prompts[i] for i in rows])
            return tuple(part for part in answers if part is not None)

        states, *pooled = self._ask(prompts, self._prompts, encode)
        return states, pooled[0] if pooled else None

    @torch.no_grad()
    def phrases(self, phrases: Sequence[str]) -> Tensor:
        """(N, P) pooled embeddings of the phrases."""
        (embeddings,) = self._ask(
            phrases, self._phrases, lambda rows: (self.backbone.encode_phrases([phrases[i] for i in rows]),)
        )
        return embeddings

    @torch.no_grad()
    def references(self, names: Sequence[str], pixels: Tensor) -> Tensor:
        """(N, L, D) image tokens.

        Args:
            names: one per reference; the same name always means the same picture.
            pixels: (N, 3, h, w) as ``Backbone.prepare_references`` makes them.
        """
        (tokens,) = self._ask(names, self._references, lambda rows: (self._encode(pixels[rows]),))
        return tokens

    @torch.no_grad()
    def zero_reference(self, pixels: Tensor) -> Tensor:
        """(L, D) image tokens of a reference of zeros, of the size (..., 3, h, w) and type of ``pixels``."""
        if self._zero_reference is None:
            self._zero_reference = self._encode(pixels.new_zeros(1, *pixels.shape[-3:]))[0]
        return self._zero_reference

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.backbone.encode_references(pixels, self.features)

    def _ask(
        self,
        names: Sequence[Hashable],
        known: dict[Hashable, tuple[Tensor, ...]],
        encode: Callable[[list[int]], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """One row per name; ``encode`` is asked for the first row of each name that is not known yet."""
        known = known if self.keep else {}
        first_rows: dict[Hashable, int] = {}
        for row, name in enumerate(names):
            if name not in known:
                first_rows.setdefault(name, row)
        if self.keep:
            # One at a time: the last bits of an answer depend on how many are asked together, and a run that was
            # resumed would meet them in other company.
            for name, row in first_rows.items():
                known[name] = tuple(answer[0].to("cpu", copy=True) for answer in encode([row]))
        elif first_rows:
            answers = encode(list(first_rows.values()))
            for i, name in enumerate(first_rows):
                known[name] = tuple(answer[i] for answer in answers)
        columns = zip(*(known[name] for name in names), strict=True)
        rows = tuple(torch.stack(column) for column in columns)
        if not self.keep:
            return rows
        device = self.backbone.device
        return tuple(row.to(device) for row in rows)
