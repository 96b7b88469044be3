import json
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.training.dataset import PairsDataModule
from msdiffusion.training.module import MSDiffusionModule

RESAMPLER = {"width": 32, "depth": 1, "heads": 2, "head_width": 16}


@pytest.fixture
def make_module(tiny_model_dir):
    def make(**settings):
        folders = {"base_model": str(tiny_model_dir / "base"), "image_encoder": str(tiny_model_dir / "image_encoder")}
        if "adapter" not in settings:
            folders["resampler"] = RESAMPLER
        return MSDiffusionModule(**folders | settings)

    return make


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


@pytest.fixture
def configured(make_module, pairs_dir):
    """Function: settings -> (module with its networks, a batch); no trainer is running."""

    def make(**settings):
        torch.manual_seed(0)
        module = make_module(**settings)
        data = make_data(pairs_dir, validation_fraction=0)
        data.trainer = trainer = make_trainer()
        trainer.strategy.connect(module)
        data.setup("fit")
        module.configure_model()
        return module, data.collate([data.training[0], data.training[1]])

    return make


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


def test_only_the_adapter_is_trained(make_module, pairs_dir):
    pl.seed_everything(0)
    module = make_module(learning_rate=1e-2)
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
    from msdiffusion.loading import load_adapter

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
    module = make_module(ema_decay=0.9)
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


def in_order(batch):
    """The same batch sorted by key, each sample's subjects sorted by name."""
    rows = sorted(range(len(batch)), key=batch.keys.__getitem__)
    slots = [sorted(range(2), key=lambda i, ids=batch.reference_ids[row]: ids[i] or "~") for row in rows]
    for name in ("targets", "original_sizes", "crops_top_left"):
        setattr(batch, name, getattr(batch, name)[rows])
    for name in ("boxes", "present", "references"):
        tensor = getattr(batch, name)
        setattr(batch, name, torch.stack([tensor[row][order] for row, order in zip(rows, slots, strict=True)]))
    for name in ("phrases", "reference_ids"):
        lists = getattr(batch, name)
        setattr(batch, name, [[lists[row][i] for i in order] for row, order in zip(rows, slots, strict=True)])
    for name in ("captions", "keys"):
        setattr(batch, name, [getattr(batch, name)[row] for row in rows])


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(make_module, few_pairs_dir, tmp_path):
    """Four steps at once, and two and two, give the same weights: everything that a step depends on is restored.

    What a checkpoint does not hold is the state of the random generators: here each step seeds them.
    """

    class SameBatchAndNoise(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            in_order(batch)
            pl.seed_everything(trainer.global_step, verbose=False)

    def run(max_steps, ckpt_path=None):
        pl.seed_everything(7, verbose=False)
        module = make_module(ema_decay=0.9, warmup_steps=3, drop_grounding=0.5, learning_rate=1e-2)
        trainer = make_trainer(max_steps=max_steps, callbacks=[SameBatchAndNoise()])
        # one batch is the whole dataset, so that the order of the pairs decides nothing
        trainer.fit(module, make_data(few_pairs_dir, validation_fraction=0), ckpt_path=ckpt_path)
        return trainer, module

    straight, expected = run(4)
    half, _ = run(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, module = run(4, ckpt_path=tmp_path / "half.ckpt")
    assert straight.global_step == resumed.global_step == 4
    assert int(module.averaged.n_averaged) == 4
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_bases_prediction(configured, prediction_type, monkeypatch):
    from msdiffusion.training.objective import training_schedule

    module, batch = configured()
    module.backbone.pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    module.schedule = training_schedule(module.backbone.pipeline.scheduler)
    inputs = module.encode(batch)
    noise = torch.randn_like(inputs.latents)
    timesteps = torch.tensor([100, 700])
    signal = module.schedule.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - module.schedule.alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
    truth = noise if prediction_type == "epsilon" else signal * noise - sigma * inputs.latents
    answers, asked = [truth, truth + 2.0], []

    def answer(noisy, *arguments, **keywords):
        asked.append(noisy)
        return (answers.pop(0),)

    monkeypatch.setattr(module.backbone.unet, "forward", answer)
    loss, inside = module._loss(module.adapter, inputs, noise, timesteps, None)
    off, _ = module._loss(module.adapter, inputs, noise, timesteps, None)
    assert loss == pytest.approx(0, abs=1e-6)
    assert inside == pytest.approx(0, abs=1e-6)
    assert off == pytest.approx(4, abs=1e-4)
    torch.testing.assert_close(asked[0], signal * inputs.latents + sigma * noise)


def test_weight_inside_the_boxes(configured):
    module, batch = configured(box_loss_weight=3.0)
    inputs = module.encode(batch)
    noise = torch.randn_like(inputs.latents)
    timesteps = torch.tensor([300, 600])
    weighted, inside = module._loss(module.adapter, inputs, noise, timesteps, None)
    module.hparams.box_loss_weight = 1.0
    plain, same_inside = module._loss(module.adapter, inputs, noise, timesteps, None)
    assert inside == same_inside
    low, high = sorted((float(plain.detach()), float(inside)))
    assert low < float(weighted.detach()) < high


def test_dropped_image_is_zero_pixels_and_dropped_text_the_empty_prompt(configured):
    module, batch = configured()
    everything = module.encode(batch)
    dropped = module.encode(batch, torch.tensor([True, False]), torch.tensor([True, False]))
    zero = module.backbone.encode_references(torch.zeros_like(batch.references[0, :1]))[0]
    for slot in range(2):
        torch.testing.assert_close(dropped.image_tokens[0, slot], zero)
    torch.testing.assert_close(dropped.image_tokens[1], everything.image_tokens[1])
    states, _ = module.backbone.encode_prompts([""])
    torch.testing.assert_close(dropped.prompt_states[0], states[0])
    assert not torch.allclose(everything.prompt_states[0], states[0])
    torch.testing.assert_close(dropped.prompt_states[1], everything.prompt_states[1])
    # the phrases ground the subjects all the same
    torch.testing.assert_close(dropped.phrase_embeddings, everything.phrase_embeddings)
    assert torch.equal(dropped.boxes, everything.boxes)


def test_cached_encodings_change_nothing(configured):
    fresh, batch = configured(cache_encodings=False)
    kept, _ = configured(cache_encodings=True)
    first, second, third = (
        module.encode(batch, generator=torch.Generator().manual_seed(0)) for module in (fresh, kept, kept)
    )
    for name in ("latents", "prompt_states", "image_tokens", "phrase_embeddings", "boxes"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name), msg=name)
        assert torch.equal(getattr(second, name), getattr(third, name))


def test_size_conditions(configured, monkeypatch):
    module, batch = configured()
    given = {}
    monkeypatch.setattr(
        module.backbone, "added_conditions", lambda pooled, *sizes: given.update(sizes=[s.tolist() for s in sizes])
    )
    module.encode(batch)
    assert given["sizes"] == [[[64, 96]] * 2, [[0, 8]] * 2, [[32, 32]] * 2]
    module.hparams.size_condition = "resolution"
    module.encode(batch)
    assert given["sizes"] == [[[32, 32]] * 2, [[0, 0]] * 2, [[32, 32]] * 2]


def test_validation_repeats_itself_and_training_does_not(configured):
    module, batch = configured()
    seen = []
    module.log = lambda name, value, **keywords: seen.append((name, float(value.detach())))
    for _ in range(2):
        with torch.no_grad():
            module.validation_step(batch, 3)
    assert seen[:2] == seen[2:]
    assert [name for name, _ in seen[:2]] == ["validation/loss", "validation/loss_in_boxes"]
    losses = [float(module.training_step(batch, 0).detach()) for _ in range(2)]
    assert losses[0] != losses[1]


def test_average_follows_the_weights(make_module, pairs_dir):
    module = make_module(ema_decay=0.5, learning_rate=1e-2)
    make_trainer(max_steps=3, accumulate_grad_batches=2).fit(module, make_data(pairs_dir))
    assert int(module.averaged.n_averaged) == 3
    assert module.trained_adapter is module.averaged.module
    averaged, weights = module.trained_adapter.state_dict(), module.adapter.state_dict()
    assert any(not torch.equal(averaged[name], weights[name]) for name in weights)
    difference = max(float((averaged[name] - weights[name]).abs().max()) for name in weights)
    assert difference < 0.1


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", {0: 1 / 5, 4: 1, 50: 1, 99: 1}),
        ("linear", {0: 1 / 5, 4: 1, 52: 0.5, 100: 0}),
        ("linear_half", {0: 1 / 5, 4: 1, 50: 1, 75: 0.5, 100: 0}),
    ],
)
def test_course_of_the_learning_rate(decay, expected):
    from msdiffusion.training.module import _learning_rate_course

    factor = _learning_rate_course(4, decay, 100)
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


def test_decay_needs_an_end(configured):
    module, _ = configured(decay="linear")
    module._trainer = SimpleNamespace(estimated_stepping_batches=float("inf"))
    with pytest.raises(RequestError, match="needs to know where the run ends"):
        module.configure_optimizers()


def test_checkpointed_gradients_are_the_same(configured):
    gradients = []
    for setting in (False, True):
        module, batch = configured(gradient_checkpointing=setting)
        inputs = module.encode(batch)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(inputs.latents.shape, generator=generator)
        loss, _ = module._loss(module.adapter, inputs, noise, torch.tensor([300, 600]), None)
        loss.backward()
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
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"box_loss_weight": 0.0}, "box_loss_weight must be above 0"),
        ({"timestep_exponent": -1.0}, "timestep_exponent must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must not be below 0"),
        ({"warmup_steps": -1}, "warmup_steps must not be below 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"drop_text": 2.0}, "drop_text must be in"),
        ({"decay": "cosine"}, "decay must be one of"),
        ({"size_condition": "none"}, "size_condition must be one of"),
        ({"base_dtype": "int8"}, "base_dtype must be one of"),
        ({"attention": "flash"}, "attention must be one of"),
    ],
)
def test_bad_settings_are_told_at_construction(settings, message):
    with pytest.raises(RequestError, match=message):
        MSDiffusionModule(**{"base_model": "base", "image_encoder": "encoder"} | settings)


@pytest.mark.parametrize(
    ("settings", "features"),
    [
        ({"resampler": {**RESAMPLER, "grounding": False}}, (64 + 1, 24)),
        ({"regions": "everywhere"}, (64 + 1, 24)),
        ({"resampler": {"tokens": 4}, "projector": "global", "regions": "everywhere"}, (1, 16)),
    ],
)
def test_ablations_train_save_and_load(configured, tmp_path, settings, features):
    from msdiffusion.generate import MSDiffusion

    module, batch = configured(**settings)
    inputs = module.encode(batch)
    assert tuple(inputs.image_tokens.shape[-2:]) == features
    loss, _ = module._loss(
        module.adapter,
        inputs,
        torch.randn_like(inputs.latents),
        torch.full((len(batch),), 500),
        torch.zeros(len(batch), dtype=torch.bool),
    )
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
