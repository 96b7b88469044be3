import subprocess
import sys

import pytest

import msdiffusion
from msdiffusion import errors


def test_every_error_has_the_one_base_and_is_exported():
    found = {value for value in vars(errors).values() if isinstance(value, type)}
    assert all(issubclass(error, errors.MSDiffusionError) for error in found)
    assert {error.__name__ for error in found} <= set(msdiffusion.__all__)


@pytest.mark.parametrize("name", ["LayoutError", "PhraseError", "RequestError", "DataError"])
def test_errors_that_blame_a_value_are_value_errors(name):
    assert issubclass(getattr(msdiffusion, name), ValueError)


def test_nobody_is_told_to_run_a_pickle():
    import pickle

    advice = "Weights only load failed ... `weights_only` to `False` will likely succeed, \x1b[1mdo those steps\x1b[0m"
    for error in (pickle.UnpicklingError(advice), RuntimeError(advice), OSError(f"x\n{advice}")):
        assert errors.reason(error) == "it is a pickle of more than tensors, which could run code when it is read"
    assert errors.reason(OSError("\x1b[31mno such file\x1b[0m\nmore")) == "no such file"
    assert errors.reason(KeyError()) == "KeyError"


def test_public_names():
    assert dir(msdiffusion) == sorted(msdiffusion.__all__)
    assert msdiffusion.MSDiffusion.__module__ == "msdiffusion.generation.generate"
    assert msdiffusion.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = msdiffusion.Nothing


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys, msdiffusion; print(sorted({'torch', 'diffusers', 'transformers', 'spacy'} & sys.modules.keys()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    "place",
    [
        None,
        "owner/repository",
        "checkpoints",
        ".",
        "/",
        "open_clip:ViT-H-14@x.safetensors",
        "gpt2",
        str(errors.__file__),
    ],
)
def test_what_may_be_a_hub_name_or_is_there_passes(place):
    errors.check_place(place, "--model")


@pytest.mark.parametrize("place", ["./a", "/a/b", "~/a", "a/b/c", "a.bin", "x/a.ckpt", "C:\\a\\b", "a.safetensors"])
def test_a_place_that_is_not_there_is_told(place):
    with pytest.raises(errors.WeightsError, match=r"no such file or folder: .* \(--model\)"):
        errors.check_place(place, "--model")


def test_a_folder_inside_a_repository_passes_where_that_is_possible():
    errors.check_place("h94/IP-Adapter/sdxl_models/image_encoder", "--image-encoder", inside=True)
    with pytest.raises(errors.WeightsError):
        errors.check_place("./IP-Adapter/sdxl_models", "--image-encoder", inside=True)


@pytest.mark.parametrize(
    "place",
    [
        "https://huggingface.co/owner/name",
        "https://huggingface.co/owner/name/tree/main",
        "http://hf.co/owner/name?download=true",
        "huggingface.co/owner/name",
        "hf://owner/name",
    ],
)
def test_an_address_is_told_how_a_repository_is_named(place):
    with pytest.raises(errors.WeightsError, match=r"is an address: .* owner/name, here owner/name$"):
        errors.check_place(place, "base_model=", inside=True)
    with pytest.raises(errors.WeightsError, match="is an address: .* as owner/name$"):
        errors.check_place("https://example.org/owner/name", "base_model=")
