"""Whether what was loaded is whole, and made for one another: torch would say it while drawing, or nobody."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from data_pipeline.models.weights import check_names
from msdiffusion.errors import WeightsError, reason, refused_weights


def check_vocabulary(pipeline: DiffusionPipeline, source: str) -> None:
    """Raise WeightsError where a tokenizer was not there, of which transformers then makes an empty one without a word,
    or numbers tokens otherwise than its text encoder; one that is missing altogether is told by ``check_fit``.
    """
    for name, reader in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        tokenizer, encoder = getattr(pipeline, name, None), getattr(pipeline, reader, None)
        if tokenizer is None or encoder is None:
            continue
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise WeightsError(f"the {name} of {source} has no vocabulary: its files are missing")
        ends = getattr(encoder.config, "eos_token_id", None)
        if ends not in (2, tokenizer.eos_token_id):  # 2: configs from before transformers 4.31
            raise WeightsError(
                f"the {reader} of {source} takes token {ends} for the end of a text, but its {name} writes "
                f"{tokenizer.eos_token_id}: they belong to different models"
            )
        last, known = max(tokenizer.get_vocab().values()), getattr(encoder.config, "vocab_size", None)
        if known is not None and last >= known:
            raise WeightsError(
                f"the {name} of {source} numbers its tokens up to {last}, but the {reader} knows {known}: they belong "
                "to different models"
            )


def check_fit(pipeline: DiffusionPipeline, source: str | Path) -> None:
    """Raise WeightsError where weights are missing, or text encoders, UNet and VAE are of different models."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):  # diffusers leaves weights that were not there on the meta device
            missing = [key for key, weight in part.state_dict().items() if weight.device.type == "meta"]
            with refused_weights():
                check_names(f"the {name} of {source}", missing)
    second = ("tokenizer_2", "text_encoder_2") if isinstance(pipeline, StableDiffusionXLPipeline) else ()
    needed = ("unet", "vae", "scheduler", "tokenizer", "text_encoder", *second)
    if lacking := [name for name in needed if getattr(pipeline, name, None) is None]:  # a refiner, for example
        raise WeightsError(
            f"the base model {source} has no {', '.join(lacking)}: a {type(pipeline).__name__} with all of its parts "
            "is needed"
        )
    unet = pipeline.unet.config
    differ = f"the parts of {source} are of different models: "
    for setting in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if unet.get(setting) is not None:
            raise WeightsError(
                f"the UNet of {source} has {setting} {unet[setting]!r}, so it asks for more than text: it is of "
                "another kind"
            )
    encoders = [pipeline.text_encoder]
    if isinstance(pipeline, StableDiffusionXLPipeline):
        encoders.append(pipeline.text_encoder_2)
        pooled = encoders[1].config.projection_dim
        sizes = 6 * (unet.addition_time_embed_dim or 0)
        if unet.projection_class_embeddings_input_dim != pooled + sizes:
            raise WeightsError(
                f"{differ}text_encoder_2 pools to {pooled} numbers, which with "
                f"{sizes} for the picture's sizes are {pooled + sizes}, but the UNet takes "
                f"{unet.projection_class_embeddings_input_dim}"
            )
        limits = [
            min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            for tokenizer, encoder in zip((pipeline.tokenizer, pipeline.tokenizer_2), encoders, strict=True)
        ]
        if limits[0] != limits[1]:
            raise WeightsError(
                f"{differ}tokenizer and text_encoder read {limits[0]} tokens, "
                f"tokenizer_2 and text_encoder_2 {limits[1]} (model_max_length, max_position_embeddings): needed are "
                "as many"
            )
    widths, taken = [encoder.config.hidden_size for encoder in encoders], unet.cross_attention_dim
    if isinstance(taken, int) and sum(widths) != taken:
        raise WeightsError(
            f"{differ}the text is {' + '.join(map(str, widths))} wide, but the UNet reads text {taken} wide"
        )
    channels = getattr(pipeline.vae.config, "latent_channels", unet.out_channels)
    if channels != unet.out_channels:
        raise WeightsError(f"{differ}the UNet makes latents of {unet.out_channels} channels, the vae reads {channels}")
    for setting in ("latents_mean", "latents_std"):
        numbers = pipeline.vae.config.get(setting)
        if numbers is not None and len(numbers) != channels:
            raise WeightsError(
                f"the vae of {source} has {len(numbers)} numbers of {setting}: needed are {channels}, one for each "
                "channel of its latents"
            )
    _check_scheduler(pipeline.scheduler, unet.out_channels, source)


def _check_scheduler(scheduler: Any, channels: int, source: str | Path) -> None:
    """Raise unless a scheduler takes steps, on four numbers a channel: what its config says is looked at only there.

    One that is made for other pipelines passes: drawing says so, and may be given another.

    Raises:
        WeightsError: with the scheduler's own reason.
    """
    if not all(hasattr(scheduler, name) for name in ("init_noise_sigma", "order", "scale_model_input")):
        return
    advice = f"the scheduler of {source} ({type(scheduler).__name__}) takes no steps with its scheduler_config.json: "
    betas, trained = scheduler.config.get("trained_betas"), scheduler.config.get("num_train_timesteps", 0)
    if betas is not None and len(betas) < trained:
        raise WeightsError(
            f"{advice}trained_betas has {len(betas)} numbers: needed are {trained} (num_train_timesteps)"
        )
    try:
        try:
            _take_steps(scheduler, channels, 4)
        except Exception:  # a distilled one may know fewer
            _take_steps(scheduler, channels, 1)
    except ImportError:  # of a library that it needs: another scheduler may be given
        return
    except Exception as error:  # its settings decide which of many comes
        raise WeightsError(f"{advice}{reason(error)}") from error


def _take_steps(scheduler: Any, channels: int, steps: int) -> None:
    trial, latents = copy.deepcopy(scheduler), torch.ones(1, channels, 2, 2)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial.set_timesteps(steps)
        for timestep in trial.timesteps:
            noise = trial.scale_model_input(latents, timestep)
            latents = trial.step(noise, timestep, latents, return_dict=False)[0]
