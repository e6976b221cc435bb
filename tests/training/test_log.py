import json
import os
import sys
from unittest.mock import MagicMock

import pytest
import torch

from betaclip.errors import ConfigError, NonFiniteError, OutputError
from betaclip.training.config import RunConfig, TrainingConfig
from betaclip.training.log import Log, MetricsBuffer, line, read_metrics

CPU = torch.device("cpu")


def buffer() -> MetricsBuffer:
    some = MetricsBuffer(["loss", "norm"], ["loss"])
    for i, loss in enumerate((1.0, torch.nan, 4.0)):
        some.add(torch.tensor([loss, torch.inf if i == 1 else float(i)]), [f"picture {i}"], images=5, waited_s=0.0)
    return some


def test_metrics_buffer():
    some = buffer()
    metrics = some.means(CPU)
    assert (metrics["loss"], metrics["norm"], metrics["skipped"]) == (2.5, 1.0, 1.0)
    assert metrics["images_per_s"] > 0 and metrics["data_share"] == 0 and metrics["peak_gib"] > 0.1
    some.clear()
    assert some.read()[0].shape == (0, 2) and some.read()[1] == []


def test_metrics_buffer_names_the_step(tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"step 41 is not finite: loss nan, norm inf; rank 2's 1 images"
    ) as stopped:
        buffer().stop_if_not_finite(42, 2, tmp_path)
    assert str(stopped.value).endswith("\n  picture 1")
    saved = json.loads((tmp_path / "non_finite_rank2.json").read_text())
    assert saved["step"] == 41 and saved["paths"] == ["picture 1"]
    # A column that need not be finite stops nothing.
    some = MetricsBuffer(["loss", "norm"], ["loss"])
    some.add(torch.tensor([1.0, torch.inf]), [], 1, 0.0)
    some.stop_if_not_finite(1, 0, tmp_path)


def test_line():
    metrics = {
        "loss": 3.5, "global_loss": 1.25, "beta_cal_loss": 2.25, "logit_scale": 14.0, "pool_logit_scale": 15.0,
        "norm_backbone": 0.5, "norm_pool": 0.25, "images_per_s": 12.34, "data_share": 0.016, "peak_gib": 1.5,
        "skipped": 0.0, "epoch": 0.125, "lr_backbone": 1e-5, "lr_pool": 1e-3,
    }  # fmt: skip
    assert line(7, 90, metrics) == (
        "step 7/90  loss 3.5  global 1.25  beta_cal 2.25  scales 14 15  norms 0.5 0.25  lr 1e-05 0.001  "
        "12.3 images/s  data 2 %  peak 1.50 GiB  epoch 0.125"
    )
    assert line(7, 90, metrics | {"skipped": 2.0}).endswith("  skipped 2  epoch 0.125")


def test_log_forgets_what_comes_after_the_checkpoint(tmp_path):
    """A line that a kill or a power cut damaged is removed, too."""
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (10, 20, 30)]
    (tmp_path / "metrics.jsonl").write_text("\0\0\n" + "\n".join(lines) + '\n{"step": 40, "lo')
    log = Log(tmp_path, TrainingConfig(run=RunConfig(name="x", tensorboard=False)), steps=50, step=20)
    log.write(21, {"loss": 2.0})
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 21]
    assert read_metrics(tmp_path / "nowhere") == []


def test_curve_survives_a_failure_at_resume(tmp_path, monkeypatch):
    """The lines are rewritten aside: where that fails, those of before are there."""
    lines = "".join(json.dumps({"step": step}) + "\n" for step in (10, 20, 30))
    (tmp_path / "metrics.jsonl").write_text(lines)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
        Log(tmp_path, TrainingConfig(run=RunConfig(name="x", tensorboard=False)), steps=50, step=20)
    assert [path.read_text() for path in tmp_path.iterdir()] == [lines]


def test_results_are_logged(tmp_path, capsys):
    log = Log(tmp_path, TrainingConfig(run=RunConfig(name="x", tensorboard=False)), steps=50, step=0)
    log.write_evaluation(5, {"scenes/pointing/ratio": 2.0}, "set     ratio\nscenes  2.00")
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["scenes/pointing/ratio"] == 2.0
    out = capsys.readouterr().out
    assert out.startswith("step 5/50, evaluated\nset     ratio\nscenes  2.00\n")


def test_wandb(tmp_path, monkeypatch):
    config = TrainingConfig(run=RunConfig(name="x", tensorboard=False, wandb="project"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"run\.wandb: wandb is not installed: pip install wandb"):
        Log(tmp_path, config, 10, 0)

    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = Log(tmp_path, config, 10, 0)
    log.write(3, {"loss": 1.0})
    log.close()
    assert wandb.init.call_args.kwargs["project"] == "project" and wandb.init.call_args.kwargs["id"] == "x"
    run = wandb.init.return_value
    run.log.assert_called_once_with({"loss": 1.0}, step=3)
    run.finish.assert_called_once_with()
