import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.own_memory import give_own_memory
from msdiffusion.training.learning.sharding import is_sharded, shard_adapter, shard_unet, whole_weights
from msdiffusion.training.strategies import OffloadedAdapter, ShardedAdapter, check_precision

CONFIGS = Path(__file__).parents[3] / "configs"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture
def mesh(tmp_path):
    """A group of this process alone: everything is split, into one part. test_distributed.py does it with two."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def unet(tiny_model_dir):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_model_dir / "base" / "unet").requires_grad_(False)
    give_own_memory(unet)  # as the backbone does
    return unet


@pytest.fixture(params=["resampler", "global"])
def adapter(request, tiny_model_dir, unet):
    sizes = MSAdapter.from_pretrained(tiny_model_dir).config.resampler
    params = ResamplerParams(
        image_width=sizes.image_width, phrase_width=sizes.phrase_width, output_width=sizes.output_width,
        width=32, depth=2, heads=2, head_width=16,
    )  # fmt: skip
    return MSAdapter.from_unet(unet, params, projector=request.param)


class Module(nn.Module):
    """What ``whole_weights`` needs of MSDiffusionModule, with the average of the weights below another module."""

    def __init__(self, adapter, unet, rank=0):
        super().__init__()
        self.adapter = adapter
        self.averaged = nn.ModuleDict({"module": copy.deepcopy(adapter)})
        self.__dict__["backbone"] = SimpleNamespace(unet=unet)
        self.global_rank = rank

    @property
    def trained_adapter(self):
        return self.averaged["module"]


def condition_of(adapter):
    params = adapter.config.resampler
    tokens = 1 if adapter.config.projector == "global" else 5
    generator = torch.Generator().manual_seed(0)
    return adapter(
        torch.randn(1, 2, tokens, params.image_width, generator=generator),
        torch.randn(1, 2, params.phrase_width, generator=generator),
        torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]]),
    )


@pytest.mark.exact
def test_every_parameter_is_split_and_the_condition_stays_the_same(adapter, mesh):
    before = condition_of(adapter)
    assert not is_sharded(adapter)
    shard_adapter(adapter, mesh)
    assert all(isinstance(parameter, DTensor) for parameter in adapter.parameters())
    after = condition_of(adapter)
    for layer, keys in before.keys.items():
        assert torch.equal(after.keys[layer], keys)
        assert torch.equal(after.values[layer], before.values[layer])
    # nothing stays whole, although no backward pass followed
    assert all(isinstance(parameter, DTensor) for parameter in adapter.parameters())


@pytest.mark.exact
def test_gradients_are_those_of_the_whole_adapter(adapter, mesh):
    whole = copy.deepcopy(adapter)
    shard_adapter(adapter, mesh)
    for each in (whole, adapter):
        condition = condition_of(each)
        sum(states.square().sum() for states in (*condition.keys.values(), *condition.values.values())).backward()
    ours = dict(adapter.named_parameters())
    found = 0
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            found += 1
            torch.testing.assert_close(ours[name].grad.full_tensor(), parameter.grad)
    assert found > len(whole.layers)


def test_what_is_split_is_not_split_again(adapter, mesh):
    shard_adapter(adapter, mesh)
    parameters = list(adapter.parameters())
    shard_adapter(adapter, mesh)
    assert all(a is b for a, b in zip(adapter.parameters(), parameters, strict=True))


@pytest.mark.exact
def test_a_split_unet_says_the_same(unet, mesh):
    inputs = {
        "sample": torch.randn(1, 4, 16, 16),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(1, 7, unet.config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 20), "time_ids": torch.randn(1, 6)},
    }
    with torch.no_grad():
        before = unet(**inputs).sample
        shard_unet(unet, mesh)
        assert all(isinstance(parameter, DTensor) for parameter in unet.parameters())
        assert torch.equal(unet(**inputs).sample, before)
    blocks = [part for part in unet.modules() if isinstance(part, FSDPModule)]
    assert len(blocks) > 5


def test_whole_weights_stand_in_for_the_trained_adapter(adapter, unet, mesh):
    module = Module(adapter, unet)
    with torch.no_grad():
        for parameter in module.trained_adapter.parameters():
            parameter.add_(1)  # the average, not the weights themselves
    expected = {name: tensor.clone() for name, tensor in module.trained_adapter.state_dict().items()}
    for part in (module.adapter, module.trained_adapter):
        shard_adapter(part, mesh)
    shard_unet(unet, mesh)
    split = module.trained_adapter
    with whole_weights(module):
        whole = module.trained_adapter
        assert whole is not split
        assert not is_sharded(whole)
        assert not is_sharded(unet)
        assert whole.config == split.config
        assert {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()} == {
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }
        assert all(torch.equal(tensor, expected[name]) for name, tensor in whole.state_dict().items())
        condition_of(whole)
    assert module.trained_adapter is split
    assert is_sharded(split)
    assert all(isinstance(parameter, DTensor) for parameter in unet.parameters())


def test_after_an_error_everything_is_split_again(adapter, unet, mesh):
    module = Module(adapter, unet)
    split = module.trained_adapter
    shard_adapter(split, mesh)
    shard_unet(unet, mesh)
    with pytest.raises(KeyError), whole_weights(module):
        raise KeyError
    assert module.trained_adapter is split
    assert all(isinstance(parameter, DTensor) for parameter in unet.parameters())


def test_other_processes_help_and_keep_nothing(adapter, unet, mesh):
    module = Module(adapter, unet, rank=1)
    split = module.trained_adapter
    shard_adapter(split, mesh)
    with whole_weights(module):
        assert module.trained_adapter is split


def test_whole_weights_does_nothing_where_nothing_is_split(adapter, unet):
    module = Module(adapter, unet)
    before = module.trained_adapter
    with whole_weights(module):
        assert module.trained_adapter is before


def test_a_wrong_timeout_is_refused():
    with pytest.raises(RequestError, match="timeout_minutes must be above 0, got 0"):
        ShardedAdapter(timeout_minutes=0)


def strategy_of(module, mesh, **settings):
    strategy = ShardedAdapter(**settings)
    strategy._lightning_module = module
    strategy._device_mesh = {"data_parallel": mesh}
    return strategy


def test_a_model_without_an_adapter_is_refused(mesh):
    with pytest.raises(RequestError, match="Boring has none: train it with --trainer.strategy ddp"):
        strategy_of(type("Boring", (pl.LightningModule,), {})(), mesh).setup(None)


def test_a_compiled_unet_is_not_split(adapter, unet, mesh):
    module = Module(adapter, unet)
    module.hparams = SimpleNamespace(compile=True)
    with pytest.raises(RequestError, match="shard_unet does not go together with compile"):
        strategy_of(module, mesh, shard_unet=True).setup(None)


@pytest.fixture
def parse(monkeypatch):
    """Function: a file of configs/strategies -> settings of the SDXL run with it, everything made but the trainer."""
    monkeypatch.setattr("sys.argv", ["lightning"])  # LightningCLI warns where both it and its caller have arguments
    from msdiffusion.training.cli import main
    from msdiffusion.training.run.run_cli import RunCLI

    made = []
    monkeypatch.setattr(RunCLI, "instantiate_trainer", lambda cli: None)
    monkeypatch.setattr(RunCLI, "_run_subcommand", lambda cli, subcommand: made.append(cli))

    def run(name):
        main(["fit", "-c", str(CONFIGS / "msd_sdxl.yaml"), "-c", str(CONFIGS / "strategies" / name)])
        return made.pop().config_init["fit"]

    return run


def test_the_config_for_sharding(parse):
    settings = parse("sharded.yaml")
    assert type(settings["trainer"]["strategy"]) is ShardedAdapter
    assert not settings["trainer"]["strategy"].shard_unet


@pytest.mark.skipif(HAS_DEEPSPEED, reason="DeepSpeed is installed")
def test_the_config_for_deepspeed_says_what_to_install(parse, capsys):
    with pytest.raises(SystemExit):
        parse("deepspeed.yaml")
    assert "OffloadedAdapter needs DeepSpeed: pip install deepspeed" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed: pip install deepspeed")
def test_the_config_for_deepspeed(parse):
    settings = parse("deepspeed.yaml")
    strategy = settings["trainer"]["strategy"]
    assert type(strategy) is OffloadedAdapter
    assert strategy.config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    check_precision(settings["trainer"]["precision"])
    assert settings["model"].hparams["base_dtype"] == "bfloat16"


def test_deepspeed_is_not_let_near_16_bit_weights():
    check_precision("32-true")
    with pytest.raises(RequestError, match="needs trainer.precision 32-true, got bf16-mixed"):
        check_precision("bf16-mixed")


def test_strange_weights_are_refused_before_they_are_split(adapter, unet, mesh, tmp_path, monkeypatch):
    """This strategy gives the module its weights before the module sees the checkpoint."""
    module, taken = Module(adapter, unet), []
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    strategy = strategy_of(module, mesh)
    shard_adapter(adapter, mesh)
    monkeypatch.setattr(strategy, "broadcast", lambda path: path)
    monkeypatch.setattr(ModelParallelStrategy, "load_checkpoint", lambda self, path, weights_only: taken.append(path))
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": weights}, path)
    strategy.load_checkpoint(path)
    assert taken == [path]
    next(iter(weights.values())).fill_(float("inf"))
    torch.save({"state_dict": weights}, path)
    with pytest.raises(WeightsError, match=f"{path}: .* numbers that are NaN or infinite"):
        strategy.load_checkpoint(path)
    assert len(taken) == 1
