"""One file of weights in the original layout: told by its header, refused where it could run code."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from msdiffusion.backbone.configs import skeleton_unet
from msdiffusion.backbone.single_file import check_shapes, names_single_file, read_single_file
from msdiffusion.errors import WeightsError


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_the_header_tells_kind_and_sizes(single_file, sd1_single_file):
    xl, one = read_single_file(single_file), read_single_file(sd1_single_file)
    assert (xl.kind, xl.phrase_width, xl.cross_attentions) == ("sdxl", 16, (7, 48))
    assert (one.kind, one.phrase_width, one.cross_attentions) == ("sd1", 20, (7, 20))


def test_a_file_is_told_from_a_folder_and_a_hub_name(tmp_path, single_file):
    (tmp_path / "folder.bin").mkdir()
    assert names_single_file(single_file)
    assert names_single_file("missing/model.ckpt")
    assert not names_single_file(tmp_path / "folder.bin")
    assert not names_single_file("stabilityai/stable-diffusion-xl-base-1.0")


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model", "model.safetensors"])
def test_a_pickle_is_refused_and_never_runs(tmp_path, name):
    trace = tmp_path / "it_ran"
    (tmp_path / name).write_bytes(pickle.dumps(Malice(trace)))
    with pytest.raises(WeightsError, match="can run any code|not a safetensors file"):
        read_single_file(tmp_path / name)
    torch.save({"state_dict": Malice(trace)}, tmp_path / name)
    with pytest.raises(WeightsError, match="can run any code|not a safetensors file"):
        read_single_file(tmp_path / name)
    assert not trace.exists()


def test_missing_and_foreign_files(tmp_path, single_file):
    with pytest.raises(WeightsError, match="no such file"):
        read_single_file(tmp_path / "model.safetensors")
    weights = load_file(single_file)
    for name, kept in (
        ("unet_only", "model.diffusion_model."),
        ("text_only", "conditioner."),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor for key, tensor in weights.items() if key.startswith(kept)}, path)
        with pytest.raises(WeightsError, match="no Stable Diffusion checkpoint in the original layout"):
            read_single_file(path)


@pytest.mark.parametrize("shape", [(), (16,), (1, 16, 16)])
@pytest.mark.parametrize("name", ["position_embedding.weight", "attn2.to_k.weight"])
def test_weights_that_are_no_matrices(single_file, tmp_path, name, shape):
    weights = load_file(single_file)
    key = next(key for key in weights if key.endswith(name))
    save_file({**weights, key: torch.zeros(shape)}, tmp_path / "broken.safetensors")
    with pytest.raises(WeightsError, match=rf"is broken: {key} is no matrix"):
        read_single_file(tmp_path / "broken.safetensors")


def test_a_unet_of_another_architecture_than_the_config(single_file, sd1_single_file, tiny_model_dir, tmp_path):
    unet = skeleton_unet(tiny_model_dir / "base")
    check_shapes(read_single_file(single_file), "unet", unet, "here")
    with pytest.raises(WeightsError, match=r"has no label_emb.*which the config of here asks for: base_config="):
        check_shapes(read_single_file(sd1_single_file), "unet", unet, "here")
    weights = load_file(single_file)
    key = "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight"
    key = key if key in weights else next(name for name in weights if name.endswith("attn2.to_k.weight"))
    save_file({**weights, key: torch.zeros(16, 50)}, tmp_path / "wide.safetensors")
    with pytest.raises(WeightsError, match=r"attn2\.to_k\.weight has shape \(16, 50\), the config asks for \(16, 48\)"):
        check_shapes(read_single_file(tmp_path / "wide.safetensors"), "unet", unet, "here")
    del weights[key]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(WeightsError, match=r"has shape nothing, the config asks for \(16, 48\)"):
        check_shapes(read_single_file(tmp_path / "less.safetensors"), "unet", unet, "here")
