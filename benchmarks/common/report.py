"""Formats what the benchmarks print, from CSV rows alone: tables and a summary."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from common.rows import BOTH, FORWARD, OK, SKIPPED, Row

Columns = Mapping[str, Callable[[Row], str]]  # heading: what it shows of a row


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


# These columns are in all tables.
COMMON = {
    "speed-up": number("speedup", ".2f"),
    "of mm": number("share_of_mm", ".2f"),
    "extra memory": memory("peak_bytes"),
}
LOSS_ERRORS = {
    "error: loss": number("loss_error", ".1e"),
    "gradients": number("gradient_error", ".1e"),
    "scale": number("scale_error", ".1e"),
}


def spread(row: Row) -> str:
    """142 (139-151): the median, and the 20th and 80th percentile if there is more than one round."""
    middle, low, high = (in_ms(row[f"time_ms_{p}"]) for p in ("p50", "p20", "p80"))
    return middle if not middle or row["rounds"] == "1" else f"{middle} ({low}-{high})"


def table(rows: Sequence[Row], columns: Columns) -> str:
    """One line per implementation of a form at a size, both phases side by side; below, why others have no time.

    ``columns`` follow those that all tables have. They show the row of forward + backward, or that of forward where it
    is the only one; a column without any entry is left out.
    """
    columns = {**COMMON, **columns}
    phases: dict[str, dict[str, Row]] = {}
    for row in rows:
        phases.setdefault(row["implementation"], {})[row["phase"]] = row
    lines = [("implementation", "forward ms", "forward+backward ms", *columns)]
    reasons = []
    for name, by_phase in phases.items():
        main = by_phase.get(BOTH) or by_phase[FORWARD]
        if all(row["status"] != OK for row in by_phase.values()):
            reasons.append(f"  {name}: {main['status']}" + (f" ({main['note']})" if main["note"] else ""))
        else:
            times = (spread(by_phase[x]) or by_phase[x]["status"] if x in by_phase else "" for x in (FORWARD, BOTH))
            lines.append((name, *times, *(show(main) for show in columns.values())))
    filled = [cells for cells in zip(*lines, strict=True) if any(cells[1:]) or not lines[1:]]
    widths = [max(map(len, cells)) for cells in filled]
    padded = ([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])] for name, *cells in zip(*filled, strict=True))
    shown = ["  " + "  ".join(cells).rstrip() for cells in padded]
    return "\n".join([shown[0], "  " + "-" * (len(shown[0]) - 2), *shown[1:], *reasons])


def kept_within(rows: Sequence[Row], minutes: float, size: str, not_begun: Sequence[str]) -> list[str]:
    """Say what a limit of ``minutes`` cost: rows that were measured once, and rows that were left out."""
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
