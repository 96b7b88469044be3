from dataclasses import replace

import pytest
import torch

from msdiffusion.adapter.official import infer_params, rename_resampler
from msdiffusion.adapter.resampler import GlobalProjector, GroundingResampler, ResamplerParams
from msdiffusion.errors import WeightsError


@pytest.fixture(scope="module")
def golden(golden_tensors):
    return golden_tensors("resampler")


@pytest.fixture(scope="module")
def resampler(golden):
    tensors, config = golden
    weights = {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}
    weights = rename_resampler(weights)
    module = GroundingResampler(infer_params(weights, config["dim_head"]))
    module.load_state_dict(weights)  # strict
    return module.eval()


@pytest.mark.exact
@pytest.mark.parametrize(("key", "drop"), [("00", [0, 0]), ("01", [0, 1]), ("11", [1, 1])])
def test_equals_the_official_resampler(resampler, golden, key, drop):
    tensors, _ = golden
    with torch.no_grad():
        ours = resampler(
            tensors["image_tokens"].unflatten(0, (2, 3)),
            tensors["phrase_embeds"].unflatten(0, (2, 3)),
            tensors["boxes"],
            torch.tensor(drop),
        )
    torch.testing.assert_close(ours.flatten(0, 1), tensors[f"out_drop_{key}"], rtol=1e-5, atol=1e-5)


def test_params_are_read_from_the_official_weights(resampler, golden):
    _, config = golden
    params = resampler.params
    assert (params.width, params.depth, params.heads) == (config["dim"], config["depth"], config["heads"])
    assert (params.tokens, params.image_width) == (config["num_queries"], config["embedding_dim"])
    assert (params.phrase_width, params.output_width) == (config["phrase_embeddings_dim"], config["output_dim"])


def test_no_drop_flags_mean_no_drop(resampler, golden):
    tensors, _ = golden
    inputs = (
        tensors["image_tokens"].unflatten(0, (2, 3)),
        tensors["phrase_embeds"].unflatten(0, (2, 3)),
        tensors["boxes"],
    )
    with torch.no_grad():
        assert torch.equal(resampler(*inputs), resampler(*inputs, torch.zeros(2, dtype=torch.bool)))


@pytest.mark.exact
def test_subjects_do_not_see_one_another(resampler, golden):
    tensors, _ = golden
    images = tensors["image_tokens"].unflatten(0, (2, 3))
    phrases = tensors["phrase_embeds"].unflatten(0, (2, 3))
    with torch.no_grad():
        before = resampler(images, phrases, tensors["boxes"])
        changed = images.clone()
        changed[:, 1] += 1.0
        after = resampler(changed, phrases, tensors["boxes"])
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_box_features_are_frequency_major_without_two_pi():
    resampler = GroundingResampler(ResamplerParams(image_width=4, phrase_width=4, output_width=4, width=8, heads=1))
    box = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])
    features = resampler.box_features(box)[0, 0]
    assert features.shape == (64,)
    torch.testing.assert_close(features[:4], box[0, 0].sin())
    torch.testing.assert_close(features[4:8], box[0, 0].cos())
    torch.testing.assert_close(features[8:12], (box[0, 0] * 100 ** (1 / 8)).sin())


def test_the_released_sizes_have_the_released_number_of_weights():
    with torch.device("meta"):
        module = GroundingResampler(ResamplerParams(image_width=1664, phrase_width=768, output_width=2048))
    assert sum(weight.numel() for weight in module.parameters()) == 118_943_616
    assert len(module.state_dict()) == 59


@pytest.mark.parametrize("name", ["depth", "heads", "tokens", "width"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_sizes_are_refused(name, value):
    with pytest.raises(WeightsError, match=name):
        ResamplerParams(**{"image_width": 8, "phrase_width": 8, "output_width": 8, name: value})


def test_tokens_of_another_encoder_are_refused_with_both_widths(resampler):
    with pytest.raises(WeightsError, match="48.*24.*32 and 24"):
        resampler(torch.zeros(1, 1, 10, 32), torch.zeros(1, 1, 24), torch.zeros(1, 1, 4))


def test_learned_queries_are_the_grounded_resampler_with_everything_dropped(resampler, golden):
    """The ablation without grounding equals the official resampler's own drop, weight for weight."""
    tensors, _ = golden
    weights = {
        name: value
        for name, value in resampler.state_dict().items()
        if not name.startswith(("query_projection", "query_norm"))
    }
    ablation = GroundingResampler(replace(resampler.params, grounding=False))
    ablation.load_state_dict(weights)  # strict: the query network isn't there
    with torch.no_grad():
        ours = ablation.eval()(
            tensors["image_tokens"].unflatten(0, (2, 3)),
            tensors["phrase_embeds"].unflatten(0, (2, 3)),
            torch.rand_like(tensors["boxes"]),  # boxes are not seen
        )
    torch.testing.assert_close(ours.flatten(0, 1), tensors["out_drop_11"], rtol=1e-5, atol=1e-5)


def test_grounding_is_yes_or_no(resampler):
    with pytest.raises(WeightsError, match="grounding must be true or false, got 1"):
        replace(resampler.params, grounding=1)


@pytest.fixture
def projector():
    torch.manual_seed(0)
    return GlobalProjector(ResamplerParams(image_width=6, phrase_width=5, output_width=8, tokens=4))


def test_projector_makes_tokens_of_one_embedding_and_sees_nothing_else(projector):
    embeddings, phrases, boxes = torch.randn(2, 3, 1, 6), torch.randn(2, 3, 5), torch.rand(2, 3, 4)
    tokens = projector(embeddings, phrases, boxes)
    assert tokens.shape == (2, 3, 4, 8)
    other = projector(embeddings, torch.randn(2, 3, 5), torch.rand(2, 3, 4), torch.ones(2, dtype=torch.bool))
    assert torch.equal(tokens, other)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)  # normalised


def test_projector_refuses_several_tokens_and_other_widths(projector):
    with pytest.raises(WeightsError, match="one embedding per reference, got 7"):
        projector(torch.randn(2, 3, 7, 6), torch.randn(2, 3, 5), torch.rand(2, 3, 4))
    with pytest.raises(WeightsError, match="6 wide"):
        projector(torch.randn(2, 3, 1, 9), torch.randn(2, 3, 5), torch.rand(2, 3, 4))
