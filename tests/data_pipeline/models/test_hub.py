import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import InputError, MissingModelError
from data_pipeline.models.hub import (
    GROUNDING_DINO,
    SEGMENTERS,
    HubModel,
    fetch,
    find_files,
    in_cache,
    missing,
    place_of,
    transformers_model,
)

NAMES = ("config.json", "preprocessor_config.json", "tokenizer.json", "vocab.txt")
NETWORK = {"model.safetensors": b"w" * 3_000_000, **{name: name.encode() for name in NAMES}}


@pytest.fixture
def hub(small_hub):
    small_hub.repositories = {
        GROUNDING_DINO.hub_id: NETWORK | {"pytorch_model.bin": b"p" * 9000, "onnx/config.json": b"o"},
        "ybelkada/segment-anything": {
            "checkpoints/sam_vit_b_01ec64.pth": b"b" * 2000,
            "checkpoints/sam_vit_h_4b8939.pth": b"h",
        },
    }
    return small_hub


def test_sizes_are_told_and_only_what_is_needed_is_downloaded(hub, capfd):
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()  # another test may have switched them off
    told = []
    wanted = [GROUNDING_DINO, SEGMENTERS["vit_b"], GROUNDING_DINO]
    assert missing(wanted) == [GROUNDING_DINO, SEGMENTERS["vit_b"]]
    fetch(wanted, told.append)
    assert told == [
        "downloading Grounding DINO (IDEA-Research/grounding-dino-tiny, 3 MB) to the cache of huggingface_hub",
        "downloading SAM vit_b (ybelkada/segment-anything, 0 MB) to the cache of huggingface_hub",
    ]
    assert "100%" in capfd.readouterr().err  # the bar
    assert sorted(hub.asked) == sorted([*NETWORK, "checkpoints/sam_vit_b_01ec64.pth"])
    assert {path.name for path in in_cache(GROUNDING_DINO).iterdir()} == NETWORK.keys()
    assert in_cache(SEGMENTERS["vit_b"]).read_bytes() == b"b" * 2000
    assert in_cache(SEGMENTERS["vit_h"]) is None  # another file of a repository that is there
    fetch(wanted, told.append)
    assert len(told) == 2


def test_quiet_is_quiet(hub, capfd):
    assert place_of(SEGMENTERS["vit_b"]).name == "sam_vit_b_01ec64.pth"
    assert capfd.readouterr().err == ""


def test_what_the_hub_does_not_give(hub, monkeypatch):
    with pytest.raises(InputError, match=r"the hub: owner/dino has no weights \(\*.pth\)"):
        hub.repositories["owner/dino"] = {"a.py": b""}
        fetch([HubModel("owner/dino", {"weights": ("*.pth",)})])
    with pytest.raises(InputError, match="^the hub has no model no/where: look for a mistake in the name, or, if it"):
        fetch([transformers_model("no/where")])
    hub.closed.add(GROUNDING_DINO.hub_id)
    with pytest.raises(
        InputError, match=r"\(IDEA-Research/grounding-dino-tiny, 690 MB\) is given only to those who acc"
    ):
        fetch([GROUNDING_DINO])
    with pytest.raises(InputError, match="'two words' is no directory here, and cannot be on the hub: Repo id must"):
        fetch([transformers_model("two words")])


def test_without_a_network_it_is_said_how_to_get_them(small_hub, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    wanted = [GROUNDING_DINO, SEGMENTERS["vit_t"]]
    with pytest.raises(MissingModelError) as caught:
        fetch(wanted)
    first, *commands, _ = str(caught.value).splitlines()
    assert first.startswith(
        "Grounding DINO (IDEA-Research/grounding-dino-tiny, 690 MB) and MobileSAM (dhkim2810/MobileSAM, 41 MB) are not"
    )
    assert commands == [
        f"  hf download {GROUNDING_DINO.hub_id} --include '*.json' --include '*.txt' --include '*.safetensors' && "
        "hf download dhkim2810/MobileSAM --include 'mobile_sam.pt'",
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingModelError, match=r"and cannot be had from the hub \(HF_HUB_OFFLINE forbids it\); where"):
        fetch(wanted)


def test_the_command_that_is_named_downloads_what_is_needed(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    command = Path(sys.executable).with_name("hf")
    changed = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "0"}
    wanted = [GROUNDING_DINO, SEGMENTERS["vit_b"]]
    for model in wanted:
        arguments = [command, *shlex.split(model.command)[1:]]
        subprocess.run(arguments, check=True, env=os.environ | changed, capture_output=True)
    assert missing(wanted) == []
    assert sorted(set(hub.asked) - NETWORK.keys()) == ["checkpoints/sam_vit_b_01ec64.pth", "onnx/config.json"]


def test_half_a_model_is_fetched_again(hub):
    fetch([GROUNDING_DINO])
    (in_cache(GROUNDING_DINO) / "vocab.txt").unlink()
    (in_cache(GROUNDING_DINO) / "tokenizer.json").unlink()
    assert in_cache(GROUNDING_DINO) is None
    fetch([GROUNDING_DINO])
    assert in_cache(GROUNDING_DINO) is not None


def test_what_is_left_of_a_broken_download_is_fetched_again(hub):
    fetch([GROUNDING_DINO])
    place = in_cache(GROUNDING_DINO)
    weights = place / "model.safetensors"
    weights.resolve().unlink()  # a link into nowhere is left
    assert in_cache(GROUNDING_DINO) is None
    fetch([GROUNDING_DINO])
    assert weights.stat().st_size == 3_000_000
    for damaged in (b"", b"\0" * 40):  # a machine that lost its power
        (place.parents[1] / "refs/main").write_bytes(damaged)
        assert in_cache(GROUNDING_DINO) is None
        fetch([GROUNDING_DINO])
        assert in_cache(GROUNDING_DINO) == place
    (place.parents[1] / "refs/main").write_bytes(b"\xff\xfe")
    with pytest.raises(MissingModelError) as caught:  # the library cannot read it either
        fetch([GROUNDING_DINO])
    assert f"; what is in {place.parents[1]} is not whole, and can be deleted if it is damaged; " in str(caught.value)


def test_weights_in_parts_are_there_if_all_parts_are(hub, tmp_path):
    parts = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = json.dumps({"weight_map": {"a": parts[0], "b": parts[1], "c": parts[0]}}).encode()
    network = {name: name.encode() for name in (*NAMES, *parts)} | {"model.safetensors.index.json": index}
    hub.repositories["owner/large"] = network
    model = transformers_model("owner/large")
    fetch([model])
    (in_cache(model) / parts[1]).unlink()
    assert in_cache(model) is None
    fetch([model])
    assert (in_cache(model) / parts[1]).read_bytes() == parts[1].encode()


def test_a_disk_without_room_is_told_before_the_download(hub, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(2_500_000))
    with pytest.raises(
        InputError, match=r"tiny, 3 MB\) must be downloaded, and .*hub_cache has room for 2 MB: free some"
    ):
        fetch([GROUNDING_DINO])
    assert hub.asked == []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(3_500_000))
    fetch([GROUNDING_DINO])
    (in_cache(GROUNDING_DINO) / "config.json").unlink()  # most of it is there
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(500_000))
    fetch([GROUNDING_DINO])


def test_files_by_a_hub_id(hub):
    hub.repositories["owner/dino"] = {"a.py": b"1", "b.py": b"2", "w.pth": b"3"}
    found = find_files("owner/dino", "--model", {"configuration": ("b.py",), "weights": ("*.safetensors", "*.pth")})
    assert {name: path.read_bytes() for name, path in found.items()} == {"configuration": b"2", "weights": b"3"}
    hub.repositories["owner/two"] = hub.repositories["owner/dino"]
    with pytest.raises(InputError, match="owner/two has several files for its configuration: name one of a.py, b.py"):
        find_files("owner/two", "--model", {"configuration": ("*.py",)})


def test_files_of_a_directory(tmp_path):
    needed = {"weights": ("*.safetensors", "*.pth"), "configuration": ("*.py",)}
    for name in ("config.py", "old.pth", "older.pth", "new.safetensors"):
        (tmp_path / name).touch()
    found = find_files(str(tmp_path), "--model", needed)
    assert found == {"weights": tmp_path / "new.safetensors", "configuration": tmp_path / "config.py"}
    assert find_files(str(tmp_path), "--model", {"weights": ("old.pth",)}) == {"weights": tmp_path / "old.pth"}
    (tmp_path / "new.safetensors").unlink()
    with pytest.raises(InputError, match="--model: .* several files for its weights: name one of old.pth, older.pth"):
        find_files(str(tmp_path), "--model", needed)
    with pytest.raises(InputError, match=r"--model: .* has no tokenizer \(vocab.txt\)"):
        find_files(str(tmp_path), "--model", {"tokenizer": ("vocab.txt",)})
    with pytest.raises(
        InputError, match="--model: no directory at .*/nothing; give a model's directory, or its hub id"
    ):
        find_files(str(tmp_path / "nothing"), "--model", needed)


def test_a_cache_that_is_forbidden_is_no_missing_model(hub, monkeypatch):
    fetch([SEGMENTERS["vit_b"]])

    def forbidden(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", forbidden)
    with pytest.raises(
        InputError, match="the models in .*models--ybelkada--segment-anything cannot be read: no permis"
    ):
        missing([SEGMENTERS["vit_b"]])
