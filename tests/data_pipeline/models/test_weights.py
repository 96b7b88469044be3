"""The door for weights, by itself: what it takes, what it refuses, and the words."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from data_pipeline.errors import InputError
from data_pipeline.models.weights import (
    Heading,
    check_dtypes,
    check_finite,
    check_names,
    check_plain,
    check_weights,
    fill,
    load_network,
    read_headings,
    read_tensors,
    state_of,
)


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def weights(**changes):
    own = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    return {name: tensor for name, tensor in {**own, **changes}.items() if tensor is not None}


def test_a_network_gets_exactly_what_the_file_holds():
    given, ours = weights(), network()
    fill(ours, given, "a file")
    assert all(torch.equal(tensor, given[name]) for name, tensor in ours.state_dict().items())
    with torch.device("meta"):
        ours = network()
    fill(
        ours,
        {name: tensor.double() if name == "0.bias" else tensor for name, tensor in given.items()},
        "f",
        assign=True,
    )
    assert (ours[0].bias.dtype, ours[0].weight.device.type) == (torch.float64, "cpu")


def test_counters_may_be_lacking_or_left_over_but_not_where_they_would_stay_empty():
    given = weights(**{"1.num_batches_tracked": None, "0.position_ids": torch.arange(3)})
    fill(network(), given, "a file")
    with torch.device("meta"):
        empty = network()
    with pytest.raises(InputError, match=r"its files lack 1.num_batches_tracked"):
        fill(empty, given, "a file", assign=True)


def test_what_a_caller_allows_may_lack_or_is_left_out():
    given = weights(**{"0.bias": None, "head.weight": torch.zeros(2)})
    with pytest.raises(InputError, match=r"^f is incomplete: its files lack 0.bias; there are others, such as head"):
        fill(network(), given, "f")
    fill(network(), given, "f", may_lack=("bias",), left_out=("head.",))


WRONG = [
    (
        {"0.bias": None, "0.weight": None},
        r"^f is incomplete: its files lack 0.bias, 0.weight\. What is missing",
    ),
    (
        {"more": torch.zeros(1)},
        "^f holds tensors that have no place in this network: more: the weights are",
    ),
    ({"0.bias": torch.zeros(4)}, r"^f: 0.bias has shape \(4,\), the network needs \(3,\)"),
    ({"0.bias": torch.zeros(())}, r"^f: 0.bias has shape \(\), the network needs \(3,\)"),
    ({"0.bias": torch.zeros(3, dtype=torch.int32)}, "^f: 0.bias is int32: weights are floating-point numbers"),
    ({"0.bias": torch.zeros(3, dtype=torch.complex64)}, "^f: 0.bias is complex64"),
    ({"0.bias": torch.zeros(3, dtype=torch.bool)}, "^f: 0.bias is bool"),
    ({"1.num_batches_tracked": torch.tensor(1.5)}, "^f: 1.num_batches_tracked is float32: .* counters whole ones"),
    ({"0.bias": torch.tensor([0, float("nan"), 0])}, "^f: 0.bias holds 1 of 3 numbers that are NaN or infinite: get"),
    ({"1.running_var": torch.tensor([0, float("inf"), float("nan")])}, "^f: 1.running_var holds 2 of 3 numbers"),
    ({"0.bias": torch.tensor([70000.0, 0, 0]).half()}, r"holds 1 of 3 .* \(too large for half a precision\?\)"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_what_is_wrong_is_named_and_changes_nothing(changes, message):
    ours = network()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(InputError, match=message):
        fill(ours, weights(**changes), "f")
    with torch.device("meta"):
        empty = network()
    with pytest.raises(InputError, match=message):
        check_weights(empty, weights(**changes), "f")
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_long_lists_of_names_are_cut_off():
    with pytest.raises(InputError, match=r"lack a0, a1, a10 and 97 more; there are others, such as b0, which") as told:
        check_names("f", [f"a{k}" for k in range(100)], [f"b{k}" for k in range(100)])
    with pytest.raises(InputError) as long:
        check_names("f", ["x" * 10_000])
    assert max(len(str(told.value)), len(str(long.value))) < 500


def test_what_is_no_mapping_of_tensors():
    check_plain({"a": torch.zeros(3), "b": torch.zeros(4, 4)[1:, ::2], "c": torch.zeros(0)}, "f")
    for content, message in (
        ([1], "f holds a list: needed are tensors"),
        ({1: torch.zeros(1)}, "f: '1' is a Tensor: needed"),
        ({"a": 3}, "f: 'a' is a int: needed are tensors by name"),
        ({"a": torch.zeros(1).expand(3)}, "f: a is no plain tensor .*its numbers are not all in the file"),
        ({"a": torch.zeros(3, device="meta")}, "f: a is no plain tensor .*on meta"),
        ({"a": torch.eye(3).to_sparse()}, "f: a is no plain tensor .*sparse"),
    ):
        with pytest.raises(InputError, match=message):
            check_plain(content, "f")


def test_dtypes_of_headings():
    check_dtypes("f", {"a": Heading((1,), True, "F8_E4M3"), "b.position_ids": Heading((1,), False, "I64")})
    with pytest.raises(InputError, match="f: a is I8"):
        check_dtypes("f", {"a": Heading((1,), False, "I8")})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_one_number_among_many_is_found_wherever_it_is(dtype):
    for place in (0, 4097, 9999):
        tensor = torch.ones(10_000)
        check_finite([("a", tensor.to(dtype))], "f")
        tensor[place] = float("nan")
        with pytest.raises(InputError, match="f: a holds 1 of 10000"):
            check_finite([("a", tensor.to(dtype))], "f")


def test_the_largest_numbers_and_empty_tensors_are_finite():
    largest = torch.full((1000,), torch.finfo(torch.float32).max)
    check_finite([("a", largest), ("b", -largest), ("c", torch.zeros(0)), ("d", torch.tensor([1, 2]))], "f")
    assert set(state_of(network())) == set(network().state_dict())


class Flag:
    """Would set a flag when it is unpickled."""

    def __reduce__(self):
        return (setattr, (Flag, "is_set", True))


def test_files_that_are_none_of_tensors(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, path)
    assert torch.equal(read_tensors(path, ("model", "state_dict"))["a"], torch.ones(2))
    torch.save({"a": Flag()}, path)
    with pytest.raises(InputError, match="it is a pickle of more than tensors, which could run code") as told:
        read_tensors(path)
    assert "weights_only" not in str(told.value)
    assert not hasattr(Flag, "is_set")
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="is not a file of tensors only"):
        read_tensors(path)
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 100)
    for call in (read_tensors, lambda place: read_headings(place.parent, "w")):
        with pytest.raises(InputError, match=r"w\.safetensors is not a safetensors file"):
            call(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="no such file"):
        read_tensors(tmp_path / "nowhere.pth")


# ---- networks of transformers


@pytest.fixture
def tower(tmp_path):
    """A tiny CLIP vision tower in a folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=8, patch_size=8, projection_dim=4))
    model.save_pretrained(tmp_path)
    return tmp_path


def load(folder, **options):
    from transformers import CLIPVisionModelWithProjection

    return load_network(CLIPVisionModelWithProjection, folder, "tower", **options)


def test_parts_of_weights_are_all_looked_at(tower):
    from safetensors.torch import load_file

    held = load_file(tower / "model.safetensors")
    (tower / "model.safetensors").unlink()
    names = sorted(held)
    split = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in split.items():
        save_file({name: held[name] for name in part}, tower / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in split.items() for name in part}}
    (tower / "model.safetensors.index.json").write_text(json.dumps(index))
    assert {name: heading.shape for name, heading in read_headings(tower, "model").items()} == {
        name: tuple(tensor.shape) for name, tensor in held.items()
    }
    assert torch.equal(load(tower).visual_projection.weight, held["visual_projection.weight"])
    save_file(
        {**{name: held[name] for name in names[5:]}, names[6]: held[names[6]].int()}, tower / "model-2.safetensors"
    )
    with pytest.raises(InputError, match=f"tower: {names[6]} is I32"):
        load(tower)


def test_a_config_of_more_than_its_files_hold_is_refused_at_once(tower):
    config = json.loads((tower / "config.json").read_text())
    for large in ({"hidden_size": 65536, "num_hidden_layers": 20}, {"intermediate_size": 65536, "hidden_size": 8192}):
        (tower / "config.json").write_text(json.dumps({**config, **large}))
        began = time.perf_counter()
        with pytest.raises(InputError, match=r"tower does not fit its config: that asks for [\d,]+ numbers, the"):
            load(tower)
        assert time.perf_counter() - began < 5
    (tower / "config.json").write_text(json.dumps({**config, "intermediate_size": 16}))
    with pytest.raises(InputError, match=r"fc1.bias has shape \(8,\), the config asks for \(16,\)"):
        load(tower)


def test_the_folder_is_looked_at_first(tower):
    (tower / "model.safetensors").unlink()
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "own.Own"}}))
    with pytest.raises(InputError, match="auto_map .* asks for code of its own"):
        load(tower)
    (tower / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="is of model_type 'clip_vision_model': needed is siglip"):
        load(tower, model_types=("siglip",))


def test_names_of_older_diffusers_are_all_known(tmp_path):
    """The autoencoder of Stable Diffusion 1.5 has the names of its first release."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    network = AutoencoderKL(block_out_channels=(4,), **blocks, norm_num_groups=2)
    network.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    renamed = (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn."))
    held = load_file(path)
    for new, old in renamed:
        held = {name.replace(new, old): tensor for name, tensor in held.items()}
    save_file(held, path, metadata={"format": "pt"})
    loaded = load_network(AutoencoderKL, tmp_path, "vae").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in network.state_dict().items())


def test_of_a_whole_clip_the_text_tower_is_taken(tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**sizes, "image_size": 8, "patch_size": 8}
    whole = CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 20}, vision_config=vision, projection_dim=4))
    whole.save_pretrained(tmp_path)
    others = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
    tower = load_network(CLIPTextModel, tmp_path, "text encoder", left_out=others)
    ours, theirs = tower.get_input_embeddings().weight, whole.text_model.get_input_embeddings().weight
    assert torch.equal(ours, theirs)
    with pytest.raises(InputError, match="no place in this network: logit_scale, text_projection.weight, vision_model"):
        load_network(CLIPTextModel, tmp_path, "text encoder")
