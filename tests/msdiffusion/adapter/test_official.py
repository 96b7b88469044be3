"""The official ms_adapter.bin: its exact layout at full size, both ways, and that nothing in it runs."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.config import AdapterConfig
from msdiffusion.adapter.official import from_record, read_record, write_record
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.errors import RequestError, WeightsError

# The UNet of stabilityai/stable-diffusion-xl-base-1.0, as its config.json states it.
SDXL_UNET = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


def released_shapes():
    """Every key of the released file with its shape: the resampler's 59, the 140 of the UNet's layers."""
    resampler = {
        "grounding_latents": (1, 16, 1280),
        "latent_proj.0.weight": (1664, 832),
        "latent_proj.0.bias": (1664,),
        "latent_proj.2.weight": (20480, 1664),
        "latent_proj.2.bias": (20480,),
        "latent_norm.weight": (1280,),
        "latent_norm.bias": (1280,),
        "proj_in.weight": (1280, 1664),
        "proj_in.bias": (1280,),
        "attention_norm.weight": (1280,),
        "attention_norm.bias": (1280,),
        "proj_out.weight": (2048, 1280),
        "proj_out.bias": (2048,),
        "norm_out.weight": (2048,),
        "norm_out.bias": (2048,),
    }
    for i in range(4):
        resampler |= {
            f"layers.{i}.0.norm1.weight": (1280,),
            f"layers.{i}.0.norm1.bias": (1280,),
            f"layers.{i}.0.norm2.weight": (1280,),
            f"layers.{i}.0.norm2.bias": (1280,),
            f"layers.{i}.0.to_q.weight": (1280, 1280),
            f"layers.{i}.0.to_kv.weight": (2560, 1280),
            f"layers.{i}.0.to_out.weight": (1280, 1280),
            f"layers.{i}.1.0.weight": (1280,),
            f"layers.{i}.1.0.bias": (1280,),
            f"layers.{i}.1.1.weight": (5120, 1280),
            f"layers.{i}.1.3.weight": (1280, 5120),
        }
    layers = {}
    for index in range(1, 140, 2):
        width = 640 if index <= 7 or 109 <= index <= 119 else 1280
        layers |= {f"{index}.to_k_ip.weight": (width, 2048), f"{index}.to_v_ip.weight": (width, 2048)}
    return {"image_proj": resampler, "ms_adapter": layers, "dummy_image_tokens": (1, 4, 2048)}


def on_meta(shapes):
    if isinstance(shapes, tuple):
        return torch.empty(shapes, device="meta")
    return {name: on_meta(value) for name, value in shapes.items()}


def shapes_of(record):
    if isinstance(record, torch.Tensor):
        return tuple(record.shape)
    return {name: shapes_of(value) for name, value in record.items()}


@pytest.fixture(scope="module")
def sdxl_unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL_UNET)


def test_the_released_layout_loads_strictly_at_full_size(sdxl_unet):
    """Every key and shape of the release, through our names, into a strict load, and back to the very same keys."""
    record = on_meta(released_shapes())
    assert (len(record["image_proj"]), len(record["ms_adapter"])) == (59, 140)
    numbers = [tensor.numel() for part in ("image_proj", "ms_adapter") for tensor in record[part].values()]
    assert sum(numbers) + record["dummy_image_tokens"].numel() == 459_739_008
    adapter = MSAdapter.from_official_record(record, sdxl_unet)
    assert adapter.config == AdapterConfig(
        resampler=ResamplerParams(image_width=1664, phrase_width=768, output_width=2048)
    )
    assert sum(weight.numel() for weight in adapter.parameters()) == 459_739_008 - 4 * 2048
    assert len(adapter.layers) == 70
    assert next(iter(adapter.layers)) == "down_blocks/1/attentions/0/transformer_blocks/0/attn2"
    assert list(adapter.layers)[-1] == "mid_block/attentions/0/transformer_blocks/9/attn2"
    assert shapes_of(adapter.official_record(sdxl_unet)) == released_shapes()


@pytest.mark.parametrize(
    ("part", "key", "shape", "message"),
    [
        ("image_proj", "proj_in.weight", None, "no image_projection.weight: not the official grounding resampler"),
        ("image_proj", "norm_out.bias", None, r"files lack resampler.output_norm.bias"),
        ("image_proj", "pos_emb.weight", (257, 1280), r"no place in this network: resampler.pos_emb.weight"),
        ("ms_adapter", "139.to_v_ip.weight", None, "its files lack"),
        ("ms_adapter", "2.to_k_ip.weight", (640, 2048), "71 cross-attention layers .* the UNet has 70"),
        ("ms_adapter", "1.to_q_ip.weight", (640, 640), "unknown key 1.to_q_ip.weight"),
        ("ms_adapter", "1.to_k_ip.weight", (640, 1024), r"shape \(640, 1024\), the network needs \(640, 2048\)"),
        ("image_proj", "layers.2.0.to_kv.weight", (2560, 1000), r"shape \(2560, 1000\), the"),
    ],
)
def test_any_other_layout_is_refused(sdxl_unet, part, key, shape, message):
    shapes = released_shapes()
    if shape is None:
        del shapes[part][key]
    else:
        shapes[part][key] = shape
    with pytest.raises(WeightsError, match=message):
        MSAdapter.from_official_record(on_meta(shapes), sdxl_unet)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.update(image_proj=[1]), "image_proj must hold tensors by name"),
        (lambda r: r.update(ms_adapter=torch.zeros(2)), "ms_adapter must hold tensors by name"),
        (lambda r: r["image_proj"].update(proj_out=3), "image_proj must hold tensors by name"),
        (lambda r: r["image_proj"].update(grounding_latents=torch.zeros(16)), "a weight has other axes than"),
        (lambda r: r["image_proj"].update(grounding_latents=torch.zeros(1, 16, 0)), "a weight has other axes than"),
        (lambda r: r["image_proj"].update({"proj_in.weight": torch.zeros(8)}), "a weight has other axes than"),
        (lambda r: r["image_proj"].update({"layers.x.0.to_q.weight": torch.zeros(8)}), "no place in|other axes"),
        (lambda r: r["ms_adapter"].update({"1.to_k_ip.weight": torch.tensor(1.0)}), r"has shape \(\), but|has shape"),
    ],
)
def test_broken_contents_are_refused(sdxl_unet, edit, message):
    record = on_meta(released_shapes())
    edit(record)
    with pytest.raises(WeightsError, match=message):
        MSAdapter.from_official_record(record, sdxl_unet)


@pytest.mark.parametrize("width", [0, -1, 2.5])
def test_a_head_width_that_is_none(sdxl_unet, width):
    with pytest.raises(RequestError, match="head_width must be a whole number of at least 1"):
        from_record(on_meta(released_shapes()), list(sdxl_unet.attn_processors), head_width=width)


def test_what_an_adapter_has_no_place_for_is_told(tmp_path):
    torch.save({"image_proj": {}, "ms_adapter": {}, "ip_adapter": {}, 3: 4}, tmp_path / "ms_adapter.bin")
    with pytest.warns(UserWarning, match=r"also holds \['3', 'ip_adapter'\], which an adapter has no place for"):
        read_record(tmp_path / "ms_adapter.bin")


def test_a_head_width_that_does_not_divide(sdxl_unet):
    with pytest.raises(WeightsError, match="1280 wide, which 60 does not divide"):
        from_record(on_meta(released_shapes()), list(sdxl_unet.attn_processors), head_width=60)


@pytest.fixture
def official(golden_tensors, official_adapter_file):
    """(record, UNet on the meta device) of the file that the official code wrote."""
    _, config = golden_tensors("unet")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config["unet_config"])
    return read_record(official_adapter_file), unet


@pytest.mark.exact
def test_there_and_back_is_the_same_to_the_bit(official, official_adapter_file, tmp_path):
    record, unet = official
    adapter = MSAdapter.from_official(official_adapter_file, unet, head_width=16)
    adapter.save_pretrained(tmp_path)
    MSAdapter.from_pretrained(tmp_path).to_official(tmp_path / "new" / "ms_adapter.bin", unet)
    again = torch.load(tmp_path / "new" / "ms_adapter.bin", weights_only=True)
    assert again.keys() == record.keys() == {"image_proj", "ms_adapter", "dummy_image_tokens"}
    for part in ("image_proj", "ms_adapter"):
        assert again[part].keys() == record[part].keys()
        for name, tensor in record[part].items():
            assert torch.equal(again[part][name], tensor)
            assert again[part][name].dtype == tensor.dtype
    assert again["dummy_image_tokens"].shape == record["dummy_image_tokens"].shape
    assert not again["dummy_image_tokens"].any()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ms_adapter.bin"]
    # Weights that are views of a larger storage must not bring it along.
    weights = sum(t.numel() * t.element_size() for part in ("image_proj", "ms_adapter") for t in again[part].values())
    assert (tmp_path / "new" / "ms_adapter.bin").stat().st_size < 1.5 * weights + 100_000


def test_views_of_a_larger_storage_are_written_alone(tmp_path):
    whole = torch.zeros(1_000_000)
    write_record({"image_proj": {"a": whole[:10]}, "dummy_image_tokens": whole[:4]}, tmp_path / "small.bin")
    assert (tmp_path / "small.bin").stat().st_size < 10_000


def test_ablations_cannot_be_official(official, official_adapter_file, sdxl_unet):
    _, unet = official
    params = {"image_width": 8, "phrase_width": 8, "output_width": 32, "width": 16, "heads": 1, "head_width": 16}
    names = {"a": 16}
    for config, message in (
        ({"projector": "global"}, 'projector "global" and regions "boxes" is an ablation'),
        ({"regions": "everywhere"}, 'projector "resampler" and regions "everywhere" is an ablation'),
    ):
        adapter = MSAdapter(AdapterConfig(resampler=ResamplerParams(**params), **config), names)
        with pytest.raises(WeightsError, match=message):
            adapter.official_record(unet)
    for sizes, message in (
        ({"grounding": False}, "without grounding is an ablation that the official file cannot hold"),
        ({"box_frequencies": 4}, "is for 8 frequencies per box, this adapter has 4"),
    ):
        adapter = MSAdapter(AdapterConfig(resampler=ResamplerParams(**params, **sizes)), names)
        with pytest.raises(WeightsError, match=message):
            adapter.official_record(unet)
    with pytest.raises(WeightsError, match="has 11 cross-attention layers and the UNet 70, not all the same"):
        MSAdapter.from_official(official_adapter_file, unet, head_width=16).official_record(sdxl_unet)


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_refused_and_never_runs(tmp_path):
    trace = tmp_path / "it_ran"
    torch.save({"image_proj": {}, "ms_adapter": {}, "dummy_image_tokens": Malice(trace)}, tmp_path / "ms_adapter.bin")
    with pytest.raises(WeightsError, match="not a file of tensors only, so it is not opened: it is a pickle") as caught:
        read_record(tmp_path / "ms_adapter.bin")
    assert "weights_only" not in str(caught.value), "nobody is told how to run it"
    assert not trace.exists()


def test_other_files(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        read_record(tmp_path / "ms_adapter.bin")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "ms_adapter.bin")
    with pytest.raises(WeightsError, match=r"needs image_proj and ms_adapter, found \['weight'\]"):
        read_record(tmp_path / "ms_adapter.bin")
    torch.save([1], tmp_path / "ms_adapter.bin")
    with pytest.raises(WeightsError, match="found .list."):
        read_record(tmp_path / "ms_adapter.bin")
