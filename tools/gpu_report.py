"""The report of a bring-up, from what tools/gpu.py recorded: how steps ended, failures, figures beside predictions."""

import csv
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TUNING = ROOT / "benchmarks" / "results" / "tuning.md"
PASSED, FAILED, TIMED_OUT, UNFINISHED, NOT_RUN = "passed", "failed", "timed out", "unfinished", "not run"
# The endings of the files of rows, and what these hold.
FILES = {
    "": "Losses",
    "-pooling": "Pooling",
    "-train-step": "A training step",
    "-tiles-loss": "Tiles of the losses: what the tables say, beside the fastest variant",
    "-tiles-pooling": "Tiles of pooling: what the tables say, beside the fastest variant",
}
MEASURED = {"phase": "forward+backward", "status": "ok", "dtype": "bfloat16"}
SIZES = ("n", "k", "images", "texts", "patches", "dim", "heads", "model", "context")
MOST_FAILURES = 20
TAIL_LINES = 12
RECORD = "tests.jsonl"  # what tools/gpu_tests.py writes, in the folder of the logs

Row = Mapping[str, str]


def report(facts: Mapping[str, Any], stages: Mapping[str, str], recorded: Mapping[str, Any], output: Path) -> str:
    """The page, in Markdown. stages: of each step by name. recorded: of those that have run."""
    device = facts["device"]
    folder = output / f"bringup-{device}"
    rows = {suffix: read_rows(output / f"{device}{suffix}.csv") for suffix in FILES}
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "triton", "cuda", "python"))
    peers = ", ".join(f"{name} {version or 'missing'}" for name, version in facts["packages"].items())
    everything, tests = [row for found in rows.values() for row in found], outcomes(folder / RECORD)
    sections = [
        [f"# Bring-up of {facts['name']}", "", verdict(stages, recorded, tests)],
        [
            f"{'; '.join(facts['devices'].values())}. betaclip {facts['betaclip']} at {facts['commit']}, {versions}. "
            f"CUDA library: {facts['versions']['libbetaclip']}. Others: {peers}. `{facts['command']}`, {facts['date']}."
        ],
        ["## Steps", "", *steps(stages, recorded, folder, facts["commit"])],
        headed("## Failures", failures(recorded, folder, everything, tests)),
        headed("## Beside the predictions", predictions(everything, TUNING.read_text(encoding="utf-8"))),
        headed(
            "## Figures", [line for suffix, found in rows.items() for line in figures(output, device, suffix, found)]
        ),
    ]
    return without_folders("\n\n".join("\n".join(lines) for lines in sections if lines) + "\n")


def without_folders(text: str) -> str:
    """``text`` with file names in place of absolute paths, which say nothing to readers elsewhere."""
    return re.sub(r"(?<![\w.<])(/[\w.+-]+)+/(?=[\w.])", "", text)


def headed(heading: str, lines: list[str]) -> list[str]:
    return [heading, "", *lines] if lines else []


def outcomes(record: Path) -> dict[str, Mapping[str, Any]]:
    """The last line of each test that has ended."""
    lines = [json.loads(line) for line in lines_of(record)]
    return {line["test"]: line for line in lines if line.get("outcome") in (PASSED, FAILED, "skipped")}


def verdict(stages: Mapping[str, str], recorded: Mapping[str, Any], tests: Mapping[str, Mapping[str, Any]]) -> str:
    """A few lines for who reads no further."""
    counts = Counter(recorded.get(name, {}).get("outcome", "left") for name in stages)
    line = f"**{listed(counts)}**, of {len(stages)} steps."
    if tests:
        line += f" Tests: {listed(Counter(x['outcome'] for x in tests.values()))}."
    reasons = Counter(x["reason"] for x in tests.values() if x["outcome"] == "skipped")
    return "\n".join([line, *(f"Skipped {count}: {reason}." for reason, count in reasons.most_common(3))])


def listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items())


def steps(stages: Mapping[str, str], recorded: Mapping[str, Any], folder: Path, commit: str) -> list[str]:
    lines = ["| stage | step | outcome | time | |", "|---|---|---|---|---|"]
    for name, stage in stages.items():
        if name not in recorded:
            lines.append(f"| {stage} | {name} | left | | |")
            continue
        step = recorded[name]
        log = log_of(folder, name)
        linked = f"[{name}]({folder.name}/{log.name})" if log.exists() else name
        time = f"{step['seconds']:.0f} s" if step["seconds"] else ""
        reason = "; ".join(filter(None, [step["reason"], step["commit"] != commit and f"at {step['commit']}"]))
        lines.append(f"| {stage} | {linked} | {step['outcome']} | {time} | {reason} |")
    return lines


def failures(
    recorded: Mapping[str, Any], folder: Path, rows: Sequence[Row], tests: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Tests and rows of ours that failed, and the ends of the logs of steps that did."""
    failed = [f"{name}: {x['reason']}" for name, x in tests.items() if x["outcome"] == FAILED]
    # The last measurement counts where a case was measured several times.
    last = {
        (row.get("benchmark"), case_of(row), *(row[k] for k in ("implementation", "phase", "dtype"))): row
        for row in rows
    }
    ours = (
        row
        for row in last.values()
        if row["implementation"].startswith("betaclip") and row["status"].startswith("failed")
    )
    cases = dict.fromkeys(f"{case_of(row)}, {row['implementation']}, {row['phase']}: {row['status']}" for row in ours)
    lines = []
    for found in (failed, list(cases)):
        lines += [f"* {line}" for line in found[:MOST_FAILURES]]
        if len(found) > MOST_FAILURES:
            lines.append(f"* and {len(found) - MOST_FAILURES} more")
    for name, step in recorded.items():
        if step["outcome"] in (FAILED, TIMED_OUT):
            end = tail(log_of(folder, name), TAIL_LINES)
            lines += ["", f"{name}: `{step['command']}` at {step['commit']} {step['outcome']}:", "", "```", end, "```"]
    return lines


def predictions(rows: Sequence[Row], tuning: str) -> list[str]:
    """The predictions of tuning.md in whose sizes something was measured."""
    lines = []
    for form, implementation, sizes, low, high in predicted(tuning):
        wanted = {"form": form, "implementation": implementation, **MEASURED, **sizes}
        found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
        if found:
            time = float(found[-1]["time_ms_p50"])
            nearest = min(max(time, low), high)
            said = "as predicted" if time == nearest else f"{time / nearest:.2f}× the prediction"
            where = ", ".join(f"{key} = {value}" for key, value in sizes.items())
            range_ = f"{low:g}–{high:g} ms"
            lines.append(f"| {form}, {where} | {implementation} | {range_} | {in_ms(time)} | {said} |")
    return ["| case | implementation | predicted | measured | |", "|---|---|---|---|---|", *lines] if lines else []


def predicted(tuning: str) -> Iterable[tuple[str, str, dict[str, str], float, float]]:
    """Form, implementation, sizes, and the range in ms, from the table of whole losses and pooling."""
    number = r"([\d.]+)"
    pattern = rf"^\| (\w+) \| ([^|]+) \| (\w+ = [^|]+) \| {number}–{number} ms \|"
    for form, implementation, sizes, low, high in re.findall(pattern, tuning, re.MULTILINE):
        yield form, implementation, dict(size.split(" = ") for size in sizes.split(", ")), float(low), float(high)


def figures(output: Path, device: str, suffix: str, rows: Sequence[Row]) -> list[str]:
    """A table of one file's cases and its figure, folded up."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["phase"] == "forward+backward" and row["dtype"] == rows[-1]["dtype"]:
            cases.setdefault(case_of(row), {})[row["implementation"]] = row  # of several, the last counts
    lines = []
    for case, by_name in cases.items():
        ran = {name: row for name, row in by_name.items() if row["status"] == "ok"}
        ours, others = (fastest(ran, own) for own in (True, False))
        if ours:
            share = f"{float(ours['share_of_mm']):.2f}" if ours.get("share_of_mm") else ""
            ratio = f"{float(others['time_ms_p50']) / float(ours['time_ms_p50']):.2f}×" if others else ""
            lines.append(f"| {case} | {timed(ours)} | {share} | {timed(others)} | {ratio} |")
    if not lines:
        return []
    statuses = [(f"{name} {row['status']}", case) for case, by_name in cases.items() for name, row in by_name.items()]
    absent = [status for status, _ in statuses if " unavailable: " in status]
    absent += [f"{status} ({case})" for status, case in statuses if " failed: " in status]
    picture = f"{device}{suffix}.png"
    return [
        f"<details><summary>{FILES[suffix]} ({len(lines)} cases, {rows[-1]['dtype']})</summary>", "",
        "| case | betaclip | of mm | fastest other | speed-up |", "|---|---|---|---|---|", *lines, "",
        *(f"* {status}" for status in dict.fromkeys(absent)), "",
        *([f"![{FILES[suffix]}]({picture})", ""] if (output / picture).exists() else []),
        "</details>", "",
    ]  # fmt: skip


def fastest(rows: Mapping[str, Row], ours: bool) -> Row | None:
    known = [row for name, row in rows.items() if name.startswith("betaclip") == ours]
    return min(known, key=lambda row: float(row["time_ms_p50"]), default=None)


def timed(row: Row | None) -> str:
    return f"{row['implementation']}, {in_ms(float(row['time_ms_p50']))}" if row else "none ran"


def in_ms(time: float) -> str:
    return f"{time:,.0f} ms" if time >= 100 else f"{time:.3g} ms"


def case_of(row: Row) -> str:
    return ", ".join([row["form"], *(f"{key} = {row[key]}" for key in SIZES if row.get(key))])


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_typed(command: Sequence[str]) -> str:
    """A command without this machine's folders."""
    return shlex.join(["python", *(Path(x).name if Path(x).is_absolute() else x for x in command)])


def file_name(step: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", step.lower()).strip("-")


def log_of(folder: Path, step: str) -> Path:
    return folder / f"{file_name(step)}.log"


def lines_of(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []


def left_out(log: Path) -> str:
    """The line in which a benchmark says what its time limit cost; empty if it cost nothing."""
    return next((line for line in lines_of(log) if line.startswith("To stay within --minutes")), "")


def tail(log: Path, lines: int) -> str:
    """The last lines of a log that are not empty."""
    return "\n".join([line for line in lines_of(log) if line.strip()][-lines:])
