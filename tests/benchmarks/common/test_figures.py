"""Figures show what the rows say, and name whom they show."""

import csv

import pytest
from common import figures

pyplot = pytest.importorskip("matplotlib.pyplot")
FIGURE = figures.Figure(
    panel=lambda row: f"K = {row['k']}",
    x="n",
    x_label="N",
    quantities=(("time_ms_p50", "ms", 1.0), ("peak_bytes", "MiB", 2.0**20)),
    same=("dim",),
    bound=lambda row: float(row["n"]) * 2**20,
)


def row(name, n, status="ok", k=36, time="2.5", peak="5000", dim=64):
    return {
        "benchmark": "b",
        "device": "cpu",
        "implementation": name,
        "phase": "forward+backward",
        "status": status,
        "n": str(n),
        "k": str(k),
        "dim": str(dim),
        "dtype": "float32",
        "time_ms_p50": time,
        "peak_bytes": peak,
    }


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function from rows to the figure that is drawn of them."""
    kept = []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", kept.append)

    def draw(rows):
        path = tmp_path / "x.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        assert figures.draw(path, "b", FIGURE) == f"figure: {tmp_path / 'x.png'}"
        assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
        return kept[-1]

    yield draw
    for figure in kept:
        close(figure)


def points(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line.get_xydata().tolist()


def test_points_bounds_and_what_ran_out_of_memory(drawn):
    rows = [row("dense", 72), row("dense", 144, "out of memory", time="", peak="")]
    time_axes, memory_axes = drawn(rows).axes
    assert points(time_axes, "dense") == [[72, 2.5]]
    assert points(memory_axes, "dense") == [[72, 5000 / 2**20]]
    assert points(memory_axes, "bound of betaclip") == [[72, 72], [144, 144]]
    (cross,) = [line for line in time_axes.lines if line.get_marker() == "x"]
    assert cross.get_xdata().tolist() == [144]


def test_the_last_row_of_a_case_counts_and_other_configurations_are_left_out(drawn):
    rows = [row("dense", 72, dim=32, time="9"), row("dense", 72, time="8"), row("dense", 72, time="7")]
    assert points(drawn(rows).axes[0], "dense") == [[72, 7]]


def test_one_legend_names_everyone_and_ours_is_always_blue(drawn):
    everywhere = [row(name, n) for name in ("betaclip/a", "dense", "betaclip/b") for n in (72, 144)]
    in_one_panel = [row("peer", n, k=1) for n in (72, 144)]
    figure = drawn([*everywhere, *in_one_panel])
    (legend,) = figure.legends
    assert not any(axes.get_legend() for axes in figure.axes)
    names = {text.get_text() for text in legend.get_texts()}
    assert names == {"betaclip/a", "betaclip/b", "dense", "peer", "bound of betaclip"}
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert lines["betaclip/a"].get_color() == lines["betaclip/b"].get_color() == figures.OUR_COLOUR
    assert lines["betaclip/a"].get_linestyle() != lines["betaclip/b"].get_linestyle()
    others = {lines[name].get_color() for name in ("dense", "peer")}
    assert len(others) == 2 and figures.OUR_COLOUR not in others


def test_ticks_are_plain_and_zeros_are_not_drawn(drawn):
    figure = drawn([row("dense", n, time=time) for n, time in ((1000, "0"), (1100, "70"), (9000, "4000"))])
    axes = figure.axes[0]
    assert points(axes, "dense") == [[1100, 70], [9000, 4000]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["9,000", "1,100"]  # 1,000 has no room
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert {"100", "1,000"} <= set(shown) and not any("10^" in text for text in shown)
    assert not axes.yaxis.get_minorticklocs().size


def test_few_round_numbers_along_y(drawn):
    for low, high in ((15, 90), (560, 1130), (86, 185), (1, 1e6)):
        axes = drawn([row("dense", n, time=str(time)) for n, time in ((72, low), (144, high))]).axes[0]
        assert 2 <= len([y for y in axes.get_yticks() if low <= y <= high]) <= 9


def test_no_rows(tmp_path):
    path = tmp_path / "none.csv"
    path.write_text("benchmark\n")
    assert figures.draw(path, "b", FIGURE) == "no figure: there is no row of forward + backward"
