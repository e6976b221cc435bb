"""A rank that dies at random within a training run ends the others, and the run goes on from its last checkpoint."""

import io
import random
import signal
import sys
from pathlib import Path

import torch
from support.forkserver import HANG_S
from support.kills import at_call, signal_at
from support.ranks import needs_gloo, processes, start
from support.runs import STEPS, at_step, config, put_tiny, train

from betaclip import checkpoint as checkpoints
from betaclip.process_group import ProcessGroup
from betaclip.training.step import TrainStep

RANKS, CALLS = 2, 300  # a step makes more calls


def training(folder: Path, name: str, dies: int, step: int, call: int) -> None:
    """One rank (-1: none) kills itself at a call within a step."""
    group = ProcessGroup.of()
    sys.stdout = io.StringIO()
    put_tiny(setattr, dropout=0.0)
    if group.rank == dies:
        kill = signal_at(call, signal.SIGKILL)
        TrainStep.__call__ = at_step(step, lambda: at_call(kill))  # type: ignore[method-assign]
    train(config(folder, name, checkpoint_every=2, resume=True), group)


@needs_gloo
def test_others_end(tmp_path: Path, chosen: random.Random) -> None:
    """Whichever rank dies, in a run of its own; the runs go on side by side."""
    runs = {}
    for dies in range(RANKS):
        step, call = chosen.randrange(2, STEPS - 1), chosen.randint(1, CALLS)
        print(f"rank {dies} at call {call} of step {step}")
        (folder := tmp_path / f"first {dies}").mkdir()
        runs[dies] = start(RANKS, training, folder, tmp_path, f"run {dies}", dies, step, call)
    for dies, context in runs.items():
        for process in context.processes:
            process.join(HANG_S)
        codes = [process.exitcode for process in context.processes]
        assert codes == [-signal.SIGKILL if rank == dies else 1 for rank in range(RANKS)], codes
    contents = []
    for name in (*(f"run {dies}" for dies in range(RANKS)), "whole"):
        (folder := tmp_path / name / "again").mkdir(parents=True, exist_ok=True)
        processes(RANKS, training, folder, tmp_path, name, -1, 0, 0)
        contents.append(checkpoints.read(checkpoints.checkpoint_path(tmp_path / name, STEPS))["model"])
    *resumed, truth = contents
    for ours in resumed:
        assert ours.keys() == truth.keys() and all(torch.equal(ours[name], truth[name]) for name in truth)
