"""The module: what it trains and what it leaves alone, its loss, its validation, what it writes."""

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.config import AdapterConfig
from msdiffusion.backbone.configs import skeleton_unet
from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.training.datamodule import PairsDataModule
from msdiffusion.training.learning.schedules import draw_shares, training_schedule
from msdiffusion.training.learning.settings import TrainingSettings
from msdiffusion.training.learning.structure import asked_structure
from msdiffusion.training.module import MSDiffusionModule

pytestmark = pytest.mark.usefixtures("loaded_once")

RESAMPLER = {"width": 32, "depth": 1, "heads": 2, "head_width": 16}
NO_DROPS = {"drop_image": 0, "drop_text": 0, "drop_both": 0, "drop_grounding": 0}


def make_data(pairs_dir, **settings):
    return PairsDataModule(str(pairs_dir), **{"resolution": 32, "batch_size": 4, "max_subjects": 2} | settings)


def make_trainer(**settings):
    defaults = {
        "accelerator": "cpu",
        "max_steps": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
    }
    return pl.Trainer(**defaults | settings)


def rows_of(value, rows):
    """The same rows of everything in a batch."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, list):
        return [value[row] for row in rows]
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: rows_of(getattr(value, f.name), rows) for f in fields(value)})
    return value


def frozen_weights(module):
    pipeline = module.backbone.pipeline
    networks = {
        "unet": pipeline.unet,
        "vae": pipeline.vae,
        "text_encoder": pipeline.text_encoder,
        "text_encoder_2": pipeline.text_encoder_2,
        "image_encoder": module.backbone.image_encoder,
    }
    return {
        f"{part}.{name}": tensor.clone()
        for part, network in networks.items()
        for name, tensor in network.state_dict().items()
    }


EVERYTHING = {
    "ema_decay": 0.9, "loss_weighting": "min_snr", "noise_offset": 0.1, "layout_loss_weight": 0.5,
    "gradient_checkpointing": True, "attention": "softmax", "cache_encodings": True,
}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_only_the_adapter_is_trained(make_module, pairs_dir, settings):
    pl.seed_everything(0)
    module = make_module(learning_rate=1e-2, drop_grounding=0.5, **settings)
    before = {}

    class Snapshot(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            before["frozen"] = frozen_weights(pl_module)
            before["adapter"] = {name: tensor.clone() for name, tensor in pl_module.adapter.state_dict().items()}

    make_trainer(max_steps=3, callbacks=[Snapshot()]).fit(module, make_data(pairs_dir))
    after = frozen_weights(module)
    assert len(after) > 100
    for name, tensor in before["frozen"].items():
        assert torch.equal(tensor, after[name]), f"{name} changed"
    unchanged = [n for n, t in module.adapter.state_dict().items() if torch.equal(t, before["adapter"][n])]
    assert not unchanged, "these parts of the adapter are not trained"


@pytest.mark.parametrize("settings", [{}, {"cache_encodings": True, "size_condition": "resolution"}])
def test_an_adapter_for_stable_diffusion_1x_is_trained(tiny_sd1_model_dir, pairs_dir, tmp_path, settings):
    """One text encoder, no pooled prompt, no size conditions: one step, and what it saves loads again."""
    from msdiffusion.adapter.loading import load_adapter

    folders = {name: str(tiny_sd1_model_dir / name.removesuffix("_model")) for name in ("base_model", "image_encoder")}
    module = MSDiffusionModule(**folders, resampler=RESAMPLER, learning_rate=1e-2, **settings)
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, make_data(pairs_dir))
    assert module.backbone.kind == "sd1"
    assert torch.isfinite(trainer.callback_metrics["training/loss"])
    module.save_pretrained(tmp_path)
    loaded = load_adapter(tmp_path).adapter
    for name, tensor in module.trained_adapter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    fresh = type(loaded).from_unet(module.backbone.unet, loaded.config.resampler)
    assert not torch.equal(
        next(iter(fresh.layers.values())).to_k.weight, next(iter(loaded.layers.values())).to_k.weight
    )


def test_the_optimizer_holds_exactly_the_adapter(make_module, pairs_dir):
    module = make_module(ema_decay=0.9, layout_loss_weight=1.0)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, make_data(pairs_dir))
    held = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in module.adapter.parameters()}
    assert len(held) == len(list(module.adapter.parameters()))
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} == {id(parameter) for parameter in held}


def test_training_saves_what_loads_again(make_module, pairs_dir, tmp_path, tiny_model_dir):
    module = make_module(
        reference_background=[255, 255, 255],
        reference_fit="pad",
        defaults={"scale": 0.9, "steps": 3, "guidance_scale": 2.0},
    )
    trainer = make_trainer()
    trainer.fit(module, make_data(pairs_dir))
    module.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    assert (tmp_path / "adapter" / config["base_model"]).resolve() == (tiny_model_dir / "base").resolve()
    assert (tmp_path / "adapter" / config["image_encoder"]).resolve() == (tiny_model_dir / "image_encoder").resolve()
    assert config["training_resolution"] == 32
    assert (config["largest_side"], config["most_subjects"], config["closed_vocabulary"]) == (64, 2, True)
    assert config["reference_background"] == [255, 255, 255]
    assert config["reference_fit"] == "pad"
    assert config["defaults"] == {"scale": 0.9, "steps": 3, "guidance_scale": 2.0}

    again = make_module(adapter=str(tmp_path / "adapter"))
    again.configure_model()
    for name, tensor in module.adapter.state_dict().items():
        assert torch.equal(tensor, again.adapter.state_dict()[name])
    assert again.adapter.config.reference_fit == "pad"


def test_the_trained_adapter_draws(make_module, pairs_dir, tmp_path):
    from PIL import Image

    from msdiffusion import MSDiffusion

    module = make_module()
    make_trainer(max_steps=1).fit(module, make_data(pairs_dir))
    module.save_pretrained(tmp_path / "adapter")
    model = MSDiffusion.from_pretrained(tmp_path / "adapter")
    pictures = model.generate(
        images=[Image.new("RGB", (20, 20), "red")],
        boxes=[[0.25, 0.25, 0.75, 0.75]],
        prompt="a dog on the beach",
        phrases=["dog"],
        height=32,
        width=32,
        steps=2,
        seed=0,
    )
    assert pictures[0].size == (32, 32)


def test_keys_and_values_start_from_the_frozen_ones(configured):
    module, _ = configured()
    frozen = dict(module.backbone.unet.named_modules())
    for name, layer in module.adapter.layers.items():
        attention = frozen[name.replace("/", ".")]
        assert torch.equal(layer.to_k.weight, attention.to_k.weight)
        assert torch.equal(layer.to_v.weight, attention.to_v.weight)
        assert layer.to_k.weight is not attention.to_k.weight


def test_checkpoint_holds_no_frozen_weight_and_loads_safely(make_module, pairs_dir, tmp_path):
    module = make_module(ema_decay=0.5)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, make_data(pairs_dir))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"adapter", "averaged"}
    loaded = MSDiffusionModule.load_from_checkpoint(tmp_path / "one.ckpt")
    for name, tensor in module.adapter.state_dict().items():
        assert torch.equal(tensor, loaded.adapter.state_dict()[name])


class Losses(pl.Callback):
    """The loss of every step."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.found.append(outputs["loss"].item())


@pytest.mark.exact
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(make_module, pairs_dir, tiny_model_dir, shifted, tmp_path):
    """Ten steps at once, and four and six, give the same losses and weights bit for bit: the data alone decide what
    happens, and neither a generator nor the place of the frozen weights in their files counts.
    """
    elsewhere = shifted(tiny_model_dir, tmp_path / "models", 8)

    def run(max_steps, seed, ckpt_path=None, models=tiny_model_dir):
        pl.seed_everything(7, verbose=False)
        module = make_module(
            ema_decay=0.9, warmup_steps=3, drop_grounding=0.5, learning_rate=1e-2,
            base_model=str(models / "base"), image_encoder=str(models / "image_encoder"),
        )  # fmt: skip
        losses = Losses()
        trainer = make_trainer(max_steps=max_steps, callbacks=[losses])
        module.on_train_start = lambda: pl.seed_everything(seed, verbose=False)  # no generator carries anything
        trainer.fit(module, make_data(pairs_dir, validation_fraction=0), ckpt_path=ckpt_path)
        return trainer, module, losses.found

    straight, expected, losses = run(10, seed=1)
    assert len(losses) == 10
    half, _, first = run(4, seed=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, module, rest = run(10, seed=3, ckpt_path=tmp_path / "half.ckpt", models=elsewhere)
    assert straight.global_step == resumed.global_step == 10
    assert int(module.averaged.n_averaged) == 10
    assert first + rest == losses
    # not every processor multiplies in another order where weights lie elsewhere
    frozen = [weight for weight in module.backbone.pipeline.unet.parameters() if not weight.requires_grad]
    assert {weight.data_ptr() % 64 for weight in frozen} == {0}
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


def flow_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=2.0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_unet_is_asked_for_the_bases_prediction(configured, kind, monkeypatch):
    module, batch = configured()
    scheduler = module.backbone.pipeline.scheduler
    if kind == "flow":
        scheduler = flow_scheduler()
    else:
        scheduler.register_to_config(prediction_type=kind)
    module.schedule = training_schedule(scheduler)
    inputs, noise = module.encode(batch), batch.draws.noise
    asked = []

    def answer(noisy, timesteps, **keywords):
        asked.append((noisy, timesteps))
        return (torch.zeros_like(noisy),)

    monkeypatch.setattr(module.backbone.unet, "forward", answer)
    timesteps = torch.tensor([100, 700])
    _, target = module.predict_noise(module.adapter, inputs, noise, timesteps)
    share = (timesteps / 1000).view(-1, 1, 1, 1)
    if kind == "flow":
        expected, truth = (1 - share) * inputs.latents + share * noise, noise - inputs.latents
    else:
        kept = module.schedule.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        expected = kept.sqrt() * inputs.latents + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * inputs.latents
        truth = {"epsilon": noise, "v_prediction": velocity, "sample": inputs.latents}[kind]
    torch.testing.assert_close(asked[0][0], expected)
    torch.testing.assert_close(target, truth)
    # and training: its timesteps are those of the base's kind, and it has a gradient
    monkeypatch.undo()
    module.training_step(batch, 0).backward()
    assert any(parameter.grad.any() for parameter in module.adapter.parameters())


def watch(module, monkeypatch, off=1.0):
    """The UNet is wrong by ``off`` everywhere; returns (noise, timesteps, no_grounding) of each call."""
    asked = []

    def predict(adapter, inputs, noise, timesteps, no_grounding=None, layout=None):
        asked.append((noise, timesteps, no_grounding))
        target = module.schedule.target(inputs.latents, noise, timesteps)
        return target + off, target

    monkeypatch.setattr(module, "predict_noise", predict)
    module.log = lambda *arguments, **keywords: None
    return asked


@pytest.mark.parametrize(("sampling", "exponent"), [("uniform", 1.0), ("uniform", 0.75), ("logit_normal", 1.0)])
def test_all_chance_comes_with_the_batch(configured, monkeypatch, sampling, exponent):
    module, batch = configured(timestep_sampling=sampling, timestep_exponent=exponent, drop_grounding=0.5)
    draws = replace(
        batch.draws, timestep=torch.tensor([0.2, 0.9], dtype=torch.float64), grounding=torch.tensor([0.4, 0.6])
    )
    asked = watch(module, monkeypatch)
    before = torch.get_rng_state()
    module.training_step(replace(batch, draws=draws), 0)
    assert torch.equal(torch.get_rng_state(), before)
    noise, timesteps, no_grounding = asked[0]
    assert torch.equal(noise, draws.noise)
    assert torch.equal(timesteps, module.schedule.timesteps(draw_shares(draws.timestep, sampling, exponent)))
    assert no_grounding.tolist() == [True, False]


def test_drops_follow_the_batch(configured, monkeypatch):
    module, batch = configured(rows=(0, 1, 2, 3), drop_image=0.2, drop_text=0.2, drop_both=0.2)
    draws = replace(batch.draws, condition=torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64))
    watch(module, monkeypatch)
    seen = []
    original = module.encode
    monkeypatch.setattr(module, "encode", lambda batch, *drops: seen.append(drops) or original(batch, *drops))
    module.training_step(replace(batch, draws=draws), 0)
    assert seen == [([True, False, True, False], [False, True, True, False])]


def test_noise_offset_and_min_snr(configured, monkeypatch):
    module, batch = configured(loss_weighting="min_snr", min_snr_gamma=2.0, noise_offset=0.1, **NO_DROPS)
    asked = watch(module, monkeypatch, off=3.0)
    loss = module.training_step(batch, 0)
    noise, timesteps, _ = asked[0]
    torch.testing.assert_close(noise, batch.draws.noise + 0.1 * batch.draws.offset)
    weights = module.schedule.min_snr_weights(timesteps, 2.0)
    assert 0 < weights.min() < weights.max()
    torch.testing.assert_close(loss, 9.0 * weights.mean(), rtol=1e-4, atol=1e-6)


def test_weight_inside_the_boxes(configured, monkeypatch):
    module, batch = configured(**NO_DROPS)
    logged = {}
    module.log = lambda name, value, **keywords: logged.update({name: float(value)})
    plain, inside = float(module.training_step(batch, 0).detach()), logged["training/loss_in_boxes"]
    module.settings = replace(module.settings, loss=replace(module.settings.loss, box_loss_weight=3.0))
    weighted = float(module.training_step(batch, 0).detach())
    assert logged["training/loss_in_boxes"] == inside
    assert logged["training/loss"] == weighted
    low, high = sorted((plain, inside))
    assert low < weighted < high


@pytest.mark.parametrize("settings", [
    {}, {"box_loss_weight": 4.0, "loss_weighting": "min_snr", "layout_loss_weight": 1.0, "noise_offset": 0.1},
])  # fmt: skip
def test_halves_of_a_batch_teach_on_average_what_the_whole_does(configured, settings):
    """So two processes learn what one learns from twice the batch: losses, and gradients."""
    module, batch = configured(rows=(0, 1, 2, 3), drop_grounding=0.5, **settings)
    module.log = lambda *arguments, **keywords: None

    def learn(rows):
        module.adapter.zero_grad()
        loss = module.training_step(rows_of(batch, rows), 0)
        loss.backward()
        return float(loss.detach()), [p.grad.clone() for p in module.adapter.parameters() if p.grad is not None]

    whole, gradients = learn([0, 1, 2, 3])
    # of different numbers of subjects, and so of different sizes
    (first, ours), (second, theirs) = learn([0, 2]), learn([1, 3])
    assert whole == pytest.approx((first + second) / 2, rel=1e-5)
    for gradient, a, b in zip(gradients, ours, theirs, strict=True):
        torch.testing.assert_close((a + b) / 2, gradient, rtol=1e-3, atol=1e-6)


def test_validation_is_the_plain_error_at_fixed_timesteps(configured, monkeypatch):
    """Nothing is dropped or weighted, and each pair has the timestep of its number."""
    recipe = {"box_loss_weight": 4.0, "loss_weighting": "min_snr", "noise_offset": 0.5, "drop_image": 1.0}
    module, batch = configured(
        rows=(0, 1, 2), validation_timesteps=[50, 600], drop_text=0, drop_both=0, drop_grounding=1.0, **recipe
    )
    batch = replace(batch, numbers=torch.tensor([0, 1, 4]), weights=torch.tensor([1.0, 1.0, 1.0]))
    asked = watch(module, monkeypatch, off=2.0)
    logged = {}
    module.log = lambda name, value, **keywords: logged.update({name: value})
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda sums, reduce_op: sums))
    module.on_validation_epoch_start()
    module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    noise, timesteps, no_grounding = asked[0]
    assert timesteps.tolist() == [50, 600, 50]
    assert torch.equal(noise, batch.draws.noise)
    assert no_grounding is None
    assert logged == pytest.approx(dict.fromkeys(
        ("validation/loss", "validation/loss_in_boxes", "validation/loss_t50", "validation/loss_t600"), 4.0
    ), rel=1e-5)  # fmt: skip


def test_validation_and_test_do_not_depend_on_the_batches(make_module, pairs_dir, few_pairs_dir):
    """Also where the last batch is filled up with repetitions, which have no weight."""
    seen = []
    module = make_module(ema_decay=0.5)
    for batch_size in (1, 3):
        data = make_data(pairs_dir, validation_pairs=str(few_pairs_dir), batch_size=batch_size)
        trainer = make_trainer(limit_val_batches=1.0)
        seen.append(trainer.validate(module, data, verbose=False)[0])
        tested = trainer.test(module, data, verbose=False)[0]
        assert {name.replace("test/", "validation/"): value for name, value in tested.items()} == seen[-1]
    assert set(seen[0]) == {
        "validation/loss", "validation/loss_in_boxes", *(f"validation/loss_t{t}" for t in (100, 300, 500, 700))
    }  # fmt: skip
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_a_batch_filled_up_with_repetitions_is_validated(configured):
    """Two equal halves are no guidance."""
    module, batch = configured(rows=(1, 1))
    inputs = module.encode(batch)
    timesteps = torch.tensor([300, 300])
    with torch.no_grad():
        prediction, _ = module.predict_noise(module.adapter, inputs, batch.draws.noise, timesteps)
    assert torch.equal(inputs.latents[0], inputs.latents[1])
    torch.testing.assert_close(prediction[0], prediction[1])


def test_predictions_are_pictures(make_module, few_pairs_dir):
    module = make_module(defaults={"scale": 0.9, "steps": 2, "guidance_scale": 2.0})
    data = make_data(few_pairs_dir, validation_pairs=str(few_pairs_dir), batch_size=2)
    pictures = [p for batch in make_trainer().predict(module, data) for p in batch]
    assert [(p.size, p.mode) for p in pictures] == [((32, 32), "RGB")] * 4
    assert len({p.tobytes() for p in pictures}) == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_moves_once_with_every_step(make_module, pairs_dir, accumulate):
    """Inside the step, so that every callback, which may write a checkpoint, sees both of the same step."""
    module = make_module(ema_decay=0.5, learning_rate=1e-2)
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append((trainer.global_step, int(pl_module.averaged.n_averaged)))

    make_trainer(max_steps=3, accumulate_grad_batches=accumulate, callbacks=[Look()]).fit(module, make_data(pairs_dir))
    assert all(step == averaged for step, averaged in seen)
    assert seen[-1] == (3, 3)
    assert module.trained_adapter is module.averaged.module
    averaged, weights = module.trained_adapter.state_dict(), module.adapter.state_dict()
    assert any(not torch.equal(averaged[name], weights[name]) for name in weights)
    assert max(float((averaged[name] - weights[name]).abs().max()) for name in weights) < 0.1


def test_a_checkpoint_says_what_adapter_it_holds(make_module, pairs_dir, tmp_path, tiny_model_dir):
    module = make_module(reference_fit="pad", defaults={"scale": 0.9})
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, make_data(pairs_dir))
    trainer.save_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    config = AdapterConfig.from_json(checkpoint["adapter_config"])
    assert config.resampler == module.adapter.config.resampler
    assert config.reference_fit == "pad"
    assert config.training_resolution == 32
    assert config.defaults["scale"] == 0.9
    assert Path(config.base_model).is_absolute()
    assert Path(config.base_model) == (tiny_model_dir / "base").resolve()
    assert Path(config.image_encoder) == (tiny_model_dir / "image_encoder").resolve()


def test_models_of_a_hub_keep_their_names(make_module):
    module = make_module()
    module.configure_model()
    module.settings = TrainingSettings.of({**module.hparams, "base_model": "someone/some-base"})
    assert module.exported_config()["base_model"] == "someone/some-base"
    assert module.exported_config("anywhere")["base_model"] == "someone/some-base"


def eight_subjects(path, shard_writer):
    write_shard, make_record = shard_writer
    boxes = [(x / 4, y / 2, x / 4 + 0.25, y / 2 + 0.5) for y in range(2) for x in range(4)]
    words = ("dog", "cat", "teapot", "hat") * 2
    subjects = [{"phrase": word, "target_box": list(box)} for word, box in zip(words, boxes, strict=True)]
    path.mkdir()
    entries = [(f"clip_{i}", make_record(f"clip_{i}", [], (64, 64), subjects=subjects)) for i in range(4)]
    write_shard(path / "pairs-000000.tar", entries, (64, 64))
    return path


def test_eight_subjects_are_trained(make_module, shard_writer, tmp_path):
    pairs = eight_subjects(tmp_path / "pairs", shard_writer)
    counts = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            counts.extend(batch.present.sum(dim=1).tolist())

    trainer = make_trainer(max_steps=1, callbacks=[Look()])
    trainer.fit(make_module(), make_data(pairs, validation_fraction=0, max_subjects=8))
    assert counts == [8] * 4
    assert torch.isfinite(trainer.callback_metrics["training/loss"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ema_decay": 0.9}, r"ema_decay was 0\.0, now 0\.9: .*adapter='RUN/best'"),
        ({"resampler": RESAMPLER | {"width": 48}}, r"resampler\.width was 32, now 48: .*start a new adapter"),
        ({"projector": "global"}, "projector was resampler, now global"),
    ],
)
def test_a_checkpoint_of_another_structure_is_refused_in_a_few_words(
    make_module, few_pairs_dir, tmp_path, changes, told
):
    data = make_data(few_pairs_dir, validation_fraction=0)
    trainer = make_trainer(max_steps=1)
    trainer.fit(make_module(resampler=RESAMPLER), data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer = make_trainer(max_steps=2)
    with pytest.raises(RequestError, match=f"the checkpoint does not fit these settings: {told}") as refusal:
        trainer.fit(make_module(**{"resampler": RESAMPLER} | changes), data, ckpt_path=tmp_path / "one.ckpt")
    assert len(str(refusal.value)) < 400
    # another optimizer is known by its name alone: the one of 8 bits needs a GPU
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["optimizer"] = "adamw_8bit"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(RequestError, match="optimizer was adamw_8bit, now adamw"):
        make_trainer(max_steps=2).fit(make_module(resampler=RESAMPLER), data, ckpt_path=tmp_path / "other.ckpt")


@pytest.mark.parametrize(("units", "dtype"), [("AMX", torch.bfloat16), (None, torch.float32)])
def test_the_base_follows_the_precision_of_the_hardware(make_module, few_pairs_dir, monkeypatch, units, dtype):
    from msdiffusion.training import precision

    monkeypatch.setattr(precision, "bfloat16_units", lambda device: units)
    module = make_module()
    trainer = make_trainer(max_steps=1, plugins=[precision.HardwarePrecision()], gradient_clip_val=1.0)
    trainer.fit(module, make_data(few_pairs_dir, validation_fraction=0))
    assert module.backbone.unet.dtype == dtype
    assert module.backbone.vae.dtype == torch.float32
    plain = module.backbone.from_pretrained(module.hparams.base_model, module.hparams.image_encoder).vae.state_dict()
    for name, weight in module.backbone.vae.state_dict().items():
        assert torch.equal(weight, plain[name]), name  # never rounded
    assert {parameter.dtype for parameter in module.adapter.parameters()} == {torch.float32}


def test_compiled_blocks_say_the_same(configured, monkeypatch):
    """Traced only: to compile for real takes minutes."""
    from diffusers import UNet2DConditionModel

    original = UNet2DConditionModel.compile_repeated_blocks
    monkeypatch.setattr(
        UNet2DConditionModel, "compile_repeated_blocks", lambda unet: original(unet, backend="eager", fullgraph=True)
    )
    losses = []
    for setting in (False, True):
        module, batch = configured(compile=setting)
        module.log = lambda *arguments, **keywords: None
        loss = module.training_step(batch, 0)
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in module.adapter.parameters())])
        compiled = [part for part in module.backbone.unet.modules() if part._compiled_call_impl is not None]
        assert bool(compiled) == setting
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_decay_needs_an_end(configured):
    module, _ = configured(decay="linear")
    module._trainer = SimpleNamespace(estimated_stepping_batches=float("inf"))
    with pytest.raises(RequestError, match="needs to know where the run ends"):
        module.configure_optimizers()


def test_checkpointed_gradients_are_the_same(configured):
    gradients = []
    for setting in (False, True):
        module, batch = configured(gradient_checkpointing=setting)
        module.log = lambda *arguments, **keywords: None
        module.training_step(batch, 0).backward()
        gradients.append([parameter.grad for parameter in module.adapter.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_fine_tuning_takes_settings_that_agree(make_module, tiny_model_dir):
    """So that the config that trained an adapter also goes on with it."""
    module = make_module(
        adapter=str(tiny_model_dir), resampler=RESAMPLER, reference_background=[255, 255, 255], reference_fit="pad"
    )
    module.configure_model()
    assert module.adapter.config.reference_fit == "pad"


@pytest.mark.parametrize("kind", ["run", "checkpoint", "official"])
def test_fine_tuning_takes_what_from_pretrained_takes(make_module, tiny_model_dir, tmp_path, kind):
    adapter = MSAdapter.from_pretrained(tiny_model_dir)
    place = tmp_path / "run"
    if kind == "run":
        adapter.save_pretrained(place / "best")
    elif kind == "checkpoint":
        place = tmp_path / "best.ckpt"
        state = {f"adapter.{name}": weight for name, weight in adapter.state_dict().items()}
        torch.save({"state_dict": state, "adapter_config": adapter.config.to_json()}, place)
    else:
        place = tmp_path / "ms_adapter.bin"
        adapter.to_official(place, skeleton_unet(tiny_model_dir / "base"))
    resampler = {"head_width": adapter.config.resampler.head_width}
    module = make_module(adapter=str(place), resampler=resampler)
    assert asked_structure(module.hparams).get("resampler.width", 32) == 32
    module.configure_model()
    for name, weight in adapter.state_dict().items():
        assert torch.equal(weight, module.adapter.state_dict()[name]), name
    assert Path(module.adapter.config.base_model).exists() or kind != "official"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"resampler": {"width": 64}}, r"resampler={'width': 64} contradicts .* trained with {'width': 32}"),
        ({"resampler": {"size": 1}}, r"resampler={'size': 1} contradicts"),
        ({"reference_background": [0, 0, 0]}, r"reference_background=\[0, 0, 0\] contradicts .*\[255, 255, 255\]"),
        ({"reference_fit": "squash"}, "reference_fit=squash contradicts .* trained with pad"),
    ],
)
def test_fine_tuning_refuses_settings_that_contradict_the_adapter(make_module, tiny_model_dir, setting, message):
    with pytest.raises(RequestError, match=message):
        make_module(adapter=str(tiny_model_dir), **setting).configure_model()


def test_missing_dataset_is_told_before_the_base_is_loaded(tmp_path):
    from msdiffusion.errors import DataError

    module = MSDiffusionModule(base_model="no/such/base", image_encoder="no/such/encoder")
    with pytest.raises(DataError, match=r"(?s)python -m data_pipeline\.world.*python -m data_pipeline\.build"):
        make_trainer().fit(module, make_data(tmp_path / "nowhere"))


def test_missing_base_is_told(pairs_dir):
    module = MSDiffusionModule(base_model="./no/such/base", image_encoder="./no/such/encoder")
    with pytest.raises(WeightsError, match="no/such/base"):
        make_trainer().fit(module, make_data(pairs_dir))


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({"resampler": {**RESAMPLER, "grounding": False}}, (64 + 1, 24)),
        ({"regions": "everywhere"}, (64 + 1, 24)),
        ({"resampler": {"tokens": 4}, "projector": "global", "regions": "everywhere"}, (1, 16)),
    ],
)
def test_ablations_train_save_and_load(configured, tmp_path, settings, features):
    from msdiffusion.generation.generate import MSDiffusion

    module, batch = configured(**NO_DROPS, **settings)
    inputs = module.encode(batch)
    assert tuple(inputs.image_tokens.shape[-2:]) == features
    module.log = lambda *arguments, **keywords: None
    loss = module.training_step(batch, 0)
    loss.backward()
    unused = {"resampler.null_queries"} if settings.get("resampler", {}).get("grounding", True) else set()
    without = {name for name, p in module.adapter.named_parameters() if p.grad is None or not p.grad.any()}
    assert without <= unused
    module.save_pretrained(tmp_path / "adapter")
    model = MSDiffusion.from_pretrained(tmp_path / "adapter")
    assert model.adapter.config == module.adapter.config.__class__.from_json(
        (tmp_path / "adapter" / "config.json").read_text()
    )
    picture = model.generate(
        [batch_reference()], [(0.1, 0.1, 0.6, 0.6)], "a dog", ["dog"], steps=1, seed=0, progress=False
    )[0]
    assert picture.size == (64, 64)


def batch_reference():
    from PIL import Image

    return Image.new("RGBA", (20, 20), (200, 30, 30, 255))


def test_loading_processes_are_given_the_preparation_alone(configured):
    """A collator that held the networks could not be handed to a spawned process, or only with all their weights."""
    import pickle

    from msdiffusion.training.samples.collation import PairsCollator

    module, _ = configured()
    collator = PairsCollator(2, module.prepare_references, {(32, 32): module.latent_shape(32, 32)})
    data = pickle.dumps(collator)
    assert len(data) < 100_000
    again = pickle.loads(data)
    assert torch.equal(again.prepare_references([batch_reference()]), module.prepare_references([batch_reference()]))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_trained_weights_are_never_16_bits_wide(make_module, pairs_dir, precision):
    with pytest.raises(RequestError, match=f"trainer.precision {precision} would make the trained weights 16 bits"):
        make_trainer(precision=precision).fit(make_module(), make_data(pairs_dir))


def test_predictions_do_not_depend_on_the_batch_size(make_module, pairs_dir):
    torch.manual_seed(0)
    module = make_module(defaults={"steps": 1, "guidance_scale": 1.0})
    drawn = []
    for batch_size in (1, 2):
        data = make_data(pairs_dir, batch_size=batch_size, validation_fraction=0.3)
        batches = make_trainer(limit_predict_batches=2 // batch_size).predict(module, data)
        drawn.append([picture for batch in batches for picture in batch])
    assert len(drawn[0]) == len(drawn[1]) == 2
    for one, other in zip(*drawn, strict=True):
        difference = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
        assert difference.max() <= 2
