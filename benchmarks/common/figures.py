"""Figures drawn from CSV rows alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.rows import BOTH, OK, OUT_OF_MEMORY, Row, read_rows

OURS = "betaclip"
# betaclip is blue in every figure, its variants differ by dashes; the others take the remaining colours in order.
OUR_COLOUR, DASHES = "C0", ("-", "--", ":", "-.")
COLOURS = ("C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "C7")


@dataclass(frozen=True)
class Figure:
    """Quantities of forward + backward, a row of axes for each, against the field x; a column of axes per ``panel``.

    quantities: field, label, and the unit to divide by. same: fields in which all rows of a figure agree with the last
    row of the file. bound: what peak memory of ours is promised to stay below, and how the legend calls it.
    """

    panel: Callable[[Row], str]
    x: str
    x_label: str
    quantities: tuple[tuple[str, str, float], ...]
    same: tuple[str, ...]
    title: Callable[[Row], str]
    bound: Callable[[Row], float] | None = None
    bound_label: str = ""


def draw(path: Path, benchmark: str, shown: Figure) -> str:
    """Draw the figure beside a CSV file from its rows; says where it is, or why there is none."""
    rows = [row for row in read_rows(path) if row["benchmark"] == benchmark]
    rows = [row for row in rows if all(row[key] == rows[-1][key] for key in shown.same)]
    to = path.with_suffix(".png")
    reason = plot(rows, to, shown)
    return f"figure: {to}" if reason is None else f"no figure: {reason}"


def plot(rows: Sequence[Row], path: Path, shown: Figure) -> str | None:
    """Draw ``rows``; the reason if that is impossible.

    Of several rows of one case the last counts. Cases that ran out of memory are crosses at the top edge.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return "matplotlib is not installed (pip install matplotlib)"
    latest = {(shown.panel(row), row["implementation"], int(row[shown.x])): row for row in rows if row["phase"] == BOTH}
    drawn = {key: row for key, row in latest.items() if row["status"] in (OK, OUT_OF_MEMORY)}
    sizes = {panel: {x for p, _, x in drawn if p == panel} for panel in dict.fromkeys(p for p, _, _ in drawn)}
    panels = [panel for panel in sizes if len(sizes[panel]) > 1] or list(sizes)
    if not panels:
        return "there is no row of forward + backward"
    styles = _styles(list(dict.fromkeys(name for p, name, _ in drawn if p in panels)))
    height, width = len(shown.quantities), len(panels)
    size = (max(1 + 3.4 * width, 6.5), 1.2 + 3 * height)
    figure, grid = pyplot.subplots(height, width, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(shown.title(rows[-1]))
    for column, panel in enumerate(panels):
        for axes, (field, label, unit) in zip(grid[:, column], shown.quantities, strict=True):
            for name in styles:
                own = {x: drawn[p, i, x] for p, i, x in sorted(drawn) if (p, i) == (panel, name)}
                _line(axes, own, field, unit, name, styles)
            if shown.bound is not None and field == "peak_bytes":
                bounds = {x: shown.bound(row) / unit for (p, _, x), row in sorted(drawn.items()) if p == panel}
                axes.plot(list(bounds), list(bounds.values()), ":", color="black", label=shown.bound_label)
            axes.set(xscale="log", yscale="log", xlabel=shown.x_label, ylabel="" if column else label)
            _plain_ticks(axes, sorted(sizes[panel]))
            axes.grid(alpha=0.3)
        grid[0, column].set(title=panel)
    found = [axes.get_legend_handles_labels() for axes in grid.flat]
    legend = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=max(1, int(size[0] / 2.4)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return None


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each implementation is drawn: ours last, so that it lies on top."""
    ours = [name for name in names if name.startswith(OURS)]
    others = [name for name in names if name not in ours]
    styles: dict[str, dict[str, Any]] = {
        name: {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.2, "marker": "os^vD"[i // len(COLOURS)]}
        for i, name in enumerate(others)
    }
    for i, name in enumerate(ours):
        styles[name] = {
            "color": OUR_COLOUR,
            "linewidth": 2.5,
            "linestyle": DASHES[i % len(DASHES)],
            "marker": "oDs^"[i % 4],
        }
    return styles


def _plain_ticks(axes: Any, sizes: Sequence[int]) -> None:
    """Plain numbers: along x the sizes, as far as there is room; along y as few round numbers as will do."""
    from matplotlib.ticker import NullLocator

    ticks = [sizes[-1]]
    for x in reversed(sizes[:-1]):
        if ticks[-1] / x >= (sizes[-1] / sizes[0]) ** 0.12:
            ticks.append(x)
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    round_numbers = _round_numbers(*axes.get_ylim())
    axes.set_yticks(round_numbers, [f"{y:,.6g}" for y in round_numbers])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())


def _round_numbers(low: float, high: float) -> list[float]:
    """At least three between ``low`` and ``high`` where it is possible."""
    decades = [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    found: list[float] = []
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), (1, 1.2, 1.4, 1.7, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)):
        found = [x * digit for x in decades for digit in digits if low <= x * digit <= high]
        if len(found) >= 3:
            break
    return found


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
