import json
import shutil

import pytest

from msdiffusion.errors import WeightsError
from msdiffusion.generation.identity import frozen_name, identify


def test_identity(tiny_model_dir, tmp_path, official_adapter_file):
    ours = identify(str(tiny_model_dir), None, None, "float32")
    named = identify(str(tiny_model_dir), str(tiny_model_dir / "base"), None, "float32")
    assert named == ours, "the same base, however it is called"
    assert ours.model["adapter"] == tiny_model_dir.name
    assert ours.model["base_model"].startswith("base#")
    hub = identify(str(tiny_model_dir), "somebody/sdxl", "openai/clip", "float32").model
    assert (hub["base_model"], hub["image_encoder"]) == ("somebody/sdxl", "openai/clip")
    official = identify(str(official_adapter_file), None, None, "float32")
    assert official.model["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert official.defaults["scale"] == 0.6
    with pytest.raises(WeightsError, match=r"holds no config.json"):
        identify(str(tmp_path), None, None, "float32")


def test_other_weights_under_the_same_name_are_another_base(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "copy")
    ours = identify(str(tiny_model_dir), None, None, "float32").model
    copy = identify(str(tmp_path / "copy"), None, None, "float32").model
    assert {**copy, "adapter": ours["adapter"]} == ours
    [weights] = (tmp_path / "copy" / "base" / "unet").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert identify(str(tmp_path / "copy"), None, None, "float32").model["base_model"] != ours["base_model"]


@pytest.mark.parametrize(
    ("file", "part"),
    [
        ("config.json", "adapter_config"),
        ("base/scheduler/scheduler_config.json", "base_model"),
        ("base/model_index.json", "base_model"),
        ("base/unet/config.json", "base_model"),
        ("base/vae/config.json", "base_model"),
        ("base/text_encoder_2/config.json", "base_model"),
        ("base/tokenizer/tokenizer_config.json", "base_model"),
        ("image_encoder/preprocessor_config.json", "image_encoder"),
        ("image_encoder/config.json", "image_encoder"),
    ],
)
def test_other_settings_are_another_model(tiny_model_dir, tmp_path, file, part):
    shutil.copytree(tiny_model_dir, tmp_path / "copy")
    ours = identify(str(tmp_path / "copy"), None, None, "float32").model
    content = json.loads((tmp_path / "copy" / file).read_text())
    content.update({"regions": "everywhere"} if file == "config.json" else {"prediction_type": "other"})
    (tmp_path / "copy" / file).write_text(json.dumps(content))
    changed = identify(str(tmp_path / "copy"), None, None, "float32").model
    assert [name for name in ours if ours[name] != changed[name]] == [part]


def test_places_and_defaults_of_the_config_are_no_part_of_the_model(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    changes = {"base_model": str(tmp_path / "copy" / "base"), "defaults": {"scale": 0.1}}
    ours = identify(str(tmp_path / "copy"), None, None, "float32").model
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert identify(str(tmp_path / "copy"), None, None, "float32").model == ours


def test_no_place_of_this_machine_is_told(tiny_model_dir, single_file, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vision.safetensors").write_bytes(name.encode())
    encoders = [f"open_clip:ViT-B-32@{tmp_path / name / 'vision.safetensors'}" for name in ("a", "b")]
    models = [
        identify(str(tiny_model_dir), str(single_file), encoder, "float32", base_config=config).model
        for encoder, config in zip(encoders, (None, "owner/base"), strict=True)
    ]
    assert models[0]["image_encoder"].startswith("open_clip:ViT-B-32@vision.safetensors#")
    assert models[0]["image_encoder"] != models[1]["image_encoder"], "the same name, other weights"
    assert models[0]["base_model"].startswith("fine_tune.safetensors#")
    assert models[0]["base_config"].startswith("base#")
    assert models[1]["base_config"] == "owner/base"
    assert "/" not in "".join(models[0].values())
    assert frozen_name("open_clip:ViT-B-32/openai") == "open_clip:ViT-B-32/openai"


def test_a_base_is_known_by_what_it_computes(tiny_model_dir, tmp_path):
    """Not by the notes beside it, nor by the place that a library wrote into its configs."""
    base = shutil.copytree(tiny_model_dir / "base", tmp_path / "base")
    before = frozen_name(str(base))
    (base / "NOTES.txt").write_text("mine")
    (base / "unet" / "notes.json").write_text("{}")
    config = json.loads((base / "unet" / "config.json").read_text())
    places = {"old/place", "/other"}
    found = set()
    for place in places:
        text = json.dumps({**config, "_name_or_path": place}, indent=2, sort_keys=True) + "\n"
        (base / "unet" / "config.json").write_text(text)
        found.add(frozen_name(str(base)))
    assert found == {before}
    (base / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 8}))
    assert frozen_name(str(base)) != before
