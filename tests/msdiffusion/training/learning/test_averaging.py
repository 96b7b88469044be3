"""The average of the weights: its formula, its place in checkpoints, weights that are split over processes."""

import socket

import pytest
import torch

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.config import AdapterConfig
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.training.learning.averaging import AveragedAdapter


def make_adapter(seed=0):
    torch.manual_seed(seed)
    sizes = {"width": 16, "depth": 1, "heads": 2, "head_width": 8, "tokens": 2}
    params = ResamplerParams(image_width=8, phrase_width=8, output_width=8, **sizes)
    return MSAdapter(AdapterConfig(resampler=params), {"block": 8})


def change(adapter, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_average_follows_the_formula():
    adapter = make_adapter()
    average = AveragedAdapter(adapter, 0.5)
    expected = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    for step in range(12):
        change(adapter, step)
        average.update(adapter)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * t for n, t in adapter.state_dict().items()}
    for name, tensor in average.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    assert int(average.n_averaged) == 12
    assert not any(parameter.requires_grad for parameter in average.parameters())


@pytest.mark.exact
def test_it_goes_on_from_a_checkpoint_bit_for_bit():
    adapter = make_adapter()
    average = AveragedAdapter(adapter, 0.99)
    for step in range(3):
        change(adapter, step)
        average.update(adapter)
    loaded = AveragedAdapter(make_adapter(seed=1), 0.99)
    loaded.load_state_dict(average.state_dict())
    for step in range(3, 6):
        change(adapter, step)
        average.update(adapter)
        loaded.update(adapter)
    for name, tensor in average.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.fixture
def one_process():
    """A process group of one, over which weights can be split."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_split_weights_are_averaged_alike(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    whole, split = make_adapter(), make_adapter()
    averages = [AveragedAdapter(adapter, 0.9) for adapter in (whole, split)]
    mesh = init_device_mesh("cpu", (1,))
    for part in (split, averages[1].module):
        fully_shard(part.resampler, mesh=mesh)
        fully_shard(part.layers["block"], mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in split.parameters())
    for step in range(3):
        change(whole, step)
        with torch.no_grad():
            for ours, theirs in zip(split.parameters(), whole.parameters(), strict=True):
                ours.to_local().copy_(theirs)
        averages[0].update(whole)
        averages[1].update(split)
    for ours, theirs in zip(averages[1].module.parameters(), averages[0].module.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs)
