"""Results as tables and in files.

Results are values by set, then by "task/name" as :func:`betaclip.evaluation.tasks.scenes.evaluate_scenes` names them.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from betaclip.evaluation.intervals import interval, number_behind
from betaclip.evaluation.tasks.ranking import RECALLS_AT
from betaclip.files import reporting, write_atomically

Results = Mapping[str, Mapping[str, float]]
Share = Callable[[Mapping[str, float], str], str]  # a value of a task, as a cell

OWN_TEXT_NOTE = (
    "Own text: each picture is pooled by its own text before the search, as in the released code, so the search is "
    "told what to find. Compare these rows with one another only."
)
_OWN_TEXT = "conditioned, own text"

_RECALLS = [f"{direction}_r{k}" for direction in ("t2i", "i2t") for k in RECALLS_AT]
_TOP_K = re.compile(rf"conditioned_top(\d+)_{_RECALLS[0]}")


def table(results: Results, *, intervals: bool = False) -> str:
    """Format a table for each task that has results, with accuracies, recalls and shares in percent.

    intervals: add 95 % confidence intervals (:mod:`betaclip.evaluation.intervals`).
    """
    return _layout(results, intervals, lambda title, rows: f"{title}\n{_aligned(rows)}")


def markdown(results: Results) -> str:
    """The tables in Markdown, with intervals."""
    return _layout(results, True, lambda title, rows: f"**{title}**\n\n{_piped(rows)}")


def tables(results: Results, *, intervals: bool = False) -> list[tuple[str, list[list[str]], str]]:
    """The title and the rows of each table, of which the first row has the columns' heads, and a note below it."""
    note = ", with 95 % intervals (Wilson)" if intervals else ""
    tasks = (
        ("Retrieval, %", "retrieval", _retrieval_rows),
        ("Choices, % right", "choices", _choice_rows),
        ("Zero-shot classification, %", "zero_shot", _zero_shot_rows),
        ("Pointing, % of the attention of a phrase that is in its box", "pointing", _pointing_rows),
        ("Leak, % of texts identified from what they pool from a picture", "leak", _leak_rows),
    )
    found = (
        (title + note * (task != "pointing"), rows_of(_of_task(results, task), partial(_share, task, intervals)))
        for title, task, rows_of in tasks
    )
    return [
        (title, rows, OWN_TEXT_NOTE if any(_OWN_TEXT in row for row in rows) else "")
        for title, rows in found
        if len(rows) > 1
    ]


def _layout(results: Results, intervals: bool, form: Callable[[str, list[list[str]]], str]) -> str:
    parts = []
    for title, rows, below in tables(results, intervals=intervals):
        parts += [form(title, rows), *([below] if below else [])]
    return "\n\n".join(parts)


def _retrieval_rows(sets: list[tuple[str, dict[str, float]]], share: Share) -> list[list[str]]:
    names = [f"{text} R@{k}" for text in ("text to image", "image to text") for k in RECALLS_AT]
    # Only the first column of a direction names it.
    heads = [name if name.endswith(f"@{RECALLS_AT[0]}") else name.split()[-1] for name in names]
    rows = [["set", "by", "images", "texts", "left out", *heads]]
    for name, values in sets:
        counts = [_count(values[key]) for key in ("images", "texts", "left_out")]
        top = [found[1] for key in values if (found := _TOP_K.fullmatch(key))]
        ways = {"CLS": "", "conditioned, all pairs": "conditioned_"}
        ways |= {f"conditioned, top {k}": f"conditioned_top{k}_" for k in top}
        ways |= {_OWN_TEXT: "conditioned_own_text_"}
        for way, prefix in ways.items():
            if prefix + _RECALLS[0] in values:
                rows.append([name, way, *counts, *(share(values, prefix + key) for key in _RECALLS)])
    return rows


def _choice_rows(sets: list[tuple[str, dict[str, float]]], share: Share) -> list[list[str]]:
    rows = [["set", "questions of", "number", "left out", "by region", "text-conditioned", "chance"]]
    for name, values in sets:
        for kind in [key.removesuffix("_chance") for key in values if key.endswith("_chance")]:
            counts = [_count(values[f"{kind}_{key}"]) for key in ("questions", "left_out")]
            shares = [share(values, key) for key in (kind, f"{kind}_conditioned")]
            rows.append([name, kind, *counts, *shares, _percent(values[f"{kind}_chance"])])
    return rows


def _zero_shot_rows(sets: list[tuple[str, dict[str, float]]], share: Share) -> list[list[str]]:
    rows = [["set", "classes", "images", "left out", "top 1", "top 5", "top 1, mean of the classes", "chance"]]
    for name, values in sets:
        counts = [_count(values[key]) for key in ("classes", "images", "left_out")]
        rows.append([name, *counts, *(share(values, key) for key in ("top1", "top5", "mean_per_class", "chance"))])
    return rows


def _pointing_rows(sets: list[tuple[str, dict[str, float]]], share: Share) -> list[list[str]]:
    rows = [["set", "phrases", "in the box", "box's share of the picture", "ratio"]]
    for name, values in sets:
        shares = [share(values, key) for key in ("mass_in_box", "box_share")]
        rows.append([name, _count(values["phrases"]), *shares, f"{values['ratio']:.2f}"])
    return rows


def _leak_rows(sets: list[tuple[str, dict[str, float]]], share: Share) -> list[list[str]]:
    rows = [["set", "texts", "own picture", "another picture", "chance"]]
    for name, values in sets:
        shares = [share(values, key) for key in ("own_picture", "other_picture")]
        rows.append([name, _count(values["texts"]), *shares, _percent(1 / values["texts"])])
    return rows


def write_results(results: Results, path: Path) -> None:
    """Write a file with intervals: JSON, CSV or Markdown, as its suffix says.

    In JSON the interval of "retrieval/t2i_r1" is in "retrieval/t2i_r1_low" and "retrieval/t2i_r1_high". CSV has a row
    for each value.
    """
    with reporting(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(FORMATS[path.suffix](results).encode())


def write_json(results: Results, path: Path) -> None:
    """Write the values alone."""
    with reporting(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(_json(results).encode())


def _json(results: Results) -> str:
    return json.dumps(results, indent=2, allow_nan=False) + "\n"


def _json_with_intervals(results: Results) -> str:
    content = {}
    for name, values in results.items():
        content[name] = dict(values)
        for task, of_task in _by_task(values).items():
            for key in of_task:
                if bounds := interval(task, key, of_task):
                    content[name] |= {f"{task}/{key}_{end}": b for end, b in zip(("low", "high"), bounds, strict=True)}
    return _json(content)


def _csv(results: Results) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["set", "task", "measure", "value", "low", "high", "number"])
    for name, values in results.items():
        for task, of_task in _by_task(values).items():
            for key, value in of_task.items():
                number, bounds = number_behind(task, key, of_task), interval(task, key, of_task)
                writer.writerow([name, task, key, value, *(bounds or ("", "")), "" if number is None else int(number)])
    return text.getvalue()


FORMATS: dict[str, Callable[[Results], str]] = {
    ".json": _json_with_intervals,
    ".csv": _csv,
    ".md": lambda results: markdown(results) + "\n",
}


def _by_task(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """A set's values by task, then by their names without the task."""
    tasks: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        task, _, name = key.partition("/")
        tasks.setdefault(task, {})[name] = value
    return tasks


def _of_task(results: Results, task: str) -> list[tuple[str, dict[str, float]]]:
    """Each set's values of a task."""
    found = ((name, _by_task(values).get(task)) for name, values in results.items())
    return [(name, values) for name, values in found if values]


def _share(task: str, intervals: bool, values: Mapping[str, float], key: str) -> str:
    if key not in values:
        return "-"
    bounds = interval(task, key, values) if intervals else None
    return _percent(values[key]) + (f" ({_percent(bounds[0])}–{_percent(bounds[1])})" if bounds else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _count(number: float) -> str:
    return f"{number:.0f}"


def _piped(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    line = "|".join("---:" if is_number else "---" for is_number in _numbers(rows))
    return "\n".join([head, f"|{line}|", *rest])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align columns of words to the left and columns of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, _numbers(rows), strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _numbers(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Whether a column is of numbers."""
    return [all(cell[:1].isdigit() or cell == "-" for cell in column[1:]) for column in zip(*rows, strict=True)]
