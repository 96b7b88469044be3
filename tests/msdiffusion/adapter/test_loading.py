"""An adapter and what it needs: found on disk and on the hub (replaced here), seen to fit before weights are read."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPVisionConfig

import msdiffusion.adapter.loading
from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.config import AdapterConfig
from msdiffusion.adapter.loading import Sources, check_encoders, find_adapter, load_adapter
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.generation.generate import MSDiffusion
from msdiffusion.places import REPOSITORY


@pytest.fixture
def light(monkeypatch):
    """Weights of frozen models may not be read."""

    def started(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(Backbone, "from_pretrained", started)


@pytest.fixture
def official_surroundings(golden_tensors, tmp_path):
    """Folders with the configs, and nothing else, that the official file of the golden tensors was made for."""
    _, config = golden_tensors("unet")
    with torch.device("meta"):
        UNet2DConditionModel(**config["unet_config"]).save_config(tmp_path / "base" / "unet")
    CLIPTextConfig(hidden_size=24).save_pretrained(tmp_path / "base" / "text_encoder")
    CLIPVisionConfig(hidden_size=48).save_pretrained(tmp_path / "encoder")
    return {"base_model": tmp_path / "base", "image_encoder": tmp_path / "encoder", "head_width": 16}


class Hub:
    """snapshot_download of one repository, which remembers what was asked for."""

    def __init__(self, folder, cache):
        self.folder, self.cache, self.patterns = folder, cache, []

    def __call__(self, name, allow_patterns):
        assert name == "owner/name"
        self.patterns.append(list(allow_patterns))
        for path in self.folder.rglob("*"):
            inside = path.relative_to(self.folder)
            asked = any(inside.match(pattern) or str(inside).startswith(pattern.removesuffix("**"))
                        for pattern in allow_patterns if pattern.endswith("/**") or inside.match(pattern))  # fmt: skip
            if path.is_file() and asked:
                (self.cache / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / inside)
        return str(self.cache)


# The official release


def test_an_official_repository_is_one_file(official_adapter_file, official_surroundings, tmp_path, monkeypatch, light):
    """Of the release, ms_adapter.bin alone is downloaded, not the pictures beside it."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    for folder in (repository / "imgs", cache):
        folder.mkdir(parents=True)
    shutil.copy(official_adapter_file, repository / "ms_adapter.bin")
    (repository / "imgs" / "demo.png").write_bytes(b"large")
    (repository / "README.md").write_text("the release")
    hub = Hub(repository, cache)
    monkeypatch.setattr(msdiffusion.adapter.loading, "snapshot_download", hub)
    found = load_adapter("owner/name", **official_surroundings)
    assert hub.patterns == [["config.json"], ["ms_adapter.bin"]]
    assert [path.name for path in cache.iterdir()] == ["ms_adapter.bin"]
    assert len(found.adapter.layers) == 11
    assert found.adapter.config.reference_fit == "squash"
    assert found.sources == Sources(
        str(official_surroundings["base_model"]), str(official_surroundings["image_encoder"])
    )
    assert found.unet.device.type == "meta"


def test_an_official_folder_is_known_by_its_file(official_adapter_file, official_surroundings, tmp_path):
    folder = tmp_path / "MS-Diffusion"
    folder.mkdir()
    shutil.copy(official_adapter_file, folder / "ms_adapter.bin")
    assert find_adapter(folder) == folder / "ms_adapter.bin"
    assert len(load_adapter(folder, **official_surroundings).adapter.layers) == 11
    for text in ("{", '{"model_type": "other"}', "[]"):  # somebody else's config.json says nothing
        (folder / "config.json").write_text(text)
        assert find_adapter(folder) == folder / "ms_adapter.bin"
    (folder / "config.json").write_text('{"schema": "msdiffusion.adapter/1"}')
    assert find_adapter(folder) == folder


def test_the_release_is_loaded_with_sdxl_and_bigg(official_adapter_file, golden_tensors, tmp_path, monkeypatch):
    asked = []
    _, config = golden_tensors("unet")

    def skeleton(base_model, base_config):
        asked.append((base_model, base_config))
        with torch.device("meta"):
            return UNet2DConditionModel(**config["unet_config"])

    monkeypatch.setattr(msdiffusion.adapter.loading, "skeleton_unet", skeleton)
    monkeypatch.setattr(msdiffusion.adapter.loading, "encoder_widths", lambda *names: asked.append(names) or (24, 48))
    found = load_adapter(official_adapter_file, head_width=16)
    xl, bigg = "stabilityai/stable-diffusion-xl-base-1.0", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
    assert found.sources == Sources(xl, bigg)
    assert asked == [(xl, None), (xl, bigg, "tokens")]
    assert (found.adapter.config.base_model, found.adapter.config.image_encoder) == (xl, bigg)
    # A fine-tune in one file has its configs from SDXL, and config.json says so.
    monkeypatch.chdir(tmp_path)
    Path("tune.safetensors").touch()
    found = load_adapter(official_adapter_file, "tune.safetensors", head_width=16)
    assert asked[2] == ("tune.safetensors", xl)
    assert (found.adapter.config.base_model, found.adapter.config.base_config) == ("tune.safetensors", xl)


def test_a_malicious_official_file_never_runs(official_surroundings, tmp_path):
    trace = tmp_path / "it_ran"

    class Malice:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    for write in (torch.save, lambda record, path: path.write_bytes(pickle.dumps(record, protocol=2))):
        write({"image_proj": Malice()}, tmp_path / "ms_adapter.bin")
        with pytest.raises(WeightsError, match="not a file of tensors only, so it is not opened"):
            load_adapter(tmp_path / "ms_adapter.bin", **official_surroundings)
    assert not trace.exists()


# Our folders on the hub


def test_our_repository_brings_its_models_and_nothing_else(tiny_model_dir, tmp_path, monkeypatch):
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    cache.mkdir()
    shutil.copytree(tiny_model_dir, repository)
    (repository / "ms_adapter.bin").write_bytes(b"the same again")
    (repository / "demo.png").write_bytes(b"large")
    hub = Hub(repository, cache)
    monkeypatch.setattr(msdiffusion.adapter.loading, "snapshot_download", hub)
    model = MSDiffusion.from_pretrained("owner/name", device="cpu")
    assert hub.patterns[0] == ["config.json"]
    assert {path.name for path in cache.iterdir()} == {"config.json", "adapter.safetensors", "base", "image_encoder"}
    assert model.sources == Sources(str(cache / "base"), str(cache / "image_encoder"))


def test_a_repository_that_is_not_there(monkeypatch):
    def offline(name, allow_patterns):
        raise OSError("offline")

    monkeypatch.setattr(msdiffusion.adapter.loading, "snapshot_download", offline)
    with pytest.raises(WeightsError, match=r"no such folder: nobody/nothing; .*offline"):
        find_adapter("nobody/nothing")


def test_missing_files(tmp_path):
    with pytest.raises(WeightsError, match=r"no such file or folder: .*adapter\.bin"):
        find_adapter(tmp_path / "adapter.bin")
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_adapter(tmp_path)


# A base in one file


def test_a_base_in_one_file_has_its_configs_from_the_adapters_own_base(tiny_model_dir, single_file, tmp_path):
    model = MSDiffusion.from_pretrained(tiny_model_dir, base_model=single_file, device="cpu")
    assert model.sources == Sources(
        str(single_file), str(tiny_model_dir / "image_encoder"), str(tiny_model_dir / "base")
    )
    original = MSDiffusion.from_pretrained(tiny_model_dir, device="cpu")
    for ours, theirs in zip(model.backbone.unet.parameters(), original.backbone.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # Saved and loaded again: config.json says where both are.
    model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["base_model"] == str(single_file)
    assert record["base_config"] == str(tiny_model_dir / "base")
    assert load_adapter(tmp_path).sources == model.sources.absolute()
    # And with another base of the usual kind, the configs are not wanted any more.
    assert load_adapter(tmp_path, base_model=tiny_model_dir / "base").sources.base_config is None


def test_a_base_in_one_file_beside_the_adapter(tiny_model_dir, single_file, tmp_path):
    adapter = MSAdapter.from_pretrained(tiny_model_dir)
    shutil.copy(single_file, tmp_path / "tune.safetensors")
    adapter.save_pretrained(
        tmp_path, base_model="tune.safetensors", image_encoder=str(tiny_model_dir / "image_encoder")
    )
    with pytest.raises(WeightsError, match="holds weights only: give base_config="):
        load_adapter(tmp_path)
    found = load_adapter(tmp_path, base_config=tiny_model_dir / "base")
    assert found.sources.base_model == str(tmp_path / "tune.safetensors")


def test_a_base_in_one_file_that_cannot_be(tiny_model_dir, sd1_single_file, tmp_path, light):
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"model\.ckpt is not opened: .*pickle"):
        MSDiffusion.from_pretrained(tiny_model_dir, base_model=tmp_path / "model.ckpt")
    with pytest.raises(WeightsError, match="no such file or folder: .*tune.safetensors"):
        MSDiffusion.from_pretrained(tiny_model_dir, base_model=tmp_path / "tune.safetensors")
    with pytest.raises(
        WeightsError, match=r"StableDiffusionPipeline \(7 cross-attention layers that read text 20 wide"
    ):
        MSDiffusion.from_pretrained(tiny_model_dir, base_model=sd1_single_file)


# Parts of different models


def test_a_base_of_another_kind_is_named_with_both_sizes(tiny_model_dir, tiny_sd1_model_dir, light):
    with pytest.raises(WeightsError) as error:
        MSDiffusion.from_pretrained(tiny_model_dir, base_model=tiny_sd1_model_dir / "base")
    own = tiny_model_dir / "base"
    assert "7 cross-attention layers that read text 48 wide, but the base model" in str(error.value)
    assert f"has 7 that read text 20 wide: use {own} or a fine-tune of it" in str(error.value)


def test_layers_of_another_width_are_named(tiny_model_dir, tmp_path, light):
    shutil.copytree(tiny_model_dir / "base", tmp_path / "base")
    path = tmp_path / "base" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [8, 16, 32]}))
    with pytest.raises(WeightsError, match=r"the UNet's \(32, 48\).*the base model is .*: use .* or a fine-tune of it"):
        MSDiffusion.from_pretrained(tiny_model_dir, base_model=tmp_path / "base")


def released(**config):
    return AdapterConfig(resampler=ResamplerParams(image_width=1664, phrase_width=768, output_width=2048), **config)


@pytest.mark.parametrize(
    ("widths", "sources", "message"),
    [
        (
            (768, 1280),
            Sources("stabilityai/stable-diffusion-xl-base-1.0", "open_clip:ViT-H-14"),
            r"image tokens 1664 wide, but this image encoder gives 1280 \(open_clip:ViT-H-14\): use the image encoder "
            r"that the adapter was trained on, laion/CLIP-ViT-bigG-14-laion2B-39B-b160k \(or open_clip:ViT-bigG-14\)",
        ),
        (
            (1024, 1664),
            Sources("stabilityai/stable-diffusion-2-1", "open_clip:ViT-bigG-14"),
            r"phrase embeddings 768 wide, but this text encoder gives 1024 \(stabilityai/stable-diffusion-2-1\): use "
            "the text encoder that the adapter was trained on, of stabilityai/stable-diffusion-xl-base-1.0",
        ),
        ((768, 1024), None, "gives 1024: use the image encoder that the adapter was trained on, laion/CLIP-ViT-bigG"),
    ],
)
def test_a_wrong_encoder_is_named_with_the_right_one(widths, sources, message):
    with pytest.raises(WeightsError, match=message):
        check_encoders(released(), *widths, sources)


def test_encoders_that_fit_say_nothing():
    check_encoders(released(), 768, 1664)


def test_a_wrong_encoder_is_seen_before_weights_are_read(tiny_model_dir, light):
    with pytest.raises(WeightsError, match=r"24 wide, but this image encoder gives 1664 \(open_clip:ViT-bigG-14\)"):
        MSDiffusion.from_pretrained(tiny_model_dir, image_encoder="open_clip:ViT-bigG-14")


# Stable Diffusion 1.x


def test_an_adapter_of_1x_loads(tiny_sd1_model_dir, tmp_path):
    model = MSDiffusion.from_pretrained(tiny_sd1_model_dir, device="cpu")
    assert model.backbone.kind == "sd1"
    model.save_pretrained(tmp_path, include_backbone=True)
    again = MSDiffusion.from_pretrained(tmp_path, device="cpu")
    for name, weight in again.backbone.unet.state_dict().items():
        assert torch.equal(weight, model.backbone.unet.state_dict()[name])


def test_sources_know_what_is_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert Sources("base", "owner/name").local
    assert not Sources("owner/base", "open_clip:ViT-H-14").local
    assert Sources("owner/base", "open_clip:ViT-H-14@w.safetensors").local
    assert Sources("base", "owner/name", "owner/xl").absolute() == Sources(
        str(tmp_path / "base"), "owner/name", "owner/xl"
    )


# Checkpoints and runs


@pytest.fixture
def checkpoint(tiny_model_dir, tmp_path):
    """Function: changes -> a file like those of ``lightning fit``; the average is twice as large as the weights."""

    def write(name="last.ckpt", **changes):
        adapter = MSAdapter.from_pretrained(tiny_model_dir)
        weights = adapter.state_dict()
        config = replace(
            adapter.config, base_model=str(tiny_model_dir / "base"), image_encoder=str(tiny_model_dir / "image_encoder")
        )
        record = {
            "state_dict": {f"adapter.{key}": value for key, value in weights.items()}
            | {f"averaged.module.{key}": 2 * value for key, value in weights.items()}
            | {"averaged.n_averaged": torch.tensor(3)},
            "adapter_config": config.to_json(),
            "optimizer_states": [],
        }
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({key: value for key, value in {**record, **changes}.items() if value is not None}, path)
        return path

    return write


def test_a_checkpoint_is_loaded_with_its_averaged_weights(tiny_model_dir, checkpoint, light):
    found = load_adapter(checkpoint())
    assert found.sources == Sources(str(tiny_model_dir / "base"), str(tiny_model_dir / "image_encoder"))
    for name, weight in MSAdapter.from_pretrained(tiny_model_dir).state_dict().items():
        assert torch.equal(found.adapter.state_dict()[name], 2 * weight), name


def test_without_an_average_the_weights_themselves_are_taken(tiny_model_dir, checkpoint):
    weights = MSAdapter.from_pretrained(tiny_model_dir).state_dict()
    path = checkpoint(state_dict={f"adapter.{key}": value for key, value in weights.items()})
    for name, weight in load_adapter(path).adapter.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_checkpoint_that_is_replaced_keeps_what_was_loaded(checkpoint):
    path = checkpoint()
    adapter = load_adapter(path).adapter
    before = {name: weight.clone() for name, weight in adapter.state_dict().items()}
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(weight, before[name]) for name, weight in adapter.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_config": None}, r"no checkpoint of an adapter, for it has no adapter_config: give one"),
        ({"state_dict": None}, r"it has no state_dict"),
        ({"state_dict": {"unet.weight": torch.ones(1)}}, r"no weights of an adapter, but \['unet\.weight'\]"),
        ({"state_dict": {"adapter.layers.x.to_k.weight": torch.ones(2, 2)}}, r"missing or unexpected blocks"),
        ({"adapter_config": '{"schema": "other/1"}'}, r"adapter_config in .*last\.ckpt has schema 'other/1'"),
    ],
)
def test_a_checkpoint_of_something_else_is_told(checkpoint, changes, message):
    with pytest.raises(WeightsError, match=message):
        load_adapter(checkpoint(**changes))


def test_a_file_that_is_no_checkpoint_is_told(tmp_path):
    with pytest.raises(WeightsError, match=r"no such file or folder: .*none\.ckpt"):
        load_adapter(tmp_path / "none.ckpt")
    path = tmp_path / "text.ckpt"
    path.write_text("not a checkpoint")
    with pytest.raises(WeightsError, match=r"text\.ckpt is not a file of tensors only"):
        load_adapter(path)
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match="it has no state_dict"):
        load_adapter(path)


def test_a_malicious_checkpoint_never_runs(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "broken_into"), "w"))

    torch.save({"state_dict": Malicious()}, tmp_path / "evil.ckpt")
    with pytest.raises(
        WeightsError, match=r"evil\.ckpt is not a file of tensors only, so it is not opened: it is a pickle"
    ):
        load_adapter(tmp_path / "evil.ckpt")
    assert not (tmp_path / "broken_into").exists()


def test_settings_of_the_official_file_are_refused_for_a_checkpoint(checkpoint):
    with pytest.raises(RequestError, match="head_width is for the official"):
        load_adapter(checkpoint(), head_width=16)


def test_of_a_run_the_best_adapter_is_taken_then_the_newest_then_a_checkpoint(tiny_model_dir, checkpoint, tmp_path):
    run = tmp_path / "run"
    last = checkpoint("run/checkpoints/last.ckpt")
    assert find_adapter(run) == last
    best = checkpoint("run/checkpoints/best.ckpt")
    assert find_adapter(run) == best
    for folder in ("adapter", "best"):
        MSAdapter.from_pretrained(tiny_model_dir).save_pretrained(run / folder)
        assert find_adapter(run) == run / folder
    # a folder that is an adapter is not searched for another one
    MSAdapter.from_pretrained(tiny_model_dir).save_pretrained(run)
    assert find_adapter(run) == run


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"base_model": "/another/machine/base"}, "base_model"),
        ({"base_model": "../base"}, "base_model"),
        ({"base_model": "base"}, "base_model"),
        ({"image_encoder": "models/../image_encoder"}, "image_encoder"),
        ({"image_encoder": "image_encoder"}, "image_encoder"),
    ],
)
def test_an_adapter_copied_without_its_models_names_the_way_out(changes, option, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "copy"
    adapter = MSAdapter.from_pretrained(tiny_model_dir)
    places = {
        name: str(tiny_model_dir / name.replace("base_model", "base")) for name in ("base_model", "image_encoder")
    }
    adapter.save_pretrained(folder, **{**places, **changes})
    words = option.replace("_", " ")
    with pytest.raises(WeightsError, match=rf"no {words} for the adapter .*copy: .*: give {option}=") as caught:
        load_adapter(folder)
    assert "connect" not in str(caught.value)
    load_adapter(folder, **{option: places[option]})


def test_a_hub_that_cannot_be_asked_is_told_with_the_way_out(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"no such folder: no/thing; .* either: offline .HF_.*, or not all of it$"):
        load_adapter("no/thing")
    places = {"base_model": "owner/name", "image_encoder": str(tiny_model_dir / "image_encoder")}
    MSAdapter.from_pretrained(tiny_model_dir).save_pretrained(tmp_path, **places)
    with pytest.raises(
        WeightsError,
        match=r"from 'owner/name': offline .HF_.*, or not all of it \(no such folder here, .* base_model= takes",
    ):
        load_adapter(tmp_path)


def test_what_is_no_adapter_is_told_where_it_belongs(tiny_model_dir, tmp_path):
    many = {f"a_long_name_of_a_layer.{number}.weight": torch.zeros(1) for number in range(3000)}
    torch.save({"state_dict": many, "epoch": 3}, tmp_path / "training.bin")
    torch.save(many, tmp_path / "many.bin")
    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": many}, tmp_path / "checkpoints" / "step-10.ckpt")
    for given, message in (
        (tiny_model_dir / "adapter.safetensors", r"is one file of an adapter: give its folder, \S*tiny_model\d*$"),
        (tiny_model_dir / "config.json", "is one file of an adapter: give its folder"),
        (tiny_model_dir / "base" / "unet" / "diffusion_pytorch_model.safetensors", "goes to base_model=, a LoRA to"),
        (tiny_model_dir / "base", "is a base model, not an adapter: give it as base_model="),
        (tmp_path / "training.bin", "but a checkpoint of a training: give the run's folder, or .* ends in .ckpt"),
        (tmp_path / "many.bin", "is no official ms_adapter.bin: needs image_proj and ms_adapter, found"),
        (tmp_path / "checkpoints", "holds checkpoints: give one of them, such as .*step-10.ckpt"),
        (tmp_path / "checkpoints" / "step-10.ckpt", "is no checkpoint of an adapter, for it has no adapter_config"),
        (tiny_model_dir.parent, "is no adapter, but holds some: give one of them, such as "),
        ("/no/such/place", "no such file or folder: '/no/such/place' .the adapter.$"),
        ("../no/such", "no such file or folder: '../no/such' .the adapter.$"),
        (
            "https://huggingface.co/owner/name",
            "is an address: a hub repository is given as owner/name, here owner/name",
        ),
        ("owner/name@main", "no such folder: owner/name@main; .* either: a repository is given as owner/name$"),
        (REPOSITORY / "README.md", "README.md is no adapter: that is a folder with"),
        (REPOSITORY / "Makefile", "Makefile is no adapter: that is a folder with"),
        ("", "an adapter is given by its folder, file or hub name, got ''"),
        (None, "an adapter is given by its folder, file or hub name, got None"),
    ):
        with pytest.raises(WeightsError, match=message) as caught:
            load_adapter(given)
        assert len(str(caught.value)) < 500, given
    for given, message in (
        ("/no/such/place", "no such file or folder: '/no/such/place' .base_model=.$"),
        ("https://huggingface.co/owner/name", "base_model=. is an address: .*, here owner/name$"),
        (
            REPOSITORY / "README.md",
            "the base model .*README.md is no model: give a folder, a hub name, or a .safetensors file",
        ),
        (tiny_model_dir, r"no unet/config.json there; \S*base has it$"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_adapter(tiny_model_dir, given)


def test_a_folder_given_in_place_of_another_is_told(tiny_model_dir):
    """Each has a config.json; the libraries would fill in the rest of a CLIP, or of a UNet, from their own defaults."""
    with pytest.raises(WeightsError, match=r"cannot load the UNet of the base model .*: no unet/config.json there"):
        load_adapter(tiny_model_dir, base_model=tiny_model_dir)
    with pytest.raises(WeightsError, match=r"cannot load the image encoder .* of model_type None: needed is clip"):
        load_adapter(tiny_model_dir, image_encoder=tiny_model_dir)
