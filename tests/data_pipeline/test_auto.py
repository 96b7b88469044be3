"""``--detector auto --segmenter auto``: annotations where there are some, else released networks from the hub. The hub
is one of this machine; what it has is small, in the layouts and under the names of the released ones.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline import build
from data_pipeline.build import main
from data_pipeline.models import mobile_sam, sam
from data_pipeline.places import EMBEDDED_DETECTOR, SEGMENTER_SIZES, SEGMENTER_WEIGHTS
from data_pipeline.world.clips import write_clips

DINO, MOBILE, SAM = "IDEA-Research/grounding-dino-tiny", "dhkim2810/MobileSAM", "ybelkada/segment-anything"


def mine(videos, out, *options):
    return main(["--videos", str(videos), "--out", str(out), "--workers", "0", "--quiet", *map(str, options)])


def samples_of(out):
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    content = json.load(archive.extractfile(member))
                    found[content["key"]] = content
    return found


@pytest.fixture
def hub(small_hub, monkeypatch):
    """The embedded detector and segmenter as the released Grounding DINO and SAM, and a random MobileSAM."""
    small_hub.repositories[DINO] = {path.name: path.read_bytes() for path in EMBEDDED_DETECTOR.iterdir()}
    monkeypatch.setitem(sam.RELEASED, "vit_b", sam.read_params(str(SEGMENTER_SIZES)))
    tiny = mobile_sam.MobileSamParams(
        widths=(8, 12, 16), depths=(1, 1, 1), heads=(1, 2, 2), window_sizes=(7, 7, 3), image_size=64, prompt_width=16
    )
    monkeypatch.setattr(mobile_sam, "read_mobile_params", lambda model: tiny)
    monkeypatch.setattr(mobile_sam, "our_names", lambda weights: weights)
    torch.manual_seed(0)
    for hub_id, name, weights in (
        (SAM, "checkpoints/sam_vit_b_01ec64.pth", load_file(SEGMENTER_WEIGHTS)),
        (MOBILE, "mobile_sam.pt", mobile_sam.build_mobile_sam(tiny).state_dict()),
    ):
        torch.save(weights, buffer := io.BytesIO())
        small_hub.repositories[hub_id] = {name: buffer.getvalue()}
    return small_hub


@pytest.fixture
def clips(tmp_path):
    """Four clips of the world; the first two lose their annotations, the third its masks."""
    folder = tmp_path / "clips"
    write_clips(folder, count=4, seed=0)
    for name in ("clip_000000", "clip_000001"):
        (folder / f"{name}.annotations.json").unlink()
    path = folder / "clip_000002.annotations.json"
    content = json.loads(path.read_text())
    for frame in content["frames"]:
        for found in frame["objects"]:
            found.pop("mask_rle")
    path.write_text(json.dumps(content))
    return folder


def test_every_clip_is_served_by_what_it_came_with(hub, clips, tmp_path, capsys):
    assert mine(clips, tmp_path / "out", "--segmenter-model", "vit_b") == 0
    said = capsys.readouterr().err
    assert "note: 2 of 4 videos without annotations: networks find their boxes and masks" in said
    assert re.findall(r"downloading (.*) \(", said) == ["Grounding DINO", "SAM vit_b"]
    served = {
        key: (one["source"]["boxes"], one["source"]["masks"]) for key, one in samples_of(tmp_path / "out").items()
    }
    assert served == {
        "clip_000000": (DINO, "sam vit_b"),
        "clip_000001": (DINO, "sam vit_b"),
        "clip_000002": ("annotations", "sam vit_b"),
        "clip_000003": ("annotations", "annotations"),
    }
    page = (tmp_path / "out/report.html").read_text()
    rows = re.findall(r"<td>(boxes by .*?|masks by .*?)</td><td[^>]*>(\d+)</td>", page)
    assert sorted(rows) == [
        (f"boxes by {DINO}", "2"),
        ("boxes by annotations", "2"),
        ("masks by annotations", "1"),
        ("masks by sam vit_b", "3"),
    ]
    build = json.loads((tmp_path / "out/build.json").read_text())
    assert {"detect_boxes.model", "segment_masks.checkpoint"} <= build["files"].keys()
    assert build["settings"]["detect_boxes"]["model"] == DINO
    hub.asked.clear()
    assert mine(clips, tmp_path / "again", "--segmenter-model", "vit_b") == 0
    assert hub.asked == []
    assert samples_of(tmp_path / "again") == samples_of(tmp_path / "out")


def test_with_annotations_for_all_nothing_is_downloaded(small_hub, tmp_path):
    write_clips(tmp_path / "clips", count=2, seed=0)
    assert mine(tmp_path / "clips", tmp_path / "auto") == 0
    assert mine(tmp_path / "clips", tmp_path / "plain", "--detector", "annotations", "--segmenter", "annotations") == 0
    auto, plain = (samples_of(tmp_path / name) for name in ("auto", "plain"))
    for sample in auto.values():
        assert (sample["source"].pop("boxes"), sample["source"].pop("masks")) == ("annotations", "annotations")
    for sample in (*auto.values(), *plain.values()):
        sample.pop("pipeline")
    assert auto == plain
    assert len(auto) == 2


def test_on_a_cpu_masks_are_mobile_sams(hub, clips, tmp_path):
    loose = ("--min-mask-agreement", 0, "--min-mask-score", 0, "--min-fill", 0, "--min-pixels", 1, "--max-border", 1)
    mine(clips, tmp_path / "out", *loose)  # what random weights draw may be nothing
    assert set(hub.asked) == {*hub.repositories[DINO], "mobile_sam.pt"}
    assert "boxes by IDEA-Research/grounding-dino-tiny" in (tmp_path / "out/report.html").read_text()


def test_boxes_without_masks_fetch_their_network_in_the_middle(hub, clips, tmp_path, capsys):
    for name in ("clip_000000", "clip_000001"):
        (clips / f"{name}.mp4").unlink()
    assert mine(clips, tmp_path / "out", "--segmenter-model", "vit_b") == 0
    assert "downloading SAM vit_b" in capsys.readouterr().err
    assert hub.asked == ["checkpoints/sam_vit_b_01ec64.pth"]
    assert {one["source"]["masks"] for one in samples_of(tmp_path / "out").values()} == {"sam vit_b", "annotations"}
    assert "segment_masks.checkpoint" in json.loads((tmp_path / "out/build.json").read_text())["files"]


def test_workers_ask_whoever_started_them_for_a_network(hub, clips, tmp_path):
    """The weights in this hub are none, which the worker says after they came."""
    from huggingface_hub import constants

    for name in ("clip_000000", "clip_000001"):
        (clips / f"{name}.mp4").unlink()
    hub.repositories[MOBILE]["mobile_sam.pt"] = b"no weights"
    command = [sys.executable, "-m", "data_pipeline.build", "--videos", clips, "--out", tmp_path / "out"]
    changed = {"HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_CACHE": constants.HF_HUB_CACHE, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [*command, "--workers", "1"], env=os.environ | changed, cwd=Path(__file__).parents[2], capture_output=True
    )
    said = done.stderr.decode()
    assert done.returncode == 2, said
    assert hub.asked == ["mobile_sam.pt"]
    assert "downloading MobileSAM (dhkim2810/MobileSAM, 0 MB)" in said
    assert "mobile_sam.pt is not a file of tensors only" in said


def test_one_refusal_tells_all_that_is_missing(hub, clips, tmp_path, capsys):
    for caption in clips.glob("*.txt"):
        caption.unlink()
    assert mine(clips, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "error: none of 4 videos has a caption." in said
    assert "written by BLIP (Salesforce/blip-image-captioning-large, 1.9 GB): --caption blip" in said
    assert f"Still to be downloaded then: Grounding DINO ({DINO}, 690 MB) and MobileSAM ({MOBILE}, 41 MB)" in said
    assert hub.asked == []
    assert not (tmp_path / "out").exists()


VIT_B = ("--segmenter-model", "vit_b")


def test_a_finished_dataset_asks_for_no_model(hub, clips, tmp_path, capsys):
    """Its segmenter was only found to be needed in the middle; the cache is gone now."""
    for name in ("clip_000000", "clip_000001"):
        (clips / f"{name}.mp4").unlink()
    assert mine(clips, tmp_path / "out", *VIT_B) == 0
    shutil.rmtree(tmp_path / "hub_cache")
    hub.asked.clear()
    capsys.readouterr()
    assert mine(clips, tmp_path / "out", *VIT_B) == 0
    assert capsys.readouterr().err == ""
    (clips / "clip_000003.annotations.json").unlink()
    assert mine(clips, tmp_path / "out", *VIT_B) == 2
    assert "the videos, captions or annotations have changed since (2 videos then, 2 now)" in capsys.readouterr().err
    assert hub.asked == []


def test_another_version_of_a_model_is_still_a_change(hub, clips, tmp_path, capsys):
    assert mine(clips, tmp_path / "out", *VIT_B) == 0
    [weights] = (tmp_path / "hub_cache").rglob("sam_vit_b_01ec64.pth")
    weights.write_bytes(b"another one")
    assert mine(clips, tmp_path / "out", *VIT_B) == 2
    assert "error: the file of segment_masks.checkpoint has changed since" in capsys.readouterr().err


def test_what_is_wrong_anyway_is_said_before_a_download(hub, clips, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert mine(clips, tmp_path / "full") == 2
    assert "is not empty and no earlier run of this program is in it" in capsys.readouterr().err
    assert mine(clips, tmp_path / "out", "--device", "cuda:99") == 2
    assert "error: --device cuda:99: " in capsys.readouterr().err
    assert mine(clips, tmp_path / "out", "--language-model", "xx_none") == 2
    assert "error: no spaCy model found (tried xx_none)" in capsys.readouterr().err
    assert hub.asked == []
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_stopped_may_meet_clips_that_need_a_network(hub, clips, tmp_path, monkeypatch):
    aside = [(clips / f"clip_00000{number}.mp4").rename(tmp_path / f"clip_00000{number}.mp4") for number in (0, 1, 2)]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(build, "assemble", stop)
        assert mine(clips, tmp_path / "out", *VIT_B) == 130
    assert hub.asked == []
    for path in aside:
        path.rename(clips / path.name)
    assert mine(clips, tmp_path / "out", *VIT_B) == 0
    assert len(samples_of(tmp_path / "out")) == 4
    files = json.loads((tmp_path / "out/build.json").read_text())["files"]
    assert {"detect_boxes.model", "segment_masks.checkpoint"} <= files.keys()


def test_annotations_that_are_taken_away_while_the_run_goes_on(hub, clips, tmp_path, monkeypatch):
    for name in ("clip_000000", "clip_000001", "clip_000002"):
        (clips / f"{name}.mp4").unlink()
    real = build.run

    def run(*arguments, **options):
        (clips / "clip_000003.annotations.json").unlink(missing_ok=True)
        real(*arguments, **options)

    monkeypatch.setattr(build, "run", run)
    assert mine(clips, tmp_path / "out", *VIT_B) == 0
    [sample] = samples_of(tmp_path / "out").values()
    assert (sample["source"]["boxes"], sample["source"]["masks"]) == (DINO, "sam vit_b")


def test_a_download_that_was_cut_off_is_named_and_fetched_again(hub, clips, tmp_path, capsys):
    assert mine(clips, tmp_path / "out", *VIT_B) == 0
    for name in ("model.safetensors", "sam_vit_b_01ec64.pth"):
        [path] = (tmp_path / "hub_cache").rglob(name)
        path.write_bytes(path.read_bytes()[:1000])
        capsys.readouterr()
        assert mine(clips, tmp_path / f"again {name}", *VIT_B) == 2
        [broken] = re.findall("if the download was cut off, delete (.*) and run the same", capsys.readouterr().err)
        (shutil.rmtree if Path(broken).is_dir() else os.unlink)(broken)
        assert mine(clips, tmp_path / f"again {name}", *VIT_B) == 0


def test_a_caption_with_other_words_than_the_annotations_sees_theirs(small_hub, tmp_path):
    write_clips(tmp_path / "clips", count=1, seed=0)
    (tmp_path / "clips/clip_000000.txt").write_text("a zebra and a submarine")
    assert mine(tmp_path / "clips", tmp_path / "out") == 1
    [rejected] = map(json.loads, (tmp_path / "out/rejected.jsonl").read_text().splitlines())
    objects = json.loads((tmp_path / "clips/clip_000000.annotations.json").read_text())["objects"]
    assert rejected["evidence"]["phrases"] == ["zebra", "submarine"]
    assert rejected["evidence"]["annotated"] == sorted({one["name"] for one in objects})
