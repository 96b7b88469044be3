"""Embeddings of cut-outs, for telling whether two of them show the same subject."""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.models.model_claims import VISION, check_network, three_numbers
from data_pipeline.models.model_files import IMAGE_SETTINGS, TRANSFORMERS_MODEL, check_model_directory
from data_pipeline.models.quiet import quiet_loading
from data_pipeline.reasons import reason

HEADS = (
    *("classifier.", "cls_classifier.", "distillation_classifier.", "head.", "fc."),
    *("lm_head.", "decoder.", "embeddings.mask_token", "encoder_norm.", "multiscale_fusion."),  # masked pictures
    *("layernorm.", "pooler."),  # where the classifier stands on another norm than the bare network has
    *("decode_head.", "auxiliary_head.", "segmentation_head.", "fpn1.", "fpn2.", "hidden_states_norms."),  # segments
)
"""Beginnings of names of tensors that models saved whole have on top of the network that is wanted, which has no place
for them then."""
HUES, SATURATIONS, GREYS, ORIENTATIONS = 16, 3, 6, 6
COLOUR_SHARE = 0.75
SHORT_NAMES = {
    "dinov2": {size: f"facebook/dinov2-{size}" for size in ("small", "base", "large", "giant")},
    "clip": {"base": "openai/clip-vit-base-patch32", "large": "openai/clip-vit-large-patch14"},
}


class Embedder(Protocol):
    """Turns cut-outs into unit vectors; the cosine of two is their similarity."""

    def embed(self, cutouts: list[np.ndarray]) -> np.ndarray:
        """cutouts: N uint8 RGBA (h, w, 4), alpha 0 around the subject. Returns float32 (N, D), rows of length 1."""
        ...


class HistogramEmbedder:
    """Colours and edge directions inside the mask: no weights, no learning, no meaning.

    It knows a red thing from a blue one and stripes that lie from stripes that stand; it does not know a dog from a
    cat of the same fur, and light of another colour fools it. Good enough to pair the instances of one phrase inside
    one shot; for more, name a network.

    The vector holds square roots of histograms, so a cosine is the Bhattacharyya coefficient in [0, 1]: 3/4 for
    colour (16 hues x 3 saturations, and 6 greys), 1/4 for edge directions (6, where left and right are one, so that a
    subject that turns round keeps them), weighted by edge strength.
    """

    longest_side = 48

    def embed(self, cutouts: list[np.ndarray]) -> np.ndarray:
        """See Embedder."""
        if not cutouts:
            return np.zeros((0, HUES * SATURATIONS + GREYS + ORIENTATIONS), dtype=np.float32)
        return np.stack([self._one(cutout) for cutout in cutouts]).astype(np.float32)

    def _one(self, cutout: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(cutout)
        scale = self.longest_side / max(picture.size)
        if scale < 1:
            size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture = picture.resize(size, Image.Resampling.BOX)
        alpha = np.asarray(picture.getchannel("A")) > 127
        if not alpha.any():  # thinner than the shrunken grid
            alpha = np.asarray(picture.getchannel("A")) > 0
            if not alpha.any():
                raise ValueError("a cut-out without a pixel has no embedding")
        colours = np.asarray(picture.convert("RGB").convert("HSV"))[alpha].astype(np.int64)
        hue, saturation, value = colours.T
        grey = (saturation < 40) | (value < 40)
        hue_bin = (hue * HUES // 256) * SATURATIONS + np.minimum(
            (saturation - 40) * SATURATIONS // 216, SATURATIONS - 1
        )
        place = np.where(grey, HUES * SATURATIONS + value * GREYS // 256, hue_bin)
        colour = np.bincount(place, minlength=HUES * SATURATIONS + GREYS) / len(place)
        return np.concatenate(
            (np.sqrt(COLOUR_SHARE * colour), np.sqrt((1 - COLOUR_SHARE) * self._edges(picture, alpha)))
        )

    @staticmethod
    def _edges(picture: Image.Image, alpha: np.ndarray) -> np.ndarray:
        grey = np.asarray(picture.convert("RGB").convert("L"), dtype=np.float32)
        even = np.full(ORIENTATIONS, 1 / ORIENTATIONS)
        if min(grey.shape) < 3:
            return even
        down, across = np.gradient(grey)
        # Only pixels whose neighbours belong to the subject too: else the outline of the mask decides.
        inner = alpha.copy()
        for axis in (0, 1):
            for step in (1, -1):
                inner &= np.roll(alpha, step, axis=axis)
        inner[[0, -1], :] = inner[:, [0, -1]] = False
        strength = np.hypot(down, across)[inner]
        if strength.size == 0 or strength.sum() < 1:
            return even
        angle = np.arctan2(np.abs(down[inner]), np.abs(across[inner])) / (np.pi / 2)
        bins = np.minimum((angle * ORIENTATIONS).astype(np.int64), ORIENTATIONS - 1)
        return np.bincount(bins, weights=strength, minlength=ORIENTATIONS) / strength.sum()


class NetworkEmbedder:
    """Features of a vision network for cut-outs on grey, padded to a square.

    model: takes float32 (N, 3, size, size), normalised with mean and std (3 numbers each), and returns (N, D).
    """

    most_at_once = 32

    def __init__(self, model: Any, *, size: int, mean: tuple[float, ...], std: tuple[float, ...], device: str) -> None:
        self._model, self._size, self._device = model, size, device
        self._mean, self._std = (np.asarray(values, dtype=np.float32) for values in (mean, std))

    def embed(self, cutouts: list[np.ndarray]) -> np.ndarray:
        """See Embedder."""
        import torch

        if not cutouts:
            return np.zeros((0, 1), dtype=np.float32)
        parts = []
        for start in range(0, len(cutouts), self.most_at_once):
            pictures = np.stack([self._prepare(cutout) for cutout in cutouts[start : start + self.most_at_once]])
            with torch.inference_mode():
                parts.append(self._model(torch.from_numpy(pictures).to(self._device)).float().cpu().numpy())
        features = np.concatenate(parts)
        return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

    def _prepare(self, cutout: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(cutout)
        side = max(picture.size)
        square = Image.new("RGB", (side, side), (128, 128, 128))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2), picture.getchannel("A"))
        pixels = np.asarray(square.resize((self._size, self._size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        return ((pixels - self._mean) / self._std).transpose(2, 0, 1)


def load_timm(name: str, checkpoint: Path | None, device: str) -> NetworkEmbedder:
    """A timm model by name, with the weights of a local state-dict file (.safetensors, or another one of which only
    tensors are read), or with timm's own (which may be downloaded).
    """
    import timm

    from data_pipeline.models.weights import check_finite, fill, read_tensors, state_of

    if not timm.is_model(name.partition(".")[0]):  # "hf-hub:..." would be somebody's repository
        raise InputError(f"cannot create the timm model {name!r}: it is none of timm's own (timm.list_models())")
    try:
        model = timm.create_model(name, pretrained=checkpoint is None, num_classes=0)
    except Exception as error:  # unknown releases and failed downloads have no common parent
        raise InputError(f"cannot create the timm model {name!r}: {reason(error)}") from error
    if checkpoint is not None:
        heads = model.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)  # the classifier of the file is not needed
        try:
            fill(model, read_tensors(checkpoint, ("state_dict",)), checkpoint, left_out=[f"{head}." for head in heads])
        except InputError as error:
            raise InputError(f"cannot load the timm model {name!r}: {error}") from None
    check_finite(state_of(model).items(), f"the timm model {name}")
    config = timm.data.resolve_model_data_config(model)
    model = model.to(device).eval()
    return NetworkEmbedder(model, size=config["input_size"][-1], mean=config["mean"], std=config["std"], device=device)


def load_transformers(name: str, device: str) -> NetworkEmbedder:
    """A vision model of transformers by hub name or local directory; safetensors only.

    Its features: the projected image embedding of a CLIP or SigLIP; else the pooled output (DINOv2: the normed class
    token); else the first token.
    """
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

    from data_pipeline.models.hub import model_folder
    from data_pipeline.models.weights import load_network, read_headings

    needed = {**TRANSFORMERS_MODEL, **IMAGE_SETTINGS}
    check_model_directory(name, "--embedder", needed)
    try:
        with quiet_loading():
            folder = model_folder(name, needed)
            check_network(folder, VISION)
            config = AutoConfig.from_pretrained(folder)
            projected = "CLIPVisionModelWithProjection" in (config.architectures or ())
            inside = f"{config.model_type.replace('-', '_')}."  # what a head has changed inside the network
            model = load_network(
                CLIPVisionModelWithProjection if projected else AutoModel, folder, f"vision model {name}",
                may_lack=("pooler.",), left_out=(*HEADS, *(inside + each for each in HEADS)), dtype=torch.float32,
                use_safetensors=True,
            )  # fmt: skip
            processor = AutoImageProcessor.from_pretrained(folder)
            mean, std = (
                three_numbers(getattr(processor, key), f"{key} of {name}") for key in ("image_mean", "image_std")
            )
            sizes = getattr(processor, "crop_size", None) or processor.size
            size = int(sizes.get("height") or sizes.get("shortest_edge"))
            # A ViT saved by a classifier has no pooler, which is random then: its first token will do.
            held, own = read_headings(folder, "model"), model.state_dict()
            pooled = any("pooler." in key for key in held) or not any(key.startswith("pooler.") for key in own)
    except Exception as error:
        raise InputError(f"--embedder: cannot load the vision model {name!r}: {reason(error)}") from error
    model = model.to(device).eval()

    def features(pixels: torch.Tensor) -> torch.Tensor:
        if hasattr(model, "get_image_features"):
            output = model.get_image_features(pixel_values=pixels)
        else:
            output = model(pixel_values=pixels)
        if isinstance(output, torch.Tensor):
            return output
        for kind in ("image_embeds", *(("pooler_output",) if pooled else ())):
            if getattr(output, kind, None) is not None:
                return getattr(output, kind).flatten(1)
        return output.last_hidden_state[:, 0]

    return NetworkEmbedder(features, size=size, mean=mean, std=std, device=device)


def hub_name(name: str) -> str:
    """The model behind a short name: "dinov2:small" -> "facebook/dinov2-small". A directory or a hub id may stand in
    the place of the size. SettingsError for another size.
    """
    family, _, size = name.partition(":")
    if size in SHORT_NAMES[family]:
        return SHORT_NAMES[family][size]
    if "/" not in size and not os.path.isdir(size):  # noqa: PTH112
        known = ", ".join(f"{family}:{known}" for known in SHORT_NAMES[family])
        raise SettingsError(f"the embedder {name!r} is not known; there are {known}, and {family}:DIR_OR_HUB_ID")
    return size


def load_embedder(name: str, checkpoint: Path | None, device: str) -> Embedder:
    """The embedder called "histogram", "timm:NAME", "transformers:NAME_OR_DIRECTORY", "dinov2:SIZE" or "clip:SIZE"."""
    library, _, model = name.partition(":")
    if name == "histogram":
        return HistogramEmbedder()
    if library == "timm" and model:
        return load_timm(model, checkpoint, device)
    if library == "transformers" and model:
        return load_transformers(model, device)
    if library in SHORT_NAMES and model:
        return load_transformers(hub_name(name), device)
    raise SettingsError(
        f"embedder must be histogram, timm:NAME, transformers:NAME_OR_DIR, dinov2:SIZE or clip:SIZE, got {name!r}"
    )
