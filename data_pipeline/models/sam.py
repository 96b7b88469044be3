"""Segment Anything (the package segment-anything 1.0), prompted with boxes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from data_pipeline.records import Detection, Frame, InputError, SettingsError


@dataclass(frozen=True, kw_only=True)
class SamParams:
    """Sizes of a SAM. The defaults that have values are those all released ones share."""

    encoder_width: int
    encoder_depth: int
    encoder_heads: int
    global_attention: tuple[int, ...]
    """Encoder blocks that look at the whole picture; the others look at windows."""
    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 14
    prompt_width: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048

    def __post_init__(self) -> None:
        if self.encoder_width % self.encoder_heads or self.prompt_width % self.decoder_heads:
            raise SettingsError(f"the widths of a SAM must be multiples of its heads, got {asdict(self)}")
        if self.image_size % self.patch_size:
            raise SettingsError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")


RELEASED = {
    "vit_b": SamParams(encoder_width=768, encoder_depth=12, encoder_heads=12, global_attention=(2, 5, 8, 11)),
    "vit_l": SamParams(encoder_width=1024, encoder_depth=24, encoder_heads=16, global_attention=(5, 11, 17, 23)),
    "vit_h": SamParams(encoder_width=1280, encoder_depth=32, encoder_heads=16, global_attention=(7, 15, 23, 31)),
}


def build_sam(params: SamParams) -> Sam:
    """A SAM of these sizes with random weights, in the package's classes, so that its checkpoints load."""
    grid = params.image_size // params.patch_size
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=params.image_size,
            patch_size=params.patch_size,
            embed_dim=params.encoder_width,
            depth=params.encoder_depth,
            num_heads=params.encoder_heads,
            out_chans=params.prompt_width,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=params.window_size,
            global_attn_indexes=params.global_attention,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=params.prompt_width,
            image_embedding_size=(grid, grid),
            input_image_size=(params.image_size, params.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=params.prompt_width,
            transformer=TwoWayTransformer(
                depth=params.decoder_depth,
                embedding_dim=params.prompt_width,
                mlp_dim=params.decoder_mlp_width,
                num_heads=params.decoder_heads,
            ),
        ),
    ).eval()


def read_params(model: str) -> SamParams:
    """Sizes by name ("vit_b", "vit_l", "vit_h") or from a json file with the fields of SamParams."""
    if model in RELEASED:
        return RELEASED[model]
    try:
        content: dict[str, Any] = json.loads(Path(model).read_text(encoding="utf-8"))
        return SamParams(**{**content, "global_attention": tuple(content["global_attention"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read the sizes of a SAM from {model}: {type(error).__name__}: {error}") from error


def load_sam(model: str, checkpoint: Path, device: str) -> Sam:
    """The SAM of ``read_params(model)`` with the weights of a checkpoint, of which only tensors are read. InputError
    if they don't fit.
    """
    sam = build_sam(read_params(model))
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and runtime errors, according to what the file is
        raise InputError(f"cannot read SAM weights from {checkpoint}: {str(error).splitlines()[0]}") from error
    try:
        sam.load_state_dict(weights)
    except RuntimeError as error:  # names missing and unexpected tensors, and both shapes
        raise InputError(f"the weights in {checkpoint} are not those of {model}: {error}") from error
    return sam.to(device)


class SamSegmenter:
    """A segmenter (see data_pipeline.models.segmenter.Segmenter): one mask per box, with SAM's own estimate of its
    quality.
    """

    def __init__(self, sam: Sam) -> None:
        self._predictor = SamPredictor(sam)

    @torch.inference_mode()
    def segment(self, frame: Frame, detections: tuple[Detection, ...]) -> tuple[Detection, ...]:
        """The detections with masks. A frame is encoded once for all its boxes."""
        if not detections:  # SAM cannot reshape zero boxes
            return ()
        height, width = frame.image.shape[:2]
        self._predictor.set_image(frame.image)
        pixels = np.array([detection.box for detection in detections]) * [width, height, width, height]
        boxes = torch.as_tensor(pixels, dtype=torch.float32, device=self._predictor.device)
        masks, quality, _ = self._predictor.predict_torch(
            point_coords=None,
            point_labels=None,
            boxes=self._predictor.transform.apply_boxes_torch(boxes, (height, width)),
            multimask_output=False,
        )
        self._predictor.reset_image()
        found = zip(detections, masks[:, 0].cpu().numpy(), quality[:, 0].float().cpu().tolist(), strict=True)
        return tuple(
            replace(detection, mask=mask, mask_score=min(1.0, max(0.0, score))) for detection, mask, score in found
        )
