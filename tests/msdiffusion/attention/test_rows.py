"""What the rows of a batch are."""

import pytest
import torch

from msdiffusion.attention.rows import Rows, guided, seen
from msdiffusion.errors import RequestError

PIX2PIX = Rows(("conditional", "image", "unconditional"), 2)
PAG = Rows(("unconditional", "conditional", "perturbed"), 2)


def test_parts_follow_one_another():
    assert PIX2PIX.samples == 6
    assert PIX2PIX.of("conditional") == PIX2PIX.prompted() == slice(0, 2)
    assert PIX2PIX.of("unconditional", "image") == slice(2, 6)
    assert PAG.prompted() == slice(2, 6)
    assert guided(3, True) == Rows(("unconditional", "conditional"), 3)
    assert guided(3, False).prompted() == slice(0, 3)


@pytest.mark.parametrize(
    "branches", [("perturbed",), ("conditional", "unconditional"), (), ("conditional", "perturbed")]
)
def test_parts_that_are_not_there_or_not_neighbours_are_refused(branches):
    with pytest.raises(RequestError, match="it is conditional, image, unconditional"):
        PIX2PIX.of(*branches)


@pytest.mark.parametrize(
    "branches", [(), "conditional", ("conditional", "conditional"), ("positive",), ["conditional"]]
)
def test_unknown_parts_are_refused(branches):
    with pytest.raises(RequestError, match="branches must be a tuple of unconditional, conditional"):
        Rows(branches, 1)


@pytest.mark.parametrize("pictures", [0, -1, 1.0, True, None])
def test_odd_numbers_of_pictures_are_refused(pictures):
    with pytest.raises(RequestError, match="pictures must be a whole number from 1"):
        Rows(("conditional",), pictures)


def test_guidance_is_seen():
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert seen(torch.cat([latents, latents])) == guided(2, True)
    assert seen(latents) == guided(2, False)
    assert seen(latents[:1]) == guided(1, False)
    with pytest.raises(RequestError, match="holds every latent three times: say what its parts are"):
        seen(torch.cat([latents, latents, latents]))
    start = torch.cat([torch.ones(2, 4, 3, 3), torch.ones(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)])
    with pytest.raises(RequestError, match="three times"):
        seen(torch.cat([torch.cat([latents] * 3), start], dim=1))
