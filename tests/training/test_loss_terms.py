"""A further term is a class and a line in LOSS_TERMS: settings, training and the log need no change."""

import pytest
import torch
from support.runs import config, put_tiny, train
from torch import Tensor

from betaclip.settings import read
from betaclip.training.config import LossConfig, TrainingConfig
from betaclip.training.log import read_metrics
from betaclip.training.loss_terms import LOSS_TERMS


class Length:
    needs = frozenset({"text_embeds", "logit_scale"})
    captions_only = True

    def __init__(self, config: LossConfig, several_ranks: bool) -> None:
        self.several_ranks = several_ranks

    def __call__(self, out: dict[str, Tensor]) -> Tensor:
        return out["logit_scale"] * out["text_embeds"].square().mean()


@pytest.fixture(autouse=True)
def length(monkeypatch):
    monkeypatch.setitem(LOSS_TERMS, "length", Length)
    put_tiny(monkeypatch.setattr)


def test_a_term_beside_the_others(tmp_path):
    (tmp_path / "config.toml").write_text("[loss]\nconditioned_negatives = 0\n[loss.weights]\nlength = 0.25\n")
    loss = read(TrainingConfig(), tmp_path / "config.toml").loss
    run = train(config(tmp_path, steps=2, loss=loss))
    assert read(TrainingConfig(), run.folder / "config.toml").loss == loss
    for row in read_metrics(run.folder / "metrics.jsonl"):
        assert row["loss"] == pytest.approx(row["global_loss"] + row["beta_cal_loss"] + 0.25 * row["length_loss"])


def test_a_term_alone(tmp_path):
    """It decides which texts are encoded, and which parts of the model are trained."""
    loss = LossConfig(global_weight=0.0, beta_cal_weight=0.0, weights={"length": 1.0})
    run = train(config(tmp_path, steps=2, loss=loss))
    assert run.train_step.objective.captions_only
    assert run.train_step.columns[:2] == ["loss", "length_loss"] and "norm_pool" not in run.train_step.columns
    assert run.model.logit_scale.requires_grad and not any(p.requires_grad for p in run.model.pool.parameters())
    assert torch.equal(
        *(torch.tensor([row[k] for row in read_metrics(run.folder / "metrics.jsonl")]) for k in ("loss", "length_loss"))
    )
