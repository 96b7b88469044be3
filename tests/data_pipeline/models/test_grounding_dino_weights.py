import json

import pytest
import torch

from data_pipeline.convert import main
from data_pipeline.errors import InputError
from data_pipeline.models.detector import Question
from data_pipeline.models.grounding import Preprocessing
from data_pipeline.models.grounding_dino import (
    DISPENSABLE,
    GroundingDino,
    load_grounding_dino,
    read_package_config,
    read_weights,
)
from data_pipeline.models.grounding_dino_hf import GroundingDinoHF, load_grounding_dino_hf
from data_pipeline.models.grounding_dino_weights import (
    convert_to_hf,
    convert_to_package,
    hf_config,
    package_config,
    to_hf,
    to_package,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def hf_folder(dino_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    convert_to_hf(dino_files.config, dino_files.weights, str(dino_files.bert), folder)
    return folder


@pytest.fixture(scope="module")
def both(dino_files, hf_folder):
    settings = {"box_threshold": 0.05, "nms_iou": 0.5, "image_size": 96, "batch_size": 4}
    package = load_grounding_dino(dino_files.config, dino_files.weights, str(dino_files.bert), "cpu")
    return GroundingDino(package, **settings), GroundingDinoHF(
        *load_grounding_dino_hf(str(hf_folder), "cpu"), **settings
    )


def test_both_libraries_answer_alike(both, dino_frames):
    """One network, two programs: different captions, padded to one length, in one batch."""
    prepare = Preprocessing().resized_to(96)
    pixels = torch.stack([prepare(frame.image) for frame in dino_frames[:3]])
    texts = ["dog .", "red ball . cat . a dog .", "a cat ."]
    with torch.inference_mode():
        (logits, boxes), (other_logits, other_boxes) = (one.forward(pixels, texts) for one in both)
    assert logits.shape == other_logits.shape == (3, 30, 256)
    finite = torch.isfinite(logits)
    assert torch.equal(finite, torch.isfinite(other_logits))
    assert logits[finite].std() > 0.5  # they say something
    assert (logits[finite] - other_logits[finite]).abs().max() < 1e-4
    assert boxes.std(dim=1).min() > 0.05
    assert (boxes - other_boxes).abs().max() < 1e-5


def test_both_detectors_answer_alike(both, dino_frames, make_entity):
    questions = [
        Question(video=None, frame=frame, entities=tuple(make_entity(phrase) for phrase in phrases))
        for frame, phrases in zip(dino_frames, (["dog"], ["red ball", "cat"], ["a cat", "dog"], ["ball"]), strict=True)
    ]
    first, second = (one.detect(questions) for one in both)
    assert [len(found) for found in first] == [len(found) for found in second]
    assert sum(len(found) for found in first) > 10
    for one, other in zip(sum(first, ()), sum(second, ()), strict=True):
        assert one.entity == other.entity
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert one.box == pytest.approx(other.box, abs=1e-5)


def test_round_trip_is_exact(dino_files, hf_folder, tmp_path):
    convert_to_package(str(hf_folder), tmp_path / "package")
    modes = {path.stat().st_mode for folder in (hf_folder, tmp_path / "package") for path in folder.glob("*[nsy]")
             if path.is_file()}  # fmt: skip
    assert len(modes) == 1, "weights may be read by whoever may read the configuration"
    original, returned = read_weights(dino_files.weights), read_weights(tmp_path / "package/model.safetensors")
    lost = {name for name in original if name not in returned}
    assert all(any(part in name for part in DISPENSABLE) for name in lost - {"label_enc.weight"})
    assert len(returned) > 300
    for name, tensor in returned.items():
        assert torch.equal(tensor, original[name]), name
    settings, kept = read_package_config(dino_files.config), read_package_config(tmp_path / "package/config.py")
    different = {name for name in settings if kept[name] != settings[name]}
    assert different == {"dn_labelbook_size"}  # of the training, which transformers does not know
    # The written directory loads by itself, with the text encoder beside it, and converts to the same files again.
    load_grounding_dino(tmp_path / "package/config.py", tmp_path / "package/model.safetensors", "", "cpu")
    convert_to_hf(tmp_path / "package/config.py", tmp_path / "package/model.safetensors", "", tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (hf_folder / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads((hf_folder / "config.json").read_text())


def test_names_of_query_key_and_value():
    block = torch.arange(12.0).reshape(6, 2)
    name = "transformer.decoder.layers.3.ca_text.in_proj_weight"
    converted = to_hf({name: block, "bert.pooler.dense.bias": block})
    place = "model.decoder.layers.3.encoder_attn_text"
    assert list(converted) == [f"{place}.{part}.weight" for part in ("query", "key", "value")]
    assert torch.equal(converted[f"{place}.key.weight"], block[2:4])
    assert torch.equal(to_package(converted, [name, "bert.pooler.dense.bias"])[name], block)
    del converted[f"{place}.value.weight"]
    with pytest.raises(InputError, match=f"the weights lack {place}.value.weight, which the package calls {name}"):
        to_package(converted, [name])


def test_settings_without_a_counterpart(dino_files):
    settings = read_package_config(dino_files.config)
    config = hf_config(settings, {})
    assert config.encoder_attention_heads == config.decoder_attention_heads == 4
    assert config.encoder_ffn_dim == config.decoder_ffn_dim == 64
    assert config.disable_custom_kernels
    with pytest.raises(InputError, match="has two_stage_type = 'standard', not 'no'"):
        hf_config({**settings, "two_stage_type": "no"}, {})
    with pytest.raises(InputError, match="the backbone 'resnet50' has no counterpart; known are swin_T_224_1k"):
        hf_config({**settings, "backbone": "resnet50"}, {})
    with pytest.raises(InputError, match="one number for positional_embedding_temperature; pe_temperatureW = 30"):
        hf_config({**settings, "pe_temperatureW": 30}, {})
    with pytest.raises(InputError, match="the configuration lacks nheads"):
        hf_config({name: value for name, value in settings.items() if name != "nheads"}, {})
    for change, message in (
        ({"d_model": 64}, "256 channels are wired into the package; this model has d_model = 64"),
        ({"decoder_ffn_dim": 32}, "one number for dim_feedforward; decoder_ffn_dim = 32 differs"),
        ({"two_stage": False}, "the package needs two stages"),
    ):
        changed = hf_config(settings, {})
        for name, value in change.items():
            setattr(changed, name, value)
        with pytest.raises(InputError, match=message):
            package_config(changed)
    config.backbone_config.embed_dim = 24
    with pytest.raises(InputError, match="the package builds the backbones swin_T_224_1k.* none of which has"):
        package_config(config)


def test_the_command(dino_files, hf_folder, tmp_path, capsys):
    source = str(dino_files.config.parent)
    command = ["groundingdino", "--to", "hf", source, str(tmp_path / "out"), "--text-encoder", str(dino_files.bert)]
    assert main(command) == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (hf_folder / "model.safetensors").read_bytes()
    assert main(command) == 2
    assert "is not empty: choose a new directory" in capsys.readouterr().err
    assert main(["groundingdino", "--to", "hf", str(hf_folder), str(tmp_path / "other")]) == 2
    assert f"error: IN: {hf_folder} has no configuration (*.py)" in capsys.readouterr().err
    assert main(["groundingdino", "--to", "package", source, str(tmp_path / "other"), "--config", "x.py"]) == 2
    assert "belong to --to hf" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_source_that_does_not_load_is_called_by_the_name_of_the_argument(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    command = ["groundingdino", "--to", "package", str(tmp_path / "empty"), str(tmp_path / "out")]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"error: IN: the directory {tmp_path / 'empty'} lacks its configuration")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / "empty" / name).write_text("{}")
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("error: IN: cannot load a Grounding DINO from ")
    assert not (tmp_path / "out").exists()
