"""Figures drawn from CSV rows alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.rows import BOTH, OK, OUT_OF_MEMORY, Row, read_rows

OURS = "betaclip"
# betaclip is blue in every figure, its variants differ by dashes; the others take the remaining colours in order.
OUR_COLOUR, DASHES = "C0", ("-", "--", ":", "-.")
TIME = ("time_ms_p50", "forward + backward, ms", 1.0)
PEAK = ("peak_bytes", "peak extra memory, MiB", 2.0**20)


@dataclass(frozen=True)
class Figure:
    """Quantities of forward + backward, a row of axes for each, against the field x; a column of axes per ``panel``.

    quantities: field, label, and the unit to divide by. same: fields in which, as in the dtype, all rows of a figure
    agree with the last row of the file; the title says them. bound: what our peak memory is promised to stay below.
    """

    panel: Callable[[Row], str]
    x: str
    x_label: str
    quantities: tuple[tuple[str, str, float], ...]
    same: tuple[str, ...]
    bound: Callable[[Row], float] | None = None


def draw(path: Path, benchmark: str, shown: Figure) -> str:
    """Draw the figure beside a CSV file from its rows; says where it is, or why there is none.

    Of several rows of one case the last counts. Cases that ran out of memory are crosses at the top edge.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return "no figure: matplotlib is not installed (pip install matplotlib)"
    rows = [row for row in read_rows(path) if row["benchmark"] == benchmark]
    rows = [row for row in rows if all(row[key] == rows[-1][key] for key in ("dtype", *shown.same))]
    latest = {(shown.panel(row), row["implementation"], int(row[shown.x])): row for row in rows if row["phase"] == BOTH}
    drawn = {key: row for key, row in latest.items() if row["status"] in (OK, OUT_OF_MEMORY)}
    sizes = {panel: {x for p, _, x in drawn if p == panel} for panel in dict.fromkeys(p for p, _, _ in drawn)}
    panels = [panel for panel in sizes if len(sizes[panel]) > 1] or list(sizes)
    if not panels:
        return "no figure: there is no row of forward + backward"
    styles = _styles(list(dict.fromkeys(name for p, name, _ in drawn if p in panels)))
    height, width = len(shown.quantities), len(panels)
    size = (max(1 + 3.4 * width, 6.5), 1.2 + 3 * height)
    figure, grid = pyplot.subplots(height, width, figsize=size, squeeze=False, layout="constrained")
    same = (f"{key} = {rows[-1][key]}" for key in shown.same)
    figure.suptitle(", ".join((rows[-1]["device"], rows[-1]["dtype"], *same)))
    for column, panel in enumerate(panels):
        for axes, (field, label, unit) in zip(grid[:, column], shown.quantities, strict=True):
            for name in styles:
                own = {x: drawn[p, i, x] for p, i, x in sorted(drawn) if (p, i) == (panel, name)}
                _line(axes, own, field, unit, name, styles)
            if shown.bound is not None and field == "peak_bytes":
                bounds = {x: shown.bound(row) / unit for (p, _, x), row in sorted(drawn.items()) if p == panel}
                axes.plot(list(bounds), list(bounds.values()), ":", color="black", label="bound of betaclip")
            axes.set(xscale="log", yscale="log", xlabel=shown.x_label, ylabel="" if column else label)
            _plain_ticks(axes, sorted(sizes[panel]))
            axes.grid(alpha=0.3)
        grid[0, column].set(title=panel)
    found = [axes.get_legend_handles_labels() for axes in grid.flat]
    legend = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=max(1, int(size[0] / 2.4)))
    to = path.with_suffix(".png")
    figure.savefig(to, dpi=110)
    pyplot.close(figure)
    return f"figure: {to}"


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each implementation is drawn: ours last, so that it lies on top."""
    ours = [name for name in names if name.startswith(OURS)]
    others = [name for name in names if name not in ours]
    styles: dict[str, dict[str, Any]] = {
        name: {"color": f"C{1 + i % 9}", "linewidth": 1.2, "marker": "os^vD"[i // 9]} for i, name in enumerate(others)
    }
    for i, name in enumerate(ours):
        line = {"linestyle": DASHES[i % len(DASHES)], "marker": "oDs^"[i % 4]}
        styles[name] = {"color": OUR_COLOUR, "linewidth": 2.5, **line}
    return styles


def _plain_ticks(axes: Any, sizes: Sequence[int]) -> None:
    """Plain numbers: along x the sizes, as far as there is room; along y as few round numbers as will do."""
    from matplotlib.ticker import LogLocator, NullLocator

    ticks = [sizes[-1]]
    for x in reversed(sizes[:-1]):
        if ticks[-1] / x >= (sizes[-1] / sizes[0]) ** 0.12:
            ticks.append(x)
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    bottom, top = axes.get_ylim()
    subs = (1,) if top > 1000 * bottom else (1, 2, 5) if top > 10 * bottom else range(1, 10)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:,.6g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def _line(axes: Any, own: dict[int, Row], field: str, unit: float, name: str, styles: dict[str, Any]) -> None:
    """One implementation in one pair of axes, without values that a logarithmic axis cannot show."""
    points = [(x, float(row[field]) / unit) for x, row in own.items() if row["status"] == OK and row[field]]
    points = [(x, y) for x, y in points if y > 0]
    failed = [x for x, row in own.items() if row["status"] == OUT_OF_MEMORY]
    if points:
        axes.plot(*zip(*points, strict=True), label=name, **styles[name])
    if failed:
        label = None if points else f"{name} (out of memory)"
        place = {"transform": axes.get_xaxis_transform(), "color": styles[name]["color"], "label": label}
        axes.plot(failed, [1 - 0.03 * list(styles).index(name)] * len(failed), "x", **place)
