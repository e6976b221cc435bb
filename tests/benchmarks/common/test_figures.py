"""Figures show what the rows say, and name whom they show."""

import csv

import pytest
from common import figures

pyplot = pytest.importorskip("matplotlib.pyplot")
FIGURE = figures.Figure(
    panel=("k", "K"),
    x=("n", "N"),
    same=("dim",),
    quantities=(("time_ms_p50", "ms", 1.0), ("peak_bytes", "MiB", 2.0**20)),
    bound=lambda row: float(row["n"]) * 2**20,
)


def row(name, n, status="ok", k=36, time="2.5", peak="5000", dim=64, form="ce"):
    return {
        "benchmark": "b",
        "device": "cpu",
        "form": form,
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
    """A function from rows to the figure that is drawn of them. Only the smoke runs write one, which takes long."""
    kept, saved = [], []
    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", kept.append)
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda figure, path, dpi: saved.append(path))

    def draw(rows):
        path = tmp_path / "x.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        assert figures.draw(path, "b", FIGURE) == f"figure: {tmp_path / 'x.png'}"
        assert saved[-1] == tmp_path / "x.png"
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
    rows.append({**row("dense", 72, time="1"), "phase": "forward"})
    assert points(drawn(rows).axes[0], "dense") == [[72, 7]]


def test_one_legend_names_everyone_and_ours_is_always_blue(drawn):
    everywhere = [row(name, n) for name in ("betaclip/a", "dense", "betaclip/b") for n in (72, 144)]
    in_one_panel = [row("peer", n, k=1) for n in (72, 144)]
    figure = drawn([*everywhere, *in_one_panel])
    (legend,) = figure.legends
    assert not any(axes.get_legend() for axes in figure.axes)
    names = [text.get_text() for text in legend.get_texts()]
    assert "did not run" not in figure.get_suptitle()
    assert names == ["dense", "peer", "betaclip/a", "betaclip/b", "bound of betaclip"]
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert lines["betaclip/a"].get_color() == lines["betaclip/b"].get_color() == figures.OUR_COLOUR
    assert lines["betaclip/a"].get_linestyle() != lines["betaclip/b"].get_linestyle()
    others = {lines[name].get_color() for name in ("dense", "peer")}
    assert len(others) == 2 and figures.OUR_COLOUR not in others


def test_panels_are_by_form_and_size_and_share_their_axes(drawn):
    shapes = [("ce", 36), ("bce", 36), ("ce", 4), ("clip", 1)]
    rows = [row("dense", 72 * i, form=form, k=k, time=str(10 * i)) for i, (form, k) in enumerate(shapes, 1)]
    figure = drawn([*rows, row("peer", 72, status="unavailable: no")])
    tops = figure.axes[:4]
    assert [axes.get_title() for axes in tops] == ["ce, K = 4", "ce, K = 36", "bce, K = 36", "clip, K = 1"]
    assert [points(axes, "dense") for axes in tops] == [[[216, 30]], [[72, 10]], [[144, 20]], [[288, 40]]]
    assert len({axes.get_xlim() for axes in figure.axes}) == len({axes.get_ylim() for axes in tops}) == 1
    assert figure.get_suptitle() == "cpu, float32, dim = 64\ndid not run: peer"


def test_panels_of_one_size_are_left_out_beside_others(drawn):
    rows = [row("dense", 72), row("dense", 144), row("dense", 72, form="clip", k=1), row("peer", 72, form="clip", k=1)]
    figure = drawn(rows)
    assert [axes.get_title() for axes in figure.axes] == ["ce, K = 36", ""]
    assert "peer" not in {text.get_text() for text in figure.legends[0].get_texts()}
    assert figure.get_suptitle() == "cpu, float32, dim = 64"


def test_ticks_are_plain_and_zeros_are_not_drawn(drawn):
    figure = drawn([row("dense", n, time=time) for n, time in ((1000, "0"), (1100, "70"), (9000, "4000"))])
    axes = figure.axes[0]
    assert points(axes, "dense") == [[1100, 70], [9000, 4000]]
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["9,000", "1,100"]  # 1,000 has no room
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert {"100", "1,000"} <= set(shown) and not any("10^" in text for text in shown)
    assert not axes.yaxis.get_minorticklocs().size


def test_few_round_numbers_along_y(drawn):
    for spans in (((15, 90), (86, 185)), ((560, 1130), (1, 1e6))):
        ends = zip((72, 144), *spans, strict=True)
        figure = drawn([row("dense", n, time=str(time), peak=str(mebi * 2**20)) for n, time, mebi in ends])
        for axes, (low, high) in zip(figure.axes, spans, strict=True):
            assert 2 <= len([y for y in axes.get_yticks() if low <= y <= high]) <= 9


def test_no_rows(tmp_path):
    path = tmp_path / "none.csv"
    path.write_text("benchmark\n")
    assert figures.draw(path, "b", FIGURE) == "no figure: there is no row of forward + backward"
