"""What the benchmarks print: tables, progress, and a summary, all from CSV rows alone."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from common.rows import BOTH, FORWARD, OK, SKIPPED, Row

Columns = Mapping[str, Callable[[Row], str]]  # heading: what it shows of a row


class Progress:
    """Says on the terminal what is being measured.

    shown: False on ranks that print nothing.
    """

    def __init__(self, shown: bool = True) -> None:
        self._shown, self._terminal = shown, shown and sys.stderr.isatty()

    def describe(self, what: str) -> None:
        if self._terminal:
            print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """Print ``text`` to stdout, in place of what was described last."""
        self.describe("")
        if self._shown:
            print(text, flush=True)


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


def number(field: str, pattern: str) -> Callable[[Row], str]:
    """A column that shows ``field`` by a format pattern."""
    return lambda row: format(float(row[field]), pattern) if row.get(field) else ""


def memory(field: str) -> Callable[[Row], str]:
    """A column that shows bytes."""
    return lambda row: in_bytes(row.get(field, ""))


def spread(row: Row) -> str:
    """142 (139-151): the median, and the 20th and 80th percentile if there is more than one round."""
    middle, low, high = (in_ms(row[f"time_ms_{p}"]) for p in ("p50", "p20", "p80"))
    return middle if not middle or row["rounds"] == "1" else f"{middle} ({low}-{high})"


def table(rows: Sequence[Row], columns: Columns) -> str:
    """One line per implementation of a form at a size, both phases side by side; reasons where there is no time.

    ``columns`` show the row of forward + backward, or that of forward where it is the only one.
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
    both, forward = by_phase.get(BOTH), by_phase.get(FORWARD)
    main = both or forward
    assert main is not None
    if all(row["status"] != OK for row in by_phase.values()):
        return name, main["status"] + (f" ({main['note']})" if main["note"] else "")
    times = [(spread(row) if row["status"] == OK else row["status"]) if row else "" for row in (forward, both)]
    return name, *times, *(show(main) for show in columns.values())


def kept_within(rows: Sequence[Row], minutes: float, size: str, not_begun: Sequence[str]) -> list[str]:
    """What a limit of ``minutes`` cost: rows that were measured once, and what was left out."""
    once = sum(row["rounds"] == "1" for row in rows)
    skipped = [f"{row['implementation']} at {row[size]}" for row in rows if row["status"] == SKIPPED]
    out = ", ".join(dict.fromkeys([*skipped, *not_begun])) or "nothing"
    if not minutes or not (once or skipped or not_begun):
        return []
    return [f"To stay within --minutes {minutes:g}: {once} rows of one round; left out: {out}. 0 sets no limit."]


def untrustworthy(rows: Iterable[Row]) -> list[str]:
    """A warning if other processes disturbed the times."""
    cores = max((float(row["foreign_cores"]) for row in rows if row["foreign_cores"]), default=0.0)
    return (
        [f"Disturbed: other processes kept up to {cores:.1f} cores busy. Trust no time above."] if cores > 0.1 else []
    )
