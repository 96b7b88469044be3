"""Grounding DINO's weights and settings in two spellings: the package groundingdino-py's and transformers'.

Every tensor of one is a tensor of the other, or a third of one where the package keeps query, key and value in one
block. Three kinds have no counterpart and are left out: the window indices of Swin, which are worked out from the
window size; BERT's pooler, whose output nothing reads; BERT's position numbers, which older versions stored.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import InputError
from data_pipeline.models.grounding import Preprocessing
from data_pipeline.models.grounding_dino import DISPENSABLE, load_grounding_dino, read_package_config
from data_pipeline.models.grounding_dino_hf import OPTION, load_grounding_dino_hf
from data_pipeline.models.model_files import share_weights

_SWIN = "model.backbone.conv_encoder.model"
# (package, transformers): the first that fits the start of a name is replaced, then the inner parts are.
_PREFIXES = (
    ("backbone.0.patch_embed.proj.", f"{_SWIN}.swin.embeddings.patch_embeddings.projection."),
    ("backbone.0.patch_embed.norm.", f"{_SWIN}.swin.embeddings.norm."),
    ("backbone.0.layers.", f"{_SWIN}.swin.encoder.layers."),
    ("input_proj.", "model.input_proj_vision."),
    ("bert.", "model.text_backbone."),
    ("feat_map.", "model.text_projection."),
    ("transformer.level_embed", "model.level_embed"),
    ("transformer.tgt_embed.", "model.query_position_embeddings."),
    ("transformer.enc_output.", "model.enc_output."),
    ("transformer.enc_output_norm.", "model.enc_output_norm."),
    ("transformer.enc_out_bbox_embed.", "model.encoder_output_bbox_embed."),
    ("transformer.decoder.norm.", "model.decoder.layer_norm."),
    ("transformer.decoder.ref_point_head.", "model.decoder.reference_points_head."),
    ("transformer.decoder.bbox_embed.", "model.decoder.bbox_embed."),
    ("bbox_embed.", "bbox_embed."),
)
_BLOCK = (
    (".attn.qkv.", ".attention.{qkv}_proj."),
    (".attn.proj.", ".attention.o_proj."),
    (".attn.relative_position_bias_table", ".attention.relative_position_bias.relative_position_bias_table"),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
)
_ENCODER = (
    ("self_attn.", "self_attn."),
    ("norm1.", "self_attn_layer_norm."),
    ("linear1.", "fc1."),
    ("linear2.", "fc2."),
    ("norm2.", "final_layer_norm."),
)
_TEXT = (
    ("self_attn.in_proj_", "self_attn.{query_key_value}."),
    ("self_attn.out_proj.", "self_attn.out_proj."),
    ("linear1.", "fc1."),
    ("linear2.", "fc2."),
    ("norm1.", "layer_norm_before."),
    ("norm2.", "layer_norm_after."),
)
_FUSION = (
    ("gamma_v", "vision_param"),
    ("gamma_l", "text_param"),
    ("layer_norm_v.", "layer_norm_vision."),
    ("layer_norm_l.", "layer_norm_text."),
    ("attn.v_proj.", "attn.vision_proj."),
    ("attn.l_proj.", "attn.text_proj."),
    ("attn.values_v_proj.", "attn.values_vision_proj."),
    ("attn.values_l_proj.", "attn.values_text_proj."),
    ("attn.out_v_proj.", "attn.out_vision_proj."),
    ("attn.out_l_proj.", "attn.out_text_proj."),
)
_DECODER = (
    ("self_attn.in_proj_", "self_attn.{query_key_value}."),
    ("self_attn.out_proj.", "self_attn.out_proj."),
    ("norm2.", "self_attn_layer_norm."),
    ("ca_text.in_proj_", "encoder_attn_text.{query_key_value}."),
    ("ca_text.out_proj.", "encoder_attn_text.out_proj."),
    ("catext_norm.", "encoder_attn_text_layer_norm."),
    ("cross_attn.", "encoder_attn."),
    ("norm1.", "encoder_attn_layer_norm."),
    ("linear1.", "fc1."),
    ("linear2.", "fc2."),
    ("norm3.", "final_layer_norm."),
)
# Lists of layers: how a name begins up to the number, in both spellings, and what follows it.
_LAYERS = (
    ("transformer.encoder.layers.", "model.encoder.layers.", "deformable_layer.", _ENCODER),
    ("transformer.encoder.text_layers.", "model.encoder.layers.", "text_enhancer_layer.", _TEXT),
    ("transformer.encoder.fusion_layers.", "model.encoder.layers.", "fusion_layer.", _FUSION),
    ("transformer.decoder.layers.", "model.decoder.layers.", "", _DECODER),
)
_THREE = {"{query_key_value}": ("query", "key", "value"), "{qkv}": ("q", "k", "v")}


def _spelling(name: str) -> str | None:
    """The name in transformers of one of the package's tensors, with {...} for three of them; None if it has none."""
    if any(part in name for part in DISPENSABLE):
        return None
    if match := re.fullmatch(r"backbone\.0\.norm(\d)\.(\w+)", name):  # Swin counts its outputs from 0, stages from 1
        return f"{_SWIN}.hidden_states_norms.stage{int(match[1]) + 1}.{match[2]}"
    for package, other, part, inner in _LAYERS:
        if match := re.fullmatch(re.escape(package) + r"(\d+)\.(.+)", name):
            for old, new in inner:
                if match[2].startswith(old):
                    return f"{other}{match[1]}.{part}{new}{match[2].removeprefix(old)}"
            return None
    for old, new in _PREFIXES:
        if name.startswith(old):
            spelled = new + name.removeprefix(old)
            for inner_old, inner_new in _BLOCK if name.startswith("backbone.0.layers.") else ():
                if ".blocks." in name:
                    spelled = spelled.replace(inner_old, inner_new)
            return spelled
    return None


def _spellings(name: str) -> list[str]:
    """The names in transformers of one of the package's tensors: one, or three for query, key and value."""
    spelled = _spelling(name)
    for mark, parts in _THREE.items():
        if spelled is not None and mark in spelled:
            return [spelled.replace(mark, part) for part in parts]
    return [] if spelled is None else [spelled]


def to_hf(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The package's tensors by transformers' names; what transformers has no place for is left out."""
    converted = {}
    for name, tensor in weights.items():
        spelled = _spellings(name)
        parts = tensor.chunk(3) if len(spelled) == 3 else [tensor]
        converted.update({new: part.contiguous() for new, part in zip(spelled, parts, strict=False)})
    return converted


def to_package(weights: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """Transformers' tensors by the package's names.

    names: the tensors of the package's model; those without a counterpart are left out. InputError if one is missing.
    """
    converted = {}
    for name in names:
        spelled = _spellings(name)
        if missing := [new for new in spelled if new not in weights]:
            raise InputError(f"the weights lack {missing[0]}, which the package calls {name}")
        if spelled:
            converted[name] = torch.cat([weights[new] for new in spelled])
    return converted


# ------------------------------------------------------------------------------------------------------------- settings

# Sizes of the Swin transformers that the package knows by name.
BACKBONES: Mapping[str, Mapping[str, Any]] = {
    "swin_T_224_1k": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin_B_224_22k": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 7},
    "swin_B_384_22k": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
    "swin_L_224_22k": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 7},
    "swin_L_384_22k": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
}
# (package, transformers): values that both spell out.
_SHARED = (
    ("hidden_dim", "d_model"),
    ("enc_layers", "encoder_layers"),
    ("dec_layers", "decoder_layers"),
    ("dim_feedforward", "encoder_ffn_dim"),
    ("dim_feedforward", "decoder_ffn_dim"),
    ("nheads", "encoder_attention_heads"),
    ("nheads", "decoder_attention_heads"),
    ("num_queries", "num_queries"),
    ("num_feature_levels", "num_feature_levels"),
    ("enc_n_points", "encoder_n_points"),
    ("dec_n_points", "decoder_n_points"),
    ("dropout", "dropout"),
    ("text_dropout", "text_enhancer_dropout"),
    ("fusion_dropout", "fusion_dropout"),
    ("fusion_droppath", "fusion_droppath"),
    ("transformer_activation", "activation_function"),
    ("embed_init_tgt", "embedding_init_target"),
    ("dec_pred_bbox_embed_share", "decoder_bbox_embed_share"),
    ("two_stage_bbox_embed_share", "two_stage_bbox_embed_share"),
    ("pe_temperatureH", "positional_embedding_temperature"),
    ("pe_temperatureW", "positional_embedding_temperature"),
)
# What transformers' class takes for granted.
_GRANTED: Mapping[str, Any] = {
    "modelname": "groundingdino",
    "query_dim": 4,
    "num_patterns": 0,
    "pre_norm": False,
    "two_stage_type": "standard",
    "two_stage_class_embed_share": False,
    "use_text_enhancer": True,
    "use_fusion_layer": True,
    "use_text_cross_attention": True,
    "sub_sentence_present": True,
    "max_text_len": 256,
    "position_embedding": "sine",
    "return_interm_indices": [1, 2, 3],
}
# What of a BERT's configuration shapes the network; the rest tells where it came from.
_BERT = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size"),
    *("layer_norm_eps", "pad_token_id"),
)
# What only training reads, with the values of the released configurations.
_TRAINING: Mapping[str, Any] = {
    "batch_size": 1,
    "backbone_freeze_keywords": None,
    "dn_box_noise_scale": 1.0,
    "dn_label_noise_ratio": 0.5,
    "dn_label_coef": 1.0,
    "dn_bbox_coef": 1.0,
    "dn_labelbook_size": 2000,
    "use_checkpoint": True,
    "use_transformer_ckpt": True,
}


def hf_config(settings: Mapping[str, Any], text_config: Mapping[str, Any]) -> Any:
    """Transformers' GroundingDinoConfig for the package's settings. text_config: of its BERT.

    InputError if transformers' class cannot be told one of the settings.
    """
    from transformers import GroundingDinoConfig

    for name, value in _GRANTED.items():
        if settings.get(name, value) != value:
            raise InputError(f"transformers' Grounding DINO has {name} = {value!r}, not {settings[name]!r}")
    if settings.get("backbone") not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise InputError(f"the backbone {settings.get('backbone')!r} has no counterpart; known are {known}")
    values: dict[str, Any] = {}
    for package, name in _SHARED:
        if package not in settings:
            raise InputError(f"the configuration lacks {package}")
        if values.setdefault(name, settings[package]) != settings[package]:
            raise InputError(f"transformers has one number for {name}; {package} = {settings[package]} differs")
    return GroundingDinoConfig(
        **values,
        backbone_config={"model_type": "swin", "out_indices": [2, 3, 4], **BACKBONES[settings["backbone"]]},
        text_config={"model_type": "bert", **{name: text_config[name] for name in _BERT if name in text_config}},
        two_stage=True,
        disable_custom_kernels=True,
    )


def package_config(config: Any) -> dict[str, Any]:
    """The package's settings for a GroundingDinoConfig. InputError if the package cannot be told one of its values."""
    swin = {name: getattr(config.backbone_config, name, None) for name in BACKBONES["swin_T_224_1k"]}
    swin = {name: list(value) if isinstance(value, tuple) else value for name, value in swin.items()}
    backbone = next((name for name, sizes in BACKBONES.items() if sizes == swin), None)
    if backbone is None:
        raise InputError(f"the package builds the backbones {', '.join(BACKBONES)} only, none of which has {swin}")
    if config.d_model != 256:
        raise InputError(f"256 channels are wired into the package; this model has d_model = {config.d_model}")
    if list(config.backbone_config.out_indices) != [2, 3, 4] or not config.two_stage:
        raise InputError("the package needs two stages and the backbone's outputs 2, 3 and 4")
    values: dict[str, Any] = {"backbone": backbone, **_GRANTED, **_TRAINING, "text_encoder_type": "bert-base-uncased"}
    for package, name in _SHARED:
        value = getattr(config, name)
        if package in values and values[package] != value:
            raise InputError(f"the package has one number for {package}; {name} = {value} differs")
        values[package] = value
    return values


# ---------------------------------------------------------------------------------------------------------- directories


def convert_to_hf(config: Path, checkpoint: Path, text_encoder: str, out: Path) -> None:
    """Writes the package's model as a directory that transformers loads: weights, tokenizer, image settings.

    text_encoder: as in ``load_grounding_dino``. InputError if something is missing or has no counterpart; nothing is
    written then.
    """
    from transformers import GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil

    settings = read_package_config(config)
    hf_config(settings, {})  # refuses before the weights are read
    package = load_grounding_dino(config, checkpoint, text_encoder, "cpu")
    model = GroundingDinoForObjectDetection(hf_config(settings, package.bert.config.to_dict()))
    report = model.load_state_dict(to_hf(package.state_dict()), strict=False)
    missing = [name for name in report.missing_keys if ".swin.layernorm." not in name]  # Swin's last norm is not used
    if missing or report.unexpected_keys:
        raise InputError(f"tensors without a counterpart: {', '.join([*missing, *report.unexpected_keys][:5])}")
    model.save_pretrained(out)
    share_weights(out)
    package.tokenizer.save_pretrained(out)
    preprocessing = Preprocessing()
    GroundingDinoImageProcessorPil(
        size={"shortest_edge": preprocessing.shortest, "longest_edge": preprocessing.longest},
        image_mean=list(preprocessing.mean),
        image_std=list(preprocessing.std),
    ).save_pretrained(out)


def convert_to_package(name: str, out: Path) -> None:
    """Writes a model of transformers (directory or hub id) as a directory for the package: config.py,
    model.safetensors, and text_encoder with BERT's configuration and tokenizer. InputError as above.
    """
    from safetensors.torch import save_file

    from data_pipeline.models.grounding_dino import build_from_config

    try:
        model, tokenizer, _ = load_grounding_dino_hf(name, "cpu")
    except InputError as error:  # it names the option of a mining run
        raise InputError(str(error).replace(f"{OPTION}:", "IN:", 1)) from error
    settings = package_config(model.config)
    text_encoder = out / "text_encoder"
    model.config.text_config.save_pretrained(text_encoder)
    tokenizer.save_pretrained(text_encoder)
    names = list(build_from_config(settings, str(text_encoder)).state_dict())
    weights = to_package(model.state_dict(), names)
    save_file({key: tensor.clone().contiguous() for key, tensor in weights.items()}, out / "model.safetensors")
    lines = [f"{key} = {value!r}" for key, value in settings.items()]
    (out / "config.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    share_weights(out, "config.py")
