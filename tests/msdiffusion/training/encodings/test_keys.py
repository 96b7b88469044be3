import torch
from torch import nn

from msdiffusion.training.encodings.keys import SCHEMA, PartKey, digest_of


def make_network(weight=1.0, bias=True):
    network = nn.Linear(2, 2, bias=bias)
    nn.init.constant_(network.weight, weight)
    if bias:
        nn.init.zeros_(network.bias)
    return network


def test_a_digest_depends_on_weights_type_and_shape():
    assert digest_of(make_network()) == digest_of(make_network())
    half = make_network().bfloat16()
    assert len({digest_of(n) for n in (make_network(), make_network(2.0), make_network(bias=False), half)}) == 4


def test_a_fingerprint_depends_on_everything():
    key = PartKey("latents", {"autoencoder": "a"}, {"resolution": 64})
    others = [
        PartKey("text", {"autoencoder": "a"}, {"resolution": 64}),
        PartKey("latents", {"autoencoder": "b"}, {"resolution": 64}),
        PartKey("latents", {"autoencoder": "a"}, {"resolution": 32}),
    ]
    prints = {key.fingerprint("float32"), key.fingerprint("bfloat16"), *(k.fingerprint("float32") for k in others)}
    assert len(prints) == 5
    assert key.fingerprint("float32") == PartKey("latents", {"autoencoder": "a"}, {"resolution": 64}).fingerprint(
        "float32"
    )


def test_differences_are_told_in_words():
    key = PartKey("latents", {"autoencoder": "a"}, {"resolution": 64, "crop": "center"})
    assert key.differences(key.manifest("float16")) == []
    other = PartKey("latents", {"autoencoder": "b"}, {"resolution": 32, "crop": "center", "new": 1})
    assert key.differences(other.manifest("float32")) == [
        "it was made with another autoencoder, or the same in another precision",
        "new was 1, now None",
        "resolution was 32, now 64",
    ]
    assert key.differences({"schema": "other"}) == [f"its format is 'other', this version reads {SCHEMA!r}"]


def test_digests_are_computed_once_per_object():
    network = make_network()
    before = digest_of(network)
    with torch.no_grad():
        network.weight.zero_()
    assert digest_of(network) == before  # frozen networks do not change, so nobody looks twice
