"""The grid's table and which runs it starts; the runs themselves are replaced by one that writes known results."""

import json
from pathlib import Path

import pytest
import tyro
from support.paths import ROOT
from support.programs import load_program

from betaclip.train import TrainConfig

conditioned_negatives = load_program(ROOT / "tools" / "conditioned_negatives.py")


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    started: list[list[str]] = []

    def run(command: list[str], check: bool) -> None:
        started.append(command)
        given = dict(zip(command[5::2], command[6::2], strict=False))
        folder = Path(given["--run.folder"], given["--run.name"])
        folder.mkdir(parents=True)
        share = 0.5 + 0.1 * int(given["--run.seed"]) + float(given["--loss.beta"])
        values = dict.fromkeys(conditioned_negatives.COLUMNS.values(), share)
        (folder / "results.json").write_text(json.dumps({"β-CLIP": values}))

    monkeypatch.setattr(conditioned_negatives.subprocess, "run", run)
    return started


def test_table(tmp_path, commands):
    """Means, their standard errors, and no run twice."""
    output = tmp_path / "table.md"
    options = ["--folder", str(tmp_path / "runs"), "--output", str(output), "--steps", "7", "--weight", "0.5"]
    options += ["--seeds", "0", "1", "2", "--betas", "0", "0.2", "--negatives", "0", "4", "--pool-lrs", "1e-4"]
    for _ in range(2):
        conditioned_negatives.main(options)
        lines = output.read_text().splitlines()
        assert lines[0] == "7 updates, weight 0.5: mean ± standard error over seeds, in %"
        assert [line.split(" | ")[:5] for line in lines[4:]] == [
            ["| 0", "0", "0.0001", "3", "60.0 ± 5.8"],
            ["| 0", "4", "0.0001", "3", "60.0 ± 5.8"],
            ["| 0.2", "0", "0.0001", "3", "80.0 ± 5.8"],
            ["| 0.2", "4", "0.0001", "3", "80.0 ± 5.8"],
        ]
        assert {line.count("|") for line in lines[2:]} == {len(conditioned_negatives.COLUMNS) + 5}
        assert len(commands) == 12


def test_one_seed_has_no_error(tmp_path, commands):
    options = ["--betas", "0.1", "--negatives", "2", "--pool-lrs", "1e-3", "--seeds", "1", "--model.no-pool-identity"]
    conditioned_negatives.main(["--folder", str(tmp_path), "--output", str(tmp_path / "x.md"), *options])
    assert (tmp_path / "x.md").read_text().splitlines()[-1].startswith("| 0.1 | 2 | 0.001 | 1 | 70.0 | 70.0 |")
    config = tyro.cli(TrainConfig, args=commands[0][4:])
    assert (config.loss.beta, config.loss.conditioned_negatives, config.loss.weights) == (0.1, 2, {"conditioned": 1.0})
    assert (config.run.steps, config.run.seed, config.run.resume, config.run.compare_global) == (300, 1, True, False)
    assert config.optimizer.pool.lr == 1e-3 and not config.model.pool_identity
