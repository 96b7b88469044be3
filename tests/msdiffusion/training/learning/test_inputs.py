"""A batch as the networks take it: drops, what was encoded ahead, sizes, and no computing of padding."""

from dataclasses import fields, replace

import pytest
import torch

from msdiffusion.training.learning.inputs import make_condition, subject_slots
from msdiffusion.training.samples.encoded import EncodedPairs

pytestmark = pytest.mark.usefixtures("loaded_once")

NAMES = ("latents", "prompt_states", "image_tokens", "phrase_embeddings", "boxes")


def encoded_ahead(module, batch):
    """What ``precompute`` would have written for a batch, subjects padded with zeros."""
    backbone, (B, S) = module.backbone, batch.present.shape
    mean, deviation = backbone.latent_posterior(batch.targets)
    states, pooled = backbone.encode_prompts(batch.captions)
    phrases = backbone.encode_phrases([phrase for row in batch.phrases for phrase in row]).unflatten(0, (B, S))
    tokens = backbone.encode_references(batch.references.flatten(0, 1)).unflatten(0, (B, S))
    there = batch.present[..., None]
    return EncodedPairs(mean, deviation, states, pooled, phrases * there, tokens * there[..., None])


def assert_same(ours, theirs, **tolerance):
    for name in NAMES:
        torch.testing.assert_close(
            getattr(ours, name), getattr(theirs, name), msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )
    for name, value in (theirs.added_conditions or {}).items():
        torch.testing.assert_close(ours.added_conditions[name], value, **tolerance)


def test_dropped_image_is_zero_pixels_and_dropped_text_the_empty_prompt(configured):
    module, batch = configured()
    everything = module.encode(batch)
    dropped = module.encode(batch, [False, True], [False, True])
    zero = module.backbone.encode_references(torch.zeros_like(batch.references[0, :1]))[0]
    for slot in range(2):
        torch.testing.assert_close(dropped.image_tokens[1, slot], zero)
    torch.testing.assert_close(dropped.image_tokens[0], everything.image_tokens[0])
    states, _ = module.backbone.encode_prompts([""])
    torch.testing.assert_close(dropped.prompt_states[1], states[0])
    assert not torch.allclose(everything.prompt_states[1], states[0])
    torch.testing.assert_close(dropped.prompt_states[0], everything.prompt_states[0])
    # the phrases ground the subjects all the same
    torch.testing.assert_close(dropped.phrase_embeddings, everything.phrase_embeddings)
    assert torch.equal(dropped.boxes, everything.boxes)


@pytest.mark.parametrize("drops", [(None, None), ([True, False], [False, True]), ([True, True], [True, True])])
@pytest.mark.parametrize("parts", ["latents references text", "references", "text latents", "text"])
def test_encodings_made_ahead_change_nothing(configured, drops, parts):
    module, batch = configured()
    plain = module.encode(batch, *drops)
    whole = encoded_ahead(module, batch)
    left_out = {
        "latents": ("latent_mean", "latent_deviation"),
        "references": ("image_tokens",),
        "text": ("prompt_states", "pooled", "phrase_embeddings"),
    }
    missing = [name for part, names in left_out.items() if part not in parts for name in names]
    pictures = {"targets": "latents", "references": "references"}
    gone = {name: None for name, part in pictures.items() if part in parts}
    ahead = replace(batch, encoded=replace(whole, **dict.fromkeys(missing)), **gone)
    assert_same(module.encode(ahead, *drops), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("drops", [(None, None), ([True, False], [False, True])])
def test_autocast_changes_no_encoding(configured, drops):
    """Those made ahead of a run know nothing of its autocast either."""
    module, batch = configured()
    plain = module.encode(batch, *drops)
    module, batch = configured()  # with no answers in memory
    with torch.autocast("cpu", torch.bfloat16):
        cast = module.encode(batch, *drops)
        assert torch.is_autocast_enabled("cpu")
    assert_same(cast, plain, rtol=0, atol=0)


def test_encoders_are_asked_once_for_what_a_drop_puts_in_place(configured, monkeypatch):
    module, batch = configured()
    ahead = replace(batch, encoded=encoded_ahead(module, batch), targets=None, references=None)
    asked = []
    for name in ("encode_prompts", "encode_references", "encode_phrases", "latent_posterior"):
        original = getattr(module.backbone, name)
        monkeypatch.setattr(
            module.backbone, name, lambda *a, name=name, original=original: asked.append(name) or original(*a)
        )
    module.encode(ahead)
    assert asked == []
    for _ in range(3):
        module.encode(ahead, [True, False], [True, True])
    assert sorted(asked) == ["encode_prompts", "encode_references"]


def test_cached_encodings_change_nothing(configured):
    fresh, batch = configured(cache_encodings=False)
    kept, _ = configured(cache_encodings=True)
    first, second, third = (module.encode(batch) for module in (fresh, kept, kept))
    assert_same(second, first)
    for name in NAMES:
        assert torch.equal(getattr(second, name), getattr(third, name))


def test_latents_are_the_posteriors_sample_that_the_batch_chooses(configured):
    module, batch = configured()
    inputs = module.encode(batch)
    assert inputs.latents.dtype == torch.float32
    vae = module.backbone.vae
    posterior = vae.encode(batch.targets).latent_dist
    expected = (posterior.mean + posterior.std * batch.draws.posterior) * vae.config.scaling_factor
    torch.testing.assert_close(inputs.latents, expected)
    turned = replace(batch, draws=replace(batch.draws, posterior=-batch.draws.posterior))
    assert not torch.allclose(module.encode(turned).latents, inputs.latents)


def test_size_conditions(configured, monkeypatch):
    module, batch = configured()
    given = {}
    monkeypatch.setattr(
        module.backbone, "added_conditions", lambda pooled, *sizes: given.update(sizes=[s.tolist() for s in sizes])
    )
    module.encode(batch)
    assert given["sizes"] == [[[64, 96]] * 2, batch.crops_top_left.tolist(), [[32, 32]] * 2]
    assert batch.crops_top_left.any()
    module.encoder.size_condition = "resolution"
    module.encode(batch)
    assert given["sizes"] == [[[32, 32]] * 2, [[0, 0]] * 2, [[32, 32]] * 2]


@pytest.mark.parametrize("size_condition", ["picture", "resolution"])
def test_rectangular_targets(configured, size_condition):
    """Pictures of 96 x 64 pixels: height comes first in sizes, rows in latents."""
    module, batch = configured(data={"bucket_step": 8}, size_condition=size_condition)
    height, width = batch.size
    assert height < width
    inputs = module.encode(batch)
    factor = module.backbone.latent_factor
    assert inputs.latents.shape[-2:] == (height // factor, width // factor)
    assert inputs.added_conditions["time_ids"][:, 4:].tolist() == [[height, width]] * 2
    timesteps = torch.tensor([100, 700])
    prediction, target = module.predict_noise(module.adapter, inputs, batch.draws.noise, timesteps)
    assert prediction.shape == target.shape == inputs.latents.shape


@pytest.mark.parametrize("grounding", [None, [False, True]])
def test_padding_is_not_computed_and_changes_nothing(configured, grounding, monkeypatch):
    module, batch = configured(data={"max_subjects": 5})
    assert [len(own) for own in subject_slots(batch)] == batch.present.sum(dim=1).tolist() == [1, 2]
    inputs = module.encode(batch)
    assert inputs.boxes.shape == (2, 2, 4)  # cut to the largest sample
    assert inputs.subjects.tolist() == [0, 2, 3]
    drop = None if grounding is None else torch.tensor(grounding)
    seen = []
    original = module.adapter.resampler.forward
    monkeypatch.setattr(
        module.adapter.resampler, "forward", lambda *parts: seen.append(parts[0].shape[:2]) or original(*parts)
    )
    packed = make_condition(module.adapter, inputs, drop)
    assert seen == [(3, 1)]
    monkeypatch.undo()
    B, S = batch.present.shape
    padding = torch.randn(B, S, *inputs.image_tokens.shape[2:])  # whatever padding holds
    padding[:, :2] = torch.where(batch.present[:, :2, None, None], inputs.image_tokens, padding[:, :2])
    phrases = torch.randn(B, S, inputs.phrase_embeddings.shape[-1])
    phrases[:, :2] = torch.where(batch.present[:, :2, None], inputs.phrase_embeddings, phrases[:, :2])
    plain = module.adapter(padding, phrases, batch.boxes, drop_grounding=drop)
    T = module.adapter.tokens_per_subject
    for layer, keys in plain.keys.items():
        ours, theirs = (c[:, : 2 * T].unflatten(1, (2, T))[batch.present[:, :2]] for c in (packed.keys[layer], keys))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    noise, timesteps = batch.draws.noise, torch.tensor([100, 700])
    noisy = module.schedule.noisy(inputs.latents, noise, timesteps)
    answers = [
        module.backbone.unet(
            noisy, timesteps, inputs.prompt_states, added_cond_kwargs=inputs.added_conditions,
            cross_attention_kwargs={"subjects": condition},
        ).sample
        for condition in (packed, plain)
    ]  # fmt: skip
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-6)


def test_padding_gets_no_gradient_and_the_others_all_of_it(configured):
    module, batch = configured(data={"max_subjects": 4})
    gradients = []
    for packed in (True, False):
        module.adapter.zero_grad()
        inputs = module.encode(batch)
        if packed:
            condition = make_condition(module.adapter, inputs)
        else:
            condition = module.adapter(inputs.image_tokens, inputs.phrase_embeddings, inputs.boxes)
        timesteps = torch.tensor([100, 700])
        answer = module.backbone.unet(
            module.schedule.noisy(inputs.latents, batch.draws.noise, timesteps), timesteps, inputs.prompt_states,
            added_cond_kwargs=inputs.added_conditions, cross_attention_kwargs={"subjects": condition},
        ).sample  # fmt: skip
        answer.square().mean().backward()
        gradients.append([p.grad.clone() for p in module.adapter.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_batch_that_is_moved_keeps_on_the_host_what_is_decided_there(configured):
    module, batch = configured()
    there = module.transfer_batch_to_device(batch, torch.device("meta"), 0)
    host = {"condition", "grounding", "timestep"}
    for field in fields(there.draws):
        assert getattr(there.draws, field.name).device.type == ("cpu" if field.name in host else "meta"), field.name
    assert there.boxes.device.type == there.targets.device.type == "meta"
