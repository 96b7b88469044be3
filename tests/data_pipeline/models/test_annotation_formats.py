import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import ClipError, InputError
from data_pipeline.models.annotated_masks import decode_counts, draw_polygons, read_numbers
from data_pipeline.models.annotation_formats import frame_number
from data_pipeline.models.annotations import AnnotationSource, read_mask
from data_pipeline.models.detector import AnnotationDetector, Question
from data_pipeline.models.segmenter import AnnotationSegmenter
from data_pipeline.records import encode_mask

WIDTH, HEIGHT, FRAMES = 10, 8, 12
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[2:6, 1:5] = True
BOX = (0.1, 0.25, 0.5, 0.75)
CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 5, "name": "cup"}]
POLYGON = [[1, 2, 5, 2, 5, 6, 1, 6]]


def read(tmp_path, content, name="clip.mp4", file="all.json"):
    path = tmp_path / file
    path.write_text(json.dumps(content) if isinstance(content, dict) else content)
    return AnnotationSource(path).read(tmp_path / name, name, WIDTH, HEIGHT, FRAMES)


def compress(counts):
    """COCO's compressed string of run lengths, the other way round than ``decode_counts``."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            text += chr(48 + (group | 32 if more else group))
    return text


# --------------------------------------------------------------------------------------------------------------- COCO


def coco(image=None, **annotation):
    found = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 4, 4], **annotation}
    return {
        "images": [{"id": 7, "file_name": "clip/00004.jpg", "width": WIDTH, "height": HEIGHT, **(image or {})}],
        "annotations": [{key: value for key, value in found.items() if value != "absent"}],
        "categories": CATEGORIES,
    }


@pytest.mark.parametrize(
    "segmentation",
    [
        POLYGON,
        encode_mask(MASK),
        {"size": [HEIGHT, WIDTH], "counts": compress(encode_mask(MASK)["counts"])},
    ],
    ids=["polygon", "run lengths", "compressed"],
)
def test_coco(tmp_path, segmentation):
    found = read(tmp_path, coco(segmentation=segmentation))
    [(index, [one])] = found.frames.items()
    assert (index, one.name, one.box, one.object_id) == (4, "dog", BOX, None)
    assert np.array_equal(read_mask(one, WIDTH, HEIGHT), MASK)


def test_coco_with_boxes_only_tracks_and_fields(tmp_path):
    content = coco(image={"video": "sub/clip.mp4", "frame": 11, "file_name": "000000139.jpg"}, track_id=9)
    [(index, [one])] = read(tmp_path, content, "sub/clip.mp4").frames.items()
    assert (index, one.object_id) == (11, 9)
    assert read_mask(one, WIDTH, HEIGHT) is None
    assert read(tmp_path, content, "other.mp4") is None


def test_coco_without_a_box_takes_that_of_the_mask_and_crowds_are_left_out(tmp_path):
    content = coco(segmentation=encode_mask(MASK), bbox="absent")
    content["annotations"].append({**content["annotations"][0], "iscrowd": 1})
    assert [one.box for one in read(tmp_path, content).frames[4]] == [BOX]


@pytest.mark.parametrize(
    ("content", "reason", "evidence"),
    [
        (coco(image={"width": 20}), "annotations of another size", "20"),
        (coco(image={"file_name": "clip/00012.jpg"}), "a frame that is not in the video", "12"),
        (coco(image={"frame": -1}), "a frame that is not in the video", "-1"),
        (coco(image={"file_name": "clip/first.jpg"}), "unreadable annotations", "no frame number"),
        (coco(category_id=4), "unreadable annotations", "unknown category 4, known are"),
        (coco(bbox=[1, 2, 0, 4]), "unreadable annotations", "no area"),
        (coco(bbox=[1, 2, -3, 4]), "unreadable annotations", "no area"),
        (coco(bbox=[1, float("nan"), 4, 4]), "unreadable annotations", "four numbers"),
        (coco(bbox=[1, 2, 4]), "unreadable annotations", "four numbers"),
        (coco(bbox=[1, 2, 10**400, 4]), "unreadable annotations", "four numbers"),
        (coco(bbox="absent"), "unreadable annotations", "neither a box nor a mask"),
        (coco(bbox="absent", segmentation=encode_mask(MASK & False)), "unreadable annotations", "empty mask"),
        (coco(track_id="nine"), "unreadable annotations", "number of an object must be a whole number"),
        (coco(category_id="absent"), "unreadable annotations", "KeyError"),
    ],
)
def test_broken_coco_takes_its_clip_with_it(tmp_path, content, reason, evidence):
    with pytest.raises(ClipError, match=reason) as caught:
        read(tmp_path, content)
    assert evidence in str(caught.value.evidence)


@pytest.mark.parametrize("iscrowd", [1, True, "1"])
def test_crowds_of_cvat_are_objects(tmp_path, iscrowd):
    """CVAT writes what was painted with a brush as run lengths and iscrowd 1, and outlines with 0."""
    painted = coco(segmentation=encode_mask(MASK), iscrowd=iscrowd)
    assert [one.name for one in read(tmp_path, painted).frames[4]] == ["dog"]
    outlined = {**painted["annotations"][0], "id": 2, "iscrowd": 0, "segmentation": POLYGON, "category_id": 5}
    painted["annotations"].append(outlined)
    assert [one.name for one in read(tmp_path, painted).frames[4]] == ["cup"]
    painted["annotations"][0]["attributes"] = {"occluded": False, "track_id": 0}
    assert [(one.name, one.object_id) for one in read(tmp_path, painted).frames[4]] == [("dog", 0), ("cup", None)]


def test_a_clip_of_nothing_but_crowds_says_so(tmp_path):
    content = coco(iscrowd=1)
    content["images"].append({**content["images"][0], "id": 8, "file_name": "other/1.jpg"})
    content["annotations"].append({**content["annotations"][0], "image_id": 8, "iscrowd": "0"})
    with pytest.raises(ClipError, match="annotations without an object") as caught:
        read(tmp_path, content)
    told = {"annotated_frames": 1, "left_out": "1 annotations with iscrowd 1 in the whole file"}
    assert caught.value.evidence == told
    assert read(tmp_path, content, "other.mp4").frames[1][0].name == "dog"


@pytest.mark.parametrize(
    ("file_name", "video"),
    [
        ("images/clip/00004.jpg", "clip.mp4"),
        ("JPEGImages/480p/clip/00004.jpg", "clip.mp4"),
        ("/home/me/data/clip/00004.jpg", "clip.mp4"),
        ("C:\\data\\clip\\00004.jpg", "clip.mp4"),
        ("https://host/bucket/clip/00004.jpg", "clip.mp4"),
        ("./clip/00004.jpg", "clip.mp4"),
        ("clip.mp4/00004.jpg", "clip.mp4"),
        ("images/clip.mp4/00004.jpg", "clip.mp4"),
        ("train/clip/img1/000004.jpg", "clip.mp4"),
        ("train/sub/clip/frame_000004.PNG", "sub/clip.mp4"),
        ("clip_00004.jpg", "clip.mp4"),
        ("clip-4.png", "clip.mp4"),
        ("clip_frame_000004.PNG", "clip.mp4"),
        ("clip.frame4.jpg", "clip.mp4"),
        ("clip_00004_rgb.jpg", "clip.mp4"),
        ("clip_720p_00004.jpg", "clip_720p.mp4"),
        ("b1c66a42-6f7d68ca-0000004.jpg", "b1c66a42-6f7d68ca.mov"),
        ("my clip 2 00004.jpg", "my clip 2.mp4"),
        ("images/clip_00004.jpg", "clip.mp4"),
        ("images\\3f2a91bc-clip_00004.jpg", "clip.mp4"),
        ("sub/clip_00004.jpg", "sub/clip.mp4"),
        ("cafe\u0301/00004.jpg", "caf\u00e9.mp4"),
        ("frame_000004.PNG", "clip.mp4"),  # CVAT: names no video, but there is one only
        ("images/train/000004.jpg", "clip.mp4"),
    ],
)
def test_which_video_and_frame_a_file_name_means(tmp_path, file_name, video):
    (tmp_path / video).parent.mkdir(exist_ok=True)
    (tmp_path / video).write_bytes(b"")
    assert list(read(tmp_path, coco(image={"file_name": file_name}), video).frames) == [4]


@pytest.mark.parametrize(
    ("file_name", "videos"),
    [
        ("frame_000004.PNG", ["clip.mp4", "other.mp4"]),
        ("images/other/00004.jpg", ["clip.mp4"]),
        ("other_00004_rgb.jpg", ["clip.mp4"]),
        ("sub/clip/00004.jpg", ["clip.mp4", "sub/clip.MP4"]),
        ("sub/clip_00004.jpg", ["clip.mp4", "sub/clip.mov"]),
        ("clip_frame_00004.jpg", ["clip.mp4", "clip_frame.mp4"]),
        ("other/clip_00004.jpg", ["clip.mp4", "other.mp4"]),
    ],
)
def test_what_may_mean_another_video_is_not_taken(tmp_path, file_name, videos):
    (tmp_path / "sub").mkdir()
    for video in videos:
        (tmp_path / video).write_bytes(b"")
    assert read(tmp_path, coco(image={"file_name": file_name}), videos[0]) is None


def test_two_folders_that_may_mean_one_video(tmp_path):
    content = coco(image={"file_name": "train/clip/00004.jpg"})
    content["images"].append({**content["images"][0], "id": 8, "file_name": "val/clip/00004.jpg"})
    with pytest.raises(ClipError) as caught:
        read(tmp_path, content)
    assert caught.value.evidence["error"] == "two entries for this video: train/clip and val/clip"


def test_what_was_found_where_no_entry_fits(tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(coco(image={"file_name": "images/other/00004.jpg"})))
    source = AnnotationSource(tmp_path / "all.json")
    needed = {"needed": "an entry for sub/clip in all.json, or clip.annotations.json", "found": ["images/other"]}
    assert source.needed("sub/clip.mp4") == needed
    assert AnnotationSource(None).needed("clip.mp4") == {"needed": "clip.annotations.json or --annotations FILE"}


def numbered(first, count, pattern="clip/{:05d}.jpg"):
    content = coco()
    images = [{**content["images"][0], "id": n, "file_name": pattern.format(n)} for n in range(first, first + count)]
    content["annotations"][0]["image_id"] = first
    return {**content, "images": images}


def test_numbers_that_begin_with_1_are_understood_where_every_frame_has_a_picture(tmp_path):
    frames = read(tmp_path, numbered(1, FRAMES)).frames
    assert sorted(frames) == list(range(FRAMES))
    assert [index for index, objects in frames.items() if objects] == [0]
    with pytest.raises(ClipError, match="a frame that is not in the video") as caught:
        read(tmp_path, numbered(2, FRAMES - 1))
    assert caught.value.evidence["needed"].startswith("0 to 11; numbers that begin elsewhere")


def test_numbers_of_roboflow_are_no_frames(tmp_path):
    content = coco(image={"file_name": "clip_mp4-4_jpg.rf.9f8e7d6c5b4a39281706f5e4d3c2b1a0.jpg"})
    with pytest.raises(ClipError) as caught:
        read(tmp_path, content)
    assert "Roboflow's, which counts the pictures that were taken" in caught.value.evidence["error"]
    content["images"][0] |= {"video": "clip", "frame": 4}
    assert list(read(tmp_path, content).frames) == [4]


def test_videos_as_cocovid_and_tao_name_them(tmp_path):
    content = coco(image={"video_id": 1, "frame_id": 5, "file_name": "a/img1/000006.jpg"}, instance_id=3)
    content["videos"] = [{"id": 1, "name": "MOT17/clip"}]
    [(index, [one])] = read(tmp_path, content).frames.items()
    assert (index, one.object_id) == (5, 3)
    content = coco(image={"video": "train/YFCC/clip", "frame_index": 6}, track_id="7")
    [(index, [one])] = read(tmp_path, content).frames.items()
    assert (index, one.object_id) == (6, 7)


def test_a_video_without_a_name_that_is_a_text(tmp_path):
    with pytest.raises(InputError, match="image 7 of the annotations: its video must be a text, got 5"):
        read(tmp_path, coco(image={"video": 5}))
    with pytest.raises(InputError, match="the file of 'a' in the annotations must be a text, got 5"):
        read(tmp_path, {"videos": {"a": {"file": 5, "width": 10, "height": 8}}})


def test_ids_as_numbers_and_as_texts_are_the_same(tmp_path):
    content = coco(image_id="7", category_id=3.0)
    assert read(tmp_path, content).frames[4][0].name == "dog"
    content = youtube_vis(video_id="2")
    assert read(tmp_path, content).frames[0][0].name == "cup"
    with pytest.raises(InputError, match=r"no annotation belongs to one of the 1 images: image_id is 12 .*ids are 7"):
        read(tmp_path, coco(image_id=12))


def test_a_polygon_by_itself_and_an_empty_box(tmp_path):
    [one] = read(tmp_path, coco(segmentation=POLYGON[0], bbox=[])).frames[4]
    assert one.box == BOX


@pytest.mark.parametrize("size", [{"width": 0, "height": 0}, {"width": None}])
def test_an_image_without_a_size(tmp_path, size):
    with pytest.raises(ClipError) as caught:
        read(tmp_path, coco(image=size))
    assert "an image without width and height" in caught.value.evidence["error"]


@pytest.mark.parametrize("frame", ["four", 4.5, True])
def test_a_field_frame_that_is_no_number(tmp_path, frame):
    with pytest.raises(ClipError) as caught:
        read(tmp_path, coco(image={"frame": frame}))
    assert f"image 7: the field frame must be a whole number, got {frame!r}" in caught.value.evidence["error"]


def test_two_images_for_one_frame(tmp_path):
    content = coco()
    content["images"].append({**content["images"][0], "id": 8})
    with pytest.raises(ClipError) as caught:
        read(tmp_path, content)
    assert "two images for frame 4" in caught.value.evidence["error"]


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [HEIGHT, WIDTH], "counts": [3, 4]},
        {"size": [HEIGHT, WIDTH], "counts": "~"},
        {"size": [HEIGHT, WIDTH], "counts": "b"},
        {"size": [HEIGHT, WIDTH]},
        {"counts": [80]},
        {"size": [HEIGHT, float("inf")], "counts": [80]},
        {"size": [HEIGHT, WIDTH], "counts": [10**400]},
        [[1, 2, 5, 2, 10**400, 6]],
        [[1e308, -1e308, -1e308, 1e308, 5, 5]],
        [[1, 2, 3, 4]],
        [[1, 2, 5, 2, 5]],
        [[1, 2, 5, 2, float("nan"), 6]],
    ],
)
def test_broken_masks(tmp_path, segmentation):
    [one] = read(tmp_path, coco(segmentation=segmentation)).frames[4]
    with pytest.raises(ClipError, match="unreadable mask in the annotations"):
        read_mask(one, WIDTH, HEIGHT)


def test_a_mask_of_another_size_is_refused_before_it_is_made(tmp_path):
    [one] = read(tmp_path, coco(segmentation={"size": [10**9, 10**9], "counts": [10**18]})).frames[4]
    with pytest.raises(ClipError, match="mask of another size"):
        read_mask(one, WIDTH, HEIGHT)


# -------------------------------------------------------------------------------------------------------- YouTube-VIS


def youtube_vis(files=("clip/00000.jpg", "clip/00005.jpg", "clip/00010.jpg"), **annotation):
    rle = {"size": [HEIGHT, WIDTH], "counts": compress(encode_mask(MASK)["counts"])}
    found = {
        "id": 21,
        "video_id": 2,
        "category_id": 5,
        "bboxes": [[1, 2, 4, 4], None, [0, 0, 4, 4]],
        "segmentations": [rle, None, None],
        **annotation,
    }
    return {
        "videos": [{"id": 2, "width": WIDTH, "height": HEIGHT, "length": len(files), "file_names": list(files)}],
        "annotations": [{key: value for key, value in found.items() if value != "absent"}],
        "categories": CATEGORIES,
    }


def test_youtube_vis(tmp_path):
    frames = read(tmp_path, youtube_vis()).frames
    assert {index: len(objects) for index, objects in frames.items()} == {0: 1, 5: 0, 10: 1}
    assert (frames[0][0].object_id, frames[0][0].name, frames[0][0].box) == (21, "cup", BOX)
    assert np.array_equal(read_mask(frames[0][0], WIDTH, HEIGHT), MASK)
    assert (frames[10][0].object_id, frames[10][0].box) == (21, (0, 0, 0.4, 0.5))
    assert read_mask(frames[10][0], WIDTH, HEIGHT) is None


def test_a_list_as_long_as_the_video_counts_its_frames(tmp_path):
    """OVIS starts its names at 1."""
    files = [f"clip/img_{number:07d}.jpg" for number in range(1, FRAMES + 1)]
    gaps = [None] * (FRAMES - 1)
    content = youtube_vis(files, bboxes=[[1, 2, 4, 4], *gaps], segmentations="absent")
    frames = read(tmp_path, content).frames
    assert sorted(frames) == list(range(FRAMES))
    assert [index for index, objects in frames.items() if objects] == [0]


def test_boxes_from_the_masks_where_there_are_none(tmp_path):
    assert read(tmp_path, youtube_vis(bboxes="absent")).frames[0][0].box == BOX


@pytest.mark.parametrize(
    ("content", "reason", "evidence"),
    [
        (youtube_vis(bboxes=[[1, 2, 4, 4]]), "unreadable annotations", "1 boxes and 3 masks, but the video 3 frames"),
        (youtube_vis(bboxes=[[1, 2, 0, 0], None, None]), "unreadable annotations", "no area"),
        (youtube_vis(bboxes=[[1, 2, float("nan"), 4], None, None]), "unreadable annotations", "four numbers"),
        (youtube_vis(category_id=1), "unreadable annotations", "unknown category 1"),
        (youtube_vis(("clip/00000.jpg", "clip/00005.jpg", "clip/00012.jpg")), "a frame that is not in the video", "12"),
        (youtube_vis(("clip/a1.jpg", "clip/b1.jpg", "clip/c2.jpg")), "unreadable annotations", "same frame number"),
    ],
)
def test_broken_youtube_vis_takes_its_clip_with_it(tmp_path, content, reason, evidence):
    with pytest.raises(ClipError, match=reason) as caught:
        read(tmp_path, content)
    assert evidence in str(caught.value.evidence)


def test_videos_in_one_folder_go_by_what_stands_before_the_number(tmp_path):
    content = youtube_vis([f"images/clip_{number}.jpg" for number in (0, 5, 10)])
    other = {**content["videos"][0], "id": 3, "file_names": ["images/other_0.jpg"]}
    content["videos"].append(other)
    assert sorted(read(tmp_path, content).frames) == [0, 5, 10]
    assert read(tmp_path, content, "images.mp4") is None


def test_empty_lists_for_what_is_not_seen(tmp_path):
    frames = read(tmp_path, {**youtube_vis(bboxes=[[1, 2, 4, 4], [], []], segmentations="absent"), "images": []}).frames
    assert {index: len(objects) for index, objects in frames.items()} == {0: 1, 5: 0, 10: 0}


def test_two_videos_in_one_folder(tmp_path):
    content = youtube_vis()
    content["videos"].append({**content["videos"][0], "id": 3})
    with pytest.raises(InputError, match="two videos .* in the folder 'clip', one of them with the id 3: leave one"):
        read(tmp_path, content)


@pytest.mark.parametrize(("content", "kind"), [(coco(), "images"), (coco(), "categories"), (youtube_vis(), "videos")])
def test_ids_that_mean_two_things_stop_the_run(tmp_path, content, kind):
    content[kind] = [*content[kind], content[kind][0]]
    number = content[kind][0]["id"]
    with pytest.raises(InputError, match=f"two of the {kind} of the annotations have the id {number}: number"):
        read(tmp_path, content)


def test_one_track_twice_in_a_frame(tmp_path):
    content = coco(track_id=9)
    content["annotations"] *= 2
    with pytest.raises(ClipError) as caught:
        read(tmp_path, content)
    assert caught.value.evidence["error"] == "object 9 is twice in frame 4"


def test_youtube_vis_of_another_size(tmp_path):
    content = youtube_vis()
    content["videos"][0]["height"] = 9
    with pytest.raises(ClipError, match="annotations of another size"):
        read(tmp_path, content)


# -------------------------------------------------------------------------------------------------------------- DAVIS


def davis(tmp_path, numbers=None, mode="P"):
    numbers = np.where(MASK, 2, 0).astype(np.uint8) if numbers is None else numbers
    numbers[0, 9], numbers[7, 0] = 255, 1
    (tmp_path / "masks/clip").mkdir(parents=True)
    picture = Image.fromarray(numbers)
    picture.putpalette(list(range(256)) * 3)
    picture.convert(mode).save(tmp_path / "masks/clip/00007.png")
    return {"masks": "masks", "videos": {"clip": {"1": "cup", "2": "dog"}}}


def test_davis(tmp_path):
    cup, dog = read(tmp_path, davis(tmp_path)).frames[7]
    assert (cup.name, cup.object_id, dog.name, dog.object_id) == ("cup", 1, "dog", 2)
    assert dog.box == BOX
    assert cup.box == (0, 7 / 8, 0.1, 1)
    assert np.array_equal(read_mask(dog, WIDTH, HEIGHT), MASK)


def test_davis_with_a_table_of_names(tmp_path):
    davis(tmp_path)
    table = "video,object,name\nmasks/clip,2,dog\nmasks/clip,1,\n"
    [dog] = read(tmp_path, table, "masks/clip.mp4", "names.csv").frames[7]
    assert (dog.name, dog.object_id) == ("dog", 2)


def test_a_folder_stands_for_its_table_of_names(tmp_path):
    davis(tmp_path)
    (tmp_path / "masks/annotations").mkdir()
    (tmp_path / "masks/annotations/instances_default.json").write_text("{}")
    found = "names.csv, which DAVIS masks need; there is annotations/instances_default.json: give the file itself"
    with pytest.raises(InputError, match=found):
        AnnotationSource(tmp_path / "masks")
    (tmp_path / "masks/names.csv").write_text("video,object,name\nclip,1,cup\nclip,2,dog\n")
    found = AnnotationSource(tmp_path / "masks").read(tmp_path / "clip.mp4", "clip.mp4", WIDTH, HEIGHT, FRAMES)
    assert [one.name for one in found.frames[7]] == ["cup", "dog"]


def test_broken_davis(tmp_path):
    content = davis(tmp_path)
    with pytest.raises(ClipError) as caught:
        read(tmp_path, {**content, "videos": {"clip": {"2": "dog"}}})
    assert caught.value.evidence["error"] == "clip/00007.png: no names for the objects [1]"
    with pytest.raises(ClipError) as caught:
        read(tmp_path, {**content, "videos": {"elsewhere": {"2": "dog"}}}, "elsewhere.mp4")
    assert "no pictures in the folder elsewhere" in caught.value.evidence["error"]
    source = AnnotationSource(tmp_path / "all.json")
    with pytest.raises(ClipError, match="unreadable annotations"):
        source.read(tmp_path / "elsewhere.mp4", "elsewhere.mp4", WIDTH, HEIGHT, 5)
    (tmp_path / "all.json").write_text(json.dumps(content))
    with pytest.raises(ClipError, match="mask of another size"):
        AnnotationSource(tmp_path / "all.json").read(tmp_path / "clip.mp4", "clip.mp4", 11, HEIGHT, FRAMES)
    with pytest.raises(ClipError, match="a frame that is not in the video"):
        AnnotationSource(tmp_path / "all.json").read(tmp_path / "clip.mp4", "clip.mp4", WIDTH, HEIGHT, 7)
    (tmp_path / "masks/clip/00008.png").write_bytes(b"no picture")
    with pytest.raises(ClipError, match="unreadable mask"):
        read(tmp_path, content)


def test_two_davis_pictures_for_one_frame(tmp_path):
    content = davis(tmp_path)
    (tmp_path / "masks/clip/7.png").write_bytes((tmp_path / "masks/clip/00007.png").read_bytes())
    with pytest.raises(ClipError) as caught:
        read(tmp_path, content)
    assert caught.value.evidence["error"] == "two pictures for frame 7 in the folder clip"


def test_a_mask_picture_that_would_fill_the_memory(tmp_path):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0))
    content = davis(tmp_path)
    picture = tmp_path / "masks/clip/00007.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(ClipError, match="unreadable mask") as caught:
        read(tmp_path, content)
    assert caught.value.evidence == {"file": "00007.png", "error": "DecompressionBombError"}


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("number", ["1", "255"])
def test_davis_2016(tmp_path, mode, number):
    """One object, 255; in whatever colours the picture is stored."""
    folder = tmp_path / "masks/clip"
    folder.mkdir(parents=True)
    picture = Image.fromarray((MASK * 255).astype(np.uint8))
    (picture if mode == "P" else picture.convert(mode)).save(folder / "00007.PNG", "PNG")
    [swan] = read(tmp_path, {"masks": "masks", "videos": {"clip.mp4": {number: "swan"}}}).frames[7]
    assert (swan.name, swan.object_id, swan.box) == ("swan", int(number), BOX)
    assert np.array_equal(read_mask(swan, WIDTH, HEIGHT), MASK)
    with pytest.raises(ClipError) as caught:
        read(tmp_path, {"masks": "masks", "videos": {"clip": {"1": "swan", "2": "lake"}}})
    assert "hold 0 and 255 only, one object as in DAVIS 2016, but there are names for the objects [1, 2]" in str(
        caught.value.evidence
    )


def test_black_and_white_masks_hold_object_1(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(1, FRAMES + 1):  # begins with 1
        Image.fromarray(MASK).save(folder / f"{number:05d}.png")
    found = read(tmp_path, {"videos": {"clip": {"1": "swan"}}})
    assert sorted(found.frames) == list(range(FRAMES))
    assert np.array_equal(read_mask(found.frames[0][0], WIDTH, HEIGHT), MASK)


def test_masks_in_another_format_are_named(tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/00000.jpg").write_bytes(b"")
    with pytest.raises(ClipError) as caught:
        read(tmp_path, {"videos": {"clip": {"1": "swan"}}})
    assert caught.value.evidence["error"].endswith("of the masks: needed is .png, found .jpg")


def test_davis_in_full_colour_is_refused(tmp_path):
    with pytest.raises(ClipError) as caught:
        read(tmp_path, davis(tmp_path, mode="RGB"))
    assert "palette or grey picture of object numbers, found RGB" in caught.value.evidence["error"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("clip,name\na,b\n", "needs the columns video, object and name; found clip, name"),
        ("", "needs the columns video, object and name; found none"),
        ("video,object,name\nclip,first,dog\n", "line 2: object must be a number, got 'first'"),
        ("video,object,name\nclip,1,dog\nclip,1,cup\n", "line 3: a second name for object 1 of clip"),
    ],
)
def test_a_broken_table_of_names_stops_the_run(tmp_path, table, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, table, file="names.csv")


# -------------------------------------------------------------------------------------------------------------- masks


def test_compressed_run_lengths_there_and_back():
    rng = np.random.default_rng(0)
    for _ in range(50):
        counts = [int(count) for count in rng.integers(0, 10 ** rng.integers(1, 7), rng.integers(1, 30))]
        assert decode_counts(compress(counts)) == counts
        assert decode_counts(compress(counts).encode()) == counts
    assert decode_counts("") == []


def test_compressed_run_lengths_as_the_coco_package_writes_them():
    package = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for height, width, share in [(8, 10, 0.5), (120, 90, 0.01), (300, 400, 0.99), (5, 5, 0.0), (5, 5, 1.0)]:
        mask = rng.random((height, width)) < share
        theirs = package.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert decode_counts(theirs["counts"]) == encode_mask(mask)["counts"]
        assert compress(encode_mask(mask)["counts"]) == theirs["counts"].decode()


def test_polygons():
    assert np.array_equal(draw_polygons(POLYGON, WIDTH, HEIGHT), MASK)
    assert np.array_equal(draw_polygons([POLYGON[0], POLYGON[0]], WIDTH, HEIGHT), MASK)  # a union
    over = draw_polygons([[-5, -5, 50, -5, 50, 50, -5, 50]], WIDTH, HEIGHT)
    assert over.all()
    assert not draw_polygons([[20, 20, 30, 20, 30, 30]], WIDTH, HEIGHT).any()
    rows, columns = np.mgrid[:60, :80] + 0.5
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    circle = np.stack([40 + 21.3 * np.cos(angles), 30 + 21.3 * np.sin(angles)], 1).ravel().tolist()
    assert (draw_polygons([circle], 80, 60) != ((columns - 40) ** 2 + (rows - 30) ** 2 < 21.3**2)).mean() < 0.002


def test_frame_numbers():
    assert [frame_number(name) for name in ("clip/00012.jpg", "a1/img_0000003.png", "7.png")] == [12, 3, 7]


def test_the_formats_feed_detector_and_segmenter(tmp_path, make_pair, make_entity):
    black = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    content = coco(segmentation=POLYGON, image={"frame": 3})
    pair = make_pair(black, black, annotations=read(tmp_path, content))
    question = Question(video=pair.video, frame=pair.reference, entities=(make_entity("brown dog"),))
    [[found]] = AnnotationSegmenter().segment([(pair.reference, AnnotationDetector().detect([question])[0])])
    assert found.entity.phrase == "brown dog"
    assert np.array_equal(found.mask, MASK)


def test_polygons_without_end():
    with pytest.raises(ClipError) as caught:
        draw_polygons([[0, 0, 9, 0, 9, 9]] * 1_001, WIDTH, HEIGHT)
    assert caught.value.evidence["error"] == "polygons must be a list of 1000 at most"
    with pytest.raises(ClipError):
        draw_polygons("0 0 9 0 9 9", WIDTH, HEIGHT)


def test_a_picture_of_numbers_is_measured_before_it_is_decoded(tmp_path):
    Image.new("1", (9_000, 9_000)).save(tmp_path / "a.png")
    with pytest.raises(ClipError) as caught:
        read_numbers(tmp_path / "a.png")
    assert caught.value.evidence["error"] == "too many pixels"
    (tmp_path / "b.png").write_bytes(b"P5 2 2 255 abcd")
    with pytest.raises(ClipError, match="unreadable mask"):
        read_numbers(tmp_path / "b.png")
