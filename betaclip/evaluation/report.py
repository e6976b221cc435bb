"""Results as a table and as JSON.

Results are values by set, then by "task/name" as :func:`betaclip.evaluation.tasks.scenes.evaluate_scenes` names them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from betaclip.evaluation.tasks.retrieval import RECALLS_AT
from betaclip.files import reporting, write_atomically

Results = Mapping[str, Mapping[str, float]]

_RECALLS = [f"{direction}_r{k}" for direction in ("t2i", "i2t") for k in RECALLS_AT]


def table(results: Results) -> str:
    """Format a table for each task that has results, with accuracies, recalls and shares in percent."""
    return "\n\n".join(f"{title}\n{_aligned(rows)}" for title, rows in tables(results))


def tables(results: Results) -> list[tuple[str, list[list[str]]]]:
    """The title and the rows of each table, of which the first row has the columns' heads."""
    found = (
        ("Retrieval, %", _retrieval_rows(results)),
        ("Choices, % right", _choice_rows(results)),
        ("Zero-shot classification, %", _zero_shot_rows(results)),
        ("Pointing, % of the attention of a phrase that is in its box", _pointing_rows(results)),
        ("Leak, % of texts identified from what they pool from a picture", _leak_rows(results)),
    )
    return [(title, rows) for title, rows in found if len(rows) > 1]


def _retrieval_rows(results: Results) -> list[list[str]]:
    names = [f"{text} R@{k}" for text in ("text to image", "image to text") for k in RECALLS_AT]
    # Only the first column of a direction names it.
    heads = [name if name.endswith(f"@{RECALLS_AT[0]}") else name.split()[-1] for name in names]
    rows = [["set", "by", "images", "texts", "left out", *heads]]
    for name, values in _of_task(results, "retrieval"):
        counts = [_count(values[key]) for key in ("images", "texts", "left_out")]
        for by, prefix in (("CLS", ""), ("text-conditioned", "conditioned_")):
            if prefix + _RECALLS[0] in values:
                rows.append([name, by, *counts, *(_percent(values[prefix + key]) for key in _RECALLS)])
    return rows


def _choice_rows(results: Results) -> list[list[str]]:
    rows = [["set", "questions of", "number", "left out", "by region", "text-conditioned", "chance"]]
    for name, values in _of_task(results, "choices"):
        for kind in [key.removesuffix("_chance") for key in values if key.endswith("_chance")]:
            counts = [_count(values[f"{kind}_{key}"]) for key in ("questions", "left_out")]
            shares = [_percent(values[key]) for key in (kind, f"{kind}_conditioned", f"{kind}_chance")]
            rows.append([name, kind, *counts, *shares])
    return rows


def _zero_shot_rows(results: Results) -> list[list[str]]:
    rows = [["set", "classes", "images", "left out", "top 1", "top 5", "top 1, mean of the classes", "chance"]]
    for name, values in _of_task(results, "zero_shot"):
        counts = [_count(values[key]) for key in ("classes", "images", "left_out")]
        rows.append([name, *counts, *(_percent(values[key]) for key in ("top1", "top5", "mean_per_class", "chance"))])
    return rows


def _pointing_rows(results: Results) -> list[list[str]]:
    rows = [["set", "phrases", "in the box", "box's share of the picture", "ratio"]]
    for name, values in _of_task(results, "pointing"):
        shares = [_percent(values[key]) for key in ("mass_in_box", "box_share")]
        rows.append([name, _count(values["phrases"]), *shares, f"{values['ratio']:.2f}"])
    return rows


def _leak_rows(results: Results) -> list[list[str]]:
    rows = [["set", "texts", "own picture", "another picture", "chance"]]
    for name, values in _of_task(results, "leak"):
        shares = [values["own_picture"], values["other_picture"], 1 / values["texts"]]
        rows.append([name, _count(values["texts"]), *map(_percent, shares)])
    return rows


def write_json(results: Results, path: Path) -> None:
    with reporting(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write(json.dumps(results, indent=2, allow_nan=False).encode() + b"\n")


def _of_task(results: Results, task: str) -> list[tuple[str, dict[str, float]]]:
    """Each set's values of a task, by their names without the task."""
    sets = []
    for name, values in results.items():
        found = {key.partition("/")[2]: value for key, value in values.items() if key.partition("/")[0] == task}
        if found:
            sets.append((name, found))
    return sets


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _count(number: float) -> str:
    return f"{number:.0f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align columns of words to the left and columns of numbers to the right."""
    columns = list(zip(*rows, strict=True))
    lines = []
    for row in rows:
        cells = []
        for cell, column in zip(row, columns, strict=True):
            width, number = max(map(len, column)), column[-1][:1].isdigit()
            cells.append(cell.rjust(width) if number else cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
