"""What the benchmarks show: tables, a progress bar, and plots drawn from CSV rows alone."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, str]
Columns = Mapping[str, Callable[[Row], str]]  # heading: what it shows of a row


class Progress:
    """A bar on stderr (tqdm if it is installed, plain lines if not), silent for short runs without a terminal."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        self._total, self._done = total, 0
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, file=sys.stderr, disable=not sys.stderr.isatty(), leave=False)

    def step(self, what: str) -> None:
        """``what`` starts; what came before it is done."""
        if self._bar is not None:
            self._bar.update(self._done and 1)
            self._bar.set_description(what)
        elif sys.stderr.isatty():
            print(f"[{self._done + 1}/{self._total}] {what}", file=sys.stderr)
        self._done += 1

    def print(self, text: str) -> None:
        """Text to stdout that does not break the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def in_bytes(value: str) -> str:
    """4.0 GiB, 330 MiB, 12 KiB"""
    if not value:
        return ""
    amount, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1000 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.3g} {unit}" if amount < 100 else f"{amount:.0f} {unit}"


def in_ms(value: str) -> str:
    if not value:
        return ""
    time = float(value)
    return f"{time:,.0f}" if time >= 100 else f"{time:.3g}"


def spread(row: Row) -> str:
    """142 (139-151): the median, and the 20th and 80th percentile if there is more than one round."""
    middle, low, high = (in_ms(row[f"time_ms_{p}"]) for p in ("p50", "p20", "p80"))
    return middle if not middle or row["rounds"] == "1" else f"{middle} ({low}-{high})"


def number(value: str, pattern: str) -> str:
    return format(float(value), pattern) if value else ""


def table(rows: Sequence[Row], columns: Columns) -> str:
    """One line per implementation of a form at a size, both phases side by side; reasons where there is no time.

    ``columns`` show the row of forward + backward, or of forward where that is the only one.
    """
    phases: dict[str, dict[str, Row]] = {}
    for row in rows:
        phases.setdefault(row["implementation"], {})[row["phase"]] = row
    heading = ("implementation", "forward ms", "forward+backward ms", *columns)
    lines = [heading, *(_cells(name, by_phase, columns) for name, by_phase in phases.items())]
    widths = [max(len(line[i]) for line in lines if len(line) > 2) for i in range(len(heading))]
    widths[0] = max(len(line[0]) for line in lines)
    shown = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        if len(line) == 2:  # a name and a reason
            cells.append(line[1])
        else:
            cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        shown.append("  " + "  ".join(cells).rstrip())
    shown.insert(1, "  " + "-" * (len(shown[0]) - 2))
    return "\n".join(shown)


def _cells(name: str, by_phase: dict[str, Row], columns: Columns) -> tuple[str, ...]:
    both = by_phase.get("forward+backward")
    forward = by_phase.get("forward")
    main = both or forward
    assert main is not None
    if all(row["status"] != "ok" for row in by_phase.values()):
        return name, main["status"] + (f" ({main['note']})" if main["note"] else "")
    times = [(spread(row) if row["status"] == "ok" else row["status"]) if row else "" for row in (forward, both)]
    return name, *times, *(show(main) for show in columns.values())


def summary(rows: Iterable[Row], ours: str, baselines: Sequence[str]) -> list[str]:
    """Ours against each baseline, per form, at the largest size where both were timed."""
    best: dict[tuple[str, str, str], tuple[int, str]] = {}
    timed = [row for row in rows if row["status"] == "ok" and row["phase"] == "forward+backward"]
    for row in timed:
        if not row["implementation"].startswith(ours):
            continue
        for other in timed:
            same = all(other[key] == row[key] for key in ("form", "n", "k", "dim", "dtype"))
            if not same or other["implementation"] not in baselines:
                continue
            text = f"{row['form']}, N = {int(row['n']):,}: {row['implementation']} is "
            text += _ratio(other["time_ms_p50"], row["time_ms_p50"], "faster", "slower")
            if other["peak_bytes"] and row["peak_bytes"]:
                text += " and takes " + _ratio(other["peak_bytes"], row["peak_bytes"], "less", "more") + " extra memory"
            key = (row["form"], row["implementation"], other["implementation"])
            best[key] = max(best.get(key, (0, "")), (int(row["n"]), f"{text} than {other['implementation']}"))
    return [text for _, text in best.values()]


def _ratio(theirs: str, ours: str, better: str, worse: str) -> str:
    ratio = float(theirs) / max(float(ours), 1e-9)
    return f"{ratio:.2f}× {better}" if ratio >= 1 else f"{1 / ratio:.2f}× {worse}"


@dataclass(frozen=True)
class Figure:
    """Quantities of forward + backward, a row of axes each, against the field x; a column of axes per ``panel(row)``.

    quantities: field, label, and the unit to divide by.
    """

    panel: Callable[[Row], str]
    x: str
    x_label: str
    quantities: tuple[tuple[str, str, float], ...]


def plot(rows: Sequence[Row], path: Path, title: str, shown: Figure) -> str | None:
    """Draws it, with the limit of peak memory where rows have one; the reason if it cannot.

    Of several rows of one case the last counts. Cases that ran out of memory are crosses at the top edge.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return "matplotlib is not installed (pip install matplotlib)"
    latest = {
        (shown.panel(row), row["implementation"], int(row[shown.x])): row
        for row in rows
        if row["phase"] == "forward+backward"
    }
    sizes = {panel: {x for p, _, x in latest if p == panel} for panel in dict.fromkeys(p for p, _, _ in latest)}
    panels = [panel for panel in sizes if len(sizes[panel]) > 1] or list(sizes)
    if not panels:
        return "there is no row of forward + backward"
    names = list(dict.fromkeys(name for _, name, _ in latest))
    figure, grid = pyplot.subplots(
        len(shown.quantities), len(panels), figsize=(1 + 4.5 * len(panels), 8), squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for column, panel in enumerate(panels):
        for axes, (field, label, unit) in zip(grid[:, column], shown.quantities, strict=True):
            for index, name in enumerate(names):
                own = {x: latest[p, i, x] for p, i, x in sorted(latest) if (p, i) == (panel, name)}
                _line(axes, own, field, unit, name, index)
            limits = {
                x: float(row["limit_bytes"])
                for (p, _, x), row in latest.items()
                if p == panel and row.get("limit_bytes")
            }
            if field == "peak_bytes" and limits:
                ends = sorted(limits)
                axes.plot(ends, [limits[x] / unit for x in ends], ":", color="black", label="limit for betaclip")
            axes.set(xscale="log", yscale="log", xlabel=shown.x_label, ylabel="" if column else label)
            axes.set_xticks(sorted(sizes[panel]), [f"{x:,}" for x in sorted(sizes[panel])], minor=False)
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3)
        grid[0, column].set(title=panel)
    grid[-1, 0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return None


def _line(axes: Any, own: dict[int, Row], field: str, unit: float, name: str, index: int) -> None:
    points = [(x, float(row[field]) / unit) for x, row in own.items() if row["status"] == "ok" and row[field]]
    failed = [x for x, row in own.items() if row["status"] == "out of memory"]
    style = {"color": f"C{index}", "linewidth": 2.5 if name.startswith("betaclip") else 1.2}
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", label=name, **style)
    if failed:
        label = None if points else f"{name} (out of memory)"
        axes.plot(
            failed,
            [1 - 0.03 * index] * len(failed),
            "x",
            transform=axes.get_xaxis_transform(),
            color=style["color"],
            label=label,
        )
