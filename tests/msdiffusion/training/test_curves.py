import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from msdiffusion.errors import DataError
from msdiffusion.training.curves import _panels, draw_curves, keep_until, main, read_curves, smoothed


def write(path, *lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["step,name,value", *lines]) + end)
    return path


LINES = ("10,training/loss,0.5", "20,training/loss,0.25", "20,validation/loss,1e-3", "30,training/loss,0.125")


def test_numbers_are_read_by_name_in_the_order_of_steps(tmp_path):
    path = write(tmp_path / "metrics.csv", *reversed(LINES))
    assert read_curves(path) == {
        "training/loss": [(10, 0.5), (20, 0.25), (30, 0.125)],
        "validation/loss": [(20, 0.001)],
    }


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = write(tmp_path / "metrics.csv", *LINES, "40,training/loss,0.0", end="")
    assert read_curves(path)["training/loss"][-1] == (30, 0.125)


def test_a_resumed_run_goes_on_from_its_step(tmp_path):
    path = write(tmp_path / "metrics.csv", *LINES, "40,training/lo", end="")
    keep_until(path, 20)
    assert path.read_text().splitlines() == ["step,name,value", *LINES[:2], "20,validation/loss,0.001"]
    assert keep_until(path, 10, lines=2) == 2
    assert path.read_text().splitlines() == ["step,name,value", *LINES[:2]]
    assert keep_until(path, 10, lines=3) == 1  # of another table
    assert path.read_text().splitlines() == ["step,name,value", LINES[0]]
    assert keep_until(tmp_path / "none.csv", 3) == 0
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,b\n1,2\n", "no table of a run"), ("", "no table of a run"), ("step,name,value\nx,y,z\n", "line 2"),
     ("step,name,value\n1,loss,0.5\n1,2\n", "line 3")],
)  # fmt: skip
def test_another_table_is_refused(tmp_path, content, message):
    (tmp_path / "metrics.csv").write_text(content)
    for act in (read_curves, lambda path: keep_until(path, 1)):
        with pytest.raises(DataError, match=message):
            act(tmp_path / "metrics.csv")


def test_every_name_is_in_one_picture():
    names = ["training/loss", "validation/loss", "validation/loss_t100", "validation/loss_t900", "validation/score_c",
             "training/learning_rate", "training/waiting_share", "training/samples_per_second", "training/odd",
             "validation/loss_in_boxes"]  # fmt: skip
    panels = _panels(sorted(names))
    assert sorted(name for _, chosen in panels for name in chosen) == sorted(names)
    by_title = dict(panels)
    assert by_title["loss"] == ["training/loss", "validation/loss", "validation/loss_in_boxes"]
    assert by_title["validation error by timestep"] == ["validation/loss_t100", "validation/loss_t900"]


def test_curves_are_drawn(tmp_path):
    points = [(step, 1 / step) for step in range(1, 60)]
    draw_curves({"": {"training/loss": points}}, tmp_path / "one.png")
    draw_curves(
        {"a": {"training/loss": points, "validation/loss": points[::10]}, "b": {"validation/score_color": [(5, 0.5)]}},
        tmp_path / "two.png",
    )
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("one", "two"))
    assert (one < 200).any()
    assert two.shape[1] > one.shape[1]  # another panel for the scores
    assert sorted(item.name for item in tmp_path.iterdir()) == ["one.png", "two.png"]


def test_nothing_can_not_be_drawn(tmp_path):
    with pytest.raises(DataError, match="nothing to draw"):
        draw_curves({"a": {}}, tmp_path / "none.png")


@given(st.lists(st.floats(-1e6, 1e6), max_size=30), st.integers(1, 10))
def test_smoothing_is_the_mean_of_the_last_ones(values, window):
    found = smoothed(values, window)
    assert found == pytest.approx(
        [np.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))], abs=1e-6
    )


def test_the_command_draws_runs(tmp_path, capsys):
    for name in ("first", "second"):
        write(tmp_path / name / "metrics.csv", *LINES)
    assert main([str(tmp_path / "first")]) == 0
    assert (tmp_path / "first" / "curves.png").is_file()
    assert main([str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(tmp_path / "both.png")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "first" / "curves.png"), str(tmp_path / "both.png")]
    assert main([str(tmp_path)]) == 2
    assert "RunCurves" in capsys.readouterr().err
