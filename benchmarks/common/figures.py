"""Figures drawn from CSV rows alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.rows import BOTH, OK, OUT_OF_MEMORY, Row, read_rows

# betaclip is blue in every figure, its variants differ by dashes; the others take the remaining colours in order.
OUR_COLOUR, DASHES = "C0", ("-", "--", ":", "-.")
BOUND: dict[str, Any] = {"linestyle": ":", "color": "black", "label": "bound of betaclip"}
TIME = ("time_ms_p50", "forward + backward, ms", 1.0)
PEAK = ("peak_bytes", "peak extra memory, MiB", 2.0**20)


@dataclass(frozen=True)
class Figure:
    """Quantities of forward + backward, a row of axes for each, against the field ``x``; a column of axes for each form
    and value of the field ``panel``. Both fields come with their labels.

    same: fields in which, as in the dtype, all rows of a figure agree with the last row of the file; the title says
    them. quantities: field, label, and the unit to divide by. bound: what our peak memory is promised to stay below.
    """

    panel: tuple[str, str]
    x: tuple[str, str]
    same: tuple[str, ...]
    quantities: tuple[tuple[str, str, float], ...] = (TIME, PEAK)
    bound: Callable[[Row], float] | None = None


def draw(path: Path, benchmark: str, shown: Figure) -> str:
    """Draw the figure beside a CSV file from its rows; says where it is, or why there is none.

    Of several rows of one case the last counts. Cases that ran out of memory are crosses at the top edge. Panels of a
    single size are drawn only if there are no others.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
        from matplotlib.lines import Line2D
    except ImportError:
        return "no figure: matplotlib is not installed (pip install matplotlib)"
    rows = [row for row in read_rows(path) if row["benchmark"] == benchmark]
    rows = [row for row in rows if all(row[key] == rows[-1][key] for key in ("dtype", *shown.same))]
    (by, letter), (x, x_label), forms = shown.panel, shown.x, list(dict.fromkeys(row["form"] for row in rows))
    latest = {
        (forms.index(row["form"]), int(row[by]), row["implementation"], int(row[x])): row
        for row in rows
        if row["phase"] == BOTH
    }
    known = [case for case in sorted(latest) if latest[case]["status"] in (OK, OUT_OF_MEMORY)]
    if not known:
        return "no figure: there is no row of forward + backward"
    panels = list(dict.fromkeys(case[:2] for case in known))
    panels = [panel for panel in panels if len({case[3] for case in known if case[:2] == panel}) > 1] or panels
    drawn = {case: latest[case] for case in known if case[:2] in panels}
    names, ran = dict.fromkeys(case[2] for case in latest if case[:2] in panels), {case[2] for case in drawn}
    styles, absent = _styles([name for name in names if name in ran]), [name for name in names if name not in ran]
    shape, shared = (len(shown.quantities), len(panels)), {"sharex": True, "sharey": "row"}
    size = (max(1 + 2.8 * shape[1], 6.5), 1.5 + 2.6 * shape[0])
    figure, grid = pyplot.subplots(*shape, figsize=size, squeeze=False, layout="constrained", **shared)
    title = ", ".join([rows[-1]["device"], rows[-1]["dtype"], *(f"{key} = {rows[-1][key]}" for key in shown.same)])
    figure.suptitle(title + (f"\ndid not run: {', '.join(absent)}" if absent else ""))
    for line, (field, label, unit) in zip(grid, shown.quantities, strict=True):
        for axes, panel in zip(line, panels, strict=True):
            for name in styles:
                own = {case[3]: row for case, row in drawn.items() if case[:3] == (*panel, name)}
                _line(axes, own, field, unit, name, styles)
            if shown.bound is not None and field == "peak_bytes":
                bounds = {case[3]: shown.bound(row) / unit for case, row in drawn.items() if case[:2] == panel}
                axes.plot(*zip(*sorted(bounds.items()), strict=True), **BOUND)
            axes.grid(alpha=0.3)
        line[0].set(xscale="log", yscale="log", ylabel=label)
        _plain_ticks(line[0], sorted({case[3] for case in drawn}))
    for top, bottom, (form, value) in zip(grid[0], grid[-1], panels, strict=True):
        top.set(title=f"{forms[form]}, {letter} = {value:,}")
        bottom.set(xlabel=x_label)
    legend = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    if shown.bound is not None:
        legend.append(Line2D([], [], **BOUND))
    figure.legend(handles=legend, loc="outside lower center", ncols=max(1, int(size[0] / 2.4)))
    to = path.with_suffix(".png")
    figure.savefig(to, dpi=110)
    pyplot.close(figure)
    return f"figure: {to}"


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each implementation is drawn: ours last, so that it lies on top."""
    ours = [name for name in names if name.startswith("betaclip")]
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
    from matplotlib.ticker import LogLocator

    ticks, share = [sizes[-1]], 0.05 + 0.03 * len(f"{sizes[-1]:,}")  # of the width, that a label needs
    for x in reversed(sizes[:-1]):
        if ticks[-1] / x >= (sizes[-1] / sizes[0]) ** share:
            ticks.append(x)
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    bottom, top = axes.get_ylim()
    subs = (1,) if top > 1000 * bottom else (1, 2, 5) if top > 10 * bottom else (1, 1.5, 2, 3, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:,.6g}")
    axes.minorticks_off()


def _line(axes: Any, own: dict[int, Row], field: str, unit: float, name: str, styles: dict[str, Any]) -> None:
    """One implementation in one pair of axes, without values that a logarithmic axis cannot show."""
    points = [(x, y) for x, row in own.items() if row["status"] == OK and (y := float(row[field] or 0) / unit) > 0]
    failed = [x for x, row in own.items() if row["status"] == OUT_OF_MEMORY]
    if points:
        axes.plot(*zip(*points, strict=True), label=name, **styles[name])
    if failed:
        heights = [1 - 0.03 * list(styles).index(name)] * len(failed)
        axes.plot(failed, heights, "x", transform=axes.get_xaxis_transform(), color=styles[name]["color"])
