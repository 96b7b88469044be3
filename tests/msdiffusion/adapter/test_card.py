"""The card that is written beside an adapter: true, readable by hubs, and never over somebody's own words."""

import re
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.card import is_generated, model_card, write_card
from msdiffusion.adapter.config import AdapterConfig
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.generation.generate import MSDiffusion


@pytest.fixture(scope="module")
def adapter(tiny_model_dir):
    return MSAdapter.from_pretrained(tiny_model_dir)


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_header_is_what_hubs_read(adapter):
    card = model_card(adapter, "owner/name", license="openrail++")
    fields = header(card)
    assert fields["license"] == "openrail++"
    assert fields["library_name"] == "msdiffusion"
    assert fields["pipeline_tag"] == "text-to-image"
    assert "subject-driven" in fields["tags"]
    assert "base_model" not in fields  # a folder is no repository
    with torch.device("meta"):
        released = MSAdapter(
            AdapterConfig(resampler=ResamplerParams(image_width=1664, phrase_width=768, output_width=2048)), {"a": 640}
        )
    card = model_card(released, "owner/name")
    assert "license" not in header(card), "nobody said so"
    assert header(card)["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    for fact in ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "1664 wide", "512 px", "scale 0.6", "squash", "2048 wide"):
        assert fact in card
    assert f"{sum(weight.numel() for weight in released.parameters()):,}" in card


def test_the_example_runs(tiny_model_dir, tmp_path, monkeypatch):
    """As it stands there, beside the two pictures that it names."""
    MSDiffusion.from_pretrained(tiny_model_dir, device="cpu").save_pretrained(tmp_path / "adapter")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "adapter" / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    for name in ("dog.png", "teapot.png"):
        Image.new("RGBA", (20, 20), (200, 10, 10, 255)).save(name)
    exec(compile(code, "README.md", "exec"), {})
    assert Image.open("picture.png").size == (64, 64)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/ann@lab/models/base", "base"),
        ("/home/ann/base@2", "base@2"),
        ("open_clip:ViT-B-32@/home/ann@lab/clip.safetensors", "open_clip:ViT-B-32@clip.safetensors"),
        ("open_clip:ViT-B-32/laion2b", "open_clip:ViT-B-32/laion2b"),
        ("owner/name", "owner/name"),
    ],
)
def test_places_on_this_machine_are_not_told(name, shown, adapter, monkeypatch):
    monkeypatch.setattr(adapter, "config", replace(adapter.config, base_model=name, image_encoder=name))
    card = model_card(adapter, "owner/adapter")
    assert f"| base model | `{shown}` |" in card
    assert f"`{shown}`, {adapter.config.resampler.image_width} wide" in card
    assert "/home" not in card
    assert "@lab" not in card


def test_a_changed_card_is_kept_and_a_generated_one_renewed(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    assert write_card(tmp_path, adapter)
    first = path.read_text()
    assert is_generated(first)
    assert write_card(tmp_path, adapter, "owner/name")
    assert 'from_pretrained("owner/name")' in path.read_text()
    for text in ("my own words", first.replace("several subjects", "many subjects"), first + "One more line.\n"):
        path.write_text(text)
        assert not is_generated(text)
        assert not write_card(tmp_path, adapter)
        assert path.read_text() == text


def test_the_card_says_what_config_json_says(tiny_model_dir, tmp_path):
    """Where the models are is known when the folder is written, not before."""
    model = MSDiffusion.from_pretrained(tiny_model_dir, device="cpu")
    model.save_pretrained(tmp_path, include_backbone=True)
    assert "| base model | `base` |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
