import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from msdiffusion import MSDiffusion
from msdiffusion.own_memory import give_own_memory

SHIFTS = (4, 8, 28)  # bytes after a multiple of 64: what MKL minds is a multiple of 16


@pytest.fixture(scope="module")
def aligned(tiny_model_dir, shifted, tmp_path_factory) -> Path:
    """The model with all tensors of its files at a multiple of 64 bytes."""
    return shifted(tiny_model_dir, tmp_path_factory.mktemp("aligned") / "model", 0)


def weights_of(model: MSDiffusion):
    pipeline = model.pipeline
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, model.backbone.image_encoder)
    return [tensor for part in (*parts, model.adapter) for tensor in (*part.parameters(), *part.buffers())]


def draw(model):
    boxes = [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]
    references = [torch.arange(3 * 20 * 20).remainder(200 + 50 * k).reshape(20, 20, 3).byte().numpy() for k in (0, 1)]
    pictures = [Image.fromarray(reference) for reference in references]
    return model.generate(
        pictures, boxes, "a dog and a teapot on the beach", seed=0, steps=4, output_type="pt", progress=False
    )


def at(offset: int, value: torch.Tensor) -> torch.Tensor:
    """The same values at so many bytes after a multiple of 64."""
    room = torch.empty(value.nbytes + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + offset
    place = room[start : start + value.nbytes].view(value.dtype).view(value.shape)
    return place.copy_(value)


@pytest.mark.exact
@pytest.mark.parametrize("offset", SHIFTS)
def test_weights_begin_at_a_multiple_of_64_wherever_they_lie_in_the_file(shifted, tiny_model_dir, tmp_path, offset):
    place = shifted(tiny_model_dir, tmp_path / "model", offset)
    model = MSDiffusion.from_pretrained(place, device="cpu")
    assert {tensor.data_ptr() % 64 for tensor in weights_of(model)} == {0}


@pytest.mark.exact
@pytest.mark.parametrize("offset", SHIFTS)
def test_pictures_do_not_depend_on_where_weights_lie_in_their_file(shifted, aligned, tmp_path, offset):
    expected = draw(MSDiffusion.from_pretrained(aligned, device="cpu"))
    place = shifted(aligned, tmp_path / "model", offset)
    assert torch.equal(draw(MSDiffusion.from_pretrained(place, device="cpu")), expected)


def test_so_it_is_without_the_variable_that_the_commands_set(shifted, aligned, tmp_path):
    """As for somebody who imports the package: MKL may take any path."""
    place = shifted(aligned, tmp_path / "model", 8)
    code = (
        "import sys; from pathlib import Path; import torch; from msdiffusion import MSDiffusion\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_own_memory import draw\n"
        "one, other = (draw(MSDiffusion.from_pretrained(place, device='cpu')) for place in sys.argv[1:])\n"
        "assert torch.equal(one, other), (one - other).abs().max()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    command = [sys.executable, "-c", code, str(aligned), str(place)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-2000:]


@pytest.mark.exact
def test_a_file_that_is_overwritten_does_not_change_the_model(shifted, tiny_model_dir, tmp_path):
    place = shifted(tiny_model_dir, tmp_path / "model", 8)
    model = MSDiffusion.from_pretrained(place, device="cpu")
    for path in place.rglob("*.safetensors"):
        with path.open("r+b") as file:  # in place: the same file, which is still mapped where nobody has copied it
            file.write(b"\0" * path.stat().st_size)
    assert torch.equal(draw(model), draw(MSDiffusion.from_pretrained(tiny_model_dir, device="cpu")))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the maps of this process")
def test_no_file_of_weights_stays_open(shifted, tiny_model_dir, tmp_path):
    place = shifted(tiny_model_dir, tmp_path / "model", 8)
    model = MSDiffusion.from_pretrained(place, device="cpu")
    assert str(place) not in Path("/proc/self/maps").read_text()
    assert model.adapter.device.type == "cpu"


def test_parameters_stay_themselves():
    layer, tied = nn.Linear(8, 8), nn.Linear(8, 8)
    layer.weight.data = at(8, layer.weight.data)
    tied.weight = layer.weight
    layer.register_buffer("table", at(4, torch.arange(5.0)))
    layer.bias.requires_grad_(False)
    before = dict(layer.named_parameters())
    values = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    give_own_memory(nn.ModuleList([layer, tied]))
    assert all(getattr(layer, name) is parameter for name, parameter in before.items())
    assert tied.weight is layer.weight
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (True, False)
    for name, tensor in layer.state_dict().items():
        assert tensor.data_ptr() % 64 == 0
        assert torch.equal(tensor, values[name])


def test_the_order_in_memory_stays():
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    strides = layer.weight.stride()
    give_own_memory(layer)
    assert layer.weight.stride() == strides


def test_what_has_no_place_on_this_cpu_or_is_shared_stays_as_it_is():
    on_meta = nn.Linear(2, 2, device="meta")
    shared = nn.Linear(2, 2).share_memory()
    place = shared.weight.data_ptr()
    quantized = nn.Linear(2, 2)
    quantized.weight = nn.Parameter(torch.zeros(2, 2).as_subclass(Quantized), requires_grad=False)
    values = quantized.weight.data_ptr()
    give_own_memory(on_meta, shared, quantized)
    assert on_meta.weight.device.type == "meta"
    assert shared.weight.is_shared()
    assert shared.weight.data_ptr() == place
    assert quantized.weight.data_ptr() == values


def test_sparse_weights_stay_as_they_are():
    layer = nn.Linear(2, 2)
    layer.register_buffer("links", torch.eye(2).to_sparse())
    give_own_memory(layer)
    assert layer.links.is_sparse


class Quantized(torch.Tensor):
    """Stands for the tensors of a library of its own."""


def test_precisions_stay():
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    layer.register_buffer("numbers", torch.arange(3))
    give_own_memory(layer)
    assert (layer.weight.dtype, layer.numbers.dtype) == (torch.bfloat16, torch.int64)
    assert np.array_equal(layer.numbers.numpy(), [0, 1, 2])
