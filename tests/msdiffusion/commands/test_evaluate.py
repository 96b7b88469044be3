"""`msdiffusion evaluate` on the miniature stack: batches equal single calls, all is written, bad input is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from msdiffusion.cli import main
from msdiffusion.evaluation.world import draw_cases


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    from msdiffusion.generation.generate import MSDiffusion

    return MSDiffusion.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def judge_dir(tmp_path_factory):
    """An untrained judge for the world's vocabulary."""
    import torch

    from msdiffusion.evaluation.instruments.judge import Judge
    from msdiffusion.evaluation.judge_training import world_params

    directory = tmp_path_factory.mktemp("judge")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Judge(world_params(widths=(4, 8))).save_pretrained(directory)
    return directory


def pixels(picture):
    return np.asarray(picture, dtype=np.int16)


@pytest.mark.parametrize("scale", [0.0, 0.8])
def test_batches_draw_what_single_calls_draw(model, scale):
    from msdiffusion.evaluation.drawing import picture_maker

    cases = draw_cases(5, seed=3, shares=(0.5, 0.5))
    assert len({len(case.subjects) for case in cases}) == 2
    make = picture_maker(model, scale=scale, steps=2, guidance_scale=3.0, batch_size=2, label="test")
    batched = make(cases)
    assert len(batched) == len(cases)
    for case, picture in zip(cases, batched, strict=True):
        (alone,) = model.generate(
            case.references,
            case.boxes,
            case.prompt,
            case.phrases,
            seed=case.seed,
            scale=scale,
            steps=2,
            guidance_scale=3.0,
            progress=False,
        )
        assert np.abs(pixels(picture) - pixels(alone)).max() <= 1


def test_switching_the_adapter_off_changes_pictures_not_noise(model):
    from msdiffusion.evaluation.drawing import picture_maker

    cases = draw_cases(1, seed=3, shares=(1.0,))
    settings = {"steps": 2, "guidance_scale": 1.0, "batch_size": 1, "label": "test"}
    on, again, off = (picture_maker(model, scale=scale, **settings)(cases)[0] for scale in (1.0, 1.0, 0.0))
    np.testing.assert_array_equal(pixels(on), pixels(again))
    assert (pixels(on) != pixels(off)).any()


def test_bfloat16_draws_nearly_the_same(model):
    from msdiffusion.evaluation.drawing import picture_maker

    cases = draw_cases(2, seed=3, shares=(0.0, 1.0))
    settings = {"scale": 1.0, "steps": 2, "guidance_scale": 3.0, "batch_size": 2, "label": "test"}
    (exact,) = picture_maker(model, **settings)(cases)
    (fast,) = picture_maker(model, precision="bfloat16", **settings)(cases)
    assert 0 < np.abs(pixels(fast) - pixels(exact)).mean() < 3


def test_command_leaves_scores_grid_page_and_pictures(tiny_model_dir, judge_dir, tmp_path, capsys):
    out = tmp_path / "evaluation"
    arguments = ["--model", str(tiny_model_dir), "--judge", str(judge_dir), "--out", str(out)]
    assert main(["evaluate", *arguments, "--subjects", "4", "--steps", "1"]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores["schema"] == "msdiffusion.scores/1"
    assert scores["subjects"] >= 4
    assert scores["settings"]["steps"] == 1
    assert len(scores["model"]["sha256"]) == len(scores["judge"]["sha256"]) == 64
    conditions = {"adapter_on", "adapter_off", "true_renders"}
    for question in ("category", "color", "body_color", "pattern", "background"):
        figures = scores["questions"][question]
        assert set(figures["conditions"]) == conditions
        assert 0 < figures["chance"] < 0.5
        (test,) = figures["tests"]
        assert 0 <= test["p_value"] <= 1
    for condition in conditions:
        assert len(list((out / "pictures" / condition).glob("*.png"))) == scores["pictures"]
    assert Image.open(out / "grid.png").width > 400
    assert "adapter off" in (out / "index.html").read_text(encoding="utf-8")
    assert "main colour" in capsys.readouterr().out


@pytest.mark.slow
def test_the_shipped_adapter_brings_the_colours_of_its_references():
    """A small version of the figure in the README: few subjects, few steps, fixed noise."""
    from msdiffusion.evaluation.drawing import picture_maker
    from msdiffusion.evaluation.instruments.judge import Judge
    from msdiffusion.evaluation.world import mark_readings, read_pictures
    from msdiffusion.generation.generate import MSDiffusion
    from msdiffusion.places import DEFAULT_MODEL

    shipped, judge = MSDiffusion.from_pretrained(DEFAULT_MODEL), Judge.from_pretrained(DEFAULT_MODEL / "judge")
    cases = draw_cases(16, seed=11, shares=(1.0,))
    # 13 right with the adapter and none without; eight steps take twice as long, for 15 and 2
    settings = {"steps": 4, "guidance_scale": 3.0, "batch_size": 16, "label": "test"}
    right = {}
    for scale in (1.0, 0.0):
        pictures = picture_maker(shipped, scale=scale, **settings)(cases)
        right[scale] = int(mark_readings(cases, read_pictures(judge, cases, pictures))["body_color"].sum())
    assert right[1.0] >= right[0.0] + 4, right


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--judge", "nowhere"], "no judge at nowhere"),
        (["--device", "tpu"], "device 'tpu' cannot be used here ("),
        (["--device", "hpu"], "device 'hpu' cannot be used here ("),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path, capsys):
    assert main(["evaluate", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_grids_show_every_size_of_set():
    from msdiffusion.evaluation.drawing import varied

    cases = draw_cases(40, seed=5, size=16)
    chosen = varied(cases, 6)
    assert [len(cases[index].subjects) for index in chosen] == [1, 1, 2, 2, 3, 3]
    assert len(set(varied(cases, 1000))) == len(cases)


@pytest.mark.parametrize("regions", ["boxes", "masks", "auto_layout"])
def test_every_kind_of_region_draws_the_same_in_a_batch(model, regions):
    from msdiffusion.evaluation.drawing import picture_maker

    cases = draw_cases(pictures=40, seed=3, shares=(0.0, 1.0))
    short = [case for case in cases if len(case.prompt) < 34][:2]  # the miniature's tokenizer spells words out
    settings = {"scale": 1.0, "steps": 6, "guidance_scale": 3.0, "label": "test", "regions": regions}
    together = picture_maker(model, batch_size=2, **settings)(short)
    for case, picture in zip(short, together, strict=True):
        (alone,) = picture_maker(model, batch_size=1, **settings)([case])
        assert np.abs(pixels(picture) - pixels(alone)).max() <= 1


def test_regions_change_the_picture_where_they_should(model):
    """Auto layout follows the boxes for four steps, so it differs after the fifth one only; masks differ at once."""
    from msdiffusion.evaluation.drawing import picture_maker

    case = next(c for c in draw_cases(pictures=40, seed=3, shares=(1.0,)) if len(c.prompt) < 30)
    settings = {"scale": 1.0, "guidance_scale": 3.0, "label": "test", "batch_size": 1}

    def drawn(regions, steps):
        return pixels(picture_maker(model, steps=steps, regions=regions, **settings)([case])[0])

    with pytest.warns(UserWarning, match="starts at step 5, but there are 4"):
        np.testing.assert_array_equal(drawn("auto_layout", 4), drawn("boxes", 4))
    assert (drawn("auto_layout", 6) != drawn("boxes", 6)).any()
    assert (drawn("masks", 4) != drawn("boxes", 4)).any()


def test_unknown_regions_are_refused(model):
    from msdiffusion.errors import RequestError
    from msdiffusion.evaluation.drawing import picture_maker

    with pytest.raises(RequestError, match="regions must be"):
        picture_maker(model, scale=1, steps=1, guidance_scale=1, batch_size=1, label="", regions="circles")
