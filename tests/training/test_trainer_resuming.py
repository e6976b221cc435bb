"""Runs that are stopped by signals, kills and damage, and go on as if nothing had happened."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.ranks import needs_gloo, processes
from support.runs import (
    CPU,
    LOSS,
    STEPS,
    assert_same_run,
    at_step,
    averaged,
    config,
    measured,
    put_tiny,
    tiny_runs,
    train,
)
from support.steps import assert_same
from support.tiny import START, TinyDataset

from betaclip import checkpoint as checkpoints
from betaclip.data.batches import Bad, Draw, Example
from betaclip.errors import ConfigError, Stopped
from betaclip.model.beta_clip import BetaCLIP
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup
from betaclip.signals import stop_signals
from betaclip.training.config import FIXED_SETTINGS, LockConfig, LoraConfig, TrainingConfig
from betaclip.training.log import read_metrics
from betaclip.training.step import TrainStep
from betaclip.training.trainer import Evaluated, Trainer


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    with tiny_runs():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run without interruption."""
    with tiny_runs():
        return train(config(tmp_path_factory.mktemp("whole"), "whole"))


def killed(settings: TrainingConfig, step: int, number: int, group: bool) -> None:
    def kill() -> None:
        if group:  # from another process: what comes from their parent, workers take for the end of the run
            subprocess.run(["sh", "-c", f"kill -{number} -{os.getpid()}"], check=False)
        else:
            os.kill(os.getpid(), number)

    if group:
        os.setpgrp()
    TrainStep.__call__ = at_step(step, kill)  # type: ignore[method-assign]
    sys.stdout = io.StringIO()
    torch.set_num_threads(1)
    put_tiny(setattr)
    train(settings)


def kill_in_child(settings: TrainingConfig, step: int, number: int, group: bool = False) -> int | None:
    child = multiprocessing.get_context(START).Process(target=killed, args=(settings, step, number, group))
    child.start()
    child.join(600)
    return child.exitcode


@pytest.mark.parametrize("at", [3, 6])
def test_goes_on_after_a_kill(tmp_path, whole, at):
    settings = config(tmp_path, checkpoint_every=2)
    assert kill_in_child(settings, at, signal.SIGKILL) == -signal.SIGKILL
    found = checkpoints.latest(tmp_path / "run")
    assert found is not None and checkpoints.read(found)["step"] == at // 2 * 2
    resumed = train(replace(settings, run=replace(settings.run, resume=True, workers=1)))
    assert_same_run(resumed, whole)


def test_sigterm_saves_and_exits(tmp_path, whole):
    """This also holds if SIGTERM reaches all processes of the group, workers included."""
    settings = config(tmp_path, workers=1)
    assert kill_in_child(settings, 4, signal.SIGTERM, group=True) == 128 + signal.SIGTERM
    found = checkpoints.latest(tmp_path / "run")
    assert found is not None and checkpoints.read(found)["step"] == 5
    assert_same_run(train(replace(settings, run=replace(settings.run, resume=True))), whole)


def test_sigterm_within_an_interval(tmp_path, monkeypatch):
    """Means over an interval are the same, though half of its steps were before the checkpoint."""
    truth = train(config(tmp_path, "whole", log_every=3))
    settings = config(tmp_path, log_every=3)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(Stopped) as stopped:
            train(settings)
    assert stopped.value.code == 143 and "after step 5; --run.resume continues from" in stopped.value.message
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = train(replace(settings, run=replace(settings.run, resume=True)))
    assert measured(resumed) == measured(truth) and len(measured(truth)) == 3


def test_resumed_run_has_the_same_other_pictures(tmp_path, monkeypatch):
    """Bit for bit, in micro-batches and with dropout."""
    loss = replace(LOSS, conditioned_negatives=2, weights={"conditioned": 0.5})
    options = {"steps": 5, "batch_size": 6, "micro_batch_size": 3}
    truth = train(config(tmp_path, "whole", loss, **options))
    settings = config(tmp_path, loss=loss, **options)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(Stopped):
            train(settings)
    resumed = train(replace(settings, run=replace(settings.run, resume=True)))
    names = ("loss", "conditioned_loss", "leak", "norm_pool")
    ours, theirs = (
        [[row[name] for name in names] for row in read_metrics(run.folder / "metrics.jsonl")]
        for run in (resumed, truth)
    )
    assert ours == theirs and len(theirs) == 5 and all(row[1] > 0 and 0 <= row[2] <= 1 for row in theirs)
    assert all(torch.equal(a, t) for a, t in zip(resumed.model.parameters(), truth.model.parameters(), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_signal_while_data_stall(tmp_path, monkeypatch, workers):
    """The run does not wait for them: it saves what it has."""
    put_tiny(monkeypatch.setattr, StallingDataset(14))
    settings = config(tmp_path, workers=workers)
    child = multiprocessing.get_context(START).Process(target=stalled, args=(settings,))
    child.start()
    while checkpoints.latest(tmp_path / "run") is None:
        assert child.is_alive()
        time.sleep(0.05)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGUSR1)
    child.join(60)  # PyTorch alone waits some seconds for a worker
    assert child.exitcode == 128 + signal.SIGUSR1
    found = checkpoints.latest(tmp_path / "run")
    assert found is not None and 0 < checkpoints.read(found)["step"] < STEPS


class StallingDataset(TinyDataset):
    """Whose last picture never comes."""

    def __getitem__(self, draw: Draw) -> Example | Bad:
        if draw.index == self.length - 1:
            time.sleep(600)
        return super().__getitem__(draw)


def stalled(settings: TrainingConfig) -> None:
    sys.stdout = io.StringIO()
    torch.set_num_threads(1)
    put_tiny(setattr, StallingDataset(14))
    try:
        train(replace(settings, run=replace(settings.run, checkpoint_every=1)))
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()


def test_signal_in_the_last_step(tmp_path, monkeypatch, whole):
    settings = config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", at_step(STEPS - 1, lambda: os.kill(os.getpid(), signal.SIGINT)))
        with pytest.raises(Stopped) as stopped:
            train(settings)
    assert stopped.value.code == 128 + signal.SIGINT and f"stopped by SIGINT after step {STEPS};" in (
        stopped.value.message
    )
    assert_same_run(train(replace(settings, run=replace(settings.run, resume=True))), whole)


def test_signal_before_the_first_step(tmp_path, whole):
    settings = config(tmp_path)
    with pytest.raises(Stopped, match="129"), stop_signals() as signals, signals.deferred():
        os.kill(os.getpid(), signal.SIGHUP)
        train(settings)
    assert checkpoints.latest(tmp_path / "run") is None
    assert_same_run(train(replace(settings, run=replace(settings.run, resume=True))), whole)


def test_signal_during_an_evaluation(tmp_path, whole):
    """The evaluation is abandoned, and made when the run is resumed: no line of the log is lost."""
    interrupts = True

    def evaluate(model: BetaCLIP, process_group: ProcessGroup) -> Evaluated:
        torch.rand(5)
        if interrupts:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return Evaluated({"noise/choices/hard": 0.5}, "a table of noise")

    settings = config(tmp_path)
    with pytest.raises(Stopped) as stopped:
        train(settings, evaluate=evaluate, evaluate_every=4)
    assert "after step 4" in stopped.value.message
    interrupts = False
    settings = replace(settings, run=replace(settings.run, resume=True))
    run = train(settings, evaluate=evaluate, evaluate_every=4)
    rows = read_metrics(run.folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "noise/choices/hard" in row] == [4, 8]
    assert_same_run(run, whole)


def test_resumes_from_the_last_whole_checkpoint(tmp_path, whole, caplog):
    settings = config(tmp_path, resume=True, checkpoint_every=3, keep=2)
    train(replace(settings, run=replace(settings.run, resume=False)))
    last = tmp_path / "run" / "checkpoint_00000009.pt"
    last.write_bytes(last.read_bytes()[:-9])
    assert_same_run(train(settings), whole)
    assert "checkpoint_00000009.pt: " in caplog.text and "trying the checkpoint before it" in caplog.text
    # What was damaged no longer takes the place of one to keep.
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint_*"))
    assert names == ["checkpoint_00000006.pt", "checkpoint_00000009.pt", "checkpoint_00000009.pt.damaged"]


def test_only_checkpoint_is_damaged(tmp_path):
    train(config(tmp_path, steps=2))
    path = tmp_path / "run" / "checkpoint_00000002.pt"
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"^run.resume: {path}: cannot be read as a checkpoint: [^\n]*$"):
        train(config(tmp_path, resume=True))


def test_states_that_do_not_fit(tmp_path):
    """A file that is whole, with the digest of its content, and not of this run."""
    train(config(tmp_path, steps=2))
    path = tmp_path / "run" / "checkpoint_00000002.pt"
    content = checkpoints.read(path)
    for key, value in (
        ("model", {}),
        ("model", content["model"] | {"clip.logit_scale": torch.ones(3)}),
        ("optimizer", {}),
        ("optimizer", content["optimizer"] | {"state": {}}),
        ("optimizer", content["optimizer"] | {"param_groups": []}),
        ("interval", torch.ones(2, 77)),
        ("interval", torch.tensor(3.0)),
        ("random", [{}]),
        ("random", [content["random"][0] | {"torch": torch.ones(3)}]),
    ):
        checkpoints.write(path, content | {key: value}, keep=1)
        with pytest.raises(ConfigError, match=rf"^run.resume: {path} does not fit this run: [^\n]+$"):
            Trainer(config(tmp_path, resume=True), SINGLE_PROCESS, CPU)


def test_another_model_or_other_data_are_refused(tmp_path):
    train(config(tmp_path, steps=2))
    path = tmp_path / "run" / "checkpoint_00000002.pt"
    for setting in FIXED_SETTINGS:
        content = checkpoints.read(path)
        table, key = setting.split(".")
        value = content["config"][table][key]
        others = {str: "other", list: ["other"], bool: value is False}
        content["config"][table][key] = others.get(type(value), 7)
        checkpoints.write(tmp_path / "run" / "checkpoint_00000003.pt", content | {"step": 3}, keep=2)
        message = rf"^run.resume: {setting}: .* -> .* since the checkpoint, which makes it"
        with pytest.raises(ConfigError, match=message):
            Trainer(config(tmp_path, resume=True), SINGLE_PROCESS, CPU)


def test_checkpoint_of_a_version_without_a_setting(tmp_path, whole, capsys):
    """What it did not have was as it is by default."""
    settings = config(tmp_path, resume=True, checkpoint_every=3, keep=3)
    train(replace(settings, run=replace(settings.run, resume=False)))
    path, *later = sorted((tmp_path / "run").glob("checkpoint_*.pt"))
    for checkpoint in later:
        checkpoint.unlink()
    content = checkpoints.read(path)
    for table in ("lock", "lora"):
        del content["config"][table]
    del content["config"]["optimizer"]["layer_decay"]
    for group in content["optimizer"]["param_groups"]:
        del group["lr_scale"]
    checkpoints.write(path, content, keep=1)
    locked = replace(settings, lock=LockConfig(image=True))
    with pytest.raises(ConfigError, match=r"^run.resume: lock.image: False -> True since the checkpoint"):
        Trainer(locked, SINGLE_PROCESS, CPU)
    capsys.readouterr()
    assert_same_run(train(settings), whole)
    assert capsys.readouterr().out.count("changed since the checkpoint") == 1  # of run.resume


TRAINED = {
    "lock": {"lock": LockConfig(image=True, text=True, text_unlocked_layers=2)},
    "adapters": {"lora": LoraConfig(rank=2, dropout=0.1)},
    "layers": {"layer_decay": 0.5},
    "average": {"ema_decay": 0.7},
    "adapters, layers and average": {"lora": LoraConfig(rank=2), "layer_decay": 0.5, "ema_decay": 0.7},
}


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_resumes_bit_for_bit(tmp_path, monkeypatch, options):
    """Whatever is trained, with the average of the weights."""
    if "lora" in options:
        pytest.importorskip("peft", reason="needs peft, of the extra 'test'")

    def settings(name: str, **run: bool) -> TrainingConfig:
        made = config(tmp_path, name, steps=4, micro_batch_size=2, **run)
        optimizer = replace(made.optimizer, **{k: v for k, v in options.items() if k.endswith("_decay")})
        return replace(made, optimizer=optimizer, **{k: v for k, v in options.items() if not k.endswith("_decay")})

    truth = train(settings("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(Stopped):
            train(settings("run"))
    resumed = train(settings("run", resume=True))
    rows = [[row["loss"] for row in read_metrics(run.folder / "metrics.jsonl")] for run in (resumed, truth)]
    assert rows[0] == rows[1] and len(rows[0]) == 4 and len(set(rows[0])) == 4
    ours, theirs = (checkpoints.read(run.folder / "checkpoint_00000004.pt") for run in (resumed, truth))
    for key in ("model", "ema") if "ema_decay" in options else ("model",):
        assert ours[key].keys() == theirs[key].keys()
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in theirs[key]), key
    if "ema_decay" in options:
        assert any(not torch.equal(theirs["ema"][name], theirs["model"][name]) for name in theirs["ema"])


def test_checkpoint_from_before_a_setting_was_added(tmp_path):
    train(config(tmp_path, steps=2))
    path = tmp_path / "run" / "checkpoint_00000002.pt"
    content = checkpoints.read(path)
    del content["config"]["model"]["pool_add_zero_attn"]
    checkpoints.write(path, content, keep=1)
    assert Trainer(config(tmp_path, resume=True), SINGLE_PROCESS, CPU).step == 2


def test_precision_at_resume(tmp_path):
    train(config(tmp_path, steps=2))
    with pytest.raises(
        ConfigError, match=r"^run.resume: run.precision: fp32 -> fp16 since the checkpoint, which has no"
    ):
        Trainer(config(tmp_path, resume=True, precision="fp16"), SINGLE_PROCESS, CPU)
    assert train(config(tmp_path, resume=True, precision="bf16")).step == STEPS


def stopped_run_goes_on(folder: Path, how: str, other: str) -> None:
    group, settings = ProcessGroup.of(), averaged(config(folder, how, parallel=how))
    sys.stdout = io.StringIO()
    put_tiny(setattr, dropout=0.0)
    call = TrainStep.__call__
    if group.rank == 1:
        TrainStep.__call__ = at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        train(settings, group)
    TrainStep.__call__ = call  # type: ignore[method-assign]
    assert checkpoints.latest(folder / how) == folder / how / "checkpoint_00000004.pt"
    group.barrier()
    train(replace(settings, run=replace(settings.run, parallel=other, resume=True)), group)


@needs_gloo
@pytest.mark.parametrize("how, other", [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_stopped_run_goes_on_with_another_wrapper(tmp_path, monkeypatch, how, other):
    """SIGTERM to one rank stops both after the same step; what they go on to is what one process trains."""
    processes(2, stopped_run_goes_on, tmp_path, tmp_path, how, other)
    put_tiny(monkeypatch.setattr, dropout=0.0)
    whole = train(averaged(config(tmp_path, "whole"))).folder
    truth, content = (checkpoints.read(tmp_path / name / "checkpoint_00000009.pt") for name in ("whole", how))
    assert_same(content["model"], truth["model"], 1e-4)
    assert_same(content["ema"], truth["ema"], 1e-4)
    assert len(content["random"]) == 2
    ours, of_one = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / how, whole))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in of_one], rel=1e-3)
