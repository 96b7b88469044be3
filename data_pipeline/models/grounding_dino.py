"""Grounding DINO through the package groundingdino-py 0.4, on current transformers, one frame at a time.

The package wraps BERT in a way that transformers 5 no longer allows. Instead of its wrapper, BERT itself is used
here, with a hook that turns the package's three-dimensional boolean attention mask into the additive float mask that
BERT takes (a boolean one would be right with one attention implementation and wrong with another). Outputs are
bit-equal to the package on transformers 4.57, and the names of the weights are unchanged. No installed file is
edited: the wrapper is exchanged only while a model is being built.

Batches of different captions are wrong in the package (it repeats masks in the wrong order), so frames go one by one.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.records import Box, Detection, Entity, Frame, InputError, Video, box_area, box_iou

MAX_TOKENS = 256


def _bert_with_float_masks(bert_model: Any) -> Any:
    """Stands in for the package's BertModelWarper, which is called with this keyword."""

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 3:
            lowest = torch.finfo(module.dtype).min
            kwargs["attention_mask"] = (1.0 - mask[:, None].to(module.dtype)) * lowest
        return args, kwargs

    bert_model.register_forward_pre_hook(hook, with_kwargs=True)
    return bert_model


@contextlib.contextmanager
def _replaced_bert_wrapper() -> Iterator[None]:
    from groundingdino.models.GroundingDINO import groundingdino as package
    from transformers import BertModel

    original = package.BertModelWarper
    # transformers 4 still has what the package's wrapper needs, and refuses a four-dimensional mask.
    if not hasattr(BertModel, "get_head_mask"):
        package.BertModelWarper = _bert_with_float_masks
    try:
        yield
    finally:
        package.BertModelWarper = original


def load_grounding_dino(config: Path, checkpoint: Path, text_encoder: str, device: str) -> torch.nn.Module:
    """The model of a configuration file of the package (Python code: only run one that you trust) with the weights of
    a checkpoint.

    text_encoder: directory or name of the BERT, "" for the one in the configuration; its own weights are overwritten
    by those of the checkpoint. Only tensors are read from the checkpoint. InputError if anything is missing or does
    not fit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations and syntax warnings inside the package
        from groundingdino.models import build_model
        from groundingdino.util.misc import clean_state_dict
        from groundingdino.util.slconfig import SLConfig

    try:
        settings = SLConfig.fromfile(str(config))
    except Exception as error:  # the file is a program: anything may come out of it
        raise InputError(f"cannot read the Grounding DINO configuration {config}: {error}") from error
    weights = _read_weights(checkpoint)
    settings.device = device
    settings.text_encoder_type = text_encoder or settings.text_encoder_type
    # Both save memory in training only.
    settings.use_checkpoint = settings.use_transformer_ckpt = False
    try:
        with _replaced_bert_wrapper(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build_model(settings)
    except (OSError, ValueError) as error:
        problem = f"cannot build Grounding DINO with the text encoder {settings.text_encoder_type!r}: {error}"
        raise InputError(
            f"{problem}\n  give a directory with a BERT and its tokenizer: --detector-text-encoder DIR"
        ) from error
    try:
        report = model.load_state_dict(clean_state_dict(weights), strict=False)
    except RuntimeError as error:  # names the tensors and both shapes
        raise InputError(f"the weights in {checkpoint} do not fit {config}: {error}") from error
    # Extra tensors are harmless (training leftovers, position ids of older transformers); missing ones are not.
    if report.missing_keys:
        shown = ", ".join(report.missing_keys[:5])
        raise InputError(f"{checkpoint} lacks {len(report.missing_keys)} tensors of the model of {config}: {shown} ...")
    return model.to(device).eval()


def _read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        return content.get("model", content)
    except Exception as error:  # pickle, zip and runtime errors, according to what the file is
        raise InputError(
            f"cannot read Grounding DINO weights from {checkpoint}: {str(error).splitlines()[0]}"
        ) from error


class GroundingDino:
    """A detector (see data_pipeline.models.detector.Detector) for a built model.

    All phrases are asked at once. The score of a phrase is the best sigmoid over its tokens, and a box belongs to its
    best phrase.
    """

    def __init__(self, model: torch.nn.Module, *, box_threshold: float, nms_iou: float, image_size: int) -> None:
        import groundingdino.datasets.transforms as transforms

        self.model = model
        self.box_threshold = box_threshold
        self.nms_iou = nms_iou
        # The package's preprocessing: short side image_size, long side at most 5/3 of it, ImageNet statistics.
        longest = round(image_size * 1333 / 800)
        self.transform = transforms.Compose(
            [
                transforms.RandomResize([image_size], max_size=longest),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def question(self, phrases: list[str]) -> tuple[str, list[range]]:
        """The caption that asks for the phrases, "dog . red ball .", and the token positions of each. Phrases over
        256 tokens are cut.
        """
        parts, spans, position = [], [], 1  # position 0 is the start token
        for phrase in phrases:
            # Full stops and question marks separate phrases.
            words = phrase.lower().replace(".", " ").replace("?", " ")
            length = len(self.model.tokenizer(words, add_special_tokens=False)["input_ids"])
            if position + length + 2 > MAX_TOKENS:
                break
            parts.append(f"{words} .")
            spans.append(range(position, position + length))
            position += length + 1
        return " ".join(parts), spans

    @torch.inference_mode()
    def detect(self, video: Video, frame: Frame, entities: tuple[Entity, ...]) -> tuple[Detection, ...]:
        """Detections, the best first; each entity's boxes overlap each other by at most nms_iou."""
        caption, spans = self.question([entity.phrase for entity in entities])
        pixels, _ = self.transform(Image.fromarray(frame.image), None)
        device = next(self.model.parameters()).device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = self.model(pixels[None].to(device), captions=[caption])
        scores = output["pred_logits"][0].sigmoid().float().cpu().numpy()
        by_phrase = np.stack([scores[:, span.start : span.stop].max(axis=1) for span in spans], axis=1)
        centres = output["pred_boxes"][0].float().cpu().numpy()
        corners = np.concatenate(
            (centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2), axis=1
        ).clip(0, 1)
        found: list[Detection] = []
        for row in np.argsort(-by_phrase.max(axis=1), kind="stable"):
            entity, score = entities[int(by_phrase[row].argmax())], float(by_phrase[row].max())
            box: Box = tuple(float(value) for value in corners[row])
            rivals = (other.box for other in found if other.entity == entity)
            if score < self.box_threshold:
                break
            if box_area(box) > 0 and all(box_iou(box, other) <= self.nms_iou for other in rivals):
                found.append(Detection(entity=entity, box=box, score=score))
        return tuple(found)
