"""Runs that are killed at random, again and again, and end as a run without interruption does, bit for bit."""

import io
import multiprocessing
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.kills import WRITING, at_call, signal_at
from support.runs import STEPS, config, put_tiny, train
from support.tiny import START

from betaclip import checkpoint as checkpoints
from betaclip.training.config import TrainingConfig
from betaclip.training.log import read_metrics
from betaclip.training.trainer import Trainer

KILLS = 3
TIMES = ("images_per_s", "data_share", "peak_gib")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in processes and here, to compute alike
    put_tiny(monkeypatch.setattr)
    yield
    torch.set_num_threads(threads)


def in_child(settings: TrainingConfig, do: Callable[[int], None], files: tuple[str, ...]) -> int | None:
    def run() -> None:
        sys.stdout = io.StringIO()
        torch.set_num_threads(1)
        at_call(do, files)
        train(settings)

    child = multiprocessing.get_context(START).Process(target=run)
    child.start()
    child.join(600)  # ends only a hang
    assert child.exitcode is not None
    return child.exitcode


def outcome(run: Trainer) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """All that was logged except times, and the last checkpoint's weights."""
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run.folder / "metrics.jsonl")]
    return rows, checkpoints.read(checkpoints.checkpoint_path(run.folder, STEPS))["model"]


@pytest.mark.skipif(START != "fork", reason="the patched model and data reach a child by fork only")
@pytest.mark.parametrize("files", [("",), WRITING], ids=["anywhere", "while writing"])
def test_goes_on(tmp_path: Path, chosen: random.Random, files: tuple[str, ...]) -> None:
    counter = multiprocessing.get_context(START).Value("q", 0)

    def count(call: int) -> None:
        counter.value = call

    settings = {"checkpoint_every": 2, "log_every": chosen.choice([1, 2, 5]), "keep": chosen.choice([1, 3])}
    assert in_child(config(tmp_path, "whole", **settings), count, files) == 0
    calls = counter.value
    for _ in range(KILLS):
        number, call = chosen.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]), chosen.randint(1, calls)
        code = in_child(config(tmp_path, resume=True, **settings), signal_at(call, number), files)
        print(f"{number.name} at call {call} of {calls}: exit code {code}")
        # What is left to do may end before that call, and a signal before the run handles it ends the process.
        assert code in ((0, -number, 128 + number) if number == signal.SIGTERM else (0, -number))
        for path in checkpoints.kept(tmp_path / "run"):
            checkpoints.read(path, checkpoints.RUN_KEYS)
    resumed = train(config(tmp_path, resume=True, **settings))
    whole = Trainer(config(tmp_path, "whole", resume=True, **settings), resumed.process_group, resumed.device)
    (ours, weights), (truth, expected) = outcome(resumed), outcome(whole)
    assert ours == truth and len(truth) >= 2
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
