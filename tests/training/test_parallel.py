"""Training on several ranks. One pair of processes does everything, and asserts there: they may be slow
to start."""

import io
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import test_gradient_cache as caching
import test_step as steps
import test_trainer as runs
import torch
import torch.distributed as dist
from support.ranks import processes
from support.tiny import tiny_batch, tiny_model
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from betaclip import BetaCALLoss
from betaclip import checkpoint as checkpoints
from betaclip.data.batches import Batch
from betaclip.errors import ConfigError, Stopped
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup
from betaclip.training import parallel
from betaclip.training.log import read_metrics
from betaclip.training.optimizers import create_optimizer
from betaclip.training.step import TrainStep, create_objective

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


def everything(folder: Path) -> None:
    sys.stdout = io.StringIO()
    group = ProcessGroup.of()
    cached_backward_equals_one_process(group)
    updates_equal_one_process(group)
    losses_of_each_rank_are_averaged(group)
    fully_sharded_gradients_wait(group)
    stopped_runs_go_on(group, folder)


def cached_backward_equals_one_process(group: ProcessGroup) -> None:
    whole = caching.batch()
    torch.manual_seed(1)
    model = caching.Model().double().eval()
    other = caching.Model().double().eval()
    other.load_state_dict(model.state_dict())
    caching.objective(model(whole)).backward()
    wrapped = DistributedDataParallel(other)
    image, text = (t[:5] if group.is_first else t[5:] for t in whole)
    reduced = []

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reduced.append(bucket.index())
        return allreduce_hook(dist.group.WORLD, bucket)

    def loss(out: dict[str, Tensor]) -> Tensor:
        return BetaCALLoss(gather=True)(out["image"], out["text"], out["scale"], mask=out["mask"])

    wrapped.register_comm_hook(None, count)
    micro_batches = caching.split((image, text), [[2, 1, 2], [1, 0, 1]][group.rank])
    caching.cached_backward(wrapped, micro_batches, loss, no_sync=wrapped.no_sync)
    assert reduced == [0]
    for a, t in zip(caching.gradients(other), caching.gradients(model), strict=True):
        torch.testing.assert_close(a, t, atol=1e-13, rtol=0)


CASES = [("ddp", "whole"), ("ddp", "cached"), ("ddp", "empty"), ("fsdp", "cached"), ("fsdp", "empty")]


def updates_equal_one_process(group: ProcessGroup) -> None:
    """Two updates of a batch of 7 on 2 ranks, of which one may have nothing left, against one process."""
    for how, case in CASES:
        whole = steps.double(tiny_batch(7))
        part = whole.of_images(7 * group.rank // 2, 7 * (group.rank + 1) // 2)
        if case == "empty":  # all of the second rank's part was bad
            whole = whole.of_images(0, 3)
            if group.rank == 1:
                part = Batch(torch.empty(0, 3, 0, 0, dtype=torch.float64), whole.texts.of_images(0, 0), [], [])
        model, settings = (
            tiny_model().double(),
            steps.config(parallel=how, micro_batch_size=2 if case == "cached" else None),
        )
        wrapped = parallel.wrap(model, settings.run.parallel, group)
        objective, optimizer = create_objective(settings, group), create_optimizer(model, settings.optimizer)
        update = TrainStep(model, wrapped, objective, optimizer, settings, group, 10)
        rows = [update(part, step, 7) for step in range(2)]
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if group.is_first:
            one = tiny_model().double()
            alone = steps.create_update(one, steps.config())
            truth = [alone(whole, step, 7) for step in range(2)]
            steps.assert_same(state, one.state_dict(), 1e-11)
            torch.testing.assert_close(torch.stack(rows), torch.stack(truth), atol=2e-6, rtol=0)
        dist.barrier()


def losses_of_each_rank_are_averaged(group: ProcessGroup) -> None:
    """β-CAL of the rank's own images as published, while the global loss is of all."""
    whole, settings = steps.double(tiny_batch(7)), steps.config()
    settings = replace(settings, loss=replace(settings.loss, gather="false"))
    parts = [whole.of_images(0, 3), whole.of_images(3, 7)]
    model = tiny_model().double()
    wrapped, objective = parallel.wrap(model, "ddp", group), create_objective(settings, group)
    update = TrainStep(model, wrapped, objective, create_optimizer(model, settings.optimizer), settings, group, 10)
    row = dict(zip(update.columns, update(parts[group.rank], 0, 7).tolist(), strict=True))
    alone, one = create_objective(steps.config(), SINGLE_PROCESS), tiny_model().double()
    of_parts = [alone(one(part.images, part.texts))["beta_cal_loss"].item() for part in parts]
    assert row["beta_cal_loss"] == pytest.approx(sum(of_parts) / 2)
    assert row["global_loss"] == pytest.approx(alone(one(whole.images, whole.texts))["global_loss"].item())


def fully_sharded_gradients_wait(group: ProcessGroup) -> None:
    """Within no_sync, nothing is reduced."""
    batch, model = tiny_batch(3), tiny_model()
    wrapped = parallel.wrap(model, "fsdp", group)
    for waits in (True, False):
        with parallel.no_sync(wrapped) if waits else nullcontext():
            wrapped(batch.images, batch.texts)["pooled_embeds"].sum().backward()
        gradients = [p.grad for p in model.pool.parameters() if p.dim()]
        assert all((gradient is None) is waits for gradient in gradients)


def stopped_runs_go_on(group: ProcessGroup, folder: Path) -> None:
    """SIGTERM to one rank stops both after the same step; either wrapper goes on from the other's checkpoint."""
    runs.put_tiny(setattr, dropout=0.0)
    settings, call = runs.config(folder), TrainStep.__call__
    for how, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
        if group.rank == 1:
            TrainStep.__call__ = runs.at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))  # type: ignore[method-assign]
        run = replace(settings.run, name=how, parallel=how)
        with pytest.raises(Stopped):
            runs.train(replace(settings, run=run), group)
        TrainStep.__call__ = call  # type: ignore[method-assign]
        assert checkpoints.latest(folder / how) == folder / how / "checkpoint_00000004.pt"
        dist.barrier()
        runs.train(replace(settings, run=replace(run, parallel=other, resume=True)), group)


def test_ranks(tmp_path, monkeypatch):
    processes(2, everything, tmp_path, tmp_path, timeout_s=600)
    runs.put_tiny(monkeypatch.setattr, dropout=0.0)
    whole = runs.train(runs.config(tmp_path, "whole")).folder
    truth = checkpoints.read(whole / "checkpoint_00000009.pt")
    for how in ("ddp", "fsdp"):
        content = checkpoints.read(tmp_path / how / "checkpoint_00000009.pt")
        steps.assert_same(content["model"], truth["model"], 1e-4)
        assert len(content["random"]) == 2
        ours, of_one = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / how, whole))
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in of_one], rel=1e-3)


def test_fsdp_needs_torchrun():
    with pytest.raises(ConfigError, match=r"run.parallel: fsdp needs torchrun"):
        parallel.wrap(tiny_model(), "fsdp", SINGLE_PROCESS)
