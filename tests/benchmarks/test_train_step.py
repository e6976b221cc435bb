"""The benchmark of training steps measures what it says: differences, rates, every part."""

import pytest
import torch
import train_step
from common import rows, steps
from common.budget import Budget
from support.smoke import assert_drawn, assert_timed, smoke_run
from support.tiny import TOKENIZER_MODEL

from betaclip.model.beta_clip import ModelConfig, create_model


def test_difference():
    pairs = [(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0])), (torch.tensor([1.0]), torch.tensor([5.0]))]
    assert train_step.difference(pairs) == pytest.approx(1.0)


def test_rates_and_differences():
    model = create_model(ModelConfig(TOKENIZER_MODEL))
    batch = steps.synthetic_step_batch(model, 2, 3, torch.float32)
    compared = train_step.StepComparison("losses", model, batch, steps.step_implementations(), Budget(seconds=0.01))
    base, _, ours = compared.measure("forward+backward")
    for row in (base, ours):
        shown = train_step.BENCHMARK.columns["images/s"](rows.as_row(row, {}))
        assert float(shown) == pytest.approx(2 / (row.time_ms_p50 / 1e3), rel=1e-2)
        assert row.values["speedup"] == pytest.approx(base.time_ms_p50 / row.time_ms_p50)
    assert "loss_difference" not in base.values
    assert ours.values["loss_difference"] < 1e-5 and ours.values["gradient_difference"] < 1e-4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "0"], "--images: expected at least 1, got 0"),
        (["--texts", "1"], "--texts: expected at least 2, got 1"),
        (["--implementations", "nobody"], "expected some of published"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit):
        train_step.arguments(["--device", "cpu", *argv])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_smoke_run(tmp_path, monkeypatch, capfd):
    pytest.importorskip("matplotlib")
    measured, shown = smoke_run("train_step.py", tmp_path, monkeypatch, capfd, "--model", TOKENIZER_MODEL)
    assert_drawn(tmp_path)
    expected = {
        (part, name, phase) for part in steps.PARTS for name in steps.step_implementations() for phase in rows.PHASES
    }
    assert {(row["form"], row["implementation"], row["phase"]) for row in measured} == expected
    for row in measured:
        assert row["status"] == "ok" and row["implementation"] in shown
        assert_timed(row)
        assert float(row["speedup"]) > 0
        if row["implementation"] != "published":
            assert float(row["loss_difference"]) < 1e-5
        if row["form"] in ("step", "text"):
            assert int(row["tokens_computed"]) > 0 < int(row["tokens_existing"])


def test_a_step_that_failed_has_no_rate():
    assert train_step.BENCHMARK.columns["images/s"]({"images": "2", "time_ms_p50": ""}) == ""
