"""Loads the frozen models: a Stable Diffusion pipeline (XL or 1.x) and a CLIP image encoder, from wherever they are.

A base model is a folder, a hub name, or one ``.safetensors`` file; an image encoder is a folder, a hub name, or one of
open_clip's. Configs can be read apart from weights, to see what fits before anything large is loaded.
"""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import re
import warnings
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
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import deprecation_utils
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from data_pipeline.models.model_claims import (
    CLIP_TEXT,
    CLIP_VISION,
    check_network,
    check_pipeline,
    configs_here,
    read_json,
)
from data_pipeline.models.weights import check_finite, check_names, load_network, skeleton, state_of
from data_pipeline.records import InputError
from msdiffusion import pixel_autoencoder
from msdiffusion.backbone.open_clip_encoder import OpenClipName, OpenClipVisionEncoder, names_open_clip, vision_config
from msdiffusion.backbone.single_file import (
    SingleFile,
    check_text_shapes,
    check_unet_shapes,
    check_vae_shapes,
    names_single_file,
    read_single_file,
)
from msdiffusion.errors import WeightsError, reason, refused_weights
from msdiffusion.pixel_autoencoder import PixelUnshuffleAutoencoder

PIPELINES: Mapping[str, type[DiffusionPipeline]] = {"sdxl": StableDiffusionXLPipeline, "sd1": StableDiffusionPipeline}
"""Kind of base model to the pipeline that it is loaded as."""
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers, pixel_autoencoder.__name__: pixel_autoencoder}
# What a missing or broken folder, hub name or file raises inside diffusers, transformers and huggingface_hub.
_LOADING_ERRORS = (
    OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, AssertionError, ImportError,
    RuntimeError, HfHubHTTPError, HFValidationError, StrictDataclassError, SafetensorError, pickle.UnpicklingError,
)  # fmt: skip
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
        return _with_vocabulary(pipeline, str(base_config))
    name = str(base_model)
    try:
        folder, version = configs_here(name)
        kind = _kind_of(folder, name)
        with _old_news_withheld():
            pipeline = _with_variant(PIPELINES[kind], name, dtype, {**_options(kind), **version}, folder)
            if vae_dtype not in (None, dtype):
                pipeline.register_modules(vae=_vae(type(pipeline.vae), name, vae_dtype, folder, version))
    except _LOADING_ERRORS as error:
        raise _not_loaded("base model", base_model, error) from error
    return _with_vocabulary(pipeline, name)


def kind_of_class(class_name: str, source: str) -> str:
    """The kind, "sdxl" or "sd1", of the diffusers pipelines with this class name (``_class_name`` of model_index.json).

    Raises:
        WeightsError: another kind.
    """
    if class_name.startswith("StableDiffusionXL"):
        return "sdxl"
    if class_name.startswith("StableDiffusion") and not class_name.startswith("StableDiffusion3"):
        return "sd1"
    raise WeightsError(
        f"the base model {source!r} is a {class_name or 'pipeline of no kind'}, but a StableDiffusionXLPipeline or "
        "StableDiffusionPipeline is needed: no adapter fits other kinds"
    )


def skeleton_unet(base_model: str | Path, base_config: str | Path | None = None) -> UNet2DConditionModel:
    """The UNet of a base model without its weights (on the meta device): names and shapes for checks and conversion.

    Args:
        base_model: see ``load_pipeline``. Of a file only the header is read, and compared with the config.
        base_config: see ``load_pipeline``.

    Raises:
        WeightsError: there is no such model, it has no UNet, or the file is of another architecture than the config.
    """
    if not names_single_file(base_model):
        return _meta_unet(base_model, "UNet of the base model")
    file = read_single_file(base_model)
    source = _config_source(file, base_config)
    unet = _meta_unet(source, _configs_of(file))
    check_unet_shapes(file, unet, source)
    return unet


def native_side(base_model: str | Path, base_config: str | Path | None = None) -> int | None:
    """Pixels of height and width that a base model draws where nobody says otherwise, from its configs alone.

    Args:
        base_model: see ``load_pipeline``.
        base_config: see ``load_pipeline``.

    Returns:
        None where the configs don't tell, or aren't there.
    """
    source = base_config if names_single_file(base_model) else base_model
    sample_size = _config_of(source, "unet").get("sample_size")
    stages = _config_of(source, "vae").get("block_out_channels")
    if not isinstance(sample_size, int) or not isinstance(stages, list) or len(stages) > 12:
        return None
    return sample_size * 2 ** (len(stages) - 1)


def calls_per_step(base_model: str | Path, base_config: str | Path | None = None) -> int:
    """How often a base model's own sampler calls the UNet in a step, from its configs alone; 1 where they don't tell.

    Args:
        base_model: see ``load_pipeline``.
        base_config: see ``load_pipeline``.
    """
    source = base_config if names_single_file(base_model) else base_model
    name = _config_of(source, "scheduler").get("_class_name")
    order = getattr(getattr(diffusers, str(name), None), "order", 1)
    return order if isinstance(order, int) else 1


def _config_of(source: str | Path | None, part: str) -> Mapping[str, Any]:
    """The config of a pipeline's part, empty where there is none."""
    if source is None:
        return {}
    reader = DDIMScheduler if part == "scheduler" else UNet2DConditionModel  # which know the names of the files
    try:
        return reader.load_config(str(source), subfolder=part)
    except _LOADING_ERRORS:
        return {}


def encoder_widths(
    base_model: str | Path,
    image_encoder: str | Path,
    features: str = "tokens",
) -> tuple[int, int]:
    """Widths of a phrase embedding and of the image encoder's features, read from configs and headers alone.

    Args:
        base_model: see ``load_pipeline``.
        image_encoder: see ``load_image_encoder``.
        features: see ``Backbone.encode_references``.

    Raises:
        WeightsError: a config is not there.
    """
    if names_single_file(base_model):
        phrase_width = read_single_file(base_model).phrase_width
    else:
        try:
            folder, version = configs_here(str(base_model), "text_encoder")
            check_network(folder, CLIP_TEXT if folder.is_dir() else ())
            config = CLIPTextConfig.from_pretrained(str(base_model), subfolder="text_encoder", **version)
            phrase_width = config.hidden_size
        except _LOADING_ERRORS as error:
            raise _not_loaded("text encoder of the base model", base_model, error) from error
    if names_open_clip(image_encoder):
        vision = vision_config(OpenClipName.parse(str(image_encoder)))
    else:
        name, options = _split_hub_folder(image_encoder)
        try:
            _, version = _encoder_folder(name, options)
            vision = CLIPVisionConfig.from_pretrained(name, **options, **version)  # also out of a whole CLIP's config
        except _LOADING_ERRORS as error:
            raise _not_loaded("image encoder", image_encoder, error) from error
    return phrase_width, vision.projection_dim if features == "global" else vision.hidden_size


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
    name, options = _split_hub_folder(image_encoder)
    try:
        folder, version = _encoder_folder(name, options)
        options |= version
        encoder = load_network(
            CLIPVisionModelWithProjection, name, f"image encoder {image_encoder}", folder=folder, dtype=dtype,
            left_out=_OTHER_TOWER["vision"], **options,
        )  # fmt: skip
    except _LOADING_ERRORS as error:
        raise _not_loaded("image encoder", image_encoder, error) from error
    return encoder, _image_processor(name, options, encoder.config, folder)


def is_local(source: str | Path) -> bool:
    """Whether a base model or image encoder lies on this machine, rather than on a hub."""
    if names_open_clip(source):
        return OpenClipName.parse(str(source)).file is not None
    return Path(source).exists()


def absolute(source: str | Path) -> str:
    """The same base model or image encoder, named so that the working directory doesn't matter."""
    if not is_local(source):
        return str(source)
    if names_open_clip(source):
        name = OpenClipName.parse(str(source))
        return str(OpenClipName(name.model, name.tag, name.file.resolve()))
    return str(Path(source).resolve())


def _load_single_file(
    file: SingleFile, dtype: torch.dtype, base_config: str | Path | None, vae_dtype: torch.dtype | None
) -> DiffusionPipeline:
    source = _config_source(file, base_config)
    folder, version = configs_here(source)
    check_unet_shapes(file, _meta_unet(source, _configs_of(file)), source)
    if _index_of(folder).get("vae") == ["diffusers", AutoencoderKL.__name__]:
        check_vae_shapes(file, _on_meta(AutoencoderKL, source, "vae", _configs_of(file)), source)
    for part, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        if _index_of(folder).get(part) == ["transformers", kind.__name__]:
            check_text_shapes(file, _on_meta(kind, source, part, _configs_of(file)), part, source)
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
            return _with_weights(pipeline, file.path)
    except (*_LOADING_ERRORS, SingleFileComponentError) as error:
        raise _not_loaded(f"{_configs_of(file)}, or its weights,", source, error) from error


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


def _config_source(file: SingleFile, base_config: str | Path | None) -> str:
    """The pipeline that a file takes its configs from, seen to be of the file's kind."""
    if base_config is None:
        raise WeightsError(
            f"{file.path} holds weights only: give base_config=, folder or hub name of a "
            f"{PIPELINES[file.kind].__name__}, whose configs and tokenizers fit it"
        )
    source = str(base_config)
    try:
        kind = _kind_of(configs_here(source)[0], source)
    except _LOADING_ERRORS as error:
        raise _not_loaded(_configs_of(file), source, error) from error
    if kind != file.kind:
        layers, width = file.cross_attentions
        raise WeightsError(
            f"{file.path} is a {PIPELINES[file.kind].__name__} ({layers} cross-attention layers that read text {width} "
            f"wide), but {source} is a {PIPELINES[kind].__name__}: use a checkpoint of that kind, or a base_config= of "
            "this one"
        )
    return source


def _with_vocabulary(pipeline: DiffusionPipeline, source: str) -> DiffusionPipeline:
    """The pipeline, unless a tokenizer was not there: transformers makes an empty one then, without a word."""
    for name, reader in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        tokenizer, encoder = getattr(pipeline, name, None), getattr(pipeline, reader, None)
        if tokenizer is None or encoder is None:  # told below
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
    return _with_weights(pipeline, source)


def _with_weights(pipeline: DiffusionPipeline, source: str | Path) -> DiffusionPipeline:
    """The pipeline, unless weights were not there (diffusers leaves those on the meta device), or parts don't fit."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            missing = [key for key, weight in part.state_dict().items() if weight.device.type == "meta"]
            with refused_weights():
                check_names(f"the {name} of {source}", missing)
    _check_fit(pipeline, source)
    return pipeline


def _check_fit(pipeline: DiffusionPipeline, source: str | Path) -> None:
    """Raise unless text encoders, UNet and autoencoder are made for one another; torch would say it while drawing.

    Raises:
        WeightsError: names both widths.
    """
    second = ("tokenizer_2", "text_encoder_2") if isinstance(pipeline, StableDiffusionXLPipeline) else ()
    needed = ("unet", "vae", "scheduler", "tokenizer", "text_encoder", *second)
    if lacking := [name for name in needed if getattr(pipeline, name, None) is None]:  # a refiner, for example
        raise WeightsError(
            f"the base model {source} has no {', '.join(lacking)}: a {type(pipeline).__name__} with all of its parts "
            "is needed"
        )
    unet = pipeline.unet.config
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
                f"the parts of {source} are of different models: text_encoder_2 pools to {pooled} numbers, which with "
                f"{sizes} for the picture's sizes are {pooled + sizes}, but the UNet takes "
                f"{unet.projection_class_embeddings_input_dim}"
            )
        limits = [
            min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            for tokenizer, encoder in zip((pipeline.tokenizer, pipeline.tokenizer_2), encoders, strict=True)
        ]
        if limits[0] != limits[1]:
            raise WeightsError(
                f"the parts of {source} are of different models: tokenizer and text_encoder read {limits[0]} tokens, "
                f"tokenizer_2 and text_encoder_2 {limits[1]} (model_max_length, max_position_embeddings): needed are "
                "as many"
            )
    widths, taken = [encoder.config.hidden_size for encoder in encoders], unet.cross_attention_dim
    if isinstance(taken, int) and sum(widths) != taken:
        raise WeightsError(
            f"the parts of {source} are of different models: the text is {' + '.join(map(str, widths))} wide, but the "
            f"UNet reads text {taken} wide"
        )
    channels = getattr(pipeline.vae.config, "latent_channels", unet.out_channels)
    if channels != unet.out_channels:
        raise WeightsError(
            f"the parts of {source} are of different models: the UNet makes latents of {unet.out_channels} channels, "
            f"the vae reads {channels}"
        )
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


def _configs_of(file: SingleFile) -> str:
    return f"configs and tokenizers for {file.path} (base_config= takes any folder or hub name of such a pipeline)"


def _index_of(folder: Path) -> Mapping[str, Any]:
    """The model_index.json of a pipeline, after a look at all that its folder claims."""
    path = folder / "model_index.json"
    if not path.exists():
        raise FileNotFoundError(f"no model_index.json there, so it is no pipeline of diffusers ({folder})")
    check_pipeline(folder)
    return read_json(path)


def _kind_of(folder: Path, source: str) -> str:
    return kind_of_class(_index_of(folder).get("_class_name", ""), source)


def _meta_unet(source: str | Path, what: str) -> UNet2DConditionModel:
    return _on_meta(UNet2DConditionModel, source, "unet", what)


def _on_meta(
    kind: type[ModelMixin] | type[PreTrainedModel], source: str | Path, part: str, what: str
) -> ModelMixin | PreTrainedModel:
    """A network of a pipeline without its weights."""
    if Path(source).is_dir() and not (Path(source) / part / "config.json").is_file():  # the one above would be taken
        inside = next((f"; {found.parents[1]} has it" for found in Path(source).glob(f"*/{part}/config.json")), "")
        raise WeightsError(f"cannot load the {what} from {str(source)!r}: no {part}/config.json there{inside}")
    try:
        folder, _ = configs_here(str(source), part)
        if issubclass(kind, PreTrainedModel):
            check_network(folder, CLIP_TEXT)
        else:
            check_network(folder, (), kind.__name__)
        return skeleton(kind, folder)
    except _LOADING_ERRORS as error:
        raise _not_loaded(what, source, error) from error


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
    for part, entry in _index_of(folder).items():
        if part not in inspect.signature(pipeline.__init__).parameters or part == "safety_checker":
            continue
        kind = getattr(_LIBRARIES.get(entry[0]), str(entry[1]), None) if isinstance(entry, list) else None
        if isinstance(kind, type) and issubclass(kind, (ModelMixin, PreTrainedModel)):
            try:
                networks[part] = _network(kind, name, part, dtype, folder, **options)
            except _LOADING_ERRORS as error:
                if "variant" in options:
                    raise
                raise _not_loaded("base model", name, error, f"its {part}: ") from error
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


def _encoder_folder(name: str, options: Mapping[str, str]) -> tuple[Path, dict[str, str]]:
    """The folder of an image encoder on this machine, seen to be a CLIP's, and its version; see ``configs_here``."""
    if Path(name).is_file():
        raise WeightsError(
            f"cannot load the image encoder from the file {name!r}: give its folder, or "
            "open_clip:MODEL@FILE.safetensors"
        )
    folder, version = configs_here(name, options.get("subfolder", ""))
    if not (folder / "config.json").is_file():  # transformers would give its defaults
        raise WeightsError(f"cannot load the image encoder from {name!r}: no config.json there")
    check_network(folder, CLIP_VISION)
    return folder, version


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
    except _LOADING_ERRORS:  # the released image encoders come without preprocessor_config.json
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    try:
        pixels = processor(images=[Image.new("RGB", (9, 9), "grey")], return_tensors="pt").pixel_values
    except _LOADING_ERRORS as error:
        raise WeightsError(f"{folder / 'preprocessor_config.json'} prepares no picture: {reason(error)}") from error
    if tuple(pixels.shape) != (1, 3, side, side) or not pixels.isfinite().all():
        found = " x ".join(map(str, pixels.shape[1:]))
        raise WeightsError(
            f"the image encoder {folder} looks at 3 x {side} x {side} pixels, but its preprocessor_config.json gives "
            f"{found}{'' if pixels.isfinite().all() else ', not all of them numbers'}: they belong to different models"
        )
    return processor


def _split_hub_folder(name: str | Path) -> tuple[str, dict[str, str]]:
    """Split "owner/name/folder" into "owner/name" and {"subfolder": "folder"}; local folders stay whole."""
    text = str(name)
    parts = text.split("/")
    if Path(text).exists() or len(parts) < 3 or text.startswith(("/", ".", "~")):
        return text, {}
    return "/".join(parts[:2]), {"subfolder": "/".join(parts[2:])}


def _not_loaded(what: str, name: str | Path, error: Exception, part: str = "") -> WeightsError:
    if isinstance(error, WeightsError):
        return error
    if isinstance(error, InputError):  # which names the file
        return WeightsError(f"cannot load the {what} from {str(name)!r}: {part}{error}")
    told = reason(error).partition(" If you want to instead")[0]  # load it with random weights
    if not Path(name).exists() and "base_config=" not in what:  # the library speaks of the hub, even of a lost folder
        option = "image_encoder=" if what == "image encoder" else "base_model="
        told = f"{hub_reason(error)} (no such folder here, so a hub was asked; {option} takes another place)"
    return WeightsError(f"cannot load the {what} from {str(name)!r}: {part}{told}")


def hub_reason(error: Exception) -> str:
    """Why a hub gives no model, in few words: without a network the libraries have much to say."""
    text = reason(error).partition(" If you want to instead")[0]
    if isinstance(error, HFValidationError):
        return "a repository is given as owner/name"
    if isinstance(error, OSError) and constants.HF_HUB_OFFLINE:
        return "offline (HF_HUB_OFFLINE is set), and the hub's cache does not hold it, or not all of it"
    if re.search("couldn't connect|cannot find the requested files|appropriate cached", text, re.IGNORECASE):
        return "the hub cannot be reached, and its cache here does not hold it, or not all of it"
    return text
