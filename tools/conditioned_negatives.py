"""Measures what conditioned negatives bring: ``betaclip train`` on scenes over seeds, β, J and rates of the pool.

It writes a table of means over seeds, with standard errors. A run that is complete is not repeated and one that was
interrupted is continued, so the grid may be stopped at any time.
"""

import argparse
import hashlib
import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

COLUMNS = {
    "R@1": "retrieval/t2i_r1",
    "hard: region": "choices/hard",
    "hard: conditioned": "choices/hard_conditioned",
    "trivial: region": "choices/trivial",
    "trivial: conditioned": "choices/trivial_conditioned",
    "in the box": "pointing/mass_in_box",
    "leak": "leak/other_picture",
}
Setting = tuple[float, int, float]  # β, J, the pooling block's learning rate


def measure(folder: Path, steps: int, seed: int, weight: float, setting: Setting, rest: list[str]) -> dict[str, float]:
    """The results of one run, in percent; it is trained unless they are there."""
    beta, others, rate = setting
    name = f"{steps}-beta{beta:g}-j{others}-weight{weight if others else 0:g}-lr{rate:g}-seed{seed}"
    if rest:
        name += "-" + hashlib.sha256(" ".join(rest).encode()).hexdigest()[:8]
    if not (folder / name / "results.json").exists():
        options = {"run.folder": folder, "run.name": name, "run.steps": steps, "run.seed": seed, "loss.beta": beta}
        options |= {"loss.conditioned-negatives": others, "optimizer.pool.lr": rate}
        command = [sys.executable, "-m", "betaclip", "train", "--run.resume"]
        command += [str(part) for option, value in options.items() for part in (f"--{option}", value)]
        command += ["--loss.weights", "conditioned", str(weight)] if others else []
        subprocess.run([*command, "--run.no-compare-global", *rest], check=True)
    found = json.loads((folder / name / "results.json").read_text())["β-CLIP"]
    return {column: 100 * found[key] for column, key in COLUMNS.items()}


def table(results: dict[Setting, list[dict[str, float]]], title: str) -> str:
    lines = [
        title,
        "",
        "| " + " | ".join(["β", "J", "pool lr", "seeds", *COLUMNS]) + " |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for setting, runs in results.items():
        cells = [f"{value:g}" for value in (*setting, len(runs))]
        for column in COLUMNS:
            values = [run[column] for run in runs]
            cells.append(f"{statistics.mean(values):.1f}")
            if len(values) > 1:
                cells[-1] += f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Further options are those of betaclip train.")
    parser.add_argument("--folder", type=Path, default=Path("runs/conditioned"), help="folder of the runs")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file for the table")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.1, 0.5])
    parser.add_argument("--negatives", type=int, nargs="+", default=[0, 2, 4], help="numbers of other pictures, J")
    parser.add_argument("--pool-lrs", type=float, nargs="+", default=[1e-4, 1e-3], help="rates of the pooling block")
    parser.add_argument("--weight", type=float, default=1.0, help="weight of the term")
    chosen, rest = parser.parse_known_args(arguments)
    title = f"{chosen.steps} updates, weight {chosen.weight:g}: mean ± standard error over seeds, in %"
    title += f" ({' '.join(rest)})" if rest else ""
    results: dict[Setting, list[dict[str, float]]] = {}
    grid = itertools.product(chosen.seeds, chosen.betas, chosen.negatives, chosen.pool_lrs)
    for seed, *setting in grid:  # the first seed of all settings, then the next
        found = measure(chosen.folder, chosen.steps, seed, chosen.weight, tuple(setting), rest)
        results.setdefault(tuple(setting), []).append(found)
        chosen.output.write_text(table(results, title))


if __name__ == "__main__":
    main()
