"""Untrained parts of the embedded default: a miniature of the SDXL stack, built from the library's own classes.

Sizes come from docs/training.md; every part is saved and loaded as its full-size sibling would be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from data_pipeline.world import BACKGROUNDS, CATEGORIES, COLORS, PATTERNS

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTokenizer, CLIPVisionModelWithProjection

MAX_TOKENS = 40
"""Longest prompt of the embedded base in tokens, both special tokens included."""

HEAD_WIDTH = 32
"""Channels of one attention head, of every network here."""
SIZE = 64
"""Side of the pictures in pixels."""
_COMMON_WORDS = (
    "a an the and or of on in at to with without by for from near next between under over behind front left right "
    "photo picture image drawing painting cartoon best worst quality high low small big large tiny old new bright "
    "dark light sunny wearing sitting standing looking two three four one day night sky snow sand sea forest city"
)


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary gives every word of the world one token; other words fall into letters.

    Every call gives the same vocabulary: weights trained with one must read prompts through its equal.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    words = " ".join([*CATEGORIES, *COLORS, *PATTERNS, *BACKGROUNDS.values(), _COMMON_WORDS]).lower()
    merges = learn_merges(words.split())
    # As in CLIP: every byte, every byte at the end of a word, then one token for each merge.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make every given ASCII word one token, most frequent pair first.

    Equally frequent pairs are taken in the order of the alphabet; the trainer of the tokenizers library takes them in
    an order that changes from call to call.
    """
    spellings = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for spelling in spellings:
            position = 0
            while position < len(spelling) - 1:
                if (spelling[position], spelling[position + 1]) == best:
                    spelling[position : position + 2] = ["".join(best)]
                position += 1
    return merges


def build_base(
    channels: Sequence[int] = (64, 96, 160),
    text_widths: tuple[int, int] = (96, 160),
    text_layers: int = 3,
    latent_factor: int = 2,
) -> StableDiffusionXLPipeline:
    """The text-to-image base with random weights: a diffusers SDXL pipeline with both text encoders.

    Args:
        channels: UNet channels of its resolutions, finest first; multiples of 32. There is attention where the
            latents are 16x16 or coarser.
        text_widths: hidden sizes of the two text encoders; their sum is the cross-attention width.
        text_layers: layers of each text encoder.
        latent_factor: pixels per latent cell, a power of two; a cell has 3 * latent_factor ** 2 channels.

    Raises:
        ValueError: if a width is not a multiple of 32, the factor is no power of two that divides the size, or
            no resolution has attention.
    """
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from msdiffusion.pixel_autoencoder import PixelUnshuffleAutoencoder

    if any(width % HEAD_WIDTH for width in (*channels, *text_widths)):
        raise ValueError(f"channels {channels} and text widths {text_widths} must be multiples of {HEAD_WIDTH}")
    if latent_factor < 1 or latent_factor & (latent_factor - 1) or SIZE % latent_factor:
        raise ValueError(f"latent_factor must be a power of two that divides {SIZE}, got {latent_factor}")
    side = SIZE // latent_factor
    attends = [side // 2**level <= 16 for level in range(len(channels))]
    if not any(attends):
        raise ValueError(f"latents of {side}x{side} with {len(channels)} resolutions never reach 16x16: no attention")
    cells = 3 * latent_factor**2
    tokenizer = build_tokenizer()

    def text_config(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=text_layers,
            num_attention_heads=width // HEAD_WIDTH,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    unet = UNet2DConditionModel(
        sample_size=side,
        in_channels=cells,
        out_channels=cells,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        transformer_layers_per_block=1,
        attention_head_dim=tuple(width // HEAD_WIDTH for width in channels),
        cross_attention_dim=sum(text_widths),
        use_linear_projection=True,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=text_widths[1] + 6 * 32,
    )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    return StableDiffusionXLPipeline(
        vae=PixelUnshuffleAutoencoder(block_out_channels=(1,) * latent_factor.bit_length(), latent_channels=cells),
        text_encoder=CLIPTextModel(text_config(text_widths[0])),
        text_encoder_2=CLIPTextModelWithProjection(text_config(text_widths[1])),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def build_image_encoder(width: int = 128, layers: int = 6) -> CLIPVisionModelWithProjection:
    """A CLIP image encoder with random weights, for patches of 8 x 8 pixels.

    Args:
        width: hidden size, a multiple of 32; also the projection size.
        layers: transformer blocks.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD_WIDTH,
            image_size=SIZE,
            patch_size=8,
            hidden_act="gelu",
        )
    )
