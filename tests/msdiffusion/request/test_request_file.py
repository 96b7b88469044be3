import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from msdiffusion.errors import LayoutError, RequestError
from msdiffusion.places import REPOSITORY
from msdiffusion.request.request_file import (
    MAX_FILE_BYTES,
    Embedded,
    check_entry,
    open_request,
    picture_names,
    read_request_file,
    with_embedded_opened,
)

GOOD = """
defaults:
  steps: 2
  images: [dog.png, [teapot.png, dog.png]]
  boxes: [[0, 0.25, 0.5, 0.75], null]
pictures:
  - prompt: a dog and a teapot on the beach
  - name: room
    prompt: a dog and a teapot in the room
    steps: 3
    num_images: 2
    boxes: null
    seed: 7
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("dog", "teapot"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{name}.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "mask.png")
    return tmp_path


def written(folder, text, name="requests.yaml"):
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_a_good_file(folder):
    first, second = read_request_file(written(folder, GOOD))
    assert (first.name, second.name) == ("0000", "room")
    assert second.where == "pictures[1] (room)"
    assert first.arguments == {
        "prompt": "a dog and a teapot on the beach",
        "steps": 2,
        "images": [folder / "dog.png", [folder / "teapot.png", folder / "dog.png"]],
        "boxes": [[0, 0.25, 0.5, 0.75], None],
        "phrases": ["dog", "teapot"],
    }
    assert (second.arguments["steps"], second.arguments["seed"]) == (3, 7)
    assert "boxes" not in second.arguments, "null takes a default away"
    assert picture_names(first) == ["0000"]
    assert picture_names(second) == ["room_0", "room_1"]
    assert open_request(second.arguments).subjects.boxes == (None, None, None)


def test_json_says_the_same(folder):
    picture = {"images": ["dog.png"], "boxes": [[0, 0, 1, 1]], "masks": ["mask.png"], "prompt": "a dog", "scale": 0.5}
    [entry] = read_request_file(written(folder, {"pictures": [picture]}, "requests.json"))
    assert entry.arguments["scale"] == 0.5
    assert entry.arguments["masks"] == [folder / "mask.png"]
    assert open_request(entry.arguments).subjects.masks[0].all()


def one(**changes):
    return {"pictures": [{"images": ["dog.png"], "boxes": [[0, 0, 1, 1]], "prompt": "a dog", **changes}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # the file
        ("", "must be a mapping with the key pictures, got None"),
        ("[1]", "must be a mapping"),
        ("pictures: 3", "pictures must be a list with an entry per request, got 3"),
        ("pictures: []", "pictures must be a list"),
        ({"picture": []}, "unknown key 'picture'; is pictures meant?"),
        ({"defaults": [], "pictures": [{}]}, "defaults must be a mapping"),
        ({"defaults": {"step": 3}, "pictures": [{}]}, "defaults: unknown key 'step'; is steps meant?"),
        ({"defaults": {"name": "x"}, "pictures": [{}]}, "defaults: unknown key 'name'"),
        ("pictures: [", "is not YAML"),
        ("pictures: !!python/object/apply:os.system ['true']", "is not YAML: could not determine a constructor"),
        ("pictures: 2024-99-99", "is not YAML"),
        ("a: 1\na: 2", "line 2: the key 'a' is given twice"),
        ("pictures:\n- {steps: 1, steps: 2}", "line 2: the key 'steps' is given twice"),
        ("[" * 200_000, "is nested too deeply"),
        ("pictures:\n- &a {steps: 1}\n- *a", "line 3: aliases (*) are not read; put what repeats under defaults"),
        ("[" * 5000, "nested too deeply"),
        # entries
        ({"pictures": [3]}, "pictures[0]: must be a mapping of arguments, got 3"),
        (one(batch_size=3), "pictures[0]: unknown key 'batch_size'; known: name, images, boxes"),
        (one(widht=64), "pictures[0]: unknown key 'widht'; is width meant?"),
        (one(output_type="np"), "unknown key 'output_type'"),
        ({"pictures": [{"prompt": "a dog"}]}, "pictures[0]: images is missing"),
        ({"pictures": [{"images": ["dog.png"]}]}, "pictures[0]: prompt is missing"),
        (one(prompt=3), "prompt must be text, got 3: quote it"),
        (one(prompt=""), "the prompt is empty"),
        (one(images="dog.png"), "images must be a list with one item per subject, got 'dog.png'"),
        (one(images=[3]), "images[0] must be the path of a picture, got 3"),
        (one(images=[["dog.png", None]]), "images[0][1] must be the path of a picture, got None"),
        (one(images=["a\0b"]), "images[0] must be the path of a picture"),
        (one(images=["cat.png"]), "images[0]: no such file: "),
        (one(masks="mask.png"), "masks must be a list"),
        (one(masks=["dog.png"]), "masks[0] has other colours than black and white"),
        (one(boxes=[[0, 0, 2, 1]]), "boxes[0] is (0.0, 0.0, 2.0, 1.0), which leaves the picture"),
        (one(boxes="0,0,1,1"), "boxes"),
        (one(scale="1"), "scale must be a number"),
        ("pictures: [{images: [dog.png], prompt: a dog, scale: .nan}]", "scale must be a number"),
        (one(auto_layout="yes"), "auto_layout must be true or false, got 'yes'"),
        (one(auto_layout=1), "auto_layout must be true or false, got 1"),
        (one(num_images=10**9), "num_images must be at most 1000, got"),
        (one(seed=0.5), "seed must be a whole number"),
        (one(subject_windows=[[1, 0]]), "subject_windows[0]"),
        ("pictures: !!bool x", "is not YAML: KeyError"),
        ("pictures: !!int ''", "is not YAML: IndexError"),
        ("pictures: !!timestamp x", "is not YAML: AttributeError"),
        ("pictures: !!float x", "is not YAML: ValueError"),
        (one(prompt="x" * 20_000), "the prompt has 20000 characters; 10000 are read at most"),
        (one(images=["x" * 5000]), "is not a picture that can be read"),
        (one(height=80_000_000), "height must be at most 8192"),
        # names
        *((one(name=name), "is a device on Windows") for name in ("CON", "nul", "Com1", "aux.x", "LPT9", "com¹")),
        (one(name="ä" * 99 + "語"), "name must be at most 200 bytes in UTF-8"),
        (one(name=3), "name must be text, got 3: quote it"),
        *((one(name=name), "name must be at most 100 letters") for name in ("", "../a", "a/b", ".a", "a.", "x" * 101)),
    ],
)  # fmt: skip
def test_bad_files(folder, content, message):
    with pytest.raises(RequestError) as caught:
        read_request_file(written(folder, content))
    assert str(caught.value).startswith(str(folder / "requests.yaml"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"pictures": [', "is not JSON"),
        ('{"pictures": 1, "pictures": 2}', "the key 'pictures' is given twice"),
        ('{"pictures": [{"images": ["dog.png"], "prompt": "a \\ud800"}]}', "half of a character"),
        ('{"pictures": [{"images": ["dog.png\\ud800"], "prompt": "a dog"}]}', "no such file"),
        ('{"pictures": NaN}', "NaN is no number of JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"pictures": ' + "1" * 5000 + "}", "is not JSON"),
    ],
)
def test_bad_json(folder, text, message):
    with pytest.raises(RequestError, match=message):
        read_request_file(written(folder, text, "requests.json"))


def test_bad_entries_are_named(folder):
    content = one()
    good = content["pictures"][0]
    content["pictures"] = [
        good,
        {**good, "boxes": [[1, 1, 0, 0]]},
        {**good, "name": "x"},
        {**good, "name": "y", "seed": -1},
    ]
    with pytest.raises(RequestError) as caught:
        read_request_file(written(folder, content))
    head, *lines = str(caught.value).splitlines()
    assert head.endswith("requests.yaml: 2 of 4 entries are wrong:")
    assert [line.strip().split(": ")[0] for line in lines] == ["pictures[1]", "pictures[3] (y)"]
    for count, last in ((3, "pictures[2]: "), (40, "and 37 more")):
        with pytest.raises(RequestError) as caught:
            read_request_file(written(folder, {"pictures": [{**good, "seed": -1}] * count}))
        head, *lines = str(caught.value).splitlines()
        assert head.endswith(f": {count} of {count} entries are wrong:")
        assert [line.strip()[:11] for line in lines[:3]] == ["pictures[0]", "pictures[1]", "pictures[2]"]
        assert len(lines) == min(count, 4)
        assert lines[-1].strip().startswith(last)


@pytest.mark.parametrize(
    "names",
    [[{"name": "a"}, {"name": "A"}], [{"name": "a", "num_images": 2}, {"name": "a_1"}], [{"name": "0001"}, {}]],
)
def test_two_pictures_of_one_name(folder, names):
    good = one()["pictures"][0]
    with pytest.raises(RequestError, match=r"pictures\[1\].*its picture would be called .*as that of pictures\[0\]"):
        read_request_file(written(folder, {"pictures": [{**good, **name} for name in names]}))


def test_the_longest_name_can_be_written(folder):
    from msdiffusion.request.provenance import save_png

    [entry] = read_request_file(written(folder, one(name="語" * 66, num_images=3)))
    assert len(entry.name.encode()) == 198
    save_png(Image.new("RGB", (2, 2)), folder / f"{entry.name}_99999.jpeg.png", {})
    assert read_request_file(written(folder, one(name="console")))[0].name == "console"


def test_files_that_cannot_be_read(folder):
    for name in ("nothing.yaml", "x" * 5000, "a\0b"):
        with pytest.raises(RequestError, match="no such file"):
            read_request_file(folder / name)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RequestError, match="cannot be read as text in UTF-8"):
        read_request_file(folder / "bytes.yaml")
    with (folder / "large.yaml").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(RequestError, match="more than 16 MiB"):
        read_request_file(folder / "large.yaml")


def test_errors_keep_their_kind(folder):
    with pytest.raises(LayoutError):
        check_entry({"images": ["dog.png"], "boxes": [[0, 0, 2, 2]], "prompt": "a dog"}, folder, "here", "name")


@pytest.mark.parametrize("text", ["0123", "-012", "12:30:45", "1:30.5", "0_1", "+07"])
@pytest.mark.parametrize("key", ["seed", "name", "boxes"])
def test_numbers_that_yaml_changes_are_refused(folder, text, key):
    lines = ["pictures:", "  - prompt: a dog", "    images: [dog.png]", f"    {key}: {text}"]
    (folder / "odd.yaml").write_text("\n".join(lines))
    with pytest.raises(RequestError, match=f"line 4: '{re.escape(text)}' is another number in YAML: write it without"):
        read_request_file(folder / "odd.yaml")


@pytest.mark.parametrize(("text", "seed"), [("0", 0), ("10", 10), ("0x1F", 31), ("1_000", 1000)])
def test_other_numbers_of_yaml_are_what_they_seem(folder, text, seed):
    lines = ["pictures:", "  - prompt: a dog", "    images: [dog.png]", "    phrases: [dog]", f"    seed: {text}"]
    (folder / "odd.yaml").write_text("\n".join(lines))
    assert read_request_file(folder / "odd.yaml")[0].arguments["seed"] == seed


@pytest.mark.parametrize(
    ("key", "ours"),
    [("num_inference_steps", "steps"), ("image", "images"), ("generator", "seed"), ("cfg_scale", "guidance_scale")],
)
def test_names_of_other_libraries_are_told_ours(folder, key, ours):
    with pytest.raises(RequestError, match=f"unknown key '{key}'; is {ours} meant"):
        read_request_file(written(folder, one(**{key: 3})))


def test_embedded_references(folder):
    content = (folder / "dog.png").read_bytes()
    entry = check_entry({"images": [Embedded(content, "dog.png")], "prompt": "a dog"}, folder, "here", "name")
    assert with_embedded_opened(entry.arguments)["images"][0].size == (8, 8)
    with pytest.raises(RequestError, match="embedded reference 'x' is not a picture that can be read"):
        check_entry({"images": [Embedded(content[:40], "x")], "prompt": "a dog"}, folder, "here", "name")


def test_a_picture_of_too_many_pixels(folder, monkeypatch):
    monkeypatch.setattr("msdiffusion.request.pictures.MAX_PIXELS", 32)
    with pytest.raises(RequestError, match="dog.png' has more than 32 pixels, the most that are read"):
        read_request_file(written(folder, one()))


def test_an_argument_nested_too_deeply(folder):
    boxes = []
    for _ in range(100_000):
        boxes = [boxes]
    with pytest.raises(RequestError, match="nested too deeply"):
        check_entry({"images": ["dog.png"], "boxes": [boxes], "prompt": "a dog"}, folder, "here", "name")


def test_the_example_is_good():
    entries = read_request_file(REPOSITORY / "docs" / "examples" / "request.yaml")
    assert len(entries) >= 3
    assert all("seed" in entry.arguments for entry in entries), "without a seed nobody gets the same picture"


def test_reading_loads_no_torch(folder):
    code = (
        "import sys; from msdiffusion.request.request_file import read_request_file; read_request_file(sys.argv[1])\n"
        "print(sorted({'torch', 'diffusers', 'spacy'} & sys.modules.keys()))"
    )
    call = [
        sys.executable,
        "-c",
        code,
        str(written(folder, one(phrases=["dog"]))),
    ]  # spaCy, which finds phrases, loads it
    assert subprocess.check_output(call, text=True).strip() == "[]"
