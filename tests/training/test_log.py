import json
import logging
import os
import sys
from unittest.mock import MagicMock

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from betaclip.errors import ConfigError, NonFiniteError, OutputError
from betaclip.training.config import RunConfig, TrainingConfig, check
from betaclip.training.log import (
    LOG_FILE,
    Log,
    MetricsBuffer,
    line,
    read_metrics,
    tensorboard_name,
    write_final,
)

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
        check(config, ranks=1)

    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = Log(tmp_path, config, 10, 0)
    log.write(3, {"loss": 1.0})
    log.close()
    assert wandb.init.call_args.kwargs["project"] == "project" and wandb.init.call_args.kwargs["id"] == "x"
    run = wandb.init.return_value
    run.log.assert_called_once_with({"loss": 1.0}, step=3)
    run.finish.assert_called_once_with()


def test_what_is_said_is_in_the_log_file(tmp_path, capsys):
    """With the time to go, and warnings; a resumed run adds to it."""
    log = Log(tmp_path, TrainingConfig(run=RunConfig(name="x", tensorboard=False)), steps=50, step=20)
    log._begin -= 30  # seconds for 10 steps
    log.write(30, {"loss": 2.0})
    logging.getLogger("betaclip.data").warning("skipped %s", "a.png")
    log.write(50, {"loss": 1.0})
    log.close()
    logging.getLogger("betaclip.data").warning("skipped b.png")
    lines = ["step 30/50  loss 2  01:00 to go", "skipped a.png", "step 50/50  loss 1"]
    assert (tmp_path / LOG_FILE).read_text().splitlines() == lines
    assert capsys.readouterr().out.splitlines() == [lines[0], lines[2]]
    log = Log(tmp_path, TrainingConfig(run=RunConfig(name="x", tensorboard=False)), steps=50, step=20)
    log.say("more")
    log.close()
    assert (tmp_path / LOG_FILE).read_text().splitlines() == [*lines, "more"]


def test_tensorboard(tmp_path):
    """Names with sections, the settings, pictures, and final results by which runs are compared."""
    config = TrainingConfig(run=RunConfig(name="x"))
    log = Log(tmp_path, config, steps=50, step=0)
    log.write(10, {"loss": 2.0, "beta_cal_loss": 1.0, "lr_pool": 0.5, "pool_logit_scale": 3.0, "peak_gib": 1.0})
    figure = Figure((1, 0.5), dpi=20)
    log.write_evaluation(10, {"scenes/retrieval/R@1": 0.5}, "table", {"attention/scene_0": figure})
    log.close()
    write_final(tmp_path, config, {"scenes/retrieval/R@1": 0.75})
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    names = {"loss/loss", "loss/beta_cal", "optim/lr_pool", "optim/pool_logit_scale", "speed/peak_gib"}
    assert names | {"scenes/retrieval/R@1", "final/scenes/retrieval/R@1"} <= set(tags["scalars"])
    assert events.Scalars("final/scenes/retrieval/R@1")[0].value == 0.75
    (image,) = events.Images("attention/scene_0")
    assert (image.width, image.height, image.step) == (20, 10, 10)
    (settings,) = events.Tensors("settings/text_summary")
    assert (
        b"[loss]" in settings.tensor_proto.string_val[0] and b"batch_size = 32" in settings.tensor_proto.string_val[0]
    )
    assert set(events.summary_metadata) >= {"_hparams_/experiment", "_hparams_/session_start_info"}
    assert tensorboard_name("skipped") == "run/skipped" and tensorboard_name("norm_text") == "optim/norm_text"
