import json

import numpy as np
import pytest
import torch

from data_pipeline.models.grounding_dino import (
    MAX_TOKENS,
    GroundingDino,
    _replaced_bert_wrapper,
    load_grounding_dino,
)
from data_pipeline.records import Frame, InputError, box_iou
from data_pipeline.steps.detect_boxes import DetectBoxes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "?", "dog", "cat", "red", "ball", "a", "##s"]
# The package's own configuration, with two layers of each kind. Swin-T and the width of 256 are wired into it.
CONFIG = """
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


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Configuration, random weights and BERT folder of a small Grounding DINO."""
    from groundingdino.models import build_model
    from groundingdino.util.slconfig import SLConfig
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("dino")
    bert, config, weights = folder / "bert", folder / "config.py", folder / "weights.pth"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(bert)
    (bert / "vocab.txt").write_text("\n".join(WORDS))
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    config.write_text(CONFIG.replace("; ", "\n"))
    settings = SLConfig.fromfile(str(config))
    settings.device, settings.text_encoder_type = "cpu", str(bert)
    with _replaced_bert_wrapper():
        model = build_model(settings)
    # Untrained heads answer every query alike: give them something to say.
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("backbone"):
            torch.nn.init.normal_(parameter, std=0.05)
    # "module." as a distributed training writes it, and a tensor that only training needs.
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": {**state, "module.label_enc.weight": torch.zeros(2)}}, weights)
    return config, weights, bert


@pytest.fixture(scope="module")
def detector(files):
    config, weights, bert = files
    model = load_grounding_dino(config, weights, str(bert), "cpu")
    return GroundingDino(model, box_threshold=0.05, nms_iou=0.5, image_size=96)


@pytest.fixture
def frame():
    return Frame(index=0, time=0.0, image=np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def test_boxes_of_all_phrases_in_one_question(detector, frame, make_entity):
    entities = (make_entity("dog"), make_entity("red ball"))
    found = detector.detect(None, frame, entities)
    assert found
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert one.entity in entities
        assert 0.05 <= one.score <= 1
        assert 0 <= one.box[0] < one.box[2] <= 1
        assert 0 <= one.box[1] < one.box[3] <= 1
    for entity in entities:
        boxes = [one.box for one in found if one.entity == entity]
        assert all(box_iou(a, b) <= 0.5 for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_phrase_is_scored_by_its_own_tokens(detector, frame, make_entity):
    caption, spans = detector.question(["dog", "red ball", "U.S. cats?"])
    assert caption == "dog . red ball . u s  cats  ."
    tokens = detector.model.tokenizer.convert_ids_to_tokens(detector.model.tokenizer(caption)["input_ids"])
    assert [tokens[span.start : span.stop] for span in spans][:2] == [["dog"], ["red", "ball"]]
    assert "." not in tokens[spans[2].start : spans[2].stop]
    assert tokens[spans[2].stop] == "."


def test_more_phrases_than_tokens_are_cut(detector):
    caption, spans = detector.question(["dog"] * 300)
    assert len(spans) == (MAX_TOKENS - 2) // 2
    assert len(detector.model.tokenizer(caption)["input_ids"]) <= MAX_TOKENS


def test_the_shim_equals_masked_attention_by_hand(detector):
    """A phrase's text features must not depend on the other phrases: the block mask has reached BERT."""
    model = detector.model
    features = []
    handle = model.feat_map.register_forward_hook(lambda module, args, output: features.append(output))
    pixels = torch.zeros(1, 3, 64, 64)
    with torch.inference_mode():
        model(pixels, captions=["dog ."])
        model(pixels, captions=["dog . red ball ."])
    handle.remove()
    torch.testing.assert_close(features[0][0, 1], features[1][0, 1], atol=1e-5, rtol=1e-5)


def test_the_step_loads_it_and_leaves_the_package_as_it_was(files):
    from groundingdino.models.GroundingDINO import bertwarper, groundingdino

    config, weights, bert = files
    step = DetectBoxes(detector="groundingdino", config=config, checkpoint=weights, text_encoder=str(bert))
    step.setup()
    assert isinstance(step._detector, GroundingDino)
    assert groundingdino.BertModelWarper is bertwarper.BertModelWarper


def test_files_that_do_not_serve(files, tmp_path):
    config, weights, bert = files
    broken = tmp_path / "broken.py"
    broken.write_text("backbone = (")
    with pytest.raises(InputError, match="cannot read the Grounding DINO configuration"):
        load_grounding_dino(broken, weights, str(bert), "cpu")
    with pytest.raises(InputError, match=r"text encoder '.*no-bert'[\s\S]*--detector-text-encoder DIR"):
        load_grounding_dino(config, weights, str(tmp_path / "no-bert"), "cpu")
    bad = tmp_path / "bad.pth"
    bad.write_bytes(b"not weights")
    with pytest.raises(InputError, match="cannot read Grounding DINO weights from"):
        load_grounding_dino(config, bad, str(bert), "cpu")
    torch.save({"model": {}}, bad)
    with pytest.raises(InputError, match="lacks .* tensors of the model"):
        load_grounding_dino(config, bad, str(bert), "cpu")
    torch.save({"model": {"feat_map.bias": torch.zeros(3)}}, bad)
    with pytest.raises(InputError, match="do not fit"):
        load_grounding_dino(config, bad, str(bert), "cpu")
