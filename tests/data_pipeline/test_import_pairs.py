import csv
import json
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, ImageCms

from data_pipeline import inspect, report
from data_pipeline.import_pairs import NOTES, main, make_parser
from data_pipeline.importers.steps import WritePairs
from data_pipeline.records import encode_mask
from data_pipeline.shard_reader import Shard
from data_pipeline.steps.write_shards import encode_jpeg
from msdiffusion.training.catalogue import read_catalogue

SIZE = (80, 60)
BOXES = [[10, 10, 40, 50], [45, 5, 80, 30]]


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, width: int = SIZE[0], height: int = SIZE[1], seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(width, height, seed)).save(path)


def disc() -> np.ndarray:
    """A mask of the first reference picture, 50 x 70."""
    rows, columns = np.mgrid[:70, :50]
    return (rows - 25) ** 2 + (columns - 18) ** 2 < 150


def item(number: int = 0, **changes: object) -> dict:
    """One item in the official layout: two subjects, each from a picture of its own, which must be saved."""
    return {
        "text": f"A Dog and a red  ball, {number}",
        "image_file": f"target{number}.png",
        "reference_image_files": ["first.png", "sub/second.png"],
        "image_boxes": BOXES,
        "reference_image_boxes": [[5, 5, 32, 45], [0, 0, 90, 40]],
        "reference_image_masks": None,
        "image_phrases": ["dog", "red ball"],
        **changes,
    }


@pytest.fixture
def pictures(tmp_path):
    """The folder of pictures of four items."""
    folder = tmp_path / "pictures"
    for number in range(4):
        save(folder / f"target{number}.png", seed=number)
    save(folder / "first.png", 50, 70, seed=10)
    save(folder / "sub" / "second.png", 90, 40, seed=11)
    return folder


@pytest.fixture
def official(tmp_path, pictures):
    """Imports official items; returns the exit code."""

    def run(items, *options: str, out: str = "out", suffix: str = ".jsonl", workers: int = 0) -> int:
        path = tmp_path / f"items{suffix}"
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), path)
        elif suffix == ".json":
            path.write_text(json.dumps(items, indent=1))
        else:
            path.write_text("\n".join(map(json.dumps, items)) + "\n")
        command = ["--from", "official", str(path), "--images", str(pictures), "--out", str(tmp_path / out)]
        return main([*command, "--quiet", "--workers", str(workers), *options])

    return run


@pytest.fixture
def folder(tmp_path):
    """Imports a folder of pictures; returns the exit code."""

    def run(*options: str, out: str = "out") -> int:
        command = ["--from", "images", str(tmp_path / "photos"), "--out", str(tmp_path / out)]
        return main([*command, "--quiet", "--workers", "0", *options])

    return run


def rejected(out: Path) -> dict[str, tuple[str, str]]:
    """Item -> (stage, reason)."""
    lines = (out / "rejected.jsonl").read_text().splitlines()
    return {entry["video"]: (entry["stage"], entry["reason"]) for entry in map(json.loads, lines)}


def evidence(out: Path) -> dict:
    """The evidence of the only item that was rejected."""
    [line] = (out / "rejected.jsonl").read_text().splitlines()
    return json.loads(line)["evidence"]


def build_json(out: Path) -> dict:
    return json.loads((out / "build.json").read_text())


def samples(out: Path) -> dict:
    """Key -> sample, through the reader of this package."""
    shards = [Shard(path) for path in sorted(out.glob("*.tar"))]
    return {key: shard.read(key) for shard in shards for key in shard.keys}


def contents(out: Path) -> dict[str, bytes]:
    names = ["index.parquet", "rejected.jsonl", *(path.name for path in out.glob("*.tar"))]
    return {name: (out / name).read_bytes() for name in names}


# ------------------------------------------------------------------------------------------------------------ official


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_items_become_pairs_that_training_reads(official, pictures, tmp_path, suffix):
    masks = [disc().astype(int).tolist(), None]
    assert official([item(0), item(1, reference_image_masks=masks)], suffix=suffix) == 0
    catalogue = read_catalogue(tmp_path / "out")
    assert catalogue.single_frame() == 0
    found = {pair.key: pair for pair in map(catalogue.read, range(len(catalogue)))}
    assert list(found) == ["target0", "target1"]
    for number in range(2):
        pair = found[f"target{number}"]
        assert pair.caption == f"A Dog and a red ball, {number}"
        assert pair.phrases == ("dog", "red ball")
        np.testing.assert_allclose(pair.boxes * [*SIZE, *SIZE], BOXES, atol=1e-3)
        assert pair.target.tobytes() == Image.open(BytesIO(encode_jpeg(noise(*SIZE, number), 95))).tobytes()
        assert [picture.size for picture in pair.references] == [(27, 40), (90, 40)]
        second = np.asarray(pair.references[1])
        np.testing.assert_array_equal(second[..., :3], noise(90, 40, 11))
        assert (second[..., 3] == 255).all()
    first = np.asarray(found["target0"].references[0])
    np.testing.assert_array_equal(first[..., :3], noise(50, 70, 10)[5:45, 5:32])
    assert (first[..., 3] == 255).all()
    cut, inside = np.asarray(found["target1"].references[0]), disc()[5:45, 5:32]
    np.testing.assert_array_equal(cut[..., 3], inside * 255)
    np.testing.assert_array_equal(cut[..., :3], noise(50, 70, 10)[5:45, 5:32] * inside[..., None])


def test_what_a_sample_says_of_itself(official, tmp_path):
    boxes = [[10, 10, 40.9, 50], [45, 5, 80.6, 30]]  # the second one reaches over the edge by a rounding error
    code = official(
        [item(reference_image_masks=[disc().tolist(), None], image_boxes=boxes, image_phrases=["dog", "cat"])]
    )
    assert code == 0
    [sample] = samples(tmp_path / "out").values()
    content = sample.metadata
    assert content["source"]["references"] == [
        {"picture": "first.png", "sha256": content["source"]["references"][0]["sha256"], "size": [50, 70]},
        {"picture": "sub/second.png", "sha256": content["source"]["references"][1]["sha256"], "size": [90, 40]},
    ]
    assert content["source"]["importer"] == "official"
    assert content["source"]["boxes_cut"] == 1
    assert "single_frame" not in content["source"]
    dog, cat = content["subjects"]
    assert (dog["mention"], cat["mention"]) == ("Dog", "")
    assert dog["reference_mask_rle"] == encode_mask(disc())
    assert "reference_mask_rle" not in cat and "target_mask_rle" not in dog
    assert dog["match_similarity"] is None
    assert cat["target_box"] == [0.5625, 0.083333, 1.0, 0.5]
    counts = build_json(tmp_path / "out")["counts"]
    assert {name: counts[name] for name in NOTES} == {
        "single_frame": 0, "subjects_without_mask": 1, "phrases_not_in_caption": 1, "boxes_cut": 1
    }  # fmt: skip
    row = pyarrow.parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()[0]
    assert (row["min_match_similarity"], row["frame_gap_seconds"], row["num_subjects"]) == (None, None, 2)


def test_items_under_the_key_datas(official, tmp_path):
    assert official([{"datas": item()}]) == 0
    assert list(samples(tmp_path / "out")) == ["target0"]


def test_a_reference_that_is_the_target_is_marked(official, pictures, tmp_path):
    (pictures / "copy.png").write_bytes((pictures / "target0.png").read_bytes())
    same = {"reference_image_boxes": BOXES}
    items = [
        item(0, reference_image_files=["target0.png", "target0.png"], **same),
        item(0, reference_image_files=["copy.png", "sub/second.png"]),
        item(1),
    ]
    assert official(items) == 0
    marks = {key: sample.metadata["source"].get("single_frame") for key, sample in samples(tmp_path / "out").items()}
    assert sorted(marks.values(), key=str) == [None, True, True]
    assert build_json(tmp_path / "out")["counts"]["single_frame"] == 2


def test_one_picture_with_two_captions_gives_two_samples(official, tmp_path):
    assert official([item(0), item(0, text="a dog, a red ball"), item(1)]) == 0
    found = samples(tmp_path / "out")
    assert len(found) == 3
    assert {sample.metadata["source"]["video"] for sample in found.values()} == {
        "target0.png", "target0.png (2)", "target1.png"
    }  # fmt: skip


def fractions(boxes: list, width: int, height: int) -> list:
    return [[x1 / width, y1 / height, x2 / width, y2 / height] for x1, y1, x2, y2 in boxes]


def test_boxes_in_fractions(official, tmp_path):
    boxes = {
        "image_boxes": fractions(BOXES, *SIZE),
        "reference_image_boxes": [*fractions([[5, 5, 32, 45]], 50, 70), [0, 0, 1, 1]],
    }
    assert official([item(0, **boxes)], "--boxes", "normalised", out="fractions") == 0
    assert official([item(0)], out="pixels") == 0
    of = {name: samples(tmp_path / name)["target0"] for name in ("fractions", "pixels")}
    for subject, other in zip(of["fractions"].metadata["subjects"], of["pixels"].metadata["subjects"], strict=True):
        assert subject == other
    assert [a.tobytes() for a in of["fractions"].references] == [b.tobytes() for b in of["pixels"].references]


def test_boxes_in_fractions_that_were_taken_for_pixels_end_the_run_at_once(official, tmp_path, capsys):
    boxes = {"image_boxes": fractions(BOXES, *SIZE), "reference_image_boxes": [[0, 0, 1, 1]] * 2}
    assert official([item(0, **boxes), item(1, **boxes)]) == 2
    assert "all 2 items lie between 0 and 1" in (error := capsys.readouterr().err)
    assert "--boxes normalised" in error
    assert not (tmp_path / "out").exists()
    assert official([item(0, **boxes), item(1)]) == 0  # only some: those are rejected
    assert rejected(tmp_path / "out") == {"target0.png": ("cut_subjects", "box in fractions where pixels are expected")}


def test_boxes_in_pixels_that_were_taken_for_fractions(official, tmp_path, capsys):
    assert official([item(0)], "--boxes", "normalised") == 2
    assert "look like pixels, so leave the option out" in capsys.readouterr().err
    boxes = {"image_boxes": fractions(BOXES, *SIZE), "reference_image_boxes": [[0, 0, 1, 1]] * 2}
    assert official([item(0, **boxes), item(1)], "--boxes", "normalised") == 0
    assert rejected(tmp_path / "out") == {"target1.png": ("cut_subjects", "box in pixels where fractions are expected")}


FAULTS = {
    "without a field": ({"image_phrases": ...}, "read_items", "unreadable item"),
    "text that is a list": ({"text": ["a dog"]}, "read_items", "unreadable item"),
    "text that was a list": ({"text": "['a dog', 'b']"}, "read_items", "unreadable item"),
    "boxes that are no list": ({"image_boxes": "10 10 20 20"}, "read_items", "unreadable item"),
    "a path that is a number": ({"reference_image_files": [1, 2]}, "read_items", "unreadable item"),
    "a picture inside": ({"image_file": {"bytes": "..."}}, "read_items", "pictures inside the table"),
    "one list shorter": ({"image_phrases": ["dog"]}, "read_items", "lists of different lengths"),
    "masks of another number": ({"reference_image_masks": [None]}, "read_items", "lists of different lengths"),
    "no caption": ({"text": " \n"}, "read_items", "no caption"),
    "an empty phrase": ({"image_phrases": ["dog", " "]}, "read_items", "empty phrase"),
    "path upwards": ({"image_file": "../target0.png"}, "open_pictures", "path outside the folder of pictures"),
    "upwards inside": ({"image_file": "sub/../target0.png"}, "open_pictures", "path outside the folder of pictures"),
    "absolute path": ({"image_file": "/etc/passwd"}, "open_pictures", "path outside the folder of pictures"),
    "link outwards": ({"image_file": "outside.png"}, "open_pictures", "path outside the folder of pictures"),
    "a zero in the path": ({"image_file": "a\0b.png"}, "open_pictures", "path outside the folder of pictures"),
    "half a letter in it": ({"image_file": "\ud800.png"}, "open_pictures", "path outside the folder of pictures"),
    "a path of nothing": ({"image_file": ""}, "open_pictures", "path outside the folder of pictures"),
    "no such target": ({"image_file": "nowhere.png"}, "open_pictures", "no such picture"),
    "a folder": ({"image_file": "sub"}, "open_pictures", "no such picture"),
    "no such reference": ({"reference_image_files": ["first.png", "no.png"]}, "open_pictures", "no such picture"),
    "cut short": ({"image_file": "short.png"}, "open_pictures", "unreadable picture"),
    "no picture": ({"image_file": "text.png"}, "open_pictures", "unreadable picture"),
    "postscript": ({"image_file": "script.png"}, "open_pictures", "unreadable picture"),
    "huge": ({"image_file": "huge.png"}, "open_pictures", "picture too large"),
    "16 bits": ({"image_file": "deep.png"}, "open_pictures", "picture of more than 8 bits per channel"),
    "transparent": ({"image_file": "clear.png"}, "open_pictures", "picture with transparency"),
    "moving": ({"image_file": "moving.gif"}, "open_pictures", "picture with several frames"),
    "turned": ({"image_file": "turned.jpg"}, "open_pictures", "picture with a rotation in its EXIF data"),
    "bad profile": ({"image_file": "profile.png"}, "open_pictures", "unusable colour profile"),
    "over the right edge": ({"image_boxes": [[10, 10, 82, 50], BOXES[1]]}, "cut_subjects", "box beyond its picture"),
    "over the upper edge": ({"image_boxes": [[10, -2, 40, 50], BOXES[1]]}, "cut_subjects", "box beyond its picture"),
    "over a reference": (
        {"reference_image_boxes": [[5, 5, 60, 45], [0, 0, 90, 40]]}, "cut_subjects", "box beyond its picture"),
    "x, y, width, height": ({"image_boxes": [[40, 10, 30, 40], BOXES[1]]}, "cut_subjects", "box smaller than a pixel"),
    "three numbers": ({"image_boxes": [[10, 10, 40], BOXES[1]]}, "cut_subjects", "unreadable box"),
    "not a number": ({"image_boxes": [[10, 10, float("nan"), 50], BOXES[1]]}, "cut_subjects", "unreadable box"),
    "infinite": ({"image_boxes": [[10, 10, float("inf"), 50], BOXES[1]]}, "cut_subjects", "unreadable box"),
    "words": ({"image_boxes": [["10", "10", "40", "50"], BOXES[1]]}, "cut_subjects", "unreadable box"),
    "true and false": ({"image_boxes": [[True, 10, 40, 50], BOXES[1]]}, "cut_subjects", "unreadable box"),
    "mask of another size": (
        {"reference_image_masks": [np.ones((50, 70), int).tolist(), None]}, "cut_subjects",
        "mask of another size than its picture"),
    "ragged mask": ({"reference_image_masks": [[[0, 1], [1]], None]}, "cut_subjects", "unreadable mask"),
    "mask of words": ({"reference_image_masks": [[["a"] * 50] * 70, None]}, "cut_subjects", "unreadable mask"),
    "soft mask": (
        {"reference_image_masks": [(disc() * 128).tolist(), None]}, "cut_subjects",
        "mask with other values than 0 and 1, or 0 and 255"),
    "empty mask": (
        {"reference_image_masks": [np.zeros((70, 50), int).tolist(), None]}, "cut_subjects", "mask without a pixel"),
    "mask beside its box": (
        {"reference_image_masks": [disc().tolist(), None], "reference_image_boxes": [[40, 50, 50, 70], [0, 0, 90, 40]]},
        "cut_subjects", "mask without a pixel inside its box"),
    "mask file outside": (
        {"reference_image_masks": ["../first.png", None]}, "cut_subjects", "path outside the folder of pictures"),
    "mask file missing": ({"reference_image_masks": ["no.png", None]}, "cut_subjects", "unreadable mask"),
    "mask in colour": ({"reference_image_masks": ["first.png", None]}, "cut_subjects", "unreadable mask"),
    "pickled mask": ({"reference_image_masks": ["pickled.npy", None]}, "cut_subjects", "unreadable mask"),
    "archive of masks": ({"reference_image_masks": ["archive.npy", None]}, "cut_subjects", "unreadable mask"),
    "broken run lengths": (
        {"reference_image_masks": [{"size": [70, 50], "counts": [1, 2]}, None]}, "cut_subjects",
        "unreadable mask in the annotations"),
    "run lengths of another size": (
        {"reference_image_masks": [{"size": [50, 70], "counts": [3500]}, None]}, "cut_subjects",
        "mask of another size"),
}  # fmt: skip


@pytest.fixture
def bad_pictures(pictures, tmp_path):
    """Files that are not what an item may use."""
    whole = (pictures / "target0.png").read_bytes()
    (pictures / "short.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "text.png").write_text("not a picture")
    (pictures / "script.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 80 60\n%%EndComments\nshowpage\n"
    )
    Image.new("1", (9000, 9000)).save(pictures / "huge.png")
    Image.fromarray(np.full((60, 80), 40_000, np.uint16)).save(pictures / "deep.png")
    Image.new("RGBA", SIZE, (1, 2, 3, 128)).save(pictures / "clear.png")
    frames = [Image.fromarray(noise(*SIZE, seed)) for seed in range(2)]
    frames[0].save(pictures / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(*SIZE)).save(pictures / "turned.jpg", exif=exif)
    Image.fromarray(noise(*SIZE)).save(pictures / "profile.png", icc_profile=b"no profile")
    save(tmp_path / "elsewhere.png")
    (pictures / "outside.png").symlink_to(tmp_path / "elsewhere.png")
    np.save(pictures / "pickled.npy", np.array([object()]), allow_pickle=True)
    with (pictures / "archive.npy").open("wb") as file:
        np.savez(file, mask=disc())
    return pictures


@pytest.mark.usefixtures("bad_pictures")
def test_every_fault_of_an_item_rejects_that_item_alone(official, tmp_path, capsys):
    items = [item(0)]
    for name, (changes, _, _) in FAULTS.items():
        changed = {**item(1), "text": f"a dog, a red ball, {name}", **changes}
        items.append({key: value for key, value in changed.items() if value is not ...})
    assert official(items) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["reason"]) for line in lines] == [
        (stage, reason) for _, stage, reason in FAULTS.values()
    ]
    assert len({line["key"] for line in lines}) == len(FAULTS)
    assert list(samples(tmp_path / "out")) == ["target0"]
    counts = build_json(tmp_path / "out")["counts"]
    assert (counts["videos"], counts["rejected"], counts["samples"]) == (len(FAULTS) + 1, len(FAULTS), 1)
    assert sum(sum(reasons.values()) for reasons in counts["reasons"].values()) == len(FAULTS)
    assert "1 rejected by cut_subjects: mask without a pixel inside its box" in capsys.readouterr().out


def test_an_item_without_subjects(official, tmp_path, capsys):
    names = ("reference_image_files", "image_boxes", "reference_image_boxes", "image_phrases")
    assert official([item(0, **{name: [] for name in names})]) == 1
    assert rejected(tmp_path / "out") == {"target0.png": ("read_items", "no subjects")}
    assert "no pair was left" in capsys.readouterr().err


def test_lines_and_values_that_are_no_items(official, tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("\ufeff" + json.dumps(item(0)) + "\n\n{broken\n[1, 2]\n" + "[" * 100_000 + "\n")
    command = ["--from", "official", str(path), "--images", str(tmp_path / "pictures"), "--out", str(tmp_path / "out")]
    assert main([*command, "--quiet", "--workers", "0"]) == 0
    found = rejected(tmp_path / "out")
    assert set(found.values()) == {("read_items", "unreadable item")}
    assert len(found) == 3
    assert list(samples(tmp_path / "out")) == ["target0"]


def test_an_item_that_no_json_can_hold(official, tmp_path):
    assert official([item(0, image_file="target0.png"), item(1, reference_image_masks=[b"\x00", b"\x01"])],
                    suffix=".parquet") == 0  # fmt: skip
    assert rejected(tmp_path / "out") == {"target1.png": ("read_items", "unreadable item")}


@pytest.mark.usefixtures("bad_pictures")
def test_absolute_paths_and_links_where_they_are_allowed(official, tmp_path):
    save(tmp_path / "elsewhere.png")
    items = [item(0, image_file=str(tmp_path / "elsewhere.png")), item(0, image_file="outside.png"),
             item(0, image_file="../elsewhere.png")]  # fmt: skip
    assert official(items, "--allow-absolute") == 0
    assert list(rejected(tmp_path / "out").values()) == [("open_pictures", "path outside the folder of pictures")]
    assert len(samples(tmp_path / "out")) == 2


@pytest.mark.usefixtures("bad_pictures")
@pytest.mark.parametrize(("choice", "size"), [("apply", (60, 80)), ("ignore", (80, 60))])
def test_turned_pictures_by_choice(official, tmp_path, choice, size):
    boxes = [[5, 5, 50, 40], [5, 5, 60, 55]]
    assert official([item(image_file="turned.jpg", image_boxes=boxes)], "--exif", choice) == 0
    assert samples(tmp_path / "out")["turned"].target.size == size


def test_a_colour_profile_is_applied(official, pictures, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"----", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"----", b"bXYZ", 1)
    assert swapped != profile  # in it the first channel is blue
    red = Image.new("RGB", SIZE, (255, 0, 0))
    red.save(pictures / "target0.png", icc_profile=profile)
    red.save(pictures / "target1.png", icc_profile=swapped)
    red.convert("P").save(pictures / "target2.png", icc_profile=swapped)
    assert official([item(0), item(1), item(2)]) == 0
    found = samples(tmp_path / "out")
    for name, colour in (("target0", (255, 0, 0)), ("target1", (0, 0, 255)), ("target2", (0, 0, 255))):
        np.testing.assert_allclose(np.asarray(found[name].target)[30, 40], colour, atol=3)


@pytest.mark.parametrize(
    "kind", ["list", "255", "bool", "rle", "compressed", "polygons", "png", "png255", "1bit", "npy"]
)
def test_every_kind_of_mask(official, pictures, tmp_path, kind):
    mask = np.zeros((70, 50), dtype=bool)
    mask[10:40, 8:30] = True
    Image.fromarray(mask.astype(np.uint8)).save(pictures / "mask.png")
    Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB").save(pictures / "mask255.png")
    Image.fromarray(mask).save(pictures / "mask1.png")
    np.save(pictures / "mask.npy", mask.astype(np.float32)[..., None])
    from pycocotools import mask as coco

    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    spec = {
        "list": mask.astype(int).tolist(),
        "255": (mask * 255).tolist(),
        "bool": mask.tolist(),
        "rle": encode_mask(mask),
        "compressed": {"size": [70, 50], "counts": packed["counts"].decode()},
        "polygons": {"size": [70, 50], "polygons": [[8, 10, 30, 10, 30, 40, 8, 40]]},
        "png": "mask.png",
        "png255": "mask255.png",
        "1bit": "mask1.png",
        "npy": "mask.npy",
    }[kind]
    assert official([item(reference_image_masks=[spec, None])]) == 0
    [sample] = samples(tmp_path / "out").values()
    assert sample.metadata["subjects"][0]["reference_mask_rle"] == encode_mask(mask)
    np.testing.assert_array_equal(np.asarray(sample.references[0])[..., 3], mask[5:45, 5:32] * 255)


def test_a_soft_mask_with_a_threshold(official, tmp_path):
    soft = (disc() * 128).tolist()
    assert official([item(reference_image_masks=[soft, None])], "--mask-threshold", "128", out="at") == 0
    assert samples(tmp_path / "at")["target0"].metadata["subjects"][0]["reference_mask_rle"] == encode_mask(disc())
    assert official([item(reference_image_masks=[soft, None])], "--mask-threshold", "129", out="above") == 1
    assert rejected(tmp_path / "above") == {"target0.png": ("cut_subjects", "mask without a pixel")}


def test_phrases_that_the_caption_does_not_hold(official, tmp_path):
    items = [item(0, text="a dogged RED\nBall"), item(1)]
    assert official(items, out="kept") == 0
    assert build_json(tmp_path / "kept")["counts"]["phrases_not_in_caption"] == 1
    assert [s["mention"] for s in samples(tmp_path / "kept")["target0"].metadata["subjects"]] == ["", "RED Ball"]
    assert official(items, "--require-phrases", out="strict") == 0
    assert rejected(tmp_path / "strict") == {"target0.png": ("read_items", "phrase not in the caption")}


# ------------------------------------------------------------------------------------------------- runs and their ends


def test_the_same_bytes_with_any_number_of_workers(official, tmp_path):
    items = [item(number % 4, text=f"a dog, a red ball, {number}") for number in range(12)]
    items[5]["image_boxes"] = [[0, 0, 500, 500], BOXES[1]]
    for workers in (0, 2):
        options = ["--pairs-per-shard", "4"]
        assert official(items, *options, out=f"out{workers}", workers=workers) == 0
    assert len(list((tmp_path / "out0").glob("*.tar"))) == 3
    assert contents(tmp_path / "out0") == contents(tmp_path / "out2")


def test_a_rerun_goes_on_where_the_last_one_stopped(official, pictures, tmp_path, monkeypatch, capsys):
    items = [item(number) for number in range(4)]
    assert official(items, out="whole") == 0
    process, done = WritePairs.process, []

    def stopping(self, cut):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(cut.opened.file.key)
        return process(self, cut)

    monkeypatch.setattr(WritePairs, "process", stopping)
    assert official(items) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not (tmp_path / "out" / "build.json").exists()
    assert official(items, "--jpeg-quality", "90") == 2
    assert "write_pairs.jpeg_quality: 95 then, 90 now" in capsys.readouterr().err
    again = []
    monkeypatch.setattr(
        WritePairs, "process", lambda self, cut: again.append(cut.opened.file.key) or process(self, cut)
    )
    assert official(items) == 0
    assert (done, again) == (["target0", "target1"], ["target2", "target3"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out" / ".mining").exists()
    assert official(items) == 0  # complete: nothing is done, the same is said
    assert again == ["target2", "target3"]
    save(pictures / "first.png", 50, 70, seed=99)  # not the target: a change of any file of an item is seen
    assert official(items) == 2
    assert "items or pictures have changed" in capsys.readouterr().err


def test_an_item_whose_reference_changed_is_imported_anew(official, pictures, monkeypatch):
    process, done = WritePairs.process, []

    def stopping(self, cut):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(cut.opened.file.key)
        return process(self, cut)

    items = [item(0), item(1), item(2, reference_image_files=["other.png", "sub/second.png"]), item(3)]
    save(pictures / "other.png", 50, 70, seed=5)
    monkeypatch.setattr(WritePairs, "process", stopping)
    assert official(items) == 130
    save(pictures / "other.png", 50, 70, seed=6)
    os.utime(pictures / "other.png", ns=(1, 1))
    done.clear()
    monkeypatch.setattr(WritePairs, "process", lambda self, cut: done.append(cut.opened.file.key) or process(self, cut))
    assert official(items) == 0
    assert done == ["target2", "target3"]


def test_report_and_inspect_read_the_dataset(official, tmp_path, capsys):
    assert official([item(0), item(1, image_boxes=[[0, 0, 500, 500], BOXES[1]])]) == 0
    page = (tmp_path / "out" / "report.html").read_bytes()
    assert b"box beyond its picture" in page
    assert report.main([str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").read_bytes() == page
    picture = tmp_path / "sample.png"
    assert inspect.main([str(tmp_path / "out"), "--out", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "subject 1  from sub/second.png, 90 x 40" in said
    assert Image.open(picture).width > 300


def test_webdataset_reads_it(official, tmp_path):
    import webdataset

    assert official([item(0), item(1)]) == 0
    url = str(tmp_path / "out" / "pairs-000000.tar")
    found = list(webdataset.WebDataset(url, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in found] == ["target0", "target1"]
    assert found[0]["target.jpg"].shape == (60, 80, 3)
    assert found[0]["json"]["subjects"][0]["phrase"] == "dog"


# -------------------------------------------------------------------------------------------------------- single frames


@pytest.fixture
def photos(tmp_path):
    """Three pictures without anything."""
    folder = tmp_path / "photos"
    for number in range(3):
        save(folder / f"p{number}.png", seed=number)
    return folder


def photo_mask() -> np.ndarray:
    mask = np.zeros(SIZE[::-1], dtype=bool)
    mask[12:48, 12:38] = True
    return mask


def sidecar(boxes=BOXES, mask=None, **changes: object) -> str:
    objects = [{"id": 0, "name": "dog", "attributes": {"colour": "red"}}, {"id": 7, "name": "red ball"}]
    found = [{"id": 0, "box": boxes[0]}, {"id": 7, "box": boxes[1]}]
    if mask is not None:
        found[0]["mask_rle"] = encode_mask(mask)
    content = {"schema": "data_pipeline.annotations/1", "width": 80, "height": 60, "objects": objects,
               "frames": [{"index": 0, "objects": found}]}  # fmt: skip
    return json.dumps({**content, **changes})


def coco_file(path: Path, names=("p0.png", "p1.png", "p2.png"), **changes: object) -> Path:
    annotations = []
    for number in range(len(names)):
        polygon = [[12, 12, 38, 12, 38, 48, 12, 48]]
        annotations += [
            {
                "id": 10 * number,
                "image_id": number,
                "category_id": 3,
                "bbox": [10, 10, 30, 40],
                "segmentation": polygon,
            },
            {"id": 10 * number + 1, "image_id": number, "category_id": 4, "bbox": [45, 5, 35, 25], "segmentation": []},
            {"id": 10 * number + 2, "image_id": number, "category_id": 4, "bbox": [0, 0, 80, 60], "iscrowd": 1},
        ]
    content = {
        "images": [{"id": i, "file_name": name, "width": 80, "height": 60} for i, name in enumerate(names)],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "dog"}, {"id": 4, "name": "red ball"}],
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


def check_photo(sample, number: int, masked: bool, attributes: bool = False) -> None:
    content = sample.metadata
    assert content["caption"] == f"a dog and a red ball, {number}"
    assert content["source"]["single_frame"] is True
    assert content["source"]["importer"] == "images"
    first, second = content["subjects"]
    assert (first["phrase"], second["phrase"]) == ("dog", "red ball")
    for subject, box in zip(content["subjects"], BOXES, strict=True):
        assert subject["target_box"] == subject["reference_box"]
        np.testing.assert_allclose(np.multiply(subject["target_box"], [*SIZE, *SIZE]), box, atol=1e-3)
        assert subject["match_similarity"] == 1.0
    np.testing.assert_array_equal(np.asarray(sample.references[1])[..., :3], noise(*SIZE, number)[5:30, 45:80])
    inside = photo_mask() if masked else np.ones(SIZE[::-1], dtype=bool)
    np.testing.assert_array_equal(np.asarray(sample.references[0])[..., 3], inside[10:50, 10:40] * 255)
    assert first["area"] == round(photo_mask().mean() if masked else 30 * 40 / 4800, 6)
    if masked:
        assert first["target_mask_rle"] == first["reference_mask_rle"] == encode_mask(photo_mask())
    assert first["attributes"] == ({"colour": "red"} if attributes else {})


@pytest.mark.parametrize("caption", ["txt", "json", "jsonl", "csv"])
@pytest.mark.parametrize("boxes", ["sidecar", "coco", "table", "objects"])
def test_every_kind_of_caption_with_every_kind_of_boxes(folder, photos, tmp_path, caption, boxes):
    options, rows = [], []
    for number in range(3):
        text = f"a dog and a red ball, {number}"
        row = {"file_name": f"p{number}.png"}
        if caption in ("txt", "json"):
            content = text if caption == "txt" else json.dumps({"caption": text})
            (photos / f"p{number}.{caption}").write_text(content)
        else:
            row["text"] = text
        if boxes == "sidecar":
            (photos / f"p{number}.annotations.json").write_text(sidecar(mask=photo_mask()))
        if boxes == "table":
            row |= {"boxes": BOXES, "phrases": ["dog", "red ball"], "masks": [encode_mask(photo_mask()), None]}
        if boxes == "objects":
            corner = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in BOXES]
            row["objects"] = {"bbox": corner, "category": ["dog", "red ball"]}
        rows.append(row)
    if boxes == "coco":
        options += ["--annotations", str(coco_file(tmp_path / "coco.json"))]
    if caption == "csv":
        with (photos / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            flat = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
            writer.writerows(flat)
    elif caption == "jsonl" or boxes in ("table", "objects"):
        (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert folder(*options) == 0
    found = samples(tmp_path / "out")
    assert list(found) == ["p0", "p1", "p2"]
    for number in range(3):
        check_photo(found[f"p{number}"], number, masked=boxes != "objects", attributes=boxes == "sidecar")
    counts = build_json(tmp_path / "out")["counts"]
    assert counts["single_frame"] == 3
    assert counts["subjects_without_mask"] == (6 if boxes == "objects" else 3)
    catalogue = read_catalogue(tmp_path / "out")
    assert catalogue.single_frame() == 1
    assert [catalogue.read(i).phrases for i in range(3)] == [("dog", "red ball")] * 3
    row = pyarrow.parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()[0]
    assert (row["min_match_similarity"], row["frame_gap_seconds"]) == (1.0, 0.0)


def test_fractions_in_a_table(folder, photos, tmp_path):
    row = {"file_name": "p0.png", "text": "a dog and a red ball, 0", "phrases": ["dog", "red ball"]}
    (photos / "metadata.jsonl").write_text(json.dumps({**row, "boxes": fractions(BOXES, *SIZE)}))
    assert folder("--boxes", "normalised") == 0
    check_photo(samples(tmp_path / "out")["p0"], 0, masked=False)


def test_a_coco_object_without_a_box_takes_that_of_its_mask(folder, photos, tmp_path):
    polygon = [[12, 12, 38, 12, 38, 48, 12, 48]]
    annotations = [{"id": 0, "image_id": 0, "category_id": 3, "segmentation": polygon}]
    coco_file(tmp_path / "coco.json", annotations=annotations)
    (photos / "p0.txt").write_text("a dog")
    assert folder("--annotations", str(tmp_path / "coco.json")) == 0
    [subject] = samples(tmp_path / "out")["p0"].metadata["subjects"]
    np.testing.assert_allclose(np.multiply(subject["target_box"], [*SIZE, *SIZE]), [12, 12, 38, 48], atol=1e-3)
    assert rejected(tmp_path / "out") == {f"p{i}.png": ("read_items", "no caption") for i in (1, 2)}


def test_what_cvat_calls_crowds_and_via_ids_are_objects(folder, photos, tmp_path):
    polygon = [12, 12, 38, 12, 38, 48, 12, 48]  # by itself, as VIA writes it
    painted = {"id": 0, "image_id": "0", "category_id": 3.0, "segmentation": polygon, "bbox": [], "iscrowd": 1}
    coco_file(tmp_path / "coco.json", annotations=[painted], names=("images\\p0.png",))
    (photos / "p0.txt").write_text("a dog")
    assert folder("--annotations", str(tmp_path / "coco.json")) == 0
    [subject] = samples(tmp_path / "out")["p0"].metadata["subjects"]
    np.testing.assert_allclose(np.multiply(subject["target_box"], [*SIZE, *SIZE]), [12, 12, 38, 48], atol=1e-3)


def test_coco_names_without_their_folder(folder, tmp_path):
    save(tmp_path / "photos" / "train" / "one.png", seed=0)
    (tmp_path / "photos" / "train" / "one.txt").write_text("a dog and a red ball, 0")
    coco_file(tmp_path / "coco.json", names=("one.png",))
    assert folder("--annotations", str(tmp_path / "coco.json")) == 0
    check_photo(samples(tmp_path / "out")["train_one"], 0, masked=True)


PHOTO_FAULTS = {
    "no caption": ({"file_name": "p1.png", "boxes": BOXES, "phrases": ["a", "b"]}, "no caption"),
    "no boxes": ({"file_name": "p1.png", "text": "a"}, "no boxes"),
    "two captions": ({"file_name": "p1.png", "text": "a", "caption": "b", "boxes": [], "phrases": []}, "two captions"),
    "boxes twice in a row": (
        {"file_name": "p1.png", "text": "a", "boxes": BOXES, "phrases": ["a", "b"], "objects": {"bbox": []}},
        "boxes given twice"),
    "boxes twice": ({"file_name": "p2.png", "text": "a", "boxes": BOXES, "phrases": ["a", "b"]}, "boxes given twice"),
    "fewer phrases": (
        {"file_name": "p1.png", "text": "a", "boxes": BOXES, "phrases": ["a"]}, "lists of different lengths"),
    "no phrases": ({"file_name": "p1.png", "text": "a", "boxes": BOXES}, "unreadable item"),
    "categories as numbers": (
        {"file_name": "p1.png", "text": "a", "objects": {"bbox": [[1, 1, 9, 9]], "category": [3]}}, "unreadable item"),
    "objects as a list": ({"file_name": "p1.png", "text": "a", "objects": [1]}, "unreadable item"),
    "upwards": ({"file_name": "../p1.png", "text": "a"}, "path outside the folder of pictures"),
    "absolute": ({"file_name": "/p1.png", "text": "a"}, "path outside the folder of pictures"),
    "a name that no file has": (
        {"file_name": "a" * 300 + ".png", "text": "a", "boxes": BOXES, "phrases": ["a", "b"]},
        "no such picture"),
    "no file_name": ({"file": "p1.png"}, "unreadable item"),
    "no such picture": (
        {"file_name": "p9.png", "text": "a", "boxes": BOXES, "phrases": ["a", "b"]}, "no such picture"),
}  # fmt: skip


@pytest.mark.usefixtures("photos")
def test_every_fault_of_a_row_rejects_that_row_alone(folder, tmp_path):
    good = {"file_name": "p0.png", "text": "a dog and a red ball, 0", "boxes": BOXES, "phrases": ["dog", "red ball"]}
    (tmp_path / "photos" / "p2.annotations.json").write_text(sidecar())
    lines = [json.dumps(good), *(json.dumps(row) for row, _ in PHOTO_FAULTS.values()), "{broken"]
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    assert folder() == 0
    found = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert found == [*(reason for _, reason in PHOTO_FAULTS.values()), "unreadable item"]
    check_photo(samples(tmp_path / "out")["p0"], 0, masked=False)


SIDECAR_FAULTS = {
    "another schema": (sidecar(schema="other/1"), "unknown annotations schema"),
    "another size": (sidecar(width=60, height=80), "annotations of another size"),
    "another frame": (sidecar(frames=[{"index": 3, "objects": []}]), "annotations of a picture need one frame, 0"),
    "no json": ("{", "unreadable annotations"),
    "unknown object": (sidecar(objects=[]), "unreadable annotations"),
    "beyond": (sidecar(boxes=[[10, 10, 90, 50], BOXES[1]]), "box beyond its picture"),
}


@pytest.mark.parametrize("name", SIDECAR_FAULTS)
def test_faults_of_a_sidecar(folder, photos, tmp_path, name):
    content, reason = SIDECAR_FAULTS[name]
    for number in range(2):
        (photos / f"p{number}.txt").write_text(f"a dog and a red ball, {number}")
    (photos / "p2.png").unlink()
    (photos / "p0.annotations.json").write_text(sidecar())
    (photos / "p1.annotations.json").write_text(content)
    assert folder() == 0
    assert {key: why for key, (_, why) in rejected(tmp_path / "out").items()} == {"p1.png": reason}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"categories": [{"id": 3, "name": "dog"}]}, "unreadable annotations"),
        ({"images": [{"id": 0, "file_name": "p0.png", "width": 81, "height": 60}]}, "annotations of another size"),
        ({"images": [{"id": 0, "file_name": "p0.png"}]}, "unreadable annotations"),
        ({"annotations": [{"image_id": 0, "category_id": 3}]}, "unreadable box"),
        ({"annotations": [{"image_id": 0, "category_id": 3, "bbox": "1 2 3 4"}]}, "unreadable box"),
    ],
)
def test_faults_of_a_coco_entry(folder, photos, tmp_path, changes, reason):
    (photos / "p0.txt").write_text("a dog and a red ball, 0")
    coco_file(tmp_path / "coco.json", **changes)
    assert folder("--annotations", str(tmp_path / "coco.json")) == 1
    assert rejected(tmp_path / "out")["p0.png"][1] == reason


# ------------------------------------------------------------------------------------------------- wrong command lines


ROW_PER_OBJECT = (
    "file_name,text,label,xmin,ymin,xmax,ymax\na.png,a dog,dog,1,2,3,4\na.png,a dog,ball,1,2,3,4\n",
    "filename,width,height,class,xmin,ymin,xmax,ymax\na.png,8,8,dog,1,2,3,4\n",
    "ImageID;XMin;XMax;YMin;YMax\na;0.1;0.2;0.3;0.4\n",
    'file_name,bbox,category\na.png,"[1, 2, 3, 4]",dog\n',
    '"file_name"\t"x"\t"y"\t"w"\t"h"\na.png\t1\t2\t3\t4\n',
)


def test_wrong_command_lines(tmp_path, pictures, capsys):
    items, out = tmp_path / "items.jsonl", tmp_path / "out"
    items.write_text(json.dumps(item(0)))
    (tmp_path / "items.pkl").write_bytes(b"")
    (tmp_path / "items.txt").write_text("")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "object.json").write_text(json.dumps({"data": []}))
    (tmp_path / "no_list.json").write_text("")
    (tmp_path / "broken.json").write_text(json.dumps([item(0)])[:-10])
    (tmp_path / "trail.json").write_text("[] []")
    (tmp_path / "commas.json").write_text('[{"a": 1} {"b": 2}]')
    (tmp_path / "latin.json").write_bytes(b'[{"a": "\xd1\xee\xe1\xe0"}]')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "broken.parquet").write_text("PAR1")
    (tmp_path / "nowhere.jsonl").write_text(json.dumps(item(0, image_file="missing.png")))
    (tmp_path / "case.jsonl").write_text(json.dumps(item(0, image_file="Target0.PNG")))
    bare = tmp_path / "bare"
    save(bare / "a.png")
    captioned = tmp_path / "captioned"
    save(captioned / "a.png")
    (captioned / "a.txt").write_text("a dog")
    nested = tmp_path / "nested"
    save(nested / "train" / "a.png")
    (nested / "train" / "metadata.jsonl").write_text("")
    both = tmp_path / "both"
    save(both / "a.png")
    (both / "metadata.jsonl").write_text("")
    (both / "metadata.csv").write_text("")
    for number, text in enumerate(ROW_PER_OBJECT):
        (tmp_path / f"objects{number}.csv").write_text(text)
    (tmp_path / "no_name.csv").write_text("name,text\na,b\n")
    (tmp_path / "coco_else.json").write_text(coco_file(tmp_path / "c.json", names=("z.png",)).read_text())
    (tmp_path / "coco_twice.json").write_text(coco_file(tmp_path / "c.json", names=("a.png", "a.png")).read_text())
    images = ["--images", str(pictures)]

    def official(name: str, *options: str) -> list[str]:
        return ["--from", "official", str(tmp_path / name), "--out", str(out), *options]

    def photos(name: str, *options: str) -> list[str]:
        return ["--from", "images", str(tmp_path / name), "--out", str(out), *options]

    def coco(name: str) -> list[str]:
        return ["--annotations", str(tmp_path / name)]

    cases = [
        (official("items.jsonl"), "needs --images DIR"),
        (official("items.jsonl", "--images", str(tmp_path / "none")), "no folder of pictures at"),
        (official("items.jsonl", *images, "--metadata", "x.csv"), "--metadata belongs to --from images"),
        (official("items.jsonl", *images, *coco("c.json")), "--annotations belongs to --from images"),
        (official("items.jsonl", *images, "--workers", "-1"), "--workers must be 0 or more, and 1024 at most, got -1"),
        (official("items.jsonl", *images, "--item-timeout", "0"), "--item-timeout must lie above 0"),
        (official("items.jsonl", *images, "--mask-threshold", "0"), "--mask-threshold must be at least 1, got 0"),
        (official("items.jsonl", *images, "--max-pixels", "0"), "--max-pixels must be at least 1, got 0"),
        (official("items.jsonl", *images, "--jpeg-quality", "0"), "jpeg_quality must lie in 1..100, got 0"),
        (official("items.jsonl", *images, "--pairs-per-shard", "0"), "pairs_per_shard must be at least 1, got 0"),
        (official("none.jsonl", *images), "no file of items at"),
        (official("items.pkl", *images), "reading a pickle runs whatever code is in it"),
        (official("items.txt", *images), "items are read from .json, .jsonl, .parquet, got items.txt"),
        (official("empty.json", *images), "no items in"),
        (official("object.json", *images), "a .json of items is one list"),
        (official("no_list.json", *images), "the end of the file"),
        (official("broken.json", *images), "item 0 is no json, or the file breaks off"),
        (official("trail.json", *images), "after the end of the list comes '[]'"),
        (official("commas.json", *images), "not a comma or a bracket"),
        (official("latin.json", *images), "latin.json is neither UTF-8, UTF-16 nor Windows-1252"),
        (official("deep.json", *images), "item 0 is nested too deeply"),
        (official("broken.parquet", *images), "cannot read"),
        (official("nowhere.jsonl", *images), "none of the 1 target pictures is in"),
        (official("case.jsonl", *images), "'Target0.PNG': paths of items are below that folder; is it 'target0.png'?"),
        (photos("bare"), "no picture in"),
        (photos("bare"), "has a caption or boxes"),
        (photos("captioned"), "has boxes: give metadata.jsonl"),
        (photos("none"), "no folder of pictures at"),
        (photos("out_of_pictures"), "no folder of pictures at"),
        (photos("nested"), "lies in a subfolder"),
        (photos("both"), "has both metadata.jsonl and metadata.csv"),
        (photos("bare", "--images", str(pictures)), "--images belongs to --from official"),
        (photos("bare", "--allow-absolute"), "--allow-absolute belongs to --from official"),
        (photos("bare", "--boxes", "normalised"), "--boxes normalised is for boxes in a metadata table"),
        (photos("bare", "--metadata", str(tmp_path / "none.csv")), "--metadata: no file at"),
        (photos("bare", "--metadata", str(tmp_path / "items.txt")), "--metadata is a .jsonl or .csv, got items.txt"),
        (photos("bare", "--metadata", str(tmp_path / "no_name.csv")), "needs the column file_name; found name, text"),
        *(
            (photos("bare", "--metadata", str(tmp_path / f"objects{number}.csv")), "has a row per object (columns ")
            for number in range(len(ROW_PER_OBJECT))
        ),
        (photos("bare", *coco("none.json")), "--annotations: no file at"),
        (photos("bare", *coco("items.jsonl")), "as COCO"),
        (photos("bare", *coco("coco_else.json")), "names none of the pictures: it has 'z.png', the folder 'a.png'"),
        (photos("bare", *coco("coco_twice.json")), "has two images of one name"),
    ]
    for command, expected in cases:
        assert main([*command, "--quiet"]) == 2, command
        error = capsys.readouterr().err
        assert expected in error, (command, error)
        assert error.startswith("error: ") and "Traceback" not in error
        assert not out.exists(), command


def test_a_file_that_may_not_be_read(tmp_path, pictures, monkeypatch, capsys):
    (tmp_path / "items.jsonl").write_text(json.dumps(item(0)))
    opened = Path.open

    def forbidden(self, *rest, **named):
        if self.name == "items.jsonl" and self.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return opened(self, *rest, **named)

    monkeypatch.setattr(Path, "open", forbidden)
    command = ["--from", "official", str(tmp_path / "items.jsonl"), "--images", str(pictures)]
    assert main([*command, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "items.jsonl: Permission denied" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pictures(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["--from", "images", str(tmp_path / "empty"), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "looked for *.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "said"), [("--image", "did you mean --images"), ("--mask-treshold", "did you mean --mask-threshold")]
)
def test_misspelled_options(capsys, option, said):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(["--from", "official", "items.json", "--out", "out", option, "1"])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_dataset_stays(official, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    assert official([item(0)]) == 2
    assert "not empty and no earlier run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_as_a_command_with_workers_and_a_bar(tmp_path, pictures):
    items = tmp_path / "items.json"
    items.write_text(json.dumps([item(0), item(1)]))
    command = [sys.executable, "-m", "data_pipeline.import_pairs", "--from", "official", items, "--images", pictures]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out", "--workers", "2"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "importing" in done.stderr and "item/s" in done.stderr
    assert done.stdout.startswith("2 samples with 4 subjects from 2 items, 0 rejected")


def test_the_help_loads_nothing_heavy():
    heavy = ["torch", "cv2", "spacy", "transformers", "pyarrow", "av", "webdataset"]
    code = f"""
import runpy, sys
sys.argv = ["import_pairs", "--help"]
try:
    runpy.run_module("data_pipeline.import_pairs", run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0, stop.code
print("loaded:", *sorted(set({heavy!r}) & set(sys.modules)))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert "--mask-threshold VALUE" in done.stdout
