"""Untrained embedded parts: the tokenizer knows the world, the base is an ordinary SDXL pipeline."""

import os
import subprocess
import sys

import pytest
import torch

from data_pipeline.world import CATEGORIES, COLORS, PATTERNS
from msdiffusion.training.embedded.networks import MAX_TOKENS, build_base, build_image_encoder, build_tokenizer


def test_every_word_of_the_world_is_one_token():
    tokenizer = build_tokenizer()
    for word in (*CATEGORIES, *COLORS, *PATTERNS, "cobblestone"):
        assert tokenizer.tokenize(word) == [f"{word}</w>"]


def test_vocabulary_is_the_same_in_every_process():
    """Weights and tokenizer are made in different processes; the trainer this replaced broke ties at random."""
    module = "msdiffusion.training.embedded.networks"
    program = f"from {module} import build_tokenizer; print(sorted(build_tokenizer().get_vocab().items()))"
    outputs = {
        subprocess.check_output([sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_unknown_words_fall_into_letters_and_come_back():
    tokenizer = build_tokenizer()
    ids = tokenizer("a zebra!").input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "azebra!"


def test_tokenizer_survives_saving(tmp_path):
    from transformers import CLIPTokenizer

    build_tokenizer().save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == MAX_TOKENS
    assert again("a red dog").input_ids == build_tokenizer()("a red dog").input_ids


def test_base_loads_as_a_diffusers_pipeline_and_draws_the_same(tmp_path):
    from diffusers import StableDiffusionXLPipeline

    torch.manual_seed(0)
    base = build_base(channels=(32, 32, 32), text_widths=(32, 32), text_layers=2)
    base.save_pretrained(tmp_path)
    loaded = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    pictures = []
    for pipeline in (base, loaded):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipeline("a dog", num_inference_steps=2, generator=generator, output_type="np").images)
    assert pictures[0].shape == (1, 64, 64, 3)
    assert (pictures[0] == pictures[1]).all()


def test_widths_that_do_not_divide_into_heads_are_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        build_base(channels=(64, 96, 100))


def test_image_encoder_gives_one_token_for_each_patch():
    encoder = build_image_encoder(width=32, layers=2)
    states = encoder(torch.zeros(1, 3, 64, 64), output_hidden_states=True).hidden_states
    assert states[-2].shape == (1, 65, 32)
