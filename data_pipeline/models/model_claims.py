"""What the json files in a model's folder claim: classes, code, sizes. Looked at before a library reads the folder.

Folders come from strangers. Older releases of diffusers and transformers import what a folder names; all of them build
what it describes, however large. So the classes that a folder may name stand here, and so do the limits of its numbers.

Standard library only, so that a folder can be refused before anything heavy is imported.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import InputError
from data_pipeline.reasons import shown

MAX_BYTES = 20_000_000
"""Of one json file; the tokenizer.json of CLIP has 3.6 million."""
CLIP_TEXT = ("clip", "clip_text_model")
CLIP_VISION = ("clip", "clip_vision_model")
VISION = (
    *("clip", "clip_vision_model", "siglip", "siglip_vision_model", "dinov2", "dinov2_with_registers", "dinov3_vit"),
    *("dinov3_convnext", "vit", "vit_mae", "vit_msn", "deit", "beit", "data2vec-vision", "ijepa", "swin", "swinv2"),
    *("convnext", "convnextv2", "resnet", "regnet", "efficientnet", "hiera", "pvt_v2", "focalnet", "mobilenet_v2"),
)
"""Model types of transformers that give an embedding of a picture."""

# Class names that a pipeline's model_index.json may give to its parts, by library. Other parts are not loaded, and so
# not judged: a safety checker, a watermark, what another pipeline has.
_SCHEDULER = r"[A-Z]\w*Scheduler"
_PARTS: Mapping[str, Mapping[str, Collection[str]]] = {
    "unet": {"diffusers": ("UNet2DConditionModel",)},
    "vae": {
        "diffusers": ("AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderTiny", "ConsistencyDecoderVAE"),
        "msdiffusion.pixel_autoencoder": ("PixelUnshuffleAutoencoder",),
    },
    "text_encoder": {"transformers": ("CLIPTextModel",)},
    "text_encoder_2": {"transformers": ("CLIPTextModelWithProjection",)},
    "tokenizer": {"transformers": ("CLIPTokenizer", "CLIPTokenizerFast")},
    "tokenizer_2": {"transformers": ("CLIPTokenizer", "CLIPTokenizerFast")},
    "scheduler": {"diffusers": (_SCHEDULER,)},
    "image_encoder": {"transformers": ("CLIPVisionModelWithProjection",)},
    "feature_extractor": {
        "transformers": (
            "CLIPImageProcessor",
            "CLIPImageProcessorFast",
            "CLIPImageProcessorPil",
            "CLIPFeatureExtractor",
        )
    },
}
_MODEL_TYPES = {"text_encoder": CLIP_TEXT, "text_encoder_2": CLIP_TEXT, "image_encoder": CLIP_VISION}
_TOKENIZERS = (
    *("CLIPTokenizer", "CLIPTokenizerFast", "BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast"),
    "TokenizersBackend",
)
_IMAGE_PROCESSOR = r"[A-Z]\w*(ImageProcessor|ImageProcessorFast|ImageProcessorPil|FeatureExtractor)"
# Keys that bring code, or other weights, from elsewhere; null and false are what saved configs have.
_CODE = {
    "auto_map": "code of its own",
    "custom_pipelines": "code of its own",
    "custom_generate": "code of its own",
    "trust_remote_code": "code of its own",
    "use_kernels": "compiled code from a hub",
    "kernel_config": "compiled code from a hub",
    "use_pretrained_backbone": "weights from elsewhere",
    "use_timm_backbone": "a network of timm",
    "backbone": "weights from elsewhere",
    "backbone_kwargs": "settings of a network of timm",
    "model_args": "settings of a network of timm",
    "quantization_config": "quantized weights",
    "compression_config": "quantized weights",
}
_NUMBER = r".*_eps|eps|scaling_factor|shift_factor|dropout"
_NUMBERS_OF_CHANNELS = ("latents_mean", "latents_std")
_SIDE = r"(sample|image|patch)_size"
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# What the libraries read of a folder; others write what they like beside it (a trainer's state, a list of modules).
_SETTINGS = r"(config(\.[\w.-]+)?|(generation|preprocessor|processor|scheduler)_config)\.json"
_INDEX = r".*\.index(\.[\w-]+)?\.json"
_TOKENIZER_SETTINGS = r"tokenizer_config\.json|special_tokens_map\.json"
_TOKENIZER_WORDS = r"vocab\.json|added_tokens\.json"  # words may be called anything
_TOKENIZER = r"tokenizer(\.[\w.-]+)?\.json"
# Files of a tokenizer by the entry that may name another one, which no library reads where one of these is there.
_TOKENIZER_FILES = {
    "vocab_file": ("vocab.json", "vocab.txt", "tokenizer.json"),
    "merges_file": ("merges.txt", "tokenizer.json"),
    "tokenizer_file": ("tokenizer.json", "vocab.json", "vocab.txt"),
}
# Largest numbers by key, first fitting; what no row names may be as large as the last says, or, with a decimal point,
# which nothing is counted by, as the one before.
_LIMITS = (
    (r"vocab_size|.*_token_id|num_class_embeds|type_vocab_size", 1_000_000),
    (r"num_beams|num_beam_groups|num_return_sequences", 16),
    (r".*timesteps|.*inference_steps|steps_offset", 10_000),
    (r".*layers.*|.*depths?|num_stages|num_hidden_groups", 200),
    (r"shortest_edge|longest_edge|height|width|max_height|max_width|(image|crop|pad|picture)_size", 4096),
    (r".*(size|dim|channels?|width|heads|hidden|length|positions|embeddings|queries|len|factor|input_dim)s?", 65_536),
    (r"(.*_)?order", 8),
    # Counted by nothing that is built: what a trainer notes, bounds, and constants.
    (r".*(steps?|epochs?|seed|theta|pixels|samples?|flos|param(eter)?s|tokens?|_index|_ids?|bytes|version)", 10**15),
    (r"longest_edge beside shortest_edge", 10**9),
    (r".*", 65_536),
)
_LARGEST_FRACTION = 10**9
_FEWEST_TOKENS = 8
_MOST_STAGES, _MOST_LAYERS = 12, 400
_PER_STAGE = r"widths|depths|hidden_sizes|num_heads|heads|(.*block_out|conv|neck_hidden)_?\w*channels|.*_block_types"


def read_json(path: Path) -> Any:
    """The content of a json file; InputError if it is no ordinary file, is too large, or is not JSON in UTF-8."""
    _check_file(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def _check_file(path: Path) -> None:
    if not path.is_file():  # a pipe or a device would be read for ever
        raise InputError(f"{path} is no ordinary file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{path} has {size / 1e6:.0f} MB: at most {MAX_BYTES // 1_000_000} are read of a model's json")


def configs_here(source: str, inside: str = "") -> tuple[Path, dict[str, str]]:
    """The folder on this machine where the configs of a model are, those of a hub repository after fetching them, and
    the version of the repository as an option of ``from_pretrained``: what was looked at is what is loaded.

    source: folder or hub name. inside: a folder in it; empty: all of it.
    """
    if Path(source).is_dir():
        return Path(source) / inside, {}
    import huggingface_hub

    patterns = [f"{inside}/*.json" if inside else "*.json"]
    folder = Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    return folder / inside, {"revision": folder.name}


def read_sizes(path: Path) -> dict[str, Any]:
    """A json file of whole numbers by name, or lists of them, within the limits; InputError names what is not."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no sizes by name, but {shown(content)}")
    for key, value in content.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise InputError(f"{path}: {key} is {shown(value)}: needed are whole numbers")
    check_values(path, content)
    return content


def three_numbers(values: Any, what: str) -> tuple[float, float, float]:
    """Red, green and blue of an image processor's setting; InputError for anything else, which ``what`` names."""
    if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(type(v) in (int, float) for v in values):
        raise InputError(f"{what} is {shown(values)}: needed are three numbers")
    return tuple(float(value) for value in values)


def check_pipeline(folder: Path) -> None:
    """What a diffusers pipeline of Stable Diffusion claims in its model_index.json and in the folders of its parts;
    those that are not there are for others to miss. InputError, with file and entry, if it names a class that is not
    one of ours, code, or a size beyond the limits.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    if not isinstance(index, dict):
        raise InputError(f"{path} is no list of a pipeline's parts")
    if not isinstance(index.get("_class_name", ""), str):
        raise InputError(
            f"{path}: _class_name is {shown(index['_class_name'])}, a class in a file of its own: allowed is the name "
            "of a pipeline of diffusers, as text"
        )
    check_values(path, index)
    for part, entry in index.items():
        if not isinstance(entry, (list, dict)):
            continue
        if part not in _PARTS or entry == [None, None]:
            continue
        _check_part(path, part, entry)
        if (folder / part).is_dir():
            expected = entry[1] if part in ("unet", "vae") else None
            tokenizer = part.startswith("tokenizer")
            check_network(folder / part, _MODEL_TYPES.get(part, ()), expected, tokenizer=tokenizer)


def _check_part(path: Path, part: str, entry: Any) -> None:
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(name, str) for name in entry)):
        raise InputError(f"{path}: {part} is {shown(entry)}: needed is [library, class]")
    library, name = entry
    allowed = _PARTS[part]
    if not any(re.fullmatch(pattern, name) for pattern in allowed.get(library, ())):
        known = ", or ".join(f"{', '.join(map(_plain, names))} of {place}" for place, names in allowed.items())
        raise InputError(
            f"{path}: {part} is {name} of {library}, which is not loaded from a model's folder: allowed is {known}"
        )


def check_network(
    folder: Path, model_types: Collection[str] = (), class_name: str | None = None, *, tokenizer: bool = False
) -> None:
    """What the json files in the folder of one network, tokenizer or scheduler claim, those that a library would read;
    InputError with file and entry, and what is allowed. It may hold weights, which are not looked at here.

    model_types: what ``model_type`` of its config.json may be; empty: it is not asked for. class_name: what
    ``_class_name`` of its config.json must be where it is there (diffusers); None: not asked. tokenizer: whether a
    tokenizer is loaded from there; else its files are not looked at.
    """
    if (folder / "adapter_config.json").exists():  # transformers would load the model that it names instead
        raise InputError(f"{folder / 'adapter_config.json'}: this is a PEFT adapter of another model, not a whole one")
    for path in sorted(folder.glob("*.json")):
        if tokenizer and re.fullmatch(_TOKENIZER_WORDS, path.name):
            _check_file(path)
        elif tokenizer and re.fullmatch(_TOKENIZER, path.name):
            _check_padding(path, read_json(path))
        elif tokenizer and re.fullmatch(_TOKENIZER_SETTINGS, path.name):
            content = _read_settings(path)
            check_values(path, content)
            if path.name == "tokenizer_config.json":
                _check_tokenizer(path, content)
        elif re.fullmatch(_INDEX, path.name):
            _check_index(path, _read_settings(path))
        elif re.fullmatch(_SETTINGS, path.name):
            content = _read_settings(path)
            check_values(path, content)
            if path.name.startswith("config."):
                _check_kind(path, content, model_types, class_name)
                _check_layers(path, content)


def _read_settings(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings by name, but {shown(content)}")
    return content


def _check_kind(path: Path, config: Mapping[str, Any], model_types: Collection[str], class_name: str | None) -> None:
    if model_types and config.get("model_type") not in model_types:
        raise InputError(
            f"{path} is of model_type {shown(config.get('model_type'))}: needed is "
            f"{' or '.join(model_types) if len(model_types) < 5 else 'one of ' + ', '.join(model_types)}"
        )
    named = config.get("_class_name", class_name)
    if class_name is not None and named != class_name:
        raise InputError(f"{path} is of the class {shown(named)}: needed is {class_name}")


def _check_layers(path: Path, config: Mapping[str, Any]) -> None:
    """Of diffusers' networks, whose layers multiply: building them takes time even without weights."""
    stages = config.get("block_out_channels")
    if not isinstance(stages, list):
        return
    blocks = max(_most(config.get(f"layers_per_{each}block"), 1) for each in ("", "down_", "up_"))
    transformers = _most(config.get("transformer_layers_per_block"), 1)
    if len(stages) * blocks * transformers > _MOST_LAYERS:
        raise InputError(
            f"{path}: {len(stages)} stages of {blocks} layers_per_block with {transformers} "
            f"transformer_layers_per_block are {len(stages) * blocks * transformers} layers: at most {_MOST_LAYERS} "
            "are built"
        )


def _most(value: Any, least: int) -> int:
    """The largest whole number in nested lists."""
    if isinstance(value, list):
        return max((_most(each, least) for each in value), default=least)
    return max(value, least) if isinstance(value, int) else least


def _check_tokenizer(path: Path, config: Mapping[str, Any]) -> None:
    limit = config.get("model_max_length")
    limit = _FEWEST_TOKENS if limit is None else limit  # none is told: the encoder has its own
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit < _FEWEST_TOKENS:
        raise InputError(
            f"{path}: model_max_length is {shown(limit)}: needed is a number of tokens, at least {_FEWEST_TOKENS}"
        )
    name = config.get("tokenizer_class")
    if name is not None and name not in _TOKENIZERS:
        raise InputError(f"{path}: tokenizer_class is {shown(name)}: allowed is {', '.join(_TOKENIZERS)}")
    for key, files in _TOKENIZER_FILES.items():  # older releases wrote where their cache was
        named = config.get(key)
        beside = named is None or (isinstance(named, str) and re.fullmatch(r"(\./)?\w[\w.-]*", named))
        if not beside and not any((path.parent / file).is_file() for file in files):
            raise InputError(f"{path}: {key} is {shown(named)}: needed is a file beside it")


def _check_padding(path: Path, content: Any) -> None:
    padding = content.get("padding") if isinstance(content, dict) else None
    strategy = padding.get("strategy") if isinstance(padding, dict) else None
    length = strategy.get("Fixed", 0) if isinstance(strategy, dict) else 0
    if not isinstance(length, int) or length > 4096:
        raise InputError(f"{path}: padding to {shown(length)} tokens: at most 4096")


def _check_index(path: Path, content: Mapping[str, Any]) -> None:
    """Of weights in several files: all of them in this folder."""
    parts = content.get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise InputError(f"{path}: weight_map must give the file of every tensor")
    for tensor, part in parts.items():
        if not isinstance(part, str) or not re.fullmatch(r"[\w][\w.-]*", part):
            raise InputError(f"{path}: {shown(tensor)} lies in {shown(part)}: needed is a file beside it")


def check_values(path: Path, content: Mapping[str, Any]) -> None:
    """InputError, with what is allowed, for a key that brings code, or a number beyond the limits, at any depth."""
    try:
        entries = list(_entries(content))
    except RecursionError:
        raise InputError(f"{path} is nested too deep for settings") from None
    for key, value in entries:
        if key in _CODE and value not in (None, False, "", {}, []):
            raise InputError(
                f"{path}: {key} is {shown(value)}, which asks for {_CODE[key]}: nothing of a model's folder is run, "
                "and everything is taken from this folder"
            )
        if key.strip("_").startswith(("attn_implementation", "experts_implementation")):
            named = list(value.values()) if isinstance(value, dict) else [value]
            if not all(name is None or name in _ATTENTION for name in named):
                raise InputError(f"{path}: {key} is {shown(value)}: allowed is {', '.join(_ATTENTION)}")
        if key in ("configuration_files", "fast_tokenizer_files"):  # of other releases: one of them is read instead
            named = value if isinstance(value, list) else [value]
            if not all(
                isinstance(name, str) and re.fullmatch(r"(config|tokenizer)\.[\w.-]*json", name) for name in named
            ):
                raise InputError(f"{path}: {key} is {shown(value)}: needed are files beside it")
        if key == "model_type" and value in ("timm_wrapper", "timm_backbone"):
            raise InputError(f"{path}: model_type is {value}, a network of timm: give timm:NAME")
        if key == "image_processor_type" and not (isinstance(value, str) and re.fullmatch(_IMAGE_PROCESSOR, value)):
            raise InputError(f"{path}: {key} is {shown(value)}: allowed is an image processor of transformers")
        _check_type(path, key, value)
        divides = key in ("image_std", "latents_std") and isinstance(value, list) and not all(value)
        if divides or (key == "scaling_factor" and value == 0):
            raise InputError(f"{path}: {key} is {shown(value)}: pictures are divided by it, so no number may be 0")
        if isinstance(value, list) and len(value) > _MOST_STAGES and re.fullmatch(_PER_STAGE, key):
            raise InputError(f"{path}: {key} has {len(value)} entries: at most {_MOST_STAGES}")
        for number in _numbers(value):
            _check_number(path, key, number)


def _check_type(path: Path, key: str, value: Any) -> None:
    """Of settings that are only looked at while drawing."""
    if value is None:
        return
    if re.fullmatch(_NUMBER, key) and type(value) not in (int, float):
        raise InputError(f"{path}: {key} is {shown(value)}: needed is a number")
    numbers = isinstance(value, list) and all(type(number) in (int, float) for number in value)
    if key in _NUMBERS_OF_CHANNELS and not numbers:
        raise InputError(f"{path}: {key} is {shown(value)}: needed is a list of numbers, one for each channel")
    if re.fullmatch(_SIDE, key) and any(number < 1 for number in _numbers(value)):
        raise InputError(f"{path}: {key} is {shown(value)}: needed is a size of 1 or more")


def _check_number(path: Path, key: str, number: float) -> None:
    if isinstance(number, float) and not math.isfinite(number):
        if math.isnan(number) or key != "lambda_min_clipped":  # whose default is minus infinity
            raise InputError(f"{path}: {key} is {number}: needed is a finite number")
        return
    if key == "model_max_length":  # where there is no limit, transformers writes 10 ** 30: the encoder has its own
        return
    limit = next(most for pattern, most in _LIMITS if re.fullmatch(pattern, key))
    if isinstance(number, float):
        limit = max(limit, _LARGEST_FRACTION) if limit == _LIMITS[-1][1] else limit
    if abs(number) > limit:
        raise InputError(f"{path}: {key} is {shown(number)}: at most {limit} is read from a model's folder")


def _entries(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth. The names of classes (id2label) are no settings."""
    if isinstance(content, dict):
        for name, value in content.items():
            bounds = name == "longest_edge" and content.get("shortest_edge") is not None
            yield f"{name} beside shortest_edge" if bounds else name, value
            if name not in ("id2label", "label2id", "added_tokens_decoder"):
                yield from _entries(value, name)
    elif isinstance(content, list):
        for value in content:
            yield from _entries(value, key)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers of a value that is one, or a list of them; truth values are none."""
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def _plain(pattern: str) -> str:
    return "a ...Scheduler" if pattern == _SCHEDULER else pattern
