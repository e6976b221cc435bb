"""The curves of finished runs."""

import json

from matplotlib.axes import Axes
from PIL import Image

from betaclip.training.artifacts import curves_figure, write_curves

ROWS = [{"step": s, "loss": 9 / s, "beta_cal_loss": 4 / s, "norm_pool": 0.1, "lr_pool": 1e-3} for s in (1, 2, 3)]


def curves(axis: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


def test_curves_of_several_runs():
    """With other columns, evaluations between the steps, and a run that has logged nothing."""
    other = [{"step": 1, "loss": 3.0}, {"step": 1, "scenes/choices/hard": 0.5}, {"step": 4, "loss": 2.0}]
    losses, scales, norms, rates = curves_figure({"a": ROWS, "b": other, "c": []}).axes
    titles = [axis.get_title() for axis in (losses, scales, norms, rates)]
    assert titles == ["losses", "scales", "gradient norms", "learning rates"]
    assert {axis.get_xlabel() for axis in (losses, scales, norms, rates)} == {"step"}
    assert curves(losses) == {
        "loss, a": ([1, 2, 3], [9, 4.5, 3]),
        "loss, b": ([1, 4], [3, 2]),
        "beta_cal_loss, a": ([1, 2, 3], [4, 2, 4 / 3]),
    }
    assert curves(norms) == {"norm_pool, a": ([1, 2, 3], [0.1] * 3)}
    assert curves(rates) == {"lr_pool, a": ([1, 2, 3], [1e-3] * 3)}
    assert curves(scales) == {} and scales.get_legend() is None
    legend = losses.get_legend()
    assert legend is not None and {text.get_text() for text in legend.get_texts()} == curves(losses).keys()
    assert [axis.get_yscale() for axis in (losses, scales, norms, rates)] == ["linear", "linear", "log", "log"]
    # A colour means a metric, a style means a run.
    looks = {str(line.get_label()): (line.get_color(), line.get_linestyle()) for line in losses.lines}
    assert looks["loss, a"][0] == looks["loss, b"][0] != looks["beta_cal_loss, a"][0]
    assert looks["loss, a"][1] == looks["beta_cal_loss, a"][1] != looks["loss, b"][1]


def test_one_run_needs_no_name():
    losses = curves_figure({"a": ROWS}).axes[0]
    assert curves(losses).keys() == {"loss", "beta_cal_loss"}


def test_nothing_overlaps():
    figure = curves_figure({"a": ROWS})
    figure.draw_without_rendering()
    boxes = [box for axis in figure.axes if (box := axis.get_tightbbox()) is not None]
    assert len(boxes) == 4
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_written_from_the_log(tmp_path):
    """A line of a loss is where the figure has it: as many pixels of its colour as a line needs."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write_curves({"a": tmp_path}, tmp_path / "curves.png")
    (tmp_path / "metrics.jsonl").write_text("")
    write_curves({"a": tmp_path}, tmp_path / "empty.png")
    first_colour = (31, 119, 180)  # Matplotlib's C0

    def pixels(name: str) -> int:
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            return sum(count for count, colour in image.convert("RGB").getcolors(2**24) or () if colour == first_colour)

    assert pixels("curves.png") > 500 and pixels("empty.png") == 0
