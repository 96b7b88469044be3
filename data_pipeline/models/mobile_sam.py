"""MobileSAM (Zhang et al., arXiv 2306.14289): SAM's prompt encoder and mask decoder behind a TinyViT, some hundred
times lighter than vit_h, for machines without a GPU.

The encoder is timm's TinyViT (Wu et al., arXiv 2207.10666). MobileSAM's differs in three points: windows of 7, 7, 14
and 7, a last merging that keeps the resolution (so that 1024 pixels give 64 x 64 features), and a neck to 256 channels.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import TinyVit

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.models.model_claims import read_sizes
from data_pipeline.models.sam import SamParams, build_prompted, put_weights
from data_pipeline.models.weights import read_tensors

# The classifier that the encoder was pre-trained with: checkpoints carry it, masks never see it.
CLASSIFIER = ("image_encoder.head.", "image_encoder.norm_head.")


@dataclass(frozen=True, kw_only=True)
class MobileSamParams:
    """Sizes of a MobileSAM; the defaults are those of the released one. The tuples have one number per stage."""

    widths: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (2, 4, 5, 10)
    window_sizes: tuple[int, ...] = (7, 7, 14, 7)
    image_size: int = 1024
    prompt_width: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048

    def __post_init__(self) -> None:
        stages = {len(numbers) for numbers in (self.widths, self.depths, self.heads, self.window_sizes)}
        if len(stages) != 1 or stages == {0}:
            raise SettingsError(
                f"widths, depths, heads and window_sizes of a MobileSAM need one number per stage, got {asdict(self)}"
            )
        if any(width % heads for width, heads in zip(self.widths, self.heads, strict=True)):
            raise SettingsError(f"the widths of a MobileSAM must be multiples of its heads, got {asdict(self)}")
        if self.image_size % self.stride:
            raise SettingsError(f"image_size {self.image_size} is not a multiple of the encoder's stride {self.stride}")

    @property
    def stride(self) -> int:
        """Pixels per feature: 4 by the patches, and 2 by every merging between stages but the last."""
        return 4 * 2 ** max(0, len(self.widths) - 2)


class TinyVitEncoder(torch.nn.Module):
    """Float pictures (N, 3, image_size, image_size), normalised as SAM's, to features (N, prompt_width, grid, grid)."""

    def __init__(self, params: MobileSamParams) -> None:
        super().__init__()
        self.img_size = params.image_size  # the name that SAM's classes ask for
        self.trunk = TinyVit(
            num_classes=0,
            embed_dims=params.widths,
            depths=params.depths,
            num_heads=params.heads,
            window_sizes=params.window_sizes,
            drop_path_rate=0.0,
        )
        self.trunk.head = torch.nn.Identity()
        if len(params.widths) > 1:
            self.trunk.stages[-1].downsample.conv2.conv.stride = (1, 1)
        width = params.prompt_width
        self.neck = torch.nn.Sequential(
            torch.nn.Conv2d(params.widths[-1], width, kernel_size=1, bias=False),
            LayerNorm2d(width),
            torch.nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(width),
        )

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.neck(self.trunk.stages(self.trunk.patch_embed(pictures)))


def build_mobile_sam(params: MobileSamParams) -> Sam:
    """A MobileSAM of these sizes with random weights."""
    alike = ("image_size", "prompt_width", "decoder_depth", "decoder_heads", "decoder_mlp_width")
    sizes = {name: getattr(params, name) for name in alike}
    # Of no consequence: the encoder is replaced.
    encoder = {"encoder_width": params.prompt_width, "encoder_heads": 1, "encoder_depth": 1, "global_attention": ()}
    return build_prompted(TinyVitEncoder(params), SamParams(**encoder, **sizes, patch_size=params.stride))


def read_mobile_params(model: str) -> MobileSamParams:
    """The released sizes for "vit_t", else those of a json file with fields of MobileSamParams; else InputError."""
    if model == "vit_t":
        return MobileSamParams()
    try:
        content = read_sizes(Path(model))
        return MobileSamParams(**{key: tuple(v) if isinstance(v, list) else v for key, v in content.items()})
    except (SettingsError, InputError):
        raise
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"cannot read the sizes of a MobileSAM from {model}: {type(error).__name__}: {error}"
        ) from error


def our_name(name: str) -> str:
    """The released checkpoint's name of a tensor -> ours, which is timm's for the encoder."""
    if not name.startswith("image_encoder.") or name.startswith("image_encoder.neck."):
        return name
    name = name.replace("image_encoder.", "image_encoder.trunk.", 1).replace(".c.", ".conv.")
    name = name.replace(".patch_embed.seq.0.", ".patch_embed.conv1.").replace(
        ".patch_embed.seq.2.", ".patch_embed.conv2."
    )
    # Both halve the resolution between two stages; the release counts the merging to the stage before, timm to the
    # one after.
    name = re.sub(r"\.layers\.(\d+)\.downsample\.", lambda m: f".stages.{int(m[1]) + 1}.downsample.", name)
    return name.replace(".layers.", ".stages.")


def our_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a released checkpoint under our names, without the classifier."""
    return {our_name(name): value for name, value in weights.items() if not name.startswith(CLASSIFIER)}


def load_mobile_sam(model: str, checkpoint: Path, device: str) -> Sam:
    """The MobileSAM of this name or file with a checkpoint's weights, in the release's names; InputError: no fit."""
    params, weights = read_mobile_params(model), our_names(read_tensors(checkpoint))
    return put_weights(lambda: build_mobile_sam(params), weights, checkpoint, f"MobileSAM {model}").to(device)
