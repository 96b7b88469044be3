"""Segment Anything (the package segment-anything 1.0), prompted with boxes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.utils.transforms import ResizeLongestSide

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.models.model_claims import read_sizes
from data_pipeline.models.weights import check_weights, read_tensors
from data_pipeline.reasons import reason
from data_pipeline.records import Detection, Frame


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
    encoder = ImageEncoderViT(
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
    )
    return build_prompted(encoder, params)


def build_prompted(encoder: torch.nn.Module, params: SamParams) -> Sam:
    """The package's prompt encoder and mask decoder behind an encoder of (N, 3, image_size, image_size) pictures to
    (N, prompt_width, grid, grid) features, where grid is image_size / patch_size.
    """
    grid = params.image_size // params.patch_size
    return Sam(
        image_encoder=encoder,
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
        content = read_sizes(Path(model))
        return SamParams(**{**content, "global_attention": tuple(content["global_attention"])})
    except (SettingsError, InputError):
        raise
    except (KeyError, TypeError, ArithmeticError) as error:
        raise InputError(f"cannot read the sizes of a SAM from {model}: {type(error).__name__}: {error}") from error


def put_weights(build: Callable[[], Sam], weights: Mapping[str, torch.Tensor], checkpoint: Path, model: str) -> Sam:
    """A SAM with these weights, all of them and no others; InputError if they don't fit, before it has any memory."""
    try:
        with torch.device("meta"):
            skeleton = build()
        check_weights(skeleton, weights, checkpoint)
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
        raise InputError(
            f"the weights in {checkpoint} are not those of {model}: {reason(error)}\nDo --segmenter (sam or "
            "mobile-sam) and --segmenter-model fit the file?"
        ) from error
    sam = build()
    sam.load_state_dict(weights, strict=False)  # counters may be lacking
    return sam


def load_sam(model: str, checkpoint: Path, device: str) -> Sam:
    """The SAM of ``read_params(model)`` with the weights of a checkpoint (``read_tensors``); InputError: no fit."""
    params = read_params(model)
    return put_weights(lambda: build_sam(params), read_tensors(checkpoint), checkpoint, model).to(device)


class SamSegmenter:
    """A segmenter (see data_pipeline.models.segmenter.Segmenter): one mask per box, with SAM's own estimate of its
    quality.

    sam: a SAM of the package's class, whatever its encoder. frames_per_batch: how many frames are encoded at once; it
    costs memory and changes nothing else.
    """

    def __init__(self, sam: Sam, frames_per_batch: int = 4) -> None:
        if frames_per_batch < 1:
            raise SettingsError(f"frames_per_batch must be at least 1, got {frames_per_batch}")
        self._sam = sam
        self._frames_per_batch = frames_per_batch
        self._resize = ResizeLongestSide(sam.image_encoder.img_size)
        with torch.inference_mode():
            self._places = sam.prompt_encoder.get_dense_pe()

    @torch.inference_mode()
    def segment(self, requests: Sequence[tuple[Frame, tuple[Detection, ...]]]) -> list[tuple[Detection, ...]]:
        """Detections with masks. A frame is encoded once for all its boxes and requests; without a box, not at all."""
        asked: dict[int, list[int]] = {}  # a frame's identity -> its requests
        for number, (frame, detections) in enumerate(requests):
            if detections:
                asked.setdefault(id(frame.image), []).append(number)
        found: list[tuple[Detection, ...]] = [()] * len(requests)
        numbers = list(asked.values())
        for start in range(0, len(numbers), self._frames_per_batch):
            batch = numbers[start : start + self._frames_per_batch]
            pictures = [requests[same[0]][0].image for same in batch]
            for embedding, same in zip(self._encode(pictures), batch, strict=True):
                for number in same:
                    frame, detections = requests[number]
                    found[number] = self._decode(embedding, frame.image.shape[:2], detections)
        return found

    def _encode(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        """Embeddings (N, channels, grid, grid); frames of any size share a batch, as all are padded to squares."""
        ready = []
        for picture in pictures:
            resized = torch.from_numpy(self._resize.apply_image(picture)).to(self._sam.device)
            ready.append(self._sam.preprocess(resized.permute(2, 0, 1).contiguous()))
        return self._sam.image_encoder(torch.stack(ready))

    def _decode(
        self, embedding: torch.Tensor, size: tuple[int, int], detections: tuple[Detection, ...]
    ) -> tuple[Detection, ...]:
        """Masks of one frame's boxes, prompted all at once. size: height, width of the frame."""
        height, width = size
        pixels = np.array([detection.box for detection in detections]) * [width, height, width, height]
        boxes = torch.as_tensor(pixels, dtype=torch.float32, device=embedding.device)
        sparse, dense = self._sam.prompt_encoder(
            points=None, boxes=self._resize.apply_boxes_torch(boxes, size), masks=None
        )
        logits, quality = self._sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=self._places,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        resized = self._resize.get_preprocess_shape(height, width, self._sam.image_encoder.img_size)
        scores = quality[:, 0].float().clamp(0, 1).tolist()
        filled = []
        # One by one: the full-size logits of many boxes in a large frame would take gigabytes.
        for detection, low, score in zip(detections, logits, scores, strict=True):
            full = self._sam.postprocess_masks(low[None], input_size=resized, original_size=size)
            mask = (full[0, 0] > self._sam.mask_threshold).cpu().numpy()
            filled.append(replace(detection, mask=mask, mask_score=score))
        return tuple(filled)
