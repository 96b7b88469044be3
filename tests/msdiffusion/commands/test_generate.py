import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import msdiffusion.generation.generate
from msdiffusion.cli import main
from msdiffusion.errors import RequestError
from msdiffusion.figures import draw_layout
from msdiffusion.generation.safety import read_watermark
from msdiffusion.request.provenance import read_record

pytestmark = pytest.mark.usefixtures("loaded_once")

PROMPT = "a dog and a teapot on the beach"


@pytest.fixture
def two(tmp_path):
    """Arguments of a good call."""
    Image.new("RGB", (20, 20), "red").save(tmp_path / "dog.png")
    Image.new("RGBA", (20, 20), "blue").save(tmp_path / "teapot.png")
    return [
        "--image", str(tmp_path / "dog.png"), "--box", "0,.25,.5,.75", "--phrase", "dog",
        "--image", str(tmp_path / "teapot.png"), "--box", ".5,.25,1,.75", "--phrase", "teapot",
        "--prompt", PROMPT, "--out", str(tmp_path / "out" / "picture.png"), "--seed", "0", "--quiet",
    ]  # fmt: skip


def test_generate_writes_the_picture(two, tiny_model_dir, tmp_path, capsys):
    assert main(["generate", *two, "--model", str(tiny_model_dir), "--steps", "2", "--device", "cpu"]) == 0
    out = tmp_path / "out" / "picture.png"
    assert capsys.readouterr().out.strip() == str(out)
    assert Image.open(out).size == (64, 64)


def test_generate_numbers_several_pictures(two, tiny_model_dir, tmp_path, capsys):
    options = ["--num-images", "2", "--steps", "1", "--height", "48", "--width", "72", "--subject-scales", "1,.5"]
    assert main(["generate", *two, *options, "--model", str(tiny_model_dir), "--auto-layout-start", "1"]) == 0
    names = [tmp_path / "out" / f"picture_{k}.png" for k in range(2)]
    assert capsys.readouterr().out.split() == [str(name) for name in names]
    assert [Image.open(name).size for name in names] == [(72, 48)] * 2


def replaced(arguments, name, value):
    position = arguments.index(name)
    return [*arguments[: position + 1], value, *arguments[position + 2 :]]


def without(arguments, name):
    places = [place for place, argument in enumerate(arguments) if argument == name]
    return [argument for place, argument in enumerate(arguments) if place not in places and place - 1 not in places]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: replaced(a, "--image", "nowhere.png"), "images[0]: no such file: nowhere.png"),
        (lambda a: replaced(a, "--box", "0,.25,1.5,.75"), "boxes[0] is (0.0, 0.25, 1.5, 0.75), which leaves"),
        (lambda a: replaced(a, "--box", "-0.1,.25,.5,.75"), "which leaves the picture"),
        (lambda a: replaced(a, "--box", "0.9,.25,.5,.75"), "reversed"),
        (lambda a: replaced(a, "--box", "nan,.25,.5,.75"), "not finite"),
        (lambda a: replaced(a, "--box", "0,.25,.5"), "four numbers"),
        (lambda a: replaced(a, "--box", "left"), "--box is 'left'"),
        (lambda a: replaced(a, "--prompt", ""), "the prompt is empty"),
        (lambda a: [*a, "--phrase", "beach"], "2 images, 2 boxes, 3 phrases"),
        (lambda a: [*a, "--box", "0,0,1,1"], "2 images, 3 boxes, 2 phrases"),
        (lambda a: [*a, "--height", "100"], "height is 100"),
        (lambda a: [*replaced(a, "--phrase", "cat"), "--auto-layout"], "'cat' is needed in the prompt"),
        (lambda a: replaced(a, "--out", "picture.doc"), "--out must end in one of .png"),
        (lambda a: [*a, "--subject-scales", "1"], "one number per subject (2), got 1"),
        (lambda a: [*a, "--subject-scales", "-1,1"], "subject_scales[0]"),
        (lambda a: [*a, "--subject-windows", "-,1:0"], "subject_windows[1] must be (start, end)"),
        (lambda a: [*a, "--mask", "nowhere.png", "--mask", "-"], "masks[0]: no such file: nowhere.png"),
        (lambda a: [*a, "--mask", "-"], "masks must hold one mask, or None, per subject (2), got 1"),
        (lambda a: [*a, "--view", "nowhere.png"], "images[1][1]: no such file: nowhere.png"),
        (lambda a: without(a, "--prompt"), "--prompt is missing"),
        (lambda a: without(a, "--image"), "no images: give --image once per subject"),
        (lambda a: [*a, "--batch-size", "0"], "--batch-size must be a whole number of at least 1, got 0"),
        (lambda a: [*a, "--request", "x.yaml"], "--request says all of what is drawn: leave out --image, --box"),
        (lambda a: [*a, "--from-png", "x.png"], "--from-png says all of what is drawn: leave out --image"),
        (lambda a: replaced(a, "--out", "."), "--out must end in one of"),
        (lambda a: replaced([*a, "--embed-references"], "--out", "x.jpg"), "--embed-references needs a PNG; --out"),
        (lambda a: [*a, "--watermark", ""], "a watermark is text of 1 to 16 bytes"),
        (lambda a: [*a, "--watermark", "x", "--height", "64", "--width", "64"], "64 x 64 pixels is too small"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_loads_no_weights(two, edit, message, capsys, monkeypatch):
    monkeypatch.setattr(
        msdiffusion.generation.generate.MSDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    assert main(["generate", *edit(two)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("msdiffusion: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_missing_model(two, tmp_path, capsys):
    assert main(["generate", *two, "--model", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err


def test_bad_input_loads_no_torch(two):
    code = (
        "import sys; from msdiffusion.cli import main; status = main(sys.argv[1:]);"
        "print(status, sorted({'torch', 'diffusers', 'spacy'} & sys.modules.keys()))"
    )
    call = [sys.executable, "-c", code, "generate", *replaced(two, "--box", "0,0,2,2")]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip() == "2 []"


def test_a_device_that_is_not_there_is_one_line(tmp_path, capsys):
    picture = tmp_path / "dog.png"
    Image.new("RGB", (8, 8)).save(picture)
    out = tmp_path / "out.png"
    words = f"generate --image {picture} --box 0,0,1,1 --phrase dog --prompt dog --out {out} --device nowhere"
    assert main(words.split()) == 2
    assert "device 'nowhere' cannot be used here (cpu" in capsys.readouterr().err
    assert main([*words.split()[:-1], "gpu"]) == 2
    assert "an NVIDIA GPU is called cuda" in capsys.readouterr().err


def test_subject_scales_that_are_no_numbers_say_so(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--subject-scales", "a,b"])
    assert "'a,b' must be numbers" in capsys.readouterr().err


def test_phrases_taken_from_the_prompt_are_shown(tiny_model_dir, tmp_path, capsys):
    """The match is by number and order only, so the user must see it."""
    picture = tmp_path / "dog.png"
    Image.new("RGB", (8, 8)).save(picture)
    request = ["--image", str(picture), "--box", "0,0,1,1", "--prompt", "a red car", "--out", str(tmp_path / "out.png")]
    assert main(["generate", *request, "--model", str(tiny_model_dir), "--steps", "1"]) == 0
    assert f"phrases from the prompt: {picture} = red car" in capsys.readouterr().err


def pixels(path):
    return np.asarray(Image.open(path))


def request_file(folder, *pictures, **defaults):
    path = folder / "requests.json"
    defaults = {"images": ["dog.png"], "boxes": [[0, 0, 1, 1]], "prompt": "a dog", "phrases": ["dog"], **defaults}
    path.write_text(json.dumps({"defaults": {"steps": 1, "seed": 0, **defaults}, "pictures": list(pictures)}))
    return path


@pytest.fixture
def draw(two, tiny_model_dir, tmp_path):
    """Function: further arguments -> exit status of "generate" with the tiny model; --out is relative to tmp_path."""

    def run(*arguments):
        *before, option, name = [str(argument) for argument in arguments]
        assert option == "--out", "the last one counts; this keeps all files in tmp_path"
        call = ["generate", "--model", str(tiny_model_dir), "--device", "cpu", *before, "--out", str(tmp_path / name)]
        return main(call)

    return run


# --------------------------------------------------------------------------------------------------- one from flags


def test_views_masks_and_windows(two, draw, tmp_path):
    Image.new("1", (8, 8), 1).save(tmp_path / "mask.png")
    more = [
        "--view",
        tmp_path / "dog.png",
        "--mask",
        tmp_path / "mask.png",
        "--mask",
        "-",
        "--subject-windows",
        "-,0:0.5",
    ]
    assert draw(*two, *more, "--steps", "1", "--out", "x.png") == 0
    request = read_record(tmp_path / "x.png")["request"]
    assert [[view["path"] for view in views] for views in request["images"]] == [["dog.png"], ["teapot.png", "dog.png"]]
    assert request["masks"][0]["path"] == "mask.png"
    assert (request["masks"][1], request["subject_windows"]) == (None, [None, [0.0, 0.5]])


def test_a_view_needs_its_subject(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--view", "x.png", "--out", "x.png"])
    assert "give its --image first" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a:b", "0-1", "0:1:x"])
def test_subject_windows_that_are_none_say_so(text, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--subject-windows", text, "--out", "x.png"])
    assert f"{text!r} must be FROM:TO or - per subject" in capsys.readouterr().err


def test_no_layout_is_told(two, draw, tmp_path, capsys):
    """Nobody should get another method than they think because a flag was forgotten."""
    assert draw(*without(two, "--box"), "--steps", "2", "--out", "x.png") == 0
    assert capsys.readouterr().err == "", "--quiet is among the arguments"
    two.remove("--quiet")
    assert draw(*without(two, "--box"), "--steps", "2", "--out", "x.png") == 0
    assert "no --box and no --mask: every subject finds its place by the text's attention" in capsys.readouterr().err
    assert read_record(tmp_path / "x.png")["request"]["boxes"] is None
    assert draw(*without(two, "--box"), "--box", "0,0,.5,1", "--box", "-", "--steps", "2", "--out", "y.png") == 0
    assert "no --box" not in capsys.readouterr().err
    assert read_record(tmp_path / "y.png")["request"]["boxes"] == [[0, 0, 0.5, 1], None]


def test_formats_without_metadata_are_told(two, draw, tmp_path, capsys):
    assert draw(*two, "--steps", "1", "--out", "x.jpg") == 0
    assert capsys.readouterr().err == "", "--quiet is among the arguments"
    two.remove("--quiet")
    assert draw(*two, "--steps", "1", "--out", "x.jpg") == 0
    assert ".jpg keeps no metadata: only a .png can be drawn again with --from-png" in capsys.readouterr().err
    assert draw("--from-png", tmp_path / "x.jpg", "--out", "y.png") == 2
    assert "is not a PNG that can be read" in capsys.readouterr().err


def test_out_may_not_be_a_folder(two, draw, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    assert draw(*two, "--out", "folder.png") == 2
    assert "is a folder: give the name of a file" in capsys.readouterr().err


def test_layouts_are_drawn_beside_the_pictures(draw, two, tmp_path, capsys, monkeypatch):
    seen = []

    def remembered(picture, **options):
        seen.append(options)
        return draw_layout(picture, **options)

    monkeypatch.setattr("msdiffusion.generation.folder.draw_layout", remembered)
    views = ["--view", tmp_path / "dog.png"]
    assert draw(*two, *views, "--steps", "1", "--num-images", "2", "--layout", "--out", "l/x.png") == 0
    names = ["x_0.png", "x_0_layout.png", "x_1.png", "x_1_layout.png"]
    assert sorted(path.name for path in (tmp_path / "l").iterdir()) == names
    assert capsys.readouterr().out.split() == [str(tmp_path / "l" / name) for name in names[::2]]
    boxes = [(0, 0.25, 0.5, 0.75), (0.5, 0.25, 1, 0.75)]
    assert seen == [{"boxes": boxes, "phrases": ("dog", "teapot"), "maps": None}] * 2, "one of each subject"
    expected = draw_layout(Image.open(tmp_path / "l" / "x_0.png"), boxes=boxes, phrases=["dog", "teapot"])
    assert np.array_equal(pixels(tmp_path / "l" / "x_0_layout.png"), expected)
    free = [*without(two, "--box"), "--steps", "2", "--layout"]
    assert draw(*free, "--out", "y.jpg") == 0
    assert (seen[-1]["boxes"], seen[-1]["maps"].shape[0]) == ([None, None], 2)
    assert (tmp_path / "y_layout.png").is_file()


def test_a_layout_never_takes_the_place_of_a_picture(draw, two, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        msdiffusion.generation.generate.MSDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    path = request_file(tmp_path, {"name": "a"}, {"name": "A_layout"})
    assert draw("--request", path, "--layout", "--out", "pictures") == 2
    assert "a.png: its layout would be drawn into a_layout.png, which is another picture" in capsys.readouterr().err
    assert draw(*two, "--layout", "--out", f"{'x' * 235}.png") == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- a file


def test_a_request_file(draw, two, tmp_path, capsys):
    path = request_file(tmp_path, {"num_images": 2}, {"name": "wide", "width": 72}, {"boxes": None, "steps": 2})
    assert draw("--request", path, "--out", "pictures") == 0
    captured = capsys.readouterr()
    names = [tmp_path / "pictures" / f"{name}.png" for name in ("0000_0", "0000_1", "wide", "0002")]
    assert captured.out.split() == [str(name) for name in names]
    assert "4/4" in captured.err, "one bar over all pictures"
    assert "<" in captured.err, "with an estimate of what is left"
    assert Image.open(names[2]).size == (72, 64)
    before = [name.read_bytes() for name in names]
    names[1].unlink()
    assert draw("--request", path, "--quiet", "--out", "pictures") == 0
    captured = capsys.readouterr()
    assert (captured.out.split(), captured.err) == ([str(names[1])], ""), "quiet"
    assert [name.read_bytes() for name in names] == before


def test_nothing_is_loaded_when_nothing_is_missing(draw, two, tmp_path, capsys, monkeypatch):
    path = request_file(tmp_path, {})
    assert draw("--request", path, "--out", "pictures") == 0
    monkeypatch.setattr(
        msdiffusion.generation.generate.MSDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    assert draw("--request", path, "--out", "pictures") == 0
    assert "1 of 1 pictures are there already" in capsys.readouterr().err
    request_file(tmp_path, {"prompt": "the dog"})
    assert draw("--request", path, "--out", "pictures") == 2
    assert "0000.png (another request); --overwrite replaces them" in capsys.readouterr().err
    monkeypatch.undo()
    assert draw("--request", path, "--overwrite", "--out", "pictures") == 0
    assert read_record(tmp_path / "pictures" / "0000.png")["request"]["prompt"] == "the dog"


def test_bad_files_load_no_torch(two, tmp_path):
    path = request_file(tmp_path, {}, {"boxes": [[0, 0, 2, 2]]}, {"name": "x", "steps": 0})
    code = (
        "import sys; from msdiffusion.cli import main; status = main(sys.argv[1:]);"
        "print(status, sorted({'torch', 'diffusers', 'spacy'} & sys.modules.keys()))"
    )
    call = [sys.executable, "-c", code, "generate", "--request", str(path), "--out", str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
    assert "2 of 3 entries are wrong:\n  pictures[1]: boxes[0]" in done.stderr
    assert "pictures[2] (x): steps must be" in done.stderr
    assert not (tmp_path / "out").exists()


def test_out_of_a_file_is_a_folder(draw, two, tmp_path, capsys):
    assert draw("--request", request_file(tmp_path, {}), "--out", "dog.png") == 2
    assert "--out must be a folder, but" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ from a PNG


@pytest.mark.exact
@pytest.mark.parametrize("count", [1, 3])
def test_a_png_draws_itself_again(draw, two, tmp_path, count):
    more = ["--subject-scales", "1,.5", "--height", "48", "--auto-layout", "--auto-layout-start", "1"]
    assert draw(*two, *more, "--num-images", count, "--out", "first.png") == 0
    first = tmp_path / ("first.png" if count == 1 else "first_2.png")
    assert draw("--from-png", first, "--quiet", "--out", "elsewhere/second.png") == 0
    second = tmp_path / "elsewhere" / "second.png"
    assert np.array_equal(pixels(first), pixels(second))
    assert read_record(second)["request"]["images"][0][0]["path"] == "../dog.png"
    assert draw("--from-png", second, "--quiet", "--out", "third.png") == 0
    assert np.array_equal(pixels(first), pixels(tmp_path / "third.png"))
    assert read_record(tmp_path / "third.png")["request"] == read_record(first)["request"]


def mixed(tmp_path):
    """Requests of which generate_batch draws each second one apart from its neighbours."""
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    two = {"images": ["dog.png", "teapot.png"], "prompt": PROMPT, "phrases": ["dog", "teapot"]}
    return {
        "negative prompt": [{}, {"negative_prompt": "a hat"}, {"seed": 2}],
        "masks": [
            {**two, "boxes": [[0, 0, 0.5, 1], None], "masks": [None, "mask.png"]},
            {**two, "boxes": [None, None], "masks": [None, "mask.png"]},
            {**two, "boxes": [[0, 0, 0.5, 1], None], "masks": [None, "mask.png"], "seed": 2},
        ],
    }


@pytest.mark.parametrize("kind", ["negative prompt", "masks"])
def test_a_record_tells_the_batch_that_was_drawn(draw, two, tmp_path, monkeypatch, kind):
    from msdiffusion.generation.drawing import BatchDrawing

    sizes = []
    draw_batch = BatchDrawing._draw_batch

    def counted(self, batch, *arguments):
        sizes.append(len(batch))
        return draw_batch(self, batch, *arguments)

    monkeypatch.setattr(BatchDrawing, "_draw_batch", counted)
    path = request_file(tmp_path, *mixed(tmp_path)[kind], steps=4, auto_layout_start=1)
    assert draw("--request", path, "--quiet", "--out", "pictures") == 0
    assert sorted(sizes) == [1, 2]
    for file in (tmp_path / "pictures").glob("*.png"):
        assert draw("--from-png", file, "--quiet", "--out", "again.png") == 0
        assert np.array_equal(pixels(file), pixels(tmp_path / "again.png"))


def test_a_reference_is_not_written_over(draw, two, tmp_path, capsys):
    before = (tmp_path / "dog.png").read_bytes()
    assert draw(*two, "--out", "dog.png") == 2
    assert "dog.png is what is drawn from, and would be written over: give another --out" in capsys.readouterr().err
    assert (tmp_path / "dog.png").read_bytes() == before


def test_a_reference_of_another_picture_is_not_written_over_either(draw, two, tmp_path, capsys):
    Image.open(tmp_path / "dog.png").save(tmp_path / "b.png")
    before = (tmp_path / "b.png").read_bytes()
    path = request_file(tmp_path, {"name": "a", "images": ["b.png"]}, {"name": "b"})
    assert draw("--request", path, "--overwrite", "--out", ".") == 2
    assert "b.png is what is drawn from, and would be written over" in capsys.readouterr().err
    assert (tmp_path / "b.png").read_bytes() == before


def test_a_picture_that_breaks_off_is_told(draw, two, tmp_path):
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with pytest.raises(RequestError, match="half.png is not a PNG that can be read"):
        read_record(tmp_path / "half.png")
    with Image.open(tmp_path / "half.png") as picture, pytest.raises(RequestError, match="is not a PNG that can be"):
        read_record(picture)


def test_metadata_behind_the_pixels_is_found(draw, two, tmp_path):
    """Where ImageMagick puts it."""
    assert draw(*two, "--steps", "1", "--quiet", "--out", "first.png") == 0
    content = (tmp_path / "first.png").read_bytes()
    chunks, place = [], 8
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        chunks.append(content[place : place + 12 + length])
        place += 12 + length
    late = [chunk for chunk in chunks if chunk[4:8] == b"tEXt"]
    assert late
    order = [*(chunk for chunk in chunks[:-1] if chunk not in late), *late, chunks[-1]]
    (tmp_path / "moved.png").write_bytes(content[:8] + b"".join(order))
    assert read_record(tmp_path / "moved.png") == read_record(tmp_path / "first.png")
    with Image.open(tmp_path / "moved.png") as picture:
        assert read_record(picture) == read_record(tmp_path / "first.png")


def test_a_default_that_came_later_does_not_slip_in(draw, two, tmp_path, tiny_model_dir, capsys):
    """The record's null means the pipeline's own negative prompt."""
    assert draw(*two, "--steps", "1", "--quiet", "--out", "first.png") == 0
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["defaults"]["negative_prompt"] = "a red clock"
    (model / "config.json").write_text(json.dumps(config))
    assert draw("--from-png", tmp_path / "first.png", "--model", model, "--quiet", "--out", "x.png") == 2
    assert "drawn without a negative prompt, but the adapter's config has 'a red clock'" in capsys.readouterr().err


def test_a_picture_of_a_batch_draws_itself_again(draw, two, tmp_path):
    path = request_file(tmp_path, {"name": "a"}, {"images": ["teapot.png"], "seed": 4}, {"seed": 7}, steps=3)
    assert draw("--request", path, "--quiet", "--out", "pictures") == 0
    for name in ("a", "0001", "0002"):
        first = tmp_path / "pictures" / f"{name}.png"
        assert draw("--from-png", first, "--quiet", "--out", "again.png") == 0
        assert np.array_equal(pixels(first), pixels(tmp_path / "again.png"))
        assert draw("--from-png", first, "--quiet", "--batch-size", 1, "--out", "alone.png") == 0
        assert abs(pixels(first).astype(int) - pixels(tmp_path / "alone.png")).max() <= 1


def test_a_png_with_its_references_can_be_drawn_anywhere(draw, two, tmp_path, capsys):
    assert draw(*two, "--steps", "1", "--embed-references", "--out", "with.png") == 0
    assert draw(*two, "--steps", "1", "--out", "lone.png") == 0
    Image.new("RGB", (9, 9)).save(tmp_path / "dog.png")
    capsys.readouterr()
    assert draw("--from-png", tmp_path / "lone.png", "--out", "again.png") == 2
    assert "dog.png has other content than when the picture was drawn (its sha256 differs)" in capsys.readouterr().err
    (tmp_path / "dog.png").unlink()
    assert draw("--from-png", tmp_path / "lone.png", "--out", "again.png") == 2
    assert "the reference 'dog.png' is missing" in capsys.readouterr().err
    assert draw("--from-png", tmp_path / "with.png", "--quiet", "--out", "again.png") == 0
    assert np.array_equal(pixels(tmp_path / "with.png"), pixels(tmp_path / "again.png"))


def edited(path, change):
    """The PNG with another record."""
    from msdiffusion.request.provenance import save_png

    record = read_record(path)
    change(record)
    other = path.with_name("edited.png")
    save_png(Image.open(path), other, record)
    return other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["model"].update(adapter_sha256="0"), "drawn with adapter_sha256 '0', not '"),
        (lambda r: r["model"].update(adapter_sha256="0", adapter="x"), "(its adapter was called 'x'): --model sets it"),
        (lambda r: r["model"].update(adapter_config="0"), "drawn with adapter_config '0', not '"),
        (lambda r: r["model"].update(base_config="a/b"), "drawn with base_config 'a/b', not None: --base-config sets"),
        (lambda r: r["model"].update(base_model="a/b"), "drawn with base_model 'a/b', not 'base#"),
        (lambda r: r["model"].update(image_encoder="a/b"), "--image-encoder sets it"),
        (lambda r: r["hooks"].update(safety_checker="a/b"), "drawn with --safety-checker 'a/b', not None"),
        (lambda r: r["request"].update(boxes=[[0, 0, 9, 9]] * 2), "edited.png: boxes[0] is (0.0, 0.0, 9.0, 9.0)"),
        (lambda r: r.update(batch=3), "its metadata is broken: batch must have the keys"),
    ],
)  # fmt: skip
def test_pngs_that_cannot_be_drawn_again(draw, two, tmp_path, change, message, capsys, monkeypatch):
    assert draw(*two, "--steps", "1", "--out", "first.png") == 0
    monkeypatch.setattr(
        msdiffusion.generation.generate.MSDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    assert draw("--from-png", edited(tmp_path / "first.png", change), "--out", "x.png") == 2
    assert message in capsys.readouterr().err


def test_other_means_than_the_png_was_drawn_with(draw, two, tmp_path, capsys):
    assert draw(*two, "--steps", "1", "--height", "192", "--width", "192", "--out", "first.png") == 0
    assert draw("--from-png", tmp_path / "first.png", "--dtype", "bfloat16", "--out", "x.png") == 2
    assert "drawn with dtype 'float32', not 'bfloat16': --dtype sets it" in capsys.readouterr().err
    assert draw("--from-png", tmp_path / "first.png", "--watermark", "mine", "--out", "x.png") == 2
    assert "drawn with --watermark None, not 'mine'" in capsys.readouterr().err
    other = edited(tmp_path / "first.png", lambda record: record["made_with"].update(torch="1.0"))
    assert draw("--from-png", other, "--quiet", "--out", "x.png") == 0
    assert "drawn with torch '1.0' (here '" in capsys.readouterr().err


def without_processor(record):
    del record["made_with"]["processor"], record["made_with"]["arithmetic"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record["made_with"].update(processor="A 386"), "drawn with processor 'A 386' (here '"),
        (lambda record: record["made_with"].update(arithmetic="x" * 900), "drawn with arithmetic 'xxx"),
        (without_processor, "drawn with processor unknown (here '"),
    ],
    ids=["another processor", "other instructions", "a file of an earlier version"],
)
def test_where_another_processor_drew_a_picture_it_is_said(draw, two, tmp_path, capsys, change, said):
    assert draw(*two, "--steps", "1", "--quiet", "--out", "first.png") == 0
    assert draw("--from-png", tmp_path / "first.png", "--quiet", "--out", "x.png") == 0
    assert "drawn with" not in capsys.readouterr().err
    assert draw("--from-png", edited(tmp_path / "first.png", change), "--quiet", "--out", "x.png") == 0
    told = capsys.readouterr().err
    assert said in told
    assert told.strip().endswith("pixels may differ" if "unknown" in said else "pixels may differ by one step of 255")
    assert len(told) < 600


def test_a_png_of_another_dtype_is_drawn_with_it(draw, two, tmp_path):
    assert draw(*two, "--steps", "1", "--dtype", "bfloat16", "--out", "first.png") == 0
    assert draw("--from-png", tmp_path / "first.png", "--quiet", "--out", "x.png") == 0
    assert np.array_equal(pixels(tmp_path / "first.png"), pixels(tmp_path / "x.png"))


# ----------------------------------------------------------------------------------------------------------- hooks


def test_a_watermark(draw, two, tmp_path, capsys):
    assert draw(*two, "--steps", "1", "--watermark", "ours", "--height", "192", "--width", "192", "--out", "x.png") == 0
    assert read_watermark(tmp_path / "x.png") == "ours"
    assert draw("--from-png", tmp_path / "x.png", "--quiet", "--out", "y.png") == 0
    assert np.array_equal(pixels(tmp_path / "x.png"), pixels(tmp_path / "y.png"))


@pytest.mark.parametrize("more", [[], ["--height", "192"], ["--width", "64", "--height", "64"]])
def test_a_watermark_on_too_small_a_picture_is_refused_before_loading(
    draw, two, single_file, monkeypatch, capsys, more
):
    """The base's own size is known from its configs, also of a base in one file."""
    monkeypatch.setattr(
        msdiffusion.generation.generate.MSDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    for base in ([], ["--base-model", single_file]):
        assert draw(*two, *more, *base, "--watermark", "ours", "--out", "z.png") == 2
        error = capsys.readouterr().err
        assert f"z.png: a picture of 64 x {192 if '192' in more else 64} pixels is too small for a watermark" in error


def test_an_out_that_cannot_be_written_is_refused_before_loading(draw, two, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        msdiffusion.generation.generate.MSDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    for out in ("dog.png/x.png", f"{'x' * 250}.png"):
        assert draw(*two, "--out", out) == 2
        told = capsys.readouterr().err
        assert "--out must lie in a folder, but" in told or "cannot be written: File name too long" in told
    assert draw(*two, "--out", "x" * 5000 + ".png") == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err
    assert draw("--request", request_file(tmp_path, {}), "--out", "dog.png/pictures") == 2
    assert "--out must be a folder, but" in capsys.readouterr().err
    monkeypatch.undo()
    assert draw(*two, "--steps", "1", "--out", "new/x.png") == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"], "nothing of the probe is left"


def test_a_subject_that_would_never_find_its_place_is_refused_before_loading(draw, two, monkeypatch, capsys):
    monkeypatch.setattr(
        msdiffusion.generation.generate.MSDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    assert draw(*without(two, "--box"), "--auto-layout-start", "4", "--out", "x.png") == 2
    assert "which starts at step 4, but there are 3 steps" in capsys.readouterr().err


class Suspicious:
    """Stands for a safety checker that flags everything; the real one has its own tests."""

    @classmethod
    def from_pretrained(cls, place, device):
        assert (place, device) == ("checker", "cpu")
        return cls()

    def __call__(self, pictures):
        from msdiffusion.generation.safety import _black

        return [_black(picture) for picture in pictures]


def test_a_safety_checker(draw, two, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("msdiffusion.generation.safety.SafetyChecker", Suspicious)
    flags = ["--safety-checker", "checker", "--watermark", "ours", "--height", "192", "--width", "192"]
    assert draw(*two, "--steps", "1", *flags, "--out", "x.png") == 0
    record = read_record(tmp_path / "x.png")
    assert (record["flagged"], record["hooks"]["safety_checker"]) == (True, "checker")
    assert f"flagged by the safety checker, so black: {tmp_path / 'x.png'}\n" in capsys.readouterr().err
    assert pixels(tmp_path / "x.png").max() < 12
    assert read_watermark(tmp_path / "x.png") == "ours", "the mark is written last"
    assert draw("--from-png", tmp_path / "x.png", "--safety-checker", "checker", "--quiet", "--out", "y.png") == 0


def test_a_local_safety_checker_is_told_by_its_content(draw, two, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Suspicious, "from_pretrained", classmethod(lambda cls, place, device: cls()))
    monkeypatch.setattr("msdiffusion.generation.safety.SafetyChecker", Suspicious)
    (tmp_path / "checker").mkdir()
    (tmp_path / "checker" / "model.safetensors").write_bytes(b"one")
    flags = ["--safety-checker", tmp_path / "checker"]
    assert draw(*two, "--steps", "1", *flags, "--out", "x.png") == 0
    assert read_record(tmp_path / "x.png")["hooks"]["safety_checker"].startswith("checker#")
    (tmp_path / "checker" / "model.safetensors").write_bytes(b"two")
    assert draw("--from-png", tmp_path / "x.png", *flags, "--out", "y.png") == 2
    assert "the PNG was drawn with --safety-checker 'checker#" in capsys.readouterr().err


def test_a_safety_checker_that_is_not_there(draw, two, capsys, monkeypatch):
    monkeypatch.setattr(
        msdiffusion.generation.generate.MSDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    assert draw(*two, "--safety-checker", "nowhere/at/all", "--out", "x.png") == 2
    assert "no such file or folder: 'nowhere/at/all' (--safety-checker)" in capsys.readouterr().err
