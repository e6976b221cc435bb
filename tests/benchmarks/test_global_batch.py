"""The benchmark of the global batch measures what it says, on one rank and on two."""

import global_batch
import pytest
import torch.distributed as dist
from common import losses, rows
from support.smoke import assert_drawn, assert_timed, smoke_run

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ranks", "0"], "--ranks: expected at least 1, got 0"),
        (["--sizes", "100"], "--sizes: expected multiples of 1 ranks × 36 texts, got 100"),
        (["--sizes", "72", "--ranks", "4"], "--sizes: expected multiples of 4 ranks × 36 texts, got 72"),
        (["--implementations", "nobody"], "expected some of open_clip"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit):
        global_batch.arguments(["--device", "cpu", *argv])
    assert message in capsys.readouterr().err


@needs_gloo
@pytest.mark.slow
def test_smoke_run(tmp_path, monkeypatch, capfd):
    pytest.importorskip("matplotlib")
    measured, shown = smoke_run("global_batch.py", tmp_path, monkeypatch, capfd)
    assert_drawn(tmp_path)
    expected = {
        (form, name, phase, "2")
        for name, loss in losses.rank_implementations().items()
        for form in loss.forms
        for phase in rows.PHASES
    }
    assert len(measured) == len(expected)
    assert {(r["form"], r["implementation"], r["phase"], r["ranks"]) for r in measured} == expected
    for r in measured:
        assert r["implementation"] in shown
        if r["status"] != "ok":
            assert r["status"].startswith("unavailable: ") and not r["implementation"].startswith("betaclip")
            continue
        assert_timed(r)
        assert float(r["loss_error"]) < 1e-5
        assert (r["gradient_error"] != "") == (r["phase"] == "forward+backward")
        if r["phase"] == "forward+backward":
            assert float(r["gradient_error"]) < 1e-4
        if r["implementation"].startswith("betaclip"):
            assert float(r["nccl_bytes"]) > 0
            if r["phase"] == "forward+backward":  # others' scale is their own affair: Inf-CL's is the sum of all ranks'
                assert float(r["scale_error"]) < 1e-4
