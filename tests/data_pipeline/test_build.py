import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipeline import build, run
from data_pipeline.build import check_inputs, main
from data_pipeline.errors import InputError, SettingsError
from data_pipeline.options import STEPS, make_parser, make_steps
from data_pipeline.records import box_iou, decode_mask
from data_pipeline.sources import find_videos
from data_pipeline.steps.filter_pairs import FilterPairs

ROOT = Path(__file__).parents[2]


def mine(videos, out, *options, workers=0):
    plain = [] if "--detector" in options else ["--detector", "annotations", "--segmenter", "annotations"]
    common = ["--videos", str(videos), "--out", str(out), "--workers", str(workers), "--quiet", *plain]
    return main([*common, *map(str, options)])


def rejected(out):
    return {entry["video"]: entry for entry in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}


def read_shard(path):
    samples = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, suffix = member.name.split(".", 1)
            samples.setdefault(key, {})[suffix] = archive.extractfile(member).read()
    return samples


def dataset(out):
    """Everything that has to be the same whenever the same clips are mined with the same settings."""
    names = [*sorted(path.name for path in out.glob("*.tar")), "index.parquet", "rejected.jsonl"]
    return {name: (out / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six good clips, and four that are bad in four ways."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("mining_conftest", Path(__file__).with_name("conftest.py"))
    helpers = module_from_spec(spec)
    spec.loader.exec_module(helpers)
    folder = tmp_path_factory.mktemp("clips")
    names = ("dog", "teapot", "cat", "fish")
    for i in range(8):
        chosen = tuple(names[(i + j) % 4] for j in range(1 + i % 3))
        pictures, masks = helpers.draw_clip(chosen, size=128, seed=i)
        helpers.write_video(folder / f"clip_{i}.mp4", pictures)
        (folder / f"clip_{i}.annotations.json").write_text(json.dumps(helpers.annotate(chosen, masks)))
        (folder / f"clip_{i}.txt").write_text(" and ".join(f"a {name}" for name in chosen) + " on the beach")
    (folder / "clip_1.txt").unlink()
    (folder / "clip_4.mp4").write_bytes((folder / "clip_4.mp4").read_bytes()[:150])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "empty.txt").write_text("a dog on the beach")
    pictures, masks = helpers.draw_clip(("dog",), size=128, speed=0)
    helpers.write_video(folder / "still.mp4", pictures)
    (folder / "still.annotations.json").write_text(json.dumps(helpers.annotate(("dog",), masks)))
    (folder / "still.txt").write_text("a dog on the beach")
    return folder


@pytest.fixture(scope="module")
def mined(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("mined") / "pairs"
    assert mine(folder, out) == 0
    return out


def test_what_is_left_behind(mined):
    names = {path.name for path in mined.iterdir()}
    expected = {"pairs-000000.tar", "index.parquet", "rejected.jsonl", "build.json", "report.html", "report"}
    assert names == expected


def test_samples_follow_the_specification(mined, folder):
    samples = read_shard(mined / "pairs-000000.tar")
    assert list(samples) == ["clip_0", "clip_2", "clip_3", "clip_5", "clip_6", "clip_7"]
    for key, files in samples.items():
        metadata = json.loads(files["json"])
        assert metadata["schema"] == "msdiffusion.pairs/1"
        assert metadata["key"] == key
        assert metadata["caption"] == (folder / f"{key}.txt").read_text()
        truth = json.loads((folder / f"{key}.annotations.json").read_text())
        assert [subject["phrase"] for subject in metadata["subjects"]] == [entry["name"] for entry in truth["objects"]]
        target = Image.open(io.BytesIO(files["target.jpg"]))
        assert target.size == (metadata["width"], metadata["height"]) == (128, 128)
        for i, subject in enumerate(metadata["subjects"]):
            assert subject["attributes"] == {"category": subject["phrase"]}
            for side in ("target", "reference"):
                box = subject[f"{side}_box"]
                assert 0 <= box[0] < box[2] <= 1
                assert 0 <= box[1] < box[3] <= 1
                index = metadata["source"][f"frame_{side}"]
                [found] = [found for found in truth["frames"][index]["objects"] if found["id"] == i]
                np.testing.assert_allclose(np.array(box) * 128, found["box"], atol=1e-3)
                assert subject[f"{side}_mask_rle"] == found["mask_rle"]
            reference = np.asarray(Image.open(io.BytesIO(files[f"reference_{i}.png"])))
            x1, y1, x2, y2 = (round(value * 128) for value in subject["reference_box"])
            mask = decode_mask(subject["reference_mask_rle"])[y1:y2, x1:x2]
            assert np.array_equal(reference[..., 3] > 0, mask)
            assert not reference[~mask].any()


def test_target_and_reference_are_different_frames_of_the_video(mined, folder):
    files = read_shard(mined / "pairs-000000.tar")["clip_0"]
    source = json.loads(files["json"])["source"]
    assert (source["video"], source["frame_reference"], source["frame_target"]) == ("clip_0.mp4", 3, 8)
    assert source["t_reference"] == 0.375
    assert source["shot"] == [0.0, 1.375]


def test_rejected_clips_have_their_reasons(mined):
    found = {video: (entry["stage"], entry["reason"]) for video, entry in rejected(mined).items()}
    assert found.pop("clip_4.mp4")[0] == "read_videos"
    assert found == {
        "clip_1.mp4": ("read_videos", "no caption"),
        "empty.mp4": ("read_videos", "empty file"),
        "still.mp4": ("filter_pairs", "near-identical frames"),
    }


def test_index_and_build_agree_with_the_shards(mined):
    rows = pyarrow.parquet.read_table(mined / "index.parquet").to_pylist()
    content = json.loads((mined / "build.json").read_text())
    assert [row["key"] for row in rows] == list(read_shard(mined / "pairs-000000.tar"))
    assert content["counts"]["samples"] == len(rows) == 6
    assert content["counts"]["videos"] == 10
    assert content["settings"]["filter_pairs"]["min_area"] == FilterPairs.min_area
    assert list(content["settings"]) == [step.name for step in make_steps(arguments())]
    sample = json.loads(read_shard(mined / "pairs-000000.tar")["clip_0"]["json"])
    assert sample["pipeline"] == {"version": content["version"], "settings_hash": content["settings_hash"]}


def test_report_shows_kept_and_rejected_clips(mined):
    page = (mined / "report.html").read_text()
    assert "near-identical frames" in page
    assert "10 videos gave 6 samples" in page
    for name in ("kept", "rejected"):
        assert f'src="report/{name}.png"' in page
        assert Image.open(mined / f"report/{name}.png").width == 1500


def test_mining_again_gives_the_same_bytes(mined, folder, tmp_path):
    assert mine(folder, tmp_path / "again") == 0
    assert dataset(tmp_path / "again") == dataset(mined)


@pytest.mark.slow
def test_workers_give_the_same_bytes(mined, folder, tmp_path):
    assert mine(folder, tmp_path / "again", workers=2) == 0
    assert dataset(tmp_path / "again") == dataset(mined)


def test_a_run_that_was_stopped_goes_on_and_ends_the_same(mined, folder, tmp_path, monkeypatch, capsys):
    original = run.travel
    done = []

    def stop_after_five(steps, journey, at):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(journey.file.name)
        return original(steps, journey, at)

    monkeypatch.setattr(run, "travel", stop_after_five)
    assert mine(folder, tmp_path / "out") == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not (tmp_path / "out" / "build.json").exists()
    later = []
    monkeypatch.setattr(
        run, "travel", lambda steps, journey, at: later.append(journey.file.name) or original(steps, journey, at)
    )
    assert mine(folder, tmp_path / "out") == 0
    assert len(later) == 5
    assert not set(later) & set(done)
    assert dataset(tmp_path / "out") == dataset(mined)


def test_a_run_that_was_stopped_while_writing_shards(mined, folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "file_hashes", fail)
    assert mine(folder, tmp_path / "out") == 130
    monkeypatch.undo()
    assert mine(folder, tmp_path / "out") == 0
    assert dataset(tmp_path / "out") == dataset(mined)


def test_a_complete_dataset_is_left_alone(mined, folder):
    before = {path: path.stat().st_mtime_ns for path in mined.rglob("*")}
    assert mine(folder, mined) == 0
    assert {path: path.stat().st_mtime_ns for path in mined.rglob("*")} == before


def test_other_settings_on_an_old_folder(mined, folder, capsys):
    assert mine(folder, mined, "--min-area", 0.05) == 2
    assert "filter_pairs.min_area: 0.01 then, 0.05 now" in capsys.readouterr().err


def test_another_version_on_a_complete_folder(mined, folder, monkeypatch, capsys):
    monkeypatch.setattr(build, "__version__", "99")
    assert mine(folder, mined) == 2
    assert re.search(r"was made by version 0.* of the pipeline, this is 99: use it as it is", capsys.readouterr().err)


def test_other_videos_on_a_complete_folder(mined, folder, capsys):
    try:
        (folder / "new.mp4").write_bytes(b"x")
        assert mine(folder, mined) == 2
    finally:
        (folder / "new.mp4").unlink()
    assert "have changed since (10 videos then, 11 now)" in capsys.readouterr().err


def test_another_annotations_file_of_the_same_name(folder, tmp_path, capsys):
    corpus = tmp_path / "corpus.json"
    corpus.write_text('{"videos": {"a": {"file": "clip_7.mp4", "width": 8, "height": 8, "annotations": []}}}')
    assert mine(folder, tmp_path / "out", "--annotations", corpus) == 0
    assert mine(folder, tmp_path / "out", "--annotations", corpus) == 0
    corpus.write_text(corpus.read_text() + " ")
    assert mine(folder, tmp_path / "out", "--annotations", corpus) == 2
    assert "the file of read_videos.annotations_file has changed since" in capsys.readouterr().err


def test_both_directions(folder, tmp_path):
    assert mine(folder, tmp_path / "out", "--both-directions", "--pairs-per-shard", 4) == 0
    shards = [list(read_shard(path)) for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert shards[0] == ["clip_0", "clip_0-swapped", "clip_2", "clip_2-swapped"]
    assert [len(shard) for shard in shards] == [4, 4, 4]


def test_nothing_kept_is_no_success(folder, tmp_path, capsys):
    assert mine(folder, tmp_path / "out", "--min-subjects", 4) == 1
    shown = capsys.readouterr()
    assert "fewer subjects than min_subjects" in shown.out
    assert "no pair was left" in shown.err


def arguments(*more):
    return make_parser().parse_args(["--videos", "videos", "--out", "out", *map(str, more)])


def test_every_filter_can_be_set_from_the_command_line():
    steps = {step.name: step for step in make_steps(arguments("--max-aspect", 7, "--max-subjects", 3))}
    assert steps["filter_pairs"] == FilterPairs(max_aspect=7.0, max_subjects=3)


def test_every_setting_of_every_step_is_on_the_command_line():
    derived = {
        "read_videos": {"annotations", "annotations_file", "annotations_required", "caption_required"},
        "pick_frames": {"annotated_only"},
        **{name: {"device"} for name in ("write_captions", "match_subjects")},
        **{name: {"device", "model_needed"} for name in ("detect_boxes", "segment_masks")},
    }
    for options, step in zip(STEPS, make_steps(arguments()), strict=True):
        names = {field.name for field in fields(step) if field.init and field.name != "pipeline"}
        assert set(options.settings) == names - derived.get(step.name, set()), step.name


def test_annotated_masks_belong_to_annotated_boxes():
    for detector in ("auto", "groundingdino"):
        with pytest.raises(SettingsError, match=f"with --detector {detector} leave --segmenter away, or use sam"):
            make_steps(arguments("--detector", detector, "--segmenter", "annotations"))
    with pytest.raises(
        SettingsError, match="--annotations is for the detectors auto and annotations, not for embedded"
    ):
        make_steps(arguments("--detector", "embedded", "--annotations", "boxes.json"))


def test_the_embedded_detector_brings_its_segmenter():
    steps = {step.name: step for step in make_steps(arguments("--detector", "embedded"))}
    assert steps["segment_masks"].segmenter == "embedded"


BAD = {
    "missing folder": (["--videos", "nowhere"], "no folder of videos at nowhere"),
    "folder without videos": (["--videos", "."], "no videos in ."),
    "no annotations at all": (
        ["--videos", "bare", "--detector", "annotations"],
        "'annotations' reads boxes that come with the videos, but none of 1 video has any.*or leave --detector away",
    ),
    "no networks": (
        ["--videos", "bare"],
        r"^error: 1 of 1 video without annotations: networks find their boxes and masks\.\n"
        r"Grounding DINO \(IDEA-Research/grounding-dino-tiny, "
        r"690 MB\) and MobileSAM \(dhkim2810/MobileSAM, 41 MB\) are not on this machine, and cannot be had .*\n"
        r"  hf download IDEA-Research/grounding-dino-tiny --include .* && hf download dhkim2810/MobileSAM --include .*"
        r"\(clips of the procedural world: --detector embedded; annotated clips only: --detector annotations",
    ),
    "missing table": (["--videos", "bare", "--captions", "no.csv"], "no captions table at no.csv"),
    "missing corpus": (["--videos", "bare", "--annotations", "no.json"], "no annotations file or folder at no.json"),
    "workers": (["--videos", "bare", "--workers", "-1"], "--workers must be 0 or more, and 1024 at most, got -1"),
    "timeout": (
        ["--videos", "bare", "--clip-timeout", "0"],
        "--clip-timeout must lie above 0 and up to 86400 s, got 0",
    ),
    "endless timeout": (["--videos", "bare", "--clip-timeout", "3000000"], "up to 86400 s, got 3000000"),
    "device": (["--videos", "bare", "--device", "gpu"], "--device is cpu, cuda, cuda:1 or mps, got 'gpu'"),
    "device on ray": (["--videos", "bare", "--ray", "local", "--device", "cuda:1"], "on Ray --device is cpu or cuda"),
    "filter": (["--videos", "bare", "--min-fill", "2"], r"min_fill must lie in \[0, 1\], got 2"),
    "detector": (
        ["--videos", "bare", "--detector", "groundingdino", "--segmenter", "sam"],
        "groundingdino needs --detector-config FILE",
    ),
}


def test_wrong_local_weights_are_told_before_others_are_downloaded(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("data_pipeline.models.hub.missing", list)
    monkeypatch.setattr("data_pipeline.models.hub.fetch", lambda *_, **__: pytest.fail("a download"))
    told = arguments("--embedder", f"transformers:{tmp_path / 'empty'}")
    with pytest.raises(InputError, match="empty lacks its configuration"):
        build.download(make_steps(told), told)


def test_videos_without_a_caption_are_told_before_the_work(tmp_path, capsys):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.mp4").write_bytes(b"x")
    (tmp_path / "b.txt").write_text("a dog")
    (tmp_path / "some.csv").write_text("video,caption\nc.mp4,a cat\n")
    told = arguments("--videos", str(tmp_path), "--captions", str(tmp_path / "some.csv"), "--detector", "embedded")
    check_inputs(told, find_videos(tmp_path, told.captions), make_steps(told))
    assert capsys.readouterr().err == (
        f"note: 1 of 3 videos without a caption in {tmp_path / 'some.csv'} or beside them, the first one 'a.mp4'\n"
    )


@pytest.mark.parametrize("name", BAD)
def test_wrong_input_is_one_clear_error_and_no_folder(name, tmp_path, monkeypatch, capsys):
    options, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    if "bare" in options:
        (tmp_path / "bare").mkdir()
        (tmp_path / "bare/a.mp4").write_bytes(b"x")
        (tmp_path / "bare/a.txt").write_text("a dog")
    assert main([*options, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error, re.DOTALL), error
    assert error.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--clip-timeout", "--max-aspect", "--min-similarity"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_numbers_that_compare_with_nothing_are_refused(option, number, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--videos", "videos", option, number])
    assert stop.value.code == 2
    assert f"needs an ordinary number, got {number}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--videos", "--out", "--captions", "--annotations", "--segmenter-checkpoint"])
def test_paths_that_cannot_be_looked_at_are_refused(option, folder, tmp_path, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, why in (("x" * 300, "File name too long"), (loop, "Too many levels of symbolic links")):
        with pytest.raises(SystemExit) as stopped:
            main(["--videos", str(folder), option, str(path)])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert f"error: argument {option}: cannot look at " in said
        assert why in said


def test_a_misspelled_option_is_answered_with_the_right_one_and_not_with_all(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--videos", "videos", "--box-treshold", "0.2"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "did you mean --box-threshold for --box-treshold?" in error
    assert len(error.splitlines()) == 3
    with pytest.raises(SystemExit):
        main(["--videos", "videos", "--caption", "captions.csv"])
    assert "a table of captions is given with --captions FILE" in capsys.readouterr().err


def test_a_command_that_was_wrong_does_not_keep_its_folder_from_the_right_one(folder, mined, tmp_path, capsys):
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[]")
    assert mine(folder, tmp_path / "out", "--annotations", wrong) == 2
    assert not (tmp_path / "out").exists()
    assert mine(folder, tmp_path / "out") == 0
    assert dataset(tmp_path / "out") == dataset(mined)


def test_videos_without_any_caption_are_one_error_at_once(tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(b"x")
    assert mine(tmp_path / "videos", tmp_path / "out") == 2
    assert "none of 1 video has a caption.\nGive a.txt beside a.mp4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_that_name_no_video_are_told(folder, tmp_path, capsys):
    table = tmp_path / "captions.csv"
    table.write_text("video,caption\nclip_0.mp4,a dog on the beach\nclop_2.mp4,a cat\n")
    assert mine(folder, tmp_path / "out", "--captions", table) == 0
    assert "note: 1 row of" in (error := capsys.readouterr().err)
    assert "the first one 'clop_2.mp4'" in error


def test_annotations_that_name_no_video_are_told_before_anything_is_mined(folder, tmp_path, capsys):
    content = {"file": "clop_0.mp4", "width": 128, "height": 128, "annotations": []}
    corpus = tmp_path / "corpus.json"
    corpus.write_text(json.dumps({"videos": {"a": content}}), encoding="utf-8-sig")
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.annotations.json"))
    assert mine(bare, tmp_path / "out", "--annotations", corpus) == 2
    assert "no video is named in 1 entry of" in (error := capsys.readouterr().err)
    assert "the first one 'clop_0.mp4', the folder has 'clip_0.mp4'; is it 'clip_0.mp4'?" in error
    assert not (tmp_path / "out").exists()
    corpus.write_text(json.dumps({"videos": {"a": content, "b": {**content, "file": "clip_7.mp4"}}}))
    assert mine(folder, tmp_path / "out", "--annotations", corpus) == 0
    assert "note: 1 entry of" in capsys.readouterr().err
    assert rejected(tmp_path / "out")["clip_7.mp4"]["reason"] == "annotations without an object"


def test_captions_of_other_languages_are_one_note(folder, tmp_path, capsys):
    table = tmp_path / "captions.csv"
    captions = ("ein Hund auf dem Sand", "a dog without a hat", "eine Katze und ein Fisch", "Собака бежит по пляжу")
    table.write_text("video,caption\n" + "".join(f"clip_{i}.mp4,{caption}\n" for i, caption in enumerate(captions)))
    mine(folder, tmp_path / "pairs", "--captions", table)
    assert (
        "note: rejected, as they do not look English: 3 captions (2 German, 1 Russian). Clips of one language, in a "
        "folder of their own, can be mined with a spaCy model for it: `python -m spacy download de_core_news_sm`, "
        "--language-model de_core_news_sm\n"
    ) in capsys.readouterr().err
    reasons = {entry["video"]: entry["reason"] for entry in rejected(tmp_path / "pairs").values()}
    assert reasons["clip_0.mp4"] == reasons["clip_3.mp4"] == "the caption is not English"
    assert "the caption denies something, which is not asked for" in (tmp_path / "pairs" / "report.html").read_text()


def test_the_root_has_nothing_beside_it(capsys):
    assert main(["--videos", "/"]) == 2
    assert "give --out DIR" in capsys.readouterr().err


def test_an_unfinished_folder_refuses_other_files_and_other_versions(folder, tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "corpus.json"
    corpus.write_text('{"videos": {"a": {"file": "clip_7.mp4", "width": 8, "height": 8, "annotations": []}}}')

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "assemble", stop)
    assert mine(folder, tmp_path / "out", "--annotations", corpus) == 130
    monkeypatch.undo()
    before = corpus.read_text()
    corpus.write_text(before + " ")
    assert mine(folder, tmp_path / "out", "--annotations", corpus) == 2
    assert "the file of read_videos.annotations_file has changed since" in capsys.readouterr().err
    corpus.write_text(before)
    monkeypatch.setattr(build, "__version__", "99")
    assert mine(folder, tmp_path / "out", "--annotations", corpus) == 2
    assert re.search(r"was started by version .* of the pipeline, this is 99", capsys.readouterr().err)
    monkeypatch.undo()
    assert mine(folder, tmp_path / "out", "--annotations", corpus) == 0


def test_wrong_input_is_noticed_before_anything_heavy_is_imported(tmp_path):
    code = f"""
import sys
from data_pipeline.build import main
assert main(["--videos", {str(tmp_path)!r}, "--out", {str(tmp_path / "out")!r}]) == 2
print(sorted({{"torch", "spacy", "av", "decord", "scipy", "pyarrow", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_command_line_of_the_module(tmp_path):
    command = [
        sys.executable,
        "-m",
        "data_pipeline.build",
        "--videos",
        str(tmp_path / "no"),
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: no folder of videos at {tmp_path / 'no'}\n"


@pytest.mark.slow
def test_the_embedded_models_mine_clips_that_bring_nothing_but_a_caption(tmp_path):
    from data_pipeline.world import write_clips

    videos = tmp_path / "clips"
    write_clips(videos, 6, split="held_out", seed=77, workers=0)
    truth = {}
    for sidecar in videos.glob("*.annotations.json"):
        content = json.loads(sidecar.read_text())
        names = {entry["id"]: entry["name"] for entry in content["objects"]}
        truth[sidecar.name.split(".")[0]] = [
            {names[found["id"]]: np.array(found["box"]) / content["width"] for found in frame["objects"]}
            for frame in content["frames"]
        ]
        sidecar.unlink()
    options = ("--detector", "embedded", "--segmenter", "embedded")
    assert mine(videos, tmp_path / "here", *options) == 0
    assert mine(videos, tmp_path / "there", *options, workers=2) == 0
    assert dataset(tmp_path / "there") == dataset(tmp_path / "here")
    content = json.loads((tmp_path / "here/build.json").read_text())
    assert {"detect_boxes.embedded", "segment_masks.embedded"} <= set(content["files"])
    found = wanted = 0
    for key, files in read_shard(tmp_path / "here/pairs-000000.tar").items():
        sample = json.loads(files["json"])
        frame = truth[key][sample["source"]["frame_target"]]
        boxes = {subject["phrase"]: subject["target_box"] for subject in sample["subjects"]}
        found += sum(name in boxes and box_iou(boxes[name], tuple(box)) > 0.5 for name, box in frame.items())
        assert set(boxes) <= set(frame), f"{key}: {boxes} where there is {frame}"
    wanted = sum(len(frames[0]) for frames in truth.values())
    assert found >= 0.8 * wanted, f"{found} of {wanted}"


def as_coco(sidecars, pattern, first=0, crowd=0):
    """Sidecars of clips as one COCO file. pattern: of file names, from the clip's name and the frame's number."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "teapot"}]}
    for clip, sidecar in sidecars.items():
        for frame in sidecar["frames"]:
            image = {"id": len(content["images"]) + 1, "file_name": pattern.format(clip, frame["index"] + first)}
            content["images"].append({**image, "width": sidecar["width"], "height": sidecar["height"]})
            for found in frame["objects"]:
                attributes = {"occluded": False, "track_id": found["id"]}
                values = {"segmentation": found["mask_rle"], "iscrowd": crowd, "attributes": attributes}
                number = len(content["annotations"]) + 1
                content["annotations"].append(
                    {"id": number, "image_id": image["id"], "category_id": found["id"] + 1, **values}
                )
    return content


@pytest.mark.parametrize("export", ["cvat", "ffmpeg", "davis"])
def test_exports_of_others_give_the_samples_that_sidecars_give(write_clip, tmp_path, export):
    videos = tmp_path / "videos"
    clips = {"a": ("dog", "teapot"), "b": ("dog",)}
    sidecars = {}
    for clip, names in clips.items():
        write_clip(videos / "sub", clip, names)
        sidecars[clip] = json.loads((videos / f"sub/{clip}.annotations.json").read_text())
    assert mine(videos, tmp_path / "sidecars") == 0
    for clip in clips:
        (videos / f"sub/{clip}.annotations.json").unlink()
    content = {
        "cvat": lambda: as_coco(sidecars, "images\\sub\\{}\\frame_{:06d}.PNG", crowd=1),
        "ffmpeg": lambda: as_coco(sidecars, "/data/sub/{}_{:05d}.jpg", first=1),
        "davis": lambda: {"masks": "masks", "videos": {"sub/a": {"1": "dog", "2": "teapot"}, "sub/b": {"1": "dog"}}},
    }[export]()
    for clip, sidecar in sidecars.items():
        (tmp_path / f"masks/sub/{clip}").mkdir(parents=True)
        for frame in sidecar["frames"]:
            pixels = sum(decode_mask(found["mask_rle"]) * np.uint8(found["id"] + 1) for found in frame["objects"])
            pixels = pixels if clip == "a" else pixels * 255  # DAVIS 2016
            Image.fromarray(pixels.astype(np.uint8)).save(
                tmp_path / f"masks/sub/{clip}/{frame['index']:05d}.PNG", "PNG"
            )
    (tmp_path / "all.json").write_text(json.dumps(content))
    assert mine(videos, tmp_path / "export", "--annotations", tmp_path / "all.json") == 0
    ours, theirs = (read_shard(tmp_path / out / "pairs-000000.tar") for out in ("sidecars", "export"))
    assert len(ours) == 2
    assert ours.keys() == theirs.keys()
    for key, files in ours.items():
        for name in files.keys() - {"json"}:
            assert files[name] == theirs[key][name], f"{key}.{name}"
        found, wanted = (
            [(subject["phrase"], subject["target_mask_rle"]) for subject in json.loads(each["json"])["subjects"]]
            for each in (theirs[key], files)
        )
        assert found == wanted


@pytest.mark.slow
def test_real_clips(shared_dir, tmp_path):
    videos = shared_dir / "media/videos"
    options = ("--captions", videos / "captions.csv", "--annotations", videos / "captions_and_boxes.json")
    assert mine(videos, tmp_path / "out", *options) == 0  # annotations only: one clip has none
    samples = read_shard(tmp_path / "out/pairs-000000.tar")
    phrases = {
        key: [subject["phrase"] for subject in json.loads(files["json"])["subjects"]] for key, files in samples.items()
    }
    assert phrases == {
        "01_dog": ["woman"],
        "02_cups": ["red plastic cup", "red plastic cup"],
        "05_default_juggle": ["man"],
    }
    lost = rejected(tmp_path / "out")
    assert lost["03_blocks.mp4"]["reason"] == "fewer than two annotated frames in one shot"
    assert lost["03_blocks.mp4"]["evidence"] == {"shots": 1, "frames": [97]}
    assert {lost[f"{name}.mp4"]["reason"] for name in ("blackswan", "bigbuckbunny")} == {"no annotations"}
