"""A small Grounding DINO in both of its libraries, with random weights that say something."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.records import Frame

# The package's own configuration, with two layers of each kind. Swin-T and the width of 256 are wired into it.
DINO_CONFIG = """
backbone = "swin_T_224_1k"; position_embedding = "sine"; pe_temperatureH = 20; pe_temperatureW = 20
return_interm_indices = [1, 2, 3]; backbone_freeze_keywords = None
enc_layers = 2; dec_layers = 2; pre_norm = False; dim_feedforward = 64; hidden_dim = 256; dropout = 0.0; nheads = 4
num_queries = 30; query_dim = 4; num_patterns = 0; num_feature_levels = 4; enc_n_points = 4; dec_n_points = 4
two_stage_type = "standard"; two_stage_bbox_embed_share = False; two_stage_class_embed_share = False
transformer_activation = "relu"; dec_pred_bbox_embed_share = True
dn_box_noise_scale = 1.0; dn_label_noise_ratio = 0.5; dn_label_coef = 1.0; dn_bbox_coef = 1.0; dn_labelbook_size = 100
embed_init_tgt = True; max_text_len = 256; text_encoder_type = "bert-base-uncased"
use_text_enhancer = True; use_fusion_layer = True; use_checkpoint = True; use_transformer_ckpt = True
use_text_cross_attention = True; text_dropout = 0.0; fusion_dropout = 0.0; fusion_droppath = 0.1
sub_sentence_present = True; modelname = "groundingdino"; batch_size = 1
"""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?", "dog", "cat", "red", "ball", "a", "##s"]


@dataclass(frozen=True)
class DinoFiles:
    """Files of a Grounding DINO of the package: configuration, checkpoint, and a BERT's config and tokenizer."""

    config: Path
    weights: Path
    bert: Path


@pytest.fixture(scope="session")
def dino_files(tmp_path_factory: pytest.TempPathFactory) -> DinoFiles:
    """A small Grounding DINO of the package with random weights, saved as a distributed training saves it."""
    import torch
    from transformers import BertConfig

    from data_pipeline.models.grounding_dino import build_from_config, read_package_config

    folder = tmp_path_factory.mktemp("dino")
    files = DinoFiles(folder / "config.py", folder / "weights.pth", folder / "bert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=len(WORDS), **sizes).save_pretrained(files.bert)
    (files.bert / "vocab.txt").write_text("\n".join(WORDS))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (files.bert / "tokenizer_config.json").write_text(json.dumps(settings))
    files.config.write_text(DINO_CONFIG.replace("; ", "\n"))
    torch.manual_seed(0)
    model = build_from_config(read_package_config(files.config), str(files.bert))
    # Untrained heads answer every query alike: give them something to say.
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("backbone"):
            torch.nn.init.normal_(parameter, std=0.05)
    # "module." as a distributed training writes it, and a tensor that only training needs.
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": {**state, "module.label_enc.weight": torch.zeros(2)}}, files.weights)
    return files


@pytest.fixture(scope="session")
def dino_frames() -> list[Frame]:
    """Four frames of noise: the first three of one size."""
    rng = np.random.default_rng(0)
    sizes = [(60, 90), (60, 90), (60, 90), (90, 60)]
    return [
        Frame(index=i, time=i / 8, image=rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for i, size in enumerate(sizes)
    ]
