import pytest
import torch

from msdiffusion.errors import DataError
from msdiffusion.training.samples.encoded import EncodedPairs, EncodedSample


def make_sample(subjects, latents=True, text=True, references=True, pooled=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return EncodedSample(
        latent_mean=draw(4, 2, 3) if latents else None,
        latent_deviation=draw(4, 2, 3) if latents else None,
        prompt_states=draw(5, 6) if text else None,
        pooled=draw(7) if text and pooled else None,
        phrase_embeddings=draw(subjects, 8) if text else None,
        image_tokens=draw(subjects, 3, 2) if references else None,
    )


def test_samples_become_a_batch_padded_with_zeros():
    samples = [make_sample(1, seed=1), make_sample(3, seed=2)]
    batch = EncodedPairs.stack(samples, max_subjects=4)
    assert batch.latent_mean.shape == (2, 4, 2, 3)
    assert batch.image_tokens.shape == (2, 4, 3, 2)
    for row, sample in enumerate(samples):
        count = len(sample.image_tokens)
        assert torch.equal(batch.prompt_states[row], sample.prompt_states)
        assert torch.equal(batch.pooled[row], sample.pooled)
        assert torch.equal(batch.image_tokens[row, :count], sample.image_tokens)
        assert torch.equal(batch.phrase_embeddings[row, :count], sample.phrase_embeddings)
        assert not batch.image_tokens[row, count:].any()
        assert not batch.phrase_embeddings[row, count:].any()


def test_subjects_are_chosen_and_ordered():
    sample = make_sample(3)
    chosen = sample.subjects([2, 0])
    assert torch.equal(chosen.image_tokens, sample.image_tokens[[2, 0]])
    assert torch.equal(chosen.phrase_embeddings, sample.phrase_embeddings[[2, 0]])
    assert chosen.latent_mean is sample.latent_mean
    assert make_sample(3, text=False).subjects([1]).phrase_embeddings is None


@pytest.mark.parametrize("part", ["latents", "text", "references"])
def test_a_part_may_be_missing(part):
    sample = make_sample(2, **{part: False})
    batch = EncodedPairs.stack([sample, sample], max_subjects=2)
    for encodings in (sample, batch, batch.to("cpu")):
        there = {"latents": encodings.has_latents, "text": encodings.has_text, "references": encodings.has_references}
        assert there == {name: name != part for name in there}


def test_a_batch_of_both_kinds_is_refused():
    with pytest.raises(DataError, match=r"1 of 2 pairs of a batch have no pooled.*encodings=off"):
        EncodedPairs.stack([make_sample(1), make_sample(1, pooled=False)], max_subjects=2)


def test_a_batch_moves_to_another_device():
    batch = EncodedPairs.stack([make_sample(1)], max_subjects=2).to("meta")
    assert batch.latent_mean.device.type == batch.image_tokens.device.type == "meta"
