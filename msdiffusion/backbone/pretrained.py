"""Loads the frozen models: a Stable Diffusion pipeline (XL or 1.x) and a CLIP image encoder, from wherever they are.

A base model is a folder, a hub name, or one ``.safetensors`` file; an image encoder is a folder, a hub name, or one of
open_clip's.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import deprecation_utils
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from data_pipeline.errors import InputError
from data_pipeline.models.model_claims import configs_here
from data_pipeline.models.weights import check_finite, load_network, state_of
from msdiffusion import pixel_autoencoder
from msdiffusion.backbone.configs import (
    LOADING_ERRORS,
    PIPELINES,
    config_source,
    configs_of,
    encoder_folder,
    index_of,
    kind_of,
    not_loaded,
    on_meta,
    split_hub_folder,
)
from msdiffusion.backbone.fit import check_fit, check_vocabulary
from msdiffusion.backbone.open_clip_encoder import OpenClipVisionEncoder, names_open_clip
from msdiffusion.backbone.single_file import SingleFile, check_shapes, names_single_file, read_single_file
from msdiffusion.errors import WeightsError, reason
from msdiffusion.pixel_autoencoder import PixelUnshuffleAutoencoder

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers, pixel_autoencoder.__name__: pixel_autoencoder}
# Classes of the networks that a file can hold, by their names in a pipeline.
_KINDS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
# Beginnings of names in the file of a whole CLIP, of which one tower is taken.
_OTHER_TOWER = {
    "text": ("vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
    "vision": ("text_model.", "text_projection.", "logit_scale"),
}
# diffusers renamed its keyword after 0.39, and warns of the old name.
_DTYPE = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


def load_pipeline(
    base_model: str | Path,
    dtype: torch.dtype = torch.float32,
    base_config: str | Path | None = None,
    vae_dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """A base model with its weights, as the text-to-image pipeline of its kind.

    Args:
        base_model: folder, hub name, or ``.safetensors`` file in the original layout.
        dtype: of all weights. In half precision, the files of the variant "fp16" are taken where there are any.
        base_config: for a file: folder or hub name of a pipeline, whose configs and tokenizers it is read with.
        vae_dtype: of the autoencoder, where it shall differ: it is then loaded by itself, from the files of full
            precision where there are any. None: as the others.

    Raises:
        WeightsError: it is not there, is none of these, or holds another kind of model.
    """
    if names_single_file(base_model):
        pipeline = _load_single_file(read_single_file(base_model), dtype, base_config, vae_dtype)
        check_vocabulary(pipeline, str(base_config))
        return pipeline
    name = str(base_model)
    try:
        folder, version = configs_here(name)
        kind = kind_of(folder, name)
        with _old_news_withheld():
            pipeline = _with_variant(PIPELINES[kind], name, dtype, {**_options(kind), **version}, folder)
            if vae_dtype not in (None, dtype):
                pipeline.register_modules(vae=_vae(type(pipeline.vae), name, vae_dtype, folder, version))
    except LOADING_ERRORS as error:
        raise not_loaded("base model", base_model, error) from error
    check_vocabulary(pipeline, name)
    check_fit(pipeline, name)
    return pipeline


def load_image_encoder(
    image_encoder: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[CLIPVisionModelWithProjection | OpenClipVisionEncoder, CLIPImageProcessor]:
    """An image encoder with its weights, and its preprocessing.

    Args:
        image_encoder: folder or hub name of a CLIPVisionModelWithProjection or of a whole CLIP, whose vision tower is
            taken; "owner/name/folder" finds a folder inside a hub repository; "open_clip:MODEL" is one of open_clip's,
            see ``msdiffusion.backbone.open_clip_encoder``.
        dtype: of all weights.

    Raises:
        WeightsError: nothing there, or something else than that.
    """
    if names_open_clip(image_encoder):
        encoder = OpenClipVisionEncoder.from_pretrained(str(image_encoder), dtype)
        return encoder, encoder.processor
    name, options = split_hub_folder(image_encoder)
    try:
        folder, version = encoder_folder(name, options)
        options |= version
        encoder = load_network(
            CLIPVisionModelWithProjection, name, f"image encoder {image_encoder}", folder=folder, dtype=dtype,
            left_out=_OTHER_TOWER["vision"], **options,
        )  # fmt: skip
    except LOADING_ERRORS as error:
        raise not_loaded("image encoder", image_encoder, error) from error
    return encoder, _image_processor(name, options, encoder.config, folder)


def _load_single_file(
    file: SingleFile, dtype: torch.dtype, base_config: str | Path | None, vae_dtype: torch.dtype | None
) -> DiffusionPipeline:
    source = config_source(file, base_config)
    folder, version = configs_here(source)
    index = index_of(folder)
    for part, kind in _KINDS.items():
        if part == "unet" or index.get(part) == [kind.__module__.partition(".")[0], kind.__name__]:
            check_shapes(file, part, on_meta(kind, source, part, configs_of(file)), source)
    try:
        with _old_news_withheld():
            pipeline = PIPELINES[file.kind].from_single_file(
                str(file.path), config=source, **{_DTYPE: dtype}, **_options(file.kind), **version
            )
            if vae_dtype not in (None, dtype):
                options = {"config": source, "subfolder": "vae", _DTYPE: vae_dtype, **version}
                pipeline.register_modules(vae=type(pipeline.vae).from_single_file(str(file.path), **options))
            pipeline.register_modules(scheduler=_scheduler_of(file, pipeline.scheduler, source))
            for part, network in pipeline.components.items():
                if isinstance(network, nn.Module):
                    check_finite(state_of(network).items(), f"the {part} of {file.path}")
            check_fit(pipeline, file.path)
            return pipeline
    except (*LOADING_ERRORS, SingleFileComponentError) as error:
        raise not_loaded(f"{configs_of(file)}, or its weights,", source, error) from error


def _scheduler_of(file: SingleFile, scheduler: Any, source: str) -> Any:
    """The scheduler of the configs, changed as the file says that it was trained."""
    kind, settings = type(scheduler), dict(file.sampling)
    if not settings:
        return scheduler
    if "sigma_data" in settings:
        if kind.__name__.startswith("EDM"):
            return scheduler
        if "sigma_max" not in settings:
            raise WeightsError(
                f"{file.path} was trained with EDM's noise (edm_mean, edm_std), but the scheduler of {source} is a "
                f"{kind.__name__}: give base_config= of its own, such as playgroundai/playground-v2.5-1024px-aesthetic"
            )
        return EDMEulerScheduler(**settings)
    if "rescale_betas_zero_snr" in settings:  # then the first step has to be the one without any signal
        settings["timestep_spacing"] = "trailing"
    if not settings.keys() <= inspect.signature(kind).parameters.keys():  # PNDM, that of Stable Diffusion 1.5
        kind, settings = DDIMScheduler, {"clip_sample": False, **settings}
    return kind.from_config(scheduler.config, **settings)


def _options(kind: str) -> dict[str, Any]:
    # The watermark would be the only part of a picture that the models didn't draw; SDXL alone knows the option.
    # A checker of the base model would turn pictures black; whoever wants one has ``picture_hooks``.
    return {"add_watermarker": False} if kind == "sdxl" else {"requires_safety_checker": False, "safety_checker": None}


def _with_variant(
    pipeline: type[DiffusionPipeline], name: str, dtype: torch.dtype, options: Mapping[str, Any], folder: Path
) -> DiffusionPipeline:
    """The pipeline from its half-precision files, half the download, where it has them and they are asked for."""
    half = dtype in (torch.float16, torch.bfloat16)
    version = {key: value for key, value in options.items() if key == "revision"}
    if half and (not Path(name).is_dir() or any(Path(name).rglob("*.fp16*.safetensors"))):
        try:
            networks = _networks(pipeline, name, dtype, folder, variant="fp16", **version)
            return pipeline.from_pretrained(name, variant="fp16", **{_DTYPE: dtype, **options, **networks})
        except InputError:
            raise
        except (OSError, ValueError, HfHubHTTPError):  # no such variant, or not of every part
            logging.getLogger(__name__).info("%s has no complete variant fp16", name)
    networks = _networks(pipeline, name, dtype, folder, **version)
    return pipeline.from_pretrained(name, **{_DTYPE: dtype, **options, **networks})


def _networks(
    pipeline: type[DiffusionPipeline], name: str, dtype: torch.dtype, folder: Path, **options: Any
) -> dict[str, nn.Module]:
    """The networks of a pipeline, each seen to be complete: the pipeline's own loading doesn't tell."""
    networks = {}
    for part, entry in index_of(folder).items():
        if part not in inspect.signature(pipeline.__init__).parameters or part == "safety_checker":
            continue
        kind = getattr(_LIBRARIES.get(entry[0]), str(entry[1]), None) if isinstance(entry, list) else None
        if isinstance(kind, type) and issubclass(kind, (ModelMixin, PreTrainedModel)):
            try:
                networks[part] = _network(kind, name, part, dtype, folder, **options)
            except LOADING_ERRORS as error:
                if "variant" in options:
                    raise
                raise not_loaded("base model", name, error, f"its {part}: ") from error
    return networks


def _network(
    kind: type[nn.Module], name: str, part: str, dtype: torch.dtype, folder: Path, **options: Any
) -> nn.Module:
    """A network of a pipeline by itself."""
    options[_DTYPE if issubclass(kind, ModelMixin) else "dtype"] = dtype
    if part.startswith("text_encoder"):
        options["left_out"] = _OTHER_TOWER["text"]
    elif part == "image_encoder":
        options["left_out"] = _OTHER_TOWER["vision"]
    if not Path(name).is_dir():
        return load_network(kind, name, f"{part} of {name}", folder=folder / part, subfolder=part, **options)
    if not (folder / part).is_dir():
        raise WeightsError(
            f"the base model {name} is incomplete: its {part} is missing, there is no folder {folder / part}"
        )
    return load_network(kind, str(folder / part), f"{part} of {name}", **options)


def _vae(kind: type[ModelMixin], name: str, dtype: torch.dtype, folder: Path, version: Mapping[str, str]) -> ModelMixin:
    """A pipeline's autoencoder by itself, from its files of full precision where there are any."""
    try:
        return _network(kind, name, "vae", dtype, folder, **version)
    except InputError:
        raise
    except (OSError, ValueError, HfHubHTTPError):
        return _network(kind, name, "vae", dtype, folder, variant="fp16", **version)


@contextmanager
def withheld(loggers: Iterable[str], *parts: str) -> Iterator[None]:
    """Keep these loggers from messages with one of these parts for a while."""

    def is_news(record: logging.LogRecord) -> bool:
        return not any(part in record.getMessage() for part in parts)

    found = [logging.getLogger(name) for name in loggers]
    for logger in found:
        logger.addFilter(is_news)
    try:
        yield
    finally:
        for logger in found:
            logger.removeFilter(is_news)


def _old_news_withheld() -> AbstractContextManager[None]:
    """Keep diffusers from two warnings at each loading that say nothing.

    One is that the embedded base's autoencoder is none of its own classes; the other, for a single file, lists no
    modules that should stay in float32.
    """
    loggers = ("diffusers.pipelines.pipeline_utils", "diffusers.models.modeling_utils")
    return withheld(loggers, PixelUnshuffleAutoencoder.__name__, "kept in float32: []")


def _image_processor(
    name: str, options: Mapping[str, str], config: CLIPVisionConfig, folder: Path
) -> CLIPImageProcessor:
    """The encoder's own preprocessing where the folder has one, else CLIP's at the encoder's size."""
    side = config.image_size
    try:
        processor = CLIPImageProcessor.from_pretrained(name, **options)
    except LOADING_ERRORS:  # the released image encoders come without preprocessor_config.json
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    try:
        pixels = processor(images=[Image.new("RGB", (9, 9), "grey")], return_tensors="pt").pixel_values
    except LOADING_ERRORS as error:
        raise WeightsError(f"{folder / 'preprocessor_config.json'} prepares no picture: {reason(error)}") from error
    if tuple(pixels.shape) != (1, 3, side, side) or not pixels.isfinite().all():
        found = " x ".join(map(str, pixels.shape[1:]))
        raise WeightsError(
            f"the image encoder {folder} looks at 3 x {side} x {side} pixels, but its preprocessor_config.json gives "
            f"{found}{'' if pixels.isfinite().all() else ', not all of them numbers'}: they belong to different models"
        )
    return processor
