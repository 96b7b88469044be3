"""The layout loss: what it measures, whom it spares, and that it teaches the adapter."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from msdiffusion.training.learning.layout_loss import LayoutLoss, PhraseTokens

GRID = (4, 6)  # rows, columns
L = 5


def look(loss, maps):
    """Show a control attention (B, Q, L), as one layer of one head would have it."""
    weights = maps.unsqueeze(1)
    assert loss.weights(None, weights) is weights


def attention(*places):
    """(1, Q, L) in which patch q looks at token place[q] alone."""
    return nn.functional.one_hot(torch.tensor(places), L).float().unsqueeze(0)


def left_half(token, other):
    return attention(*[token if q % GRID[1] < 3 else other for q in range(GRID[0] * GRID[1])])


def test_attention_inside_the_box_costs_nothing_and_outside_all():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0]]])
    inside = LayoutLoss([[(2,)]], boxes, GRID, L)
    look(inside, left_half(2, 0))
    assert inside.loss().tolist() == pytest.approx([0], abs=1e-5)
    outside = LayoutLoss([[(2,)]], boxes, GRID, L)
    look(outside, left_half(0, 2))
    assert outside.loss().tolist() == pytest.approx([1], abs=1e-5)


def test_mean_over_layers_subjects_and_words():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    loss = LayoutLoss([[(1, 2), (3,), ()]], boxes, GRID, L)
    assert loss.counted.tolist() == [[1, 1, 0]]
    assert loss.found == 2
    look(loss, left_half(2, 3))  # 0 and 0
    look(loss, left_half(3, 1))  # 1 and 1
    uniform = torch.full((1, GRID[0] * GRID[1], L), 1 / L)
    look(loss, uniform)  # 1/2 and 1/2
    look(loss, left_half(1, 0))  # 0, and nothing at all of the second, which is not divided by zero: 1 - 0
    assert loss.loss().tolist() == pytest.approx([(0 + 0 + 1 + 1 + 0.5 + 0.5 + 0 + 1) / 8], abs=1e-4)


def test_samples_without_a_subject_to_look_for_cost_nothing():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0]]]).expand(2, 1, 4)
    loss = LayoutLoss([[()], [(2,)]], boxes, GRID, L)
    look(loss, left_half(0, 2).expand(2, -1, -1))
    assert loss.loss().tolist() == pytest.approx([0, 1], abs=1e-5)


def test_subjects_of_one_name_share_their_boxes():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]]])
    loss = LayoutLoss([[(2,), (2,)]], boxes, GRID, L)
    look(loss, left_half(2, 0))
    assert loss.loss().tolist() == pytest.approx([0], abs=1e-5)


def test_what_is_computed_again_is_not_counted_again():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 1.0]]])
    loss = LayoutLoss([[(2,)]], boxes, GRID, L)
    look(loss, left_half(2, 0))
    assert loss.loss().tolist() == pytest.approx([0], abs=1e-5)
    look(loss, left_half(0, 2))  # the backward pass of gradient checkpointing
    assert loss.loss().tolist() == pytest.approx([0], abs=1e-5)


def test_words_of_a_phrase_are_found_wherever_they_occur(tiny_tokenizer):
    tokens = PhraseTokens(tiny_tokenizer)
    caption = "a dog and a cat and a dog on the beach"
    ids = tiny_tokenizer(caption).input_ids
    found = tokens.of(caption, "dog")
    assert len(found) == 2
    assert ids[found[0]] == ids[found[1]] == tiny_tokenizer("dog").input_ids[1]
    assert tokens.of(caption, "teapot") == ()
    assert tokens.of(caption, "") == ()
    long = "a cat " * tiny_tokenizer.model_max_length + "and a dog"
    assert tokens.of(long, "dog") == ()
    assert 0 < len(tokens.of(long, "cat")) < tiny_tokenizer.model_max_length


def losses(module, batch, **settings):
    logged = {}
    module.log = lambda name, value, **keywords: logged.update({name: float(value)})
    module.settings = replace(module.settings, loss=replace(module.settings.loss, **settings))
    loss = module.training_step(batch, 0)
    return loss, logged


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_the_adapter(configured, checkpointing):
    module, batch = configured(
        drop_text=0, drop_image=0, drop_both=0, layout_loss_weight=1.0, gradient_checkpointing=checkpointing
    )
    with torch.enable_grad():
        loss, logged = losses(module, batch)
        loss.backward()
        with_layout = [p.grad.clone() for p in module.adapter.parameters() if p.grad is not None]
        module.adapter.zero_grad()
        plain, without = losses(module, batch, layout_loss_weight=0.0)
        plain.backward()
    gradients = [p.grad for p in module.adapter.parameters() if p.grad is not None]
    assert 0 < logged["training/layout_loss"] < 1
    assert logged["training/layout_subjects"] == 1
    assert "training/layout_loss" not in without
    assert float(loss.detach()) == pytest.approx(float(plain.detach()) + logged["training/layout_loss"], rel=1e-5)
    difference = [(a - b).abs().max() for a, b in zip(with_layout, gradients, strict=True)]
    assert max(difference) > 1e-6
    if checkpointing:
        other, batch = configured(drop_text=0, drop_image=0, drop_both=0, layout_loss_weight=1.0)
        losses(other, batch)[0].backward()
        gradients = [p.grad for p in other.adapter.parameters() if p.grad is not None]
        for ours, theirs in zip(with_layout, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_dropped_prompt_has_no_layout(configured):
    module, batch = configured(drop_text=1.0, drop_image=0, drop_both=0, layout_loss_weight=1.0)
    _, logged = losses(module, batch)
    assert logged["training/layout_loss"] == 0
    assert logged["training/layout_subjects"] == 0


def test_training_with_it_lowers_it(configured):
    """On one batch of fixed noise, with the loss of the noise out of the way."""
    module, batch = configured(
        drop_text=0, drop_image=0, drop_both=0, drop_grounding=0, layout_loss_weight=1000.0, learning_rate=3e-3
    )
    batch = replace(batch, draws=replace(batch.draws, timestep=torch.full_like(batch.draws.timestep, 0.5)))
    optimizer = torch.optim.AdamW(module.adapter.parameters(), lr=3e-3)
    course = []
    for _ in range(40):
        loss, logged = losses(module, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(logged["training/layout_loss"])
    assert min(course[-5:]) < course[0] - 0.01, course
