"""Texts of earlier updates as negatives."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.runs import LOSS, at_step, config, put_tiny, train

from betaclip import BetaCALLoss
from betaclip.errors import ConfigError, Stopped
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup
from betaclip.training.config import LossConfig
from betaclip.training.log import read_metrics
from betaclip.training.loss_terms import BetaCALTerm
from betaclip.training.objective import Objective
from betaclip.training.step import TrainStep
from betaclip.training.text_queue import TextQueue

CPU = torch.device("cpu")


def numbered(*numbers: float) -> torch.Tensor:
    """(1, K, 2) texts of the angles ``numbers``."""
    angles = torch.tensor([numbers], dtype=torch.float64)
    return 3 * torch.stack((angles.cos(), angles.sin()), 2)


def angles(queue: TextQueue) -> list[float]:
    x, y = queue.texts[queue.valid].T
    return [round(angle, 6) for angle in torch.atan2(y, x).tolist()]


def test_holds_the_newest_valid_texts():
    queue = TextQueue(3, SINGLE_PROCESS)
    assert not queue.given(numbered(0.0))["extra_mask"].any()
    queue.add(numbered(0.1, 0.2), torch.tensor([[True, False]]), torch.tensor([[1, 2]]))
    assert angles(queue) == [0.1] and queue.texts.shape == (3, 2) and queue.ids[queue.valid].tolist() == [1]
    poisoned = numbered(0.3, 0.4, 0.5)
    poisoned[0, 1, 0] = torch.nan
    queue.add(poisoned, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[3, 4, 5]]))
    assert angles(queue) == [0.3, 0.5, 0.1]
    queue.add(numbered(0.6), torch.ones(1, 1, dtype=torch.bool), torch.tensor([[6]]))
    assert angles(queue) == [0.6, 0.3, 0.5] and queue.ids.tolist() == [6, 3, 5]
    torch.testing.assert_close(queue.texts.norm(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("size, expected", [(2, [0.1, 0.2]), (5, [0.1, 0.2, 0.3])])
def test_another_size_at_resume(size, expected):
    queue, resumed = TextQueue(3, SINGLE_PROCESS), TextQueue(size, SINGLE_PROCESS)
    queue.given(numbered(0.0))
    queue.add(numbered(0.1, 0.2, 0.3), torch.ones(1, 3, dtype=torch.bool), torch.tensor([[1, 2, 3]]))
    resumed.restore(queue.state(), CPU)
    assert angles(resumed) == expected and len(resumed.texts) == size
    assert resumed.ids[resumed.valid].tolist() == [round(10 * angle) for angle in expected]


def test_shares_are_those_of_the_ranks():
    """A state has the texts of all ranks; the same ranks take the same ones from it, one rank takes all."""
    queues = [TextQueue(5, ProcessGroup(rank, 2)) for rank in range(2)]
    for rank, queue in enumerate(queues):
        queue.given(numbered(0.0))
        new = range(3 * rank, 3 * rank + 3)
        queue.add(numbered(*(0.1 * i for i in new)), torch.ones(1, 3, dtype=torch.bool), torch.tensor([list(new)]))
    assert [angles(queue) for queue in queues] == [[0.0, 0.1], [0.3, 0.4, 0.5]]
    state = {name: torch.cat([getattr(queue, name) for queue in queues]) for name in ("texts", "valid", "ids")}
    for rank, queue in enumerate(queues):
        again = TextQueue(5, ProcessGroup(rank, 2))
        again.restore(state, CPU)
        assert angles(again) == angles(queue)
    whole = TextQueue(5, SINGLE_PROCESS)
    whole.restore(state, CPU)
    assert angles(whole) == [0.0, 0.1, 0.3, 0.4, 0.5]


def test_state_before_the_first_update():
    queue = TextQueue(5, SINGLE_PROCESS)
    queue.restore(queue.state(), CPU)
    assert len(queue.given(numbered(0.0))["extra_texts"]) == 5


@pytest.mark.parametrize("equal_texts", ["negatives", "left_out"])
@pytest.mark.parametrize("form", ["ce", "bce"])
def test_texts_of_the_last_update_are_negatives(form, equal_texts):
    """Those that equal an image's own text are none if they are left out."""
    term = BetaCALTerm(LossConfig(form=form, text_queue=5, equal_texts=equal_texts), False)
    ids = torch.tensor([[3, 4, -1], [5, 6, 3]])
    outs = []
    for _ in range(2):
        embeds = torch.randn(2, 2, 3, 8, dtype=torch.float64)
        mask = torch.tensor([[True, True, False], [True, True, True]])
        outs.append({"pooled_embeds": embeds[0], "text_embeds": embeds[1].requires_grad_(), "mask": mask})
        outs[-1]["text_ids"] = ids
        outs[-1]["pool_logit_scale"] = torch.tensor(5.0, dtype=torch.float64)
    losses = [term(out) for out in outs]
    last = F.normalize(outs[0]["text_embeds"].detach()[outs[0]["mask"]], dim=1)
    for ours, out, extra in zip(losses, outs, (None, last), strict=True):
        given = out["pooled_embeds"], out["text_embeds"], out["pool_logit_scale"]
        options = {"mask": out["mask"], "extra_texts": extra}
        if equal_texts == "left_out":
            options |= {"text_ids": ids, "extra_text_ids": None if extra is None else ids[out["mask"]]}
        torch.testing.assert_close(ours, BetaCALLoss(form)(*given, **options))


def test_resumed_run_has_the_same_texts(tmp_path: Path, monkeypatch):
    put_tiny(monkeypatch.setattr)
    loss = replace(LOSS, text_queue=20)
    truth = train(config(tmp_path, "whole", loss, steps=4))
    settings = config(tmp_path, loss=loss, steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(Stopped):
            train(settings)
    resumed = train(replace(settings, run=replace(settings.run, resume=True)))
    queue, expected = (run.train_step.objective.terms["beta_cal"].queue for run in (resumed, truth))
    assert torch.equal(queue.texts, expected.texts) and queue.valid.all()
    ours, theirs = (
        [row["beta_cal_loss"] for row in read_metrics(run.folder / "metrics.jsonl")] for run in (resumed, truth)
    )
    assert ours == theirs and len(theirs) == 4


def test_rejects():
    with pytest.raises(ConfigError, match=r"loss\.text_queue: expected at least 0, got -1"):
        Objective(LossConfig(text_queue=-1))
    with pytest.raises(ConfigError, match=r"loss\.text_queue: expected 0 without the loss term beta_cal, got 8"):
        Objective(LossConfig(text_queue=8, beta_cal_weight=0.0))
