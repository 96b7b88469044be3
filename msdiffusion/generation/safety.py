"""Hooks on finished pictures, off unless asked for: a safety checker, and an invisible watermark.

Both are functions from a list of PIL pictures to a list of PIL pictures; ``model.picture_hooks.append(hook)`` turns one
on. The watermark is the method "dwtDctSvd" of the package invisible-watermark, whose tool can read it: a bit per 8 x 8
block of the blue chroma, in the largest singular value of the block's averages. (That package's own encoder swaps the
details of rows and columns on the way back, which changes colours at edges by up to 234 of 255; this one changes no
colour by more than a few steps.)
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from msdiffusion.errors import RequestError, WeightsError, reason, warn_caller
from msdiffusion.own_memory import give_own_memory
from msdiffusion.request.pictures import open_upright

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

FLAGGED = "flagged"
"""Key in ``picture.info`` of a picture that the safety checker replaced."""
MARK_BYTES = 16
"""Longest text of a watermark, in UTF-8; two bytes of checksum follow."""
MARK_BITS = 8 * (MARK_BYTES + 2)
VOTES = 4
"""Blocks per bit that a picture must have, so that one spoiled block cannot change a bit."""
CELL, STEP = 8, 36.0
"""Pixels of a block, and the quantiser's step: those of invisible-watermark, so that its decoder fits."""


class SafetyChecker:
    """Replaces pictures that the safety checker of Stable Diffusion flags by black ones."""

    def __init__(self, checker: StableDiffusionSafetyChecker, processor: CLIPImageProcessor) -> None:
        """Take a loaded checker and its preprocessing."""
        self.checker, self.processor = checker.eval().requires_grad_(False), processor

    @classmethod
    def from_pretrained(cls, place: str | Path, device: str | torch.device | None = None) -> SafetyChecker:
        """Load a checker.

        Args:
            place: folder or hub name of a StableDiffusionSafetyChecker with its preprocessing (such as
                ``CompVis/stable-diffusion-safety-checker``), or folder of a Stable Diffusion 1.x pipeline with both.
            device: None: the CPU.

        Raises:
            WeightsError: nothing there, or incomplete: a checker with random weights would let everything pass.
        """
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        from data_pipeline.models.model_claims import check_network
        from data_pipeline.models.weights import load_network

        folder = Path(place)
        whole = (folder / "safety_checker").is_dir()
        try:
            checker = load_network(
                StableDiffusionSafetyChecker, folder / "safety_checker" if whole else place, f"safety checker {place}",
                model_types=("clip",),
            )  # fmt: skip
            if whole:
                check_network(folder / "feature_extractor")
            processor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor" if whole else place)
        except Exception as error:  # what is broken decides which of many unrelated errors comes out
            raise WeightsError(f"no safety checker can be read from {place}: {reason(error)}") from error
        checker.to("cpu" if device is None else device)
        give_own_memory(checker)
        return cls(checker, processor)

    def flags(self, pictures: Sequence[Image.Image]) -> list[bool]:
        """Per picture whether the checker objects."""
        if not pictures:
            return []
        pixels = self.processor([picture.convert("RGB") for picture in pictures], return_tensors="pt").pixel_values
        # It blackens what it is given beside the CLIP input; a pixel each will do, as we blacken ourselves.
        spare = [np.zeros(1) for _ in pictures]
        _, flagged = self.checker(clip_input=pixels.to(self.checker.device, self.checker.dtype), images=spare)
        return [bool(flag) for flag in flagged]

    def __call__(self, pictures: list[Image.Image]) -> list[Image.Image]:
        """The pictures, each flagged one black and with ``info["flagged"]``; warns which ones."""
        flags = self.flags(pictures)
        if any(flags):
            which = ", ".join(str(index) for index, flag in enumerate(flags) if flag)
            warn_caller(
                f"the safety checker flagged {sum(flags)} of {len(pictures)} pictures (number {which}, from 0): "
                "they are black now; another seed or prompt may pass"
            )
        return [_black(picture) if flag else picture for picture, flag in zip(pictures, flags, strict=True)]


class Watermark:
    """Writes a short text invisibly into pictures; ``read_watermark`` reads it."""

    def __init__(self, text: str) -> None:
        """Take the text, of 1 to 16 bytes in UTF-8, none of them zero; else RequestError."""
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else b""
        if not 1 <= len(content) <= MARK_BYTES or 0 in content:
            raise RequestError(f"a watermark is text of 1 to {MARK_BYTES} bytes in UTF-8, got {text!r}")
        self.text = text
        self.bits = _bits(content.ljust(MARK_BYTES, b"\0"))

    @staticmethod
    def check_size(width: int, height: int) -> None:
        """Raise RequestError if a picture of so many pixels is too small to carry a watermark."""
        need = VOTES * MARK_BITS
        if (width // CELL) * (height // CELL) < need:
            raise RequestError(
                f"a picture of {width} x {height} pixels is too small for a watermark: it needs {need} blocks of "
                f"{CELL} x {CELL}, for example {CELL * 24} x {CELL * 24} pixels"
            )

    def __call__(self, pictures: list[Image.Image]) -> list[Image.Image]:
        """The pictures with the watermark, RGB; RequestError where one is too small."""
        return [self._mark(picture) for picture in pictures]

    def _mark(self, picture: Image.Image) -> Image.Image:
        self.check_size(*picture.size)
        pixels = np.array(picture.convert("RGB"))
        blocks = _blocks(pixels)
        wanted = self.bits[np.arange(len(blocks)) % MARK_BITS]
        marked = _put_back(pixels, _quantise(blocks, wanted))
        result = Image.fromarray(marked)
        result.info.update(picture.info)
        return result


def read_watermark(picture: Image.Image | str | Path) -> str | None:
    """The text that ``Watermark`` wrote into a picture, or None.

    It outlasts lossless formats, and from about 512 x 512 pixels on also JPEG and WebP of ordinary quality; no scaling,
    turning or cropping. Of pictures without a watermark, all but one in 65,536 give None.

    Raises:
        RequestError: not a picture, or too small to carry a watermark.
    """
    picture = open_upright(picture, "picture")
    Watermark.check_size(*picture.size)
    values = _largest(_chroma(_blocks(np.array(picture.convert("RGB")))))
    votes = np.where(values % STEP > STEP / 2, 1, -1)
    bits = np.bincount(np.arange(len(votes)) % MARK_BITS, votes, MARK_BITS) > 0
    payload = np.packbits(bits).tobytes()
    content = payload[:MARK_BYTES]
    text = content.rstrip(b"\0")
    if not text or not np.array_equal(_bits(content), bits):
        return None
    return text.decode("utf-8", "replace")


def _black(picture: Image.Image) -> Image.Image:
    black = Image.new("RGB", picture.size)
    black.info[FLAGGED] = True
    return black


def _bits(content: bytes) -> np.ndarray:
    """(MARK_BITS,) bool: the padded text and its checksum."""
    checksum = binascii.crc_hqx(content, 0xFFFF).to_bytes(2, "big")
    return np.unpackbits(np.frombuffer(content + checksum, np.uint8)).astype(bool)


def _blocks(pixels: np.ndarray) -> np.ndarray:
    """(n, 8, 8, 3): the whole blocks of (height, width, 3), row by row."""
    rows, columns = pixels.shape[0] // CELL, pixels.shape[1] // CELL
    whole = pixels[: rows * CELL, : columns * CELL].reshape(rows, CELL, columns, CELL, 3)
    return whole.swapaxes(1, 2).reshape(-1, CELL, CELL, 3)


def _put_back(pixels: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    rows, columns = pixels.shape[0] // CELL, pixels.shape[1] // CELL
    result = pixels.copy()
    whole = blocks.reshape(rows, columns, CELL, CELL, 3).swapaxes(1, 2)
    result[: rows * CELL, : columns * CELL] = whole.reshape(rows * CELL, columns * CELL, 3)
    return result


def _chroma(blocks: np.ndarray) -> np.ndarray:
    """(n, 4, 4): averages of U over 2 x 2 pixels, doubled, which is the first band of the Haar transform."""
    red, green, blue = (blocks[..., channel].astype(np.float64) for channel in range(3))
    chroma = 0.492 * (blue - (0.299 * red + 0.587 * green + 0.114 * blue)) + 128.0
    return chroma.reshape(-1, CELL // 2, 2, CELL // 2, 2).sum(axis=(2, 4)) / 2


def _largest(bands: np.ndarray) -> np.ndarray:
    """(n,): the largest singular values; a cosine transform in between, as in the package, would not change them."""
    return np.linalg.svd(bands, compute_uv=False)[:, 0]


def _quantise(blocks: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The blocks (n, 8, 8, 3) uint8 changed as little as makes their values fall into the wanted half of a step."""
    left, values, right = np.linalg.svd(_chroma(blocks))
    pattern = left[:, :, :1] * right[:, :1, :]  # (n, 4, 4): the part of the band that the value weighs
    middle = (np.floor(values[:, 0] / STEP) + 0.25 + 0.5 * wanted) * STEP
    choices = middle[:, None] + STEP * np.array([-1.0, 0.0, 1.0])
    order = np.argsort(abs(choices - values[:, :1]), axis=1)
    result, left_over = blocks.copy(), np.ones(len(blocks), bool)
    # The nearest value may ask for a colour beyond 255; then the next nearest, on the other side, is taken.
    for nearest in order.T:
        target = np.take_along_axis(choices, nearest[:, None], axis=1)[:, 0]
        change = ((target - values[:, 0])[:, None, None] * pattern / 2).repeat(2, axis=1).repeat(2, axis=2)
        # Blue up and green down leaves the brightness and the other chroma as they are.
        moved = blocks + change[..., None] * np.array([0.0, -0.114 / 0.587, 1.0]) / 0.492
        moved = np.clip(np.round(moved), 0, 255).astype(np.uint8)
        reached = abs(_largest(_chroma(moved)) - target) < STEP / 8
        result[left_over & reached] = moved[left_over & reached]
        left_over &= ~reached
    return result
