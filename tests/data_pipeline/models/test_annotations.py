import json
import re

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import ClipError, InputError
from data_pipeline.file_names import annotations_beside
from data_pipeline.models.annotations import (
    AnnotationSource,
    read_many,
    read_mask,
    read_sidecar,
)
from data_pipeline.records import AnnotatedObject, VideoFile, encode_mask

MASK = np.zeros((8, 10), dtype=bool)
MASK[2:6, 1:5] = True


def sidecar(**changes):
    found = {"id": 7, "box": [1, 2, 5, 6], "mask_rle": encode_mask(MASK)}
    content = {
        "schema": "data_pipeline.annotations/1",
        "width": 10,
        "height": 8,
        "objects": [{"id": 7, "name": "dog", "attributes": {"main_color": "red"}}],
        "frames": [{"index": 3, "time": 0.4, "objects": [found]}],
    }
    return {**content, **changes}


def write(tmp_path, content):
    path = tmp_path / "clip.annotations.json"
    path.write_text(json.dumps(content) if isinstance(content, dict) else content)
    return path


def test_sidecar(tmp_path):
    path = write(tmp_path, sidecar())
    assert path == annotations_beside(tmp_path / "clip.mp4")
    [found] = read_sidecar(path, 10, 8, 12).frames[3]
    assert (found.object_id, found.name, found.attributes) == (7, "dog", {"main_color": "red"})
    assert found.box == (0.1, 0.25, 0.5, 0.75)
    assert np.array_equal(read_mask(found, 10, 8), MASK)


def frame(**changes):
    return [{"index": 3, "objects": [{"id": 7, "box": [1, 2, 5, 6], **changes}]}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not json", "unreadable annotations"),
        ("[]", "unreadable annotations"),
        (sidecar(schema="coco"), "unknown annotations schema"),
        (sidecar(width=20), "annotations of another size"),
        (sidecar(frames=[{"index": 12, "objects": []}]), "a frame that is not in the video"),
        (sidecar(frames=[{"index": "3", "objects": []}]), "a frame that is not in the video"),
        (sidecar(objects=[]), "unreadable annotations"),
        (sidecar(frames=frame(box=[1, 2, 5])), "unreadable annotations"),
        (sidecar(frames=frame(box=[5, 2, 1, 6])), "unreadable annotations"),
        (sidecar(frames=frame(box=[12, 2, 15, 6])), "unreadable annotations"),
        (sidecar(frames=frame(box="1234x")), "unreadable annotations"),
        (sidecar(frames=frame(box=[1, float("nan"), 5, 6])), "unreadable annotations"),
        (sidecar(frames=frame(box=[1, 2, float("inf"), 6])), "unreadable annotations"),
        (sidecar(frames=frame(box=[1, 2, 10**400, 6])), "unreadable annotations"),
        ("[" * 100_000, "unreadable annotations"),
    ],
)
def test_a_bad_sidecar_takes_its_clip_with_it(tmp_path, content, reason):
    with pytest.raises(ClipError, match=reason):
        read_sidecar(write(tmp_path, content), 10, 8, 12)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (sidecar(frames=frame() * 2), "two entries for frame 3"),
        (sidecar(objects=[{"id": 7, "name": "dog"}, {"id": 7, "name": "cup"}]), "two objects have the same id"),
        (sidecar(frames=[{"index": 3, "objects": frame()[0]["objects"] * 2}]), "object 7 is twice in frame 3"),
    ],
)
def test_what_is_said_twice_in_a_sidecar_takes_its_clip_with_it(tmp_path, content, told):
    with pytest.raises(ClipError, match="unreadable annotations") as caught:
        read_sidecar(write(tmp_path, content), 10, 8, 12)
    assert caught.value.evidence["error"] == told


def test_boxes_are_cut_at_the_frame(tmp_path):
    [found] = read_sidecar(write(tmp_path, sidecar(frames=frame(box=[-2, 2, 11, 6]))), 10, 8, 12).frames[3]
    assert found.box == (0, 0.25, 1, 0.75)


def test_a_box_without_a_mask(tmp_path):
    [found] = read_sidecar(write(tmp_path, sidecar(frames=frame())), 10, 8, 12).frames[3]
    assert read_mask(found, 10, 8) is None


def corpus(tmp_path, **changes):
    (tmp_path / "masks").mkdir(exist_ok=True)
    Image.fromarray((MASK * 2).astype(np.uint8)).save(tmp_path / "masks/clip_00003.png")
    objects = [{"id": 2, "name": "cup", "box_xyxy": [1, 2, 5, 6]}]
    entry = {
        "file": "clip.mp4",
        "width": 10,
        "height": 8,
        "annotations": [{"frame": 3, "objects": objects, "mask_png": "masks/clip_00003.png"}],
    }
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps({"videos": {"clip": {**entry, **changes}}}))
    return path


def test_corpus_file(tmp_path):
    source = AnnotationSource(corpus(tmp_path))
    [found] = source.read(tmp_path / "clip.mp4", "clip.mp4", 10, 8, 12).frames[3]
    assert (found.name, found.box) == ("cup", (0.1, 0.25, 0.5, 0.75))
    assert found.object_id is None  # its numbers only count the objects of one frame
    assert np.array_equal(read_mask(found, 10, 8), MASK)
    assert source.read(tmp_path / "other.mp4", "other.mp4", 10, 8, 12) is None


def test_the_sidecar_serves_videos_that_the_corpus_file_does_not_know(tmp_path):
    write(tmp_path, sidecar())
    corpus(tmp_path, file="another.mp4")
    source = AnnotationSource(tmp_path / "corpus.json")
    assert source.read(tmp_path / "clip.mp4", "clip.mp4", 10, 8, 12).frames[3][0].name == "dog"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 11}, "annotations of another size"),
        ({"annotations": [{"frame": 99, "objects": []}]}, "a frame that is not in the video"),
        ({"annotations": [{"objects": []}]}, "unreadable annotations"),
        ({"annotations": [{"frame": 3, "objects": []}] * 2}, "unreadable annotations"),
        (
            {
                "annotations": [
                    {
                        "frame": 3,
                        "objects": [{"id": float("inf"), "name": "a", "box_xyxy": [1, 2, 5, 6]}],
                        "mask_png": "a.png",
                    }
                ]
            },
            "unreadable annotations",
        ),
    ],
)
def test_a_bad_entry_of_the_corpus_takes_its_clip_with_it(tmp_path, changes, reason):
    source = AnnotationSource(corpus(tmp_path, **changes))
    with pytest.raises(ClipError, match=reason):
        source.read(tmp_path / "clip.mp4", "clip.mp4", 10, 8, 12)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("not json", "JSONDecodeError"),
        ("[]", "found a list instead of an object"),
        ("[" * 100_000, "RecursionError"),
        ("{}", "found an empty object"),
        ('{"shapes": [], "version": 1}', "found shapes, version"),
        ('[{"id": 1, "data": {}, "annotations": []}]', "Label Studio's own.*objects with annotations, data, id"),
        ('{"images": [], "annotations": null, "info": {}}', "found images, info, annotations, which is no list"),
        ('{"videos": {"clip": {}}}', "KeyError"),
        ('{"images": [{}], "annotations": [], "categories": []}', "KeyError"),
        ('{"videos": [{"id": 1, "file_names": []}], "annotations": [], "categories": []}', "KeyError|IndexError"),
    ],
)
def test_a_bad_corpus_file_stops_the_run(tmp_path, content, found):
    path = tmp_path / "corpus.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"cannot read annotations from .*({found}).*; known formats are\n  ours"):
        AnnotationSource(path)


@pytest.mark.parametrize(
    ("name", "told"),
    [("annotations.xml", "CVAT"), ("gt.txt", "MOT"), ("all.ndjson", "Labelbox"), ("a.ZIP", "unpacked")],
)
def test_files_of_tools_that_are_not_read_are_called_by_their_name(tmp_path, name, told):
    (tmp_path / name).write_bytes(b"PK<")
    with pytest.raises(InputError, match=rf"it is .*{told}.*known formats are\n(.*\n)+Most tools can export COCO"):
        AnnotationSource(tmp_path / name)


def test_a_sidecar_of_another_format_says_where_that_is_read(tmp_path):
    with pytest.raises(ClipError, match="unknown annotations schema") as caught:
        read_sidecar(write(tmp_path, {"images": [], "categories": []}), 10, 8, 12)
    assert caught.value.evidence["found"] == "no schema, but categories, images"
    assert "--annotations FILE reads COCO" in caught.value.evidence["hint"]


def test_a_sidecar_without_an_object(tmp_path):
    path = write(tmp_path, sidecar(frames=[{"index": 3, "objects": []}]))
    with pytest.raises(ClipError, match="annotations without an object") as caught:
        AnnotationSource(None).read(path.with_name("clip.mp4"), "clip.mp4", 10, 8, 12)
    assert caught.value.evidence == {"annotated_frames": 1}


def test_two_entries_of_the_corpus_for_one_file(tmp_path):
    path = corpus(tmp_path)
    [entry] = json.loads(path.read_text())["videos"].values()
    path.write_text(json.dumps({"videos": {"clip": entry, "again": entry}}))
    with pytest.raises(InputError, match=r"two entries for the file 'clip.mp4', one of them called 'again'"):
        AnnotationSource(path)
    # With and without the suffix: whether that is the same video only the video tells.
    path.write_text(json.dumps({"videos": {"clip": entry, "again": {**entry, "file": "clip"}}}))
    with pytest.raises(ClipError, match="unreadable annotations") as caught:
        AnnotationSource(path).read(tmp_path / "clip.mp4", "clip.mp4", 10, 8, 12)
    assert caught.value.evidence["error"] == "two entries for this video: clip.mp4 and clip"


def annotated(**mask):
    return AnnotatedObject(object_id=1, name="dog", box=(0, 0, 1, 1), **mask)


def test_masks_that_do_not_fit(tmp_path):
    with pytest.raises(ClipError, match="mask of another size"):
        read_mask(annotated(mask_rle=encode_mask(MASK)), 20, 8)
    with pytest.raises(ClipError, match="unreadable mask"):
        read_mask(annotated(mask_file=(tmp_path / "missing.png", 1)), 10, 8)


# ------------------------------------------------------------------------------------------------- encodings and names


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_a_sidecar_in_any_encoding(tmp_path, encoding):
    path = tmp_path / "clip.annotations.json"
    content = sidecar(objects=[{"id": 7, "name": "caf\u00e9"}])
    path.write_bytes(json.dumps(content, ensure_ascii=False).encode(encoding))
    found = read_sidecar(path, 10, 8, 12)
    assert found.frames[3][0].name == "caf\u00e9"
    assumed = ("annotations sidecar is no UTF-8 and was read as Windows-1252; save it as UTF-8 if letters look wrong",)
    assert found.notes == (assumed if encoding == "cp1252" else ())


def test_a_sidecar_in_no_known_encoding(tmp_path):
    path = tmp_path / "clip.annotations.json"
    path.write_bytes(b'{"a": "\xd1\xee\xe1\xe0\xea\xe0"}')
    with pytest.raises(ClipError) as caught:
        read_sidecar(path, 10, 8, 12)
    assert "annotations sidecar is neither UTF-8, UTF-16 nor" in caught.value.evidence["error"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_for_many_videos_with_a_byte_order_mark(tmp_path, encoding):
    path = corpus(tmp_path)
    path.write_bytes(path.read_text().encode(encoding))
    assert list(read_many(path)) == ["clip.mp4"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_of_names_as_programs_write_it(tmp_path, separator):
    path = tmp_path / "names.csv"
    text = separator.join(["Video", " Object", "NAME"]) + "\r\n" + separator.join(["clip", "1", "caf\u00e9"])
    path.write_bytes(text.encode("utf-16"))
    assert list(read_many(path)) == ["clip"]


def names_in(tmp_path, *files):
    videos = {str(i): {"file": name, "width": 10, "height": 8, "annotations": []} for i, name in enumerate(files)}
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps({"videos": videos}))
    return path


def videos_in(folder, *names):
    return [VideoFile(name=name, key=name, path=folder / name, caption=None) for name in names]


def test_entries_that_name_no_video_are_told(tmp_path):
    path = names_in(tmp_path, "a.mp4", "data/b", "Clip_3.mp4")
    assert AnnotationSource(path).check_names(tmp_path, videos_in(tmp_path, "a.mp4", "b.mp4", "clip_3.mp4")) == [
        f"1 entry of {path} without a video, the first one 'Clip_3.mp4', the folder has 'a.mp4'; is it 'clip_3.mp4'?"
    ]
    assert AnnotationSource(path).check_names(tmp_path, videos_in(tmp_path, "a.mp4", "b.mp4", "Clip_3.mp4")) == []


def test_annotations_of_other_videos_stop_the_run(tmp_path):
    with pytest.raises(InputError, match="no video is named in 2 entries of .*corpus.json: the first one 'x.mp4', the"):
        AnnotationSource(names_in(tmp_path, "x.mp4", "y.mp4")).check_names(tmp_path, videos_in(tmp_path, "a.mp4"))
    path = names_in(tmp_path, "b.mp4")  # the end of a path does not do for annotations, and the hint says so
    with pytest.raises(InputError, match="'b.mp4', the folder has 'deep/b.mp4'; is it 'deep/b.mp4'?"):
        AnnotationSource(path).check_names(tmp_path, videos_in(tmp_path, "deep/b.mp4"))


def test_annotations_of_other_videos_are_a_note_beside_sidecars(tmp_path):
    path, files = names_in(tmp_path, "x.mp4"), videos_in(tmp_path, f"{'b' * 240}.mp4", "clip.mp4")
    with pytest.raises(InputError, match="no video is named in 1 entry"):
        AnnotationSource(path).check_names(tmp_path, files)
    write(tmp_path, sidecar())
    assert AnnotationSource(path).check_names(tmp_path, files) == [
        f"1 entry of {path} without a video, the first one 'x.mp4', the folder has {files[0].name!r}"
    ]


def test_pictures_that_name_no_video_are_the_one_videos_and_told_where_there_are_several(tmp_path):
    images = [{"id": 1, "file_name": "frame_0001.png", "width": 10, "height": 8}]
    annotations = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}]
    path = tmp_path / "coco.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dog"}]})
    )
    assert AnnotationSource(path).check_names(tmp_path, videos_in(tmp_path, "a.mp4")) == []
    what = "the first one of pictures whose names name no video (several videos need names like 'clip/00012.jpg'), the"
    files = videos_in(tmp_path, "a.mp4", "clip.mp4")
    with pytest.raises(InputError, match=f"no video is named in 1 entry of .*: {re.escape(what)} folder has 'a.mp4'"):
        AnnotationSource(path).check_names(tmp_path, files)
    write(tmp_path, sidecar())
    [note] = AnnotationSource(path).check_names(tmp_path, files)
    assert note.startswith(f"1 entry of {path} without a video, {what}")


def test_a_deleted_video_does_not_keep_another_from_being_alone(tmp_path):
    (tmp_path / ".Trash").mkdir()
    for name in ("a.mp4", ".Trash/b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    assert AnnotationSource(None)._is_alone(tmp_path)
