import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from msdiffusion import files
from msdiffusion.errors import LayoutError, PhraseError, RequestError
from msdiffusion.request import provenance
from msdiffusion.request.provenance import (
    KEY,
    SCHEMA,
    read_record,
    read_request,
    request_record,
    same_request,
    save_png,
)
from msdiffusion.request.request_file import check_entry


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "dog.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "view.jpg")
    Image.new("1", (8, 8), 1).save(tmp_path / "mask.png")
    return tmp_path


def record_of(folder, embed=False, **changes):
    arguments = {
        "images": [["dog.png", "view.jpg"]], "boxes": [(0, 0, 1, 1)], "masks": ["mask.png"], "prompt": "a dög",
        "phrases": ["dög"], "seed": 3, "height": 64, "width": 72, **changes,
    }  # fmt: skip
    entry = check_entry(arguments, folder, "here", "name")
    return {
        "schema": SCHEMA,
        "request": request_record(entry.arguments, folder / "out", embed=embed),
        "left_out": ["width"],
        "model": dict.fromkeys(
            ("adapter", "adapter_sha256", "adapter_config", "base_model", "base_config", "image_encoder", "dtype"), "x"
        )
        | {"dtype": "float32"},
        "hooks": {"safety_checker": None, "watermark": "mark"},
        "flagged": False,
        "batch": {"size": 4, "position": 3},
        "made_with": dict.fromkeys(("msdiffusion", "torch", "diffusers", "device", "processor", "arithmetic"), "1"),
    }


def save(folder, record, name="picture.png"):
    path = folder / "out" / name
    save_png(Image.new("RGB", (72, 64)), path, record)
    return path


def test_a_record_comes_back_as_it_was_written(folder):
    record = record_of(folder)
    path = save(folder, record)
    assert read_record(path) == record
    assert read_record(str(path)) == record
    assert read_record(Image.open(path)) == record
    [[dog, view]] = record["request"]["images"]
    assert dog == {"path": "../dog.png", "sha256": hashlib.sha256((folder / "dog.png").read_bytes()).hexdigest()}
    assert view["path"] == "../view.jpg"
    assert [path.name for path in path.parent.iterdir()] == ["picture.png"], "nothing unfinished is left"


@pytest.mark.parametrize("opened", [False, True])
def test_the_request_of_a_picture(folder, opened):
    path = save(folder, record_of(folder))
    request = read_request(Image.open(path) if opened else path)
    assert [[view.resolve() for view in views] for views in request.pop("images")] == [
        [folder / "dog.png", folder / "view.jpg"]
    ]
    assert [mask.resolve() for mask in request.pop("masks")] == [folder / "mask.png"]
    assert request == {
        "boxes": [[0, 0, 1, 1]], "prompt": "a dög", "phrases": ["dög"], "seed": 3, "height": 64, "width": 72
    }  # fmt: skip
    free = read_request(save(folder, record_of(folder, boxes=None, masks=None, prompt="a dog", phrases=["dog"])))
    assert free["boxes"] is None, "generate must be given it"


def test_the_request_of_a_picture_named_by_a_relative_path(folder, monkeypatch):
    path = save(folder, record_of(folder))
    expected = read_request(path)
    for here in (folder, folder.parent):
        monkeypatch.chdir(here)
        found = read_request(path.relative_to(here))
        for given, wanted in zip(found["images"][0], expected["images"][0], strict=True):
            assert Path(given).resolve() == Path(wanted).resolve()


def test_embedded_references_need_no_file(folder):
    path = save(folder, record_of(folder, embed=True))
    for name in ("dog.png", "view.jpg", "mask.png"):
        (folder / name).unlink()
    request = read_request(path)
    [[dog, view]] = request["images"]
    assert (dog.getpixel((0, 0)), view.size) == ((255, 0, 0), (8, 8))
    assert request["masks"][0].size == (8, 8)
    again = request_record(provenance.entry_of(path, read_record(path)).arguments, folder)
    assert again == read_record(path)["request"], "a picture drawn again has them too"


def test_references_too_large_to_embed(folder, monkeypatch):
    monkeypatch.setattr(provenance, "MAX_EMBEDDED_BYTES", 100)
    with pytest.raises(RequestError, match="too much to embed"):
        record_of(folder, embed=True)
    sizes = sum((folder / name).stat().st_size for name in ("dog.png", "view.jpg", "mask.png"))
    monkeypatch.setattr(provenance, "MAX_EMBEDDED_BYTES", sizes)
    record_of(folder, embed=True)
    monkeypatch.setattr(provenance, "MAX_EMBEDDED_BYTES", sizes - 1)
    with pytest.raises(RequestError, match="too much to embed"):
        record_of(folder, embed=True)


def test_the_largest_embedded_reference_can_be_read_again(folder):
    """Pillow limits text; the record must stay below whatever it compresses to."""
    with (folder / "dog.png").open("ab") as file:
        file.write(b"\0" * (15 * 2**20))  # behind the picture's end, where readers don't look
    path = save(folder, record_of(folder, embed=True))
    assert read_request(path)["images"][0][0].size == (8, 8)


def test_a_reference_that_is_gone_or_changed(folder):
    path = save(folder, record_of(folder))
    Image.new("RGB", (8, 8), "green").save(folder / "view.jpg")
    with pytest.raises(RequestError, match=r"picture.png: the reference .*view.jpg has other content"):
        read_request(path)
    (folder / "dog.png").unlink()
    with pytest.raises(RequestError, match=r"picture.png: the reference '../dog.png' is missing"):
        read_request(path)


def test_pictures_without_a_record(folder):
    with pytest.raises(RequestError, match="dog.png has no metadata of msdiffusion"):
        read_record(folder / "dog.png")
    with pytest.raises(RequestError, match="the picture has no metadata"):
        read_record(Image.new("RGB", (8, 8)))
    for name in ("nothing.png", "x" * 5000, "a\0b"):
        with pytest.raises(RequestError, match="no such file"):
            read_record(folder / name)
    with pytest.raises(RequestError, match=r"view.jpg is not a PNG"):
        read_record(folder / "view.jpg")
    path = save(folder, record_of(folder))
    for cut in (10, 60, 200):
        (folder / "cut.png").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(RequestError, match="is not a PNG that can be read|has no metadata"):
            read_record(folder / "cut.png")


def broken(folder, record, *path, value):
    """A PNG whose record has one value replaced (or removed, for ...)."""
    inner = record = json.loads(json.dumps(record))
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return save(folder, record)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), "msdiffusion.picture/9", "has schema 'msdiffusion.picture/9'; this version reads"),
        (("schema",), ["x" * 10_000], r"has schema \['x+\.\.\.; this version"),
        (("extra",), 1, "broken: its keys must be"),
        (("flagged",), ..., "broken: its keys must be"),
        (("flagged",), 0, "flagged is 0"),
        (("model",), [], "model must have the keys"),
        (("model", "dtype"), 16, "model.dtype is 16"),
        (("model", "dtype"), "load", "model.dtype is 'load'"),
        (("hooks", "watermark"), 3, "hooks.watermark is 3"),
        (("made_with", "torch"), ..., "made_with must have the keys"),
        (("made_with", "place"), "home", "made_with must have the keys"),
        (("made_with", "arithmetic"), 2, "made_with.arithmetic is 2"),
        (("batch", "size"), True, "batch.size is True"),
        (("batch", "size"), 10**9, "batch.size is 1000000000, more than 256"),
        (("batch", "position"), 4, "batch is"),
        (("left_out",), ["depth"], "left_out is"),
        (("left_out",), "height", "left_out is"),
        (("request",), None, "request must have the keys"),
        (("request", "num_images"), 5, "request must have the keys"),
        (("request", "seed"), None, "request.seed is None"),
        (("request", "seed"), True, "request.seed is True"),
        (("request", "images"), [[]], "request.images must be lists of references"),
        (("request", "images"), "x", "request.images must be lists of references"),
        (("request", "images", 0, 0), "dog.png", "a reference must have path and sha256"),
        (("request", "images", 0, 0, "sha256"), 3, "a reference must have path and sha256"),
        (("request", "images", 0, 0, "more"), "3", "a reference must have path and sha256"),
        (("request", "masks"), 3, "request.masks must be a list"),
        (("request", "masks", 0), 3, "a reference must have path and sha256"),
    ],
)
def test_broken_records(folder, path, value, message):
    with pytest.raises(RequestError, match=message) as caught:
        read_record(broken(folder, record_of(folder), *path, value=value))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        (("request", "boxes", 0, 2), 2, LayoutError, r"picture.png: boxes\[0\]"),
        (("request", "scale"), "1", RequestError, "scale must be a number"),
        (("request", "prompt"), None, RequestError, "prompt is missing"),
        (("request", "steps"), 10.5, RequestError, "steps"),
        (("request", "images", 0, 0, "path"), "a\0b", RequestError, "a reference cannot be called"),
        (("request", "images", 0, 0, "path"), "/dev/zero", RequestError, "is missing"),
        (("request", "images", 0, 0, "path"), "x" * 5000, RequestError, "is missing"),
        (("request", "images", 0, 0, "path"), "\ud800", RequestError, "is missing"),
        (("request", "prompt"), "a d\ud800g", RequestError, "picture.png: the prompt holds"),
        (("request", "phrases"), ["x" * 10_001], PhraseError, r"phrases\[0\] has 10001 characters"),
        (("request", "images", 0, 0, "content"), "???", RequestError, "embedded reference '../dog.png' is broken"),
        (("request", "images", 0, 0, "content"), "AAAA", RequestError, "is broken: its sha256 is another"),
    ],
)
def test_requests_that_cannot_be_honoured(folder, path, value, error, message):
    with pytest.raises(error, match=message):
        read_request(broken(folder, record_of(folder), *path, value=value))


def test_embedded_bytes_that_are_no_picture(folder):
    content = b"hello"
    digest = hashlib.sha256(content).hexdigest()
    item = {"path": "x", "sha256": digest, "content": base64.b64encode(content).decode()}
    with pytest.raises(RequestError, match="embedded reference 'x' is not a picture that can be read"):
        read_request(broken(folder, record_of(folder), "request", "images", 0, 0, value=item))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "its metadata is not JSON"),
        ("[]", "has schema None"),
        ('{"schema": NaN}', "NaN is no number"),
        ('{"schema": 1, "schema": 2}', "given twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt"])
def test_texts_that_are_no_record(folder, text, message, kind):
    info = PngInfo()
    if kind == "iTXt":
        info.add_itxt(KEY, text)
    else:
        info.add_text(KEY, text, zip=kind == "zTXt")
    Image.new("RGB", (2, 2)).save(folder / "text.png", pnginfo=info)
    with pytest.raises(RequestError, match=message):
        read_record(folder / "text.png")


def test_texts_that_are_too_long(folder, monkeypatch):
    info = PngInfo()
    info.add_text(KEY, " " * (5 * 2**20), zip=True)  # pillow unpacks a mebibyte at most
    Image.new("RGB", (2, 2)).save(folder / "bomb.png", pnginfo=info)
    with pytest.raises(RequestError, match="is not a PNG that can be read|has no metadata"):
        read_record(folder / "bomb.png")
    path = save(folder, record_of(folder))
    monkeypatch.setattr(provenance, "MAX_RECORD_CHARACTERS", 100)
    with pytest.raises(RequestError, match="characters; 100 are read at most"):
        read_record(path)
    monkeypatch.setattr(provenance, "MAX_PNG_BYTES", 100)
    with pytest.raises(RequestError, match="which is no picture of ours"):
        read_record(path)


def test_a_reference_on_another_drive(folder, monkeypatch):
    def no_way(path, start):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(provenance.os.path, "relpath", no_way)
    path = save(folder, record_of(folder))
    assert read_record(path)["request"]["images"][0][0]["path"] == (folder / "dog.png").as_posix()
    assert read_request(path)["images"] == [[folder / "dog.png", folder / "view.jpg"]]


def test_a_picture_that_cannot_be_written(folder):
    with pytest.raises(RequestError, match="cannot be written"):
        save_png(Image.new("RGB", (2, 2)), folder / "dog.png" / "picture.png", {})


def test_a_reference_that_cannot_be_read(folder):
    with pytest.raises(RequestError, match="cannot be read"):
        files.file_sha256(folder / "nothing.png")
    with pytest.raises(RequestError, match="cannot be read"):
        request_record({"images": [folder / "nothing.png"], "prompt": "x"}, folder, embed=True)


def test_the_same_request(folder):
    planned = record_of(folder)
    assert same_request(planned, record_of(folder, embed=True))
    assert same_request(planned, record_of(folder, width=80)), "the model's own width is what it is"
    others = [record_of(folder, **change) for change in ({"seed": 4}, {"height": 80}, {"scale": 1}, {"masks": None})]
    for part, key in (("model", "dtype"), ("hooks", "watermark")):
        others.append({**planned, part: {**planned[part], key: "y"}})
    others.append({**planned, "left_out": []})
    assert not any(same_request(planned, other) for other in others)
    assert same_request(planned, {**planned, "model": {**planned["model"], "adapter": "renamed"}})
    (folder / "dog.png").rename(folder / "moved.png")
    assert same_request(planned, record_of(folder, images=[["moved.png", "view.jpg"]]))
    Image.new("RGB", (8, 8), "green").save(folder / "moved.png")
    assert not same_request(planned, record_of(folder, images=[["moved.png", "view.jpg"]]))
    any_seed = {**planned, "request": {**planned["request"], "seed": None}}
    assert same_request(any_seed, planned)
    assert not same_request(planned, any_seed)


def test_reading_loads_no_torch(folder):
    code = (
        "import sys; from msdiffusion.request.provenance import read_request; read_request(sys.argv[1])\n"
        "print(sorted({'torch', 'diffusers', 'spacy'} & sys.modules.keys()))"
    )
    call = [sys.executable, "-c", code, str(save(folder, record_of(folder)))]
    assert subprocess.check_output(call, text=True).strip() == "[]"
