"""What the benchmarks show: tables, a progress bar, and plots drawn from CSV rows alone."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]


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


COLUMNS = (
    "implementation",
    "forward ms",
    "forward+backward ms",
    "of mm",
    "extra memory",
    "in limit",
    "error: loss",
    "gradients",
    "scale",
)


def table(rows: Sequence[Row]) -> str:
    """One line per implementation of a form at a size, both phases side by side; reasons where there is no time."""
    phases: dict[str, dict[str, Row]] = {}
    for row in rows:
        phases.setdefault(row["implementation"], {})[row["phase"]] = row
    lines = [COLUMNS, *(_cells(name, by_phase) for name, by_phase in phases.items())]
    widths = [max(len(line[i]) for line in lines if len(line) > 2) for i in range(len(COLUMNS))]
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


def _cells(name: str, by_phase: dict[str, Row]) -> tuple[str, ...]:
    both = by_phase.get("forward+backward")
    forward = by_phase.get("forward")
    main = both or forward
    assert main is not None
    if all(row["status"] != "ok" for row in by_phase.values()):
        return name, main["status"] + (f" ({main['note']})" if main["note"] else "")
    times = [(spread(row) if row["status"] == "ok" else row["status"]) if row else "" for row in (forward, both)]
    fits = ""
    if name.startswith("betaclip") and main["peak_bytes"]:
        fits = "yes" if float(main["peak_bytes"]) <= float(main["limit_bytes"]) else "no"
    errors = (number(main[f"{what}_error"], ".1e") for what in ("loss", "gradient", "scale"))
    return name, *times, number(main["share_of_mm"], ".2f"), in_bytes(main["peak_bytes"]), fits, *errors


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


def plot(rows: Sequence[Row], path: Path, title: str) -> str | None:
    """Time and extra memory of forward + backward against N, one column per form; the reason if it cannot.

    Of several rows of one case the last counts. Cases that ran out of memory are crosses at the top edge.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        return "matplotlib is not installed (pip install matplotlib)"
    latest = {
        (row["form"], row["implementation"], int(row["n"])): row for row in rows if row["phase"] == "forward+backward"
    }
    sizes = {form: {n for f, _, n in latest if f == form} for form in dict.fromkeys(f for f, _, _ in latest)}
    forms = [form for form in sizes if len(sizes[form]) > 1] or list(sizes)
    if not forms:
        return "there is no row of forward + backward"
    names = list(dict.fromkeys(name for _, name, _ in latest))
    figure, grid = pyplot.subplots(
        2, len(forms), figsize=(1 + 4.5 * len(forms), 8), squeeze=False, layout="constrained"
    )
    figure.suptitle(title)
    for column, form in enumerate(forms):
        for axes, field, unit in zip(grid[:, column], ("time_ms_p50", "peak_bytes"), (1.0, 2.0**20), strict=True):
            for index, name in enumerate(names):
                own = {n: row for (f, i, n), row in sorted(latest.items()) if (f, i) == (form, name)}
                _line(axes, own, field, unit, name, index)
            limits = {
                n: float(row["limit_bytes"]) for (f, _, n), row in latest.items() if f == form and row["limit_bytes"]
            }
            if field == "peak_bytes" and limits:
                ends = sorted(limits)
                axes.plot(ends, [limits[n] / unit for n in ends], ":", color="black", label="limit for betaclip")
            axes.set(xscale="log", yscale="log", xlabel="N = images × texts per image")
            axes.set_xticks(sorted(sizes[form]), [f"{n:,}" for n in sorted(sizes[form])], minor=False)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        grid[0, column].set(title=f"{form}, K = {_common(latest, form, 'k')}", ylabel="forward + backward, ms")
        grid[1, column].set(ylabel="peak extra memory, MiB")
    grid[1, 0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return None


def _line(axes: Any, own: dict[int, Row], field: str, unit: float, name: str, index: int) -> None:
    points = [(n, float(row[field]) / unit) for n, row in own.items() if row["status"] == "ok" and row[field]]
    failed = [n for n, row in own.items() if row["status"] == "out of memory"]
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


def _common(latest: dict[tuple[str, str, int], Row], form: str, field: str) -> str:
    return ", ".join(sorted({row[field] for (f, _, _), row in latest.items() if f == form}))
