"""Captions of pictures by BLIP, through transformers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.models.hub import model_folder
from data_pipeline.models.model_claims import check_network
from data_pipeline.models.model_files import TEXT_AND_IMAGE_MODEL, check_model_directory
from data_pipeline.models.quiet import quiet_loading
from data_pipeline.models.weights import load_network
from data_pipeline.reasons import reason

OPTION = "--caption-model"


class BlipCaptioner:
    """One sentence per picture, by greedy search: the same picture always gets the same words.

    model, processor: BlipForConditionalGeneration and its processor. max_tokens: length of a caption at most.
    batch_size: pictures in one pass.
    """

    def __init__(self, model: torch.nn.Module, processor: Any, *, max_tokens: int = 40, batch_size: int = 4) -> None:
        self.model = model
        self.processor = processor
        self.max_tokens = max_tokens
        self.batch_size = batch_size

    @torch.inference_mode()
    def caption(self, images: Sequence[np.ndarray]) -> list[str]:
        """images: uint8 (height, width, 3). Returns one line each, without white space at its ends; maybe empty."""
        captions: list[str] = []
        for start in range(0, len(images), self.batch_size):
            pictures = [Image.fromarray(image) for image in images[start : start + self.batch_size]]
            pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            tokens = self.model.generate(
                pixel_values=pixels.to(self.model.device, self.model.dtype),
                max_new_tokens=self.max_tokens,
                num_beams=1,
                do_sample=False,
            )
            texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            captions += [" ".join(text.split()) for text in texts]
        return captions


def load_captioner(name: str, device: str, *, max_tokens: int, batch_size: int) -> BlipCaptioner:
    """A BLIP by hub id or from a directory that save_pretrained wrote. Safetensors only.

    InputError if a file is missing or does not fit.
    """
    from transformers import BlipForConditionalGeneration, BlipProcessor

    check_model_directory(name, OPTION, TEXT_AND_IMAGE_MODEL)
    try:
        with quiet_loading():
            folder = model_folder(name, TEXT_AND_IMAGE_MODEL)
            check_network(folder, tokenizer=True)
            model = load_network(
                BlipForConditionalGeneration, folder, f"BLIP {name}", model_types=("blip",), dtype=torch.float32,
                use_safetensors=True,
            )  # fmt: skip
            processor = BlipProcessor.from_pretrained(folder)
    except Exception as error:  # what is broken decides which of many unrelated errors comes out
        raise InputError(f"{OPTION}: cannot load a BLIP from {name}: {reason(error)}") from error
    return BlipCaptioner(model.to(device).eval(), processor, max_tokens=max_tokens, batch_size=batch_size)
