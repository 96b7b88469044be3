"""Grounding DINO through transformers: a directory written by save_pretrained, or a repository of the hub.

The same network as the package's (data_pipeline.models.grounding_dino), with other names for its weights;
data_pipeline.models.grounding_dino_weights converts in either direction.
"""

import warnings
from typing import Any

import torch

from data_pipeline.errors import InputError
from data_pipeline.models.grounding import GroundingDetector, Preprocessing
from data_pipeline.models.hub import model_folder
from data_pipeline.models.model_claims import check_network, three_numbers
from data_pipeline.models.model_files import TEXT_AND_IMAGE_MODEL, check_model_directory
from data_pipeline.models.quiet import quiet_loading
from data_pipeline.models.weights import load_network
from data_pipeline.reasons import reason

OPTION = "--detector-model"


def load_grounding_dino_hf(name: str, device: str) -> tuple[torch.nn.Module, Any, Preprocessing]:
    """The model, its tokenizer and its preprocessing, from a directory or by a hub id. Safetensors only.

    device: "cpu", "cuda", "cuda:1". InputError if anything is missing or does not fit.
    """
    from transformers import AutoTokenizer, GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil

    check_model_directory(name, OPTION, TEXT_AND_IMAGE_MODEL)
    try:
        with quiet_loading():
            folder = model_folder(name, TEXT_AND_IMAGE_MODEL)
            check_network(folder, tokenizer=True)
            # The custom kernel is a download of compiled code; the plain one gives the same on every device.
            # Swin's last norm is not used, and released weights have none.
            model = load_network(
                GroundingDinoForObjectDetection, folder, f"Grounding DINO {name}", model_types=("grounding-dino",),
                may_lack=(".swin.layernorm.",), dtype=torch.float32, use_safetensors=True, disable_custom_kernels=True,
            )  # fmt: skip
            tokenizer = AutoTokenizer.from_pretrained(folder)
            processor = GroundingDinoImageProcessorPil.from_pretrained(folder)
            preprocessing = Preprocessing(
                shortest=int(processor.size.shortest_edge),
                longest=int(processor.size.longest_edge),
                mean=three_numbers(processor.image_mean, f"image_mean of {name}"),
                std=three_numbers(processor.image_std, f"image_std of {name}"),
            )
    except Exception as error:  # what is broken decides which of many unrelated errors comes out
        raise InputError(f"{OPTION}: cannot load a Grounding DINO from {name}: {reason(error)}") from error
    longest, places = model.config.max_text_len, model.config.text_config.max_position_embeddings
    if longest > places:
        raise InputError(f"{OPTION}: {name}: max_text_len is {longest}, but its text encoder has {places} positions")
    use_special_tokens_of(model, tokenizer)
    return model.to(device).eval(), tokenizer, preprocessing


def use_special_tokens_of(model: torch.nn.Module, tokenizer: Any) -> None:
    """Tells a model which tokens separate phrases; its class knows only those of bert-base-uncased, by number."""
    vocabulary = tokenizer.get_vocab()
    known = [vocabulary[token] for token in ("[CLS]", "[SEP]", ".", "?") if token in vocabulary]
    buffer = model.model.special_tokens
    buffer.copy_(torch.tensor((known + known[-1:] * 4)[: len(buffer)], dtype=buffer.dtype))


class GroundingDinoHF(GroundingDetector):
    """A detector (see data_pipeline.models.detector.Detector) round transformers' GroundingDinoForObjectDetection."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, preprocessing: Preprocessing, **settings: Any) -> None:
        """settings: of GroundingDetector."""
        super().__init__(tokenizer, preprocessing, max_tokens=model.config.max_text_len, **settings)
        self.model = model

    def forward(self, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """See GroundingDetector."""
        tokens = self.tokenizer(texts, padding="longest", return_tensors="pt")
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: tokens[name].to(self.model.device) for name in names if name in tokens}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = self.model(pixel_values=pixels.to(self.model.device), **inputs)
        return output.logits, output.pred_boxes
