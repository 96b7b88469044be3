"""What the configs of base models and image encoders say, apart from weights: what fits is seen before any loading."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    ModelMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import CLIPTextConfig, CLIPVisionConfig, PreTrainedModel

from data_pipeline.errors import InputError
from data_pipeline.models.model_claims import (
    CLIP_TEXT,
    CLIP_VISION,
    check_network,
    check_pipeline,
    configs_here,
    read_json,
)
from data_pipeline.models.weights import skeleton
from msdiffusion.backbone.open_clip_encoder import OpenClipName, names_open_clip, vision_config
from msdiffusion.backbone.single_file import SingleFile, check_shapes, names_single_file, read_single_file
from msdiffusion.errors import WeightsError, reason

PIPELINES: Mapping[str, type[DiffusionPipeline]] = {"sdxl": StableDiffusionXLPipeline, "sd1": StableDiffusionPipeline}
"""Kind of base model to the pipeline that it is loaded as."""


# What a missing or broken folder, hub name or file raises inside diffusers, transformers and huggingface_hub.
LOADING_ERRORS = (
    OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, AssertionError, ImportError,
    RuntimeError, HfHubHTTPError, HFValidationError, StrictDataclassError, SafetensorError, pickle.UnpicklingError,
)  # fmt: skip


def kind_of_class(class_name: str, source: str) -> str:
    """By a pipeline's class name (``_class_name`` of model_index.json) its kind, "sdxl" or "sd1"; else WeightsError."""
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

    It is named as for ``load_pipeline``; of a file only the header is read, and compared with the config.

    Raises:
        WeightsError: there is no such model, it has no UNet, or the file is of another architecture than the config.
    """
    if not names_single_file(base_model):
        return on_meta(UNet2DConditionModel, base_model, "unet", "UNet of the base model")
    file = read_single_file(base_model)
    source = config_source(file, base_config)
    unet = on_meta(UNet2DConditionModel, source, "unet", configs_of(file))
    check_shapes(file, "unet", unet, source)
    return unet


def native_side(base_model: str | Path, base_config: str | Path | None = None) -> int | None:
    """Pixels of height and width that a base model draws where nobody says otherwise, from its configs alone.

    None where the configs don't tell, or aren't there. It is named as for ``load_pipeline``.
    """
    source = base_config if names_single_file(base_model) else base_model
    sample_size = _config_of(source, "unet").get("sample_size")
    stages = _config_of(source, "vae").get("block_out_channels")
    if not isinstance(sample_size, int) or not isinstance(stages, list) or len(stages) > 12:
        return None
    return sample_size * 2 ** (len(stages) - 1)


def calls_per_step(base_model: str | Path, base_config: str | Path | None = None) -> int:
    """How often a base model's own sampler calls the UNet in a step, from its configs alone; 1 where they don't tell.

    It is named as for ``load_pipeline``.
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
    except LOADING_ERRORS:
        return {}


def encoder_widths(base_model: str | Path, image_encoder: str | Path, features: str = "tokens") -> tuple[int, int]:
    """Widths of a phrase embedding and of the image encoder's features, read from configs and headers alone.

    Models are named as for ``load_pipeline``, ``load_image_encoder``, features as for ``Backbone.encode_references``.

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
        except LOADING_ERRORS as error:
            raise not_loaded("text encoder of the base model", base_model, error) from error
    if names_open_clip(image_encoder):
        vision = vision_config(OpenClipName.parse(str(image_encoder)))
    else:
        name, options = split_hub_folder(image_encoder)
        try:
            _, version = encoder_folder(name, options)
            vision = CLIPVisionConfig.from_pretrained(name, **options, **version)  # also out of a whole CLIP's config
        except LOADING_ERRORS as error:
            raise not_loaded("image encoder", image_encoder, error) from error
    return phrase_width, vision.projection_dim if features == "global" else vision.hidden_size


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


def config_source(file: SingleFile, base_config: str | Path | None) -> str:
    """The pipeline that a file takes its configs from, seen to be of the file's kind."""
    if base_config is None:
        raise WeightsError(
            f"{file.path} holds weights only: give base_config=, folder or hub name of a "
            f"{PIPELINES[file.kind].__name__}, whose configs and tokenizers fit it"
        )
    source = str(base_config)
    try:
        kind = kind_of(configs_here(source)[0], source)
    except LOADING_ERRORS as error:
        raise not_loaded(configs_of(file), source, error) from error
    if kind != file.kind:
        layers, width = file.cross_attentions
        raise WeightsError(
            f"{file.path} is a {PIPELINES[file.kind].__name__} ({layers} cross-attention layers that read text {width} "
            f"wide), but {source} is a {PIPELINES[kind].__name__}: use a checkpoint of that kind, or a base_config= of "
            "this one"
        )
    return source


def configs_of(file: SingleFile) -> str:
    """What is missing beside weights in one file, and how it is given, for messages."""
    return f"configs and tokenizers for {file.path} (base_config= takes any folder or hub name of such a pipeline)"


def index_of(folder: Path) -> Mapping[str, Any]:
    """The model_index.json of a pipeline, after a look at all that its folder claims."""
    path = folder / "model_index.json"
    if not path.exists():
        raise FileNotFoundError(f"no model_index.json there, so it is no pipeline of diffusers ({folder})")
    check_pipeline(folder)
    return read_json(path)


def kind_of(folder: Path, source: str) -> str:
    """Of which kind the pipeline of a folder is; ``source`` is what messages call it."""
    return kind_of_class(index_of(folder).get("_class_name", ""), source)


def on_meta(
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
    except LOADING_ERRORS as error:
        raise not_loaded(what, source, error) from error


def encoder_folder(name: str, options: Mapping[str, str]) -> tuple[Path, dict[str, str]]:
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


def split_hub_folder(name: str | Path) -> tuple[str, dict[str, str]]:
    """Split "owner/name/folder" into "owner/name" and {"subfolder": "folder"}; local folders stay whole."""
    text = str(name)
    parts = text.split("/")
    if Path(text).exists() or len(parts) < 3 or text.startswith(("/", ".", "~")):
        return text, {}
    return "/".join(parts[:2]), {"subfolder": "/".join(parts[2:])}


def not_loaded(what: str, name: str | Path, error: Exception, part: str = "") -> WeightsError:
    """The error that a part could not be loaded, worded for whoever asked for it by this name."""
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
