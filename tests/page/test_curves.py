"""Panels of curves, against the rows that they are drawn from."""

import math

import pytest

from betaclip.page.curves import HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, WIDTH, Axis, panels

ROWS = [
    {"step": 10 * i, "loss": 8.0 / i, "beta_cal_loss": 4.0 / i, "logit_scale": 14.0, "norm_pool": 10.0 ** -i,
     "lr_pool": 0.0, "images_per_s": 7.0, "leak": 0.01 * i}
    for i in (1, 2, 4)
]  # fmt: skip


def test_each_kind_of_metric_has_a_panel():
    titles = [panel.title for panel in panels({"a": ROWS})]
    assert titles == ["losses", "leak", "scales", "gradient norms", "learning rates", "images per second"]
    assert panels({"a": []}) == [] and panels({}) == []


def test_lines():
    """A colour means a metric, a style a run; what is not finite or was not logged is left out."""
    other = [{"step": 10, "loss": 5.0}, {"step": 20, "loss": math.nan}, {"step": 30, "loss": math.inf}]
    losses = panels({"a": ROWS, "b": other})[0]
    looks = {line.label: (line.colour, line.style, line.points) for line in losses.lines}
    assert looks == {
        "loss, a": (0, 0, [(10, 8), (20, 4), (40, 2)]),
        "loss, b": (0, 1, [(10, 5)]),
        "beta_cal_loss, a": (1, 0, [(10, 4), (20, 2), (40, 1)]),
    }
    assert [line.label for line in panels({"a": ROWS})[0].lines] == ["loss", "beta_cal_loss"]


def test_points_are_where_the_axes_say():
    losses, leak = panels({"a": ROWS})[:2]
    top, bottom = TOP, losses.y(1)
    assert losses.polyline(losses.lines[0]).split()[0] == f"{float(LEFT)},{float(top)}"
    x, y = map(float, losses.polyline(losses.lines[0]).split()[1].split(","))
    assert x == pytest.approx(LEFT + (WIDTH - LEFT - RIGHT) / 3, abs=0.1)
    assert y == pytest.approx(bottom + (top - bottom) * 3 / 7, abs=0.1) and bottom < HEIGHT
    assert leak.lines[0].points == [(10, 1), (20, 2), (40, 4)]  # in percent
    assert losses.data == {"first": 10, "last": 40, "lines": [[[10, 8], [20, 4], [40, 2]], [[10, 4], [20, 2], [40, 1]]]}
    assert losses.description == "losses by step: loss from 8 to 2, beta_cal_loss from 4 to 1"


def test_evaluations_during_the_run():
    """The shares of right answers, in percent, beside the metrics of the steps."""
    name = "scenes/retrieval/"
    values = {f"{name}images": 40.0, f"{name}texts": 40.0, f"{name}t2i_r1": 0.25, f"{name}i2t_r1": 0.5}
    row = {"step": 20, **values, "scenes/pointing/mass_in_box": 0.2, "scenes/pointing/box_share": 0.1}
    (panel,) = (panel for panel in panels({"a": [*ROWS, row]}) if panel.title == "evaluations")
    assert {line.label: line.points for line in panel.lines} == {
        f"{name}t2i_r1": [(20, 25)],
        f"{name}i2t_r1": [(20, 50)],
    }


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [-2.0, -2.0, -2.0], [1e-9, 1e9]])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_axes_hold_all_values(values, logarithmic):
    axis = Axis.around(values, 100, 0, logarithmic=logarithmic)
    assert all(0 <= axis(value) <= 100 for value in values)
    ticks = axis.ticks(5)
    assert 1 <= len(ticks) <= 7 and all(0 <= tick.place <= 100 for tick in ticks)


def test_ticks():
    assert [tick.label for tick in Axis.around([0, 10], 0, 100).ticks(5)] == ["0", "2", "4", "6", "8", "10"]
    powers = Axis.around([1e-5, 1e-2], 0, 90, logarithmic=True)
    assert [tuple(tick) for tick in powers.ticks(5)] == [(0, "1e-05"), (30, "0.0001"), (60, "0.001"), (90, "0.01")]
    assert powers(0) == 0  # a rate of 0 lies at the lower end
    assert [tick.label for tick in Axis.around([1, 3], 0, 90).ticks(5, integer=True)] == ["1", "2", "3"]


def test_long_runs_keep_their_spikes():
    rows = [{"step": i, "loss": 1.0} for i in range(5000)]
    rows[1234]["loss"], rows[4321]["loss"] = 99.0, -99.0
    points = panels({"a": rows})[0].lines[0].points
    assert len(points) <= MAX_POINTS and points == sorted(points)
    assert (1234, 99) in points and (4321, -99) in points
    assert points[0] == (0, 1) and points[-1] == (4999, 1)
