"""The loss benchmark measures what it says, and says what it could not measure."""

from functools import partial

import loss_throughput
import pytest
import torch
from common import batches, dense_losses, harness, losses, report, rows
from common.budget import Budget
from common.session import RESULTS
from support.smoke import assert_drawn, assert_timed, smoke_run

from betaclip.kernels.memory import kept_bytes

CPU = torch.device("cpu")


def fake_implementations(**fakes):
    return {
        name: losses.Implementation(("ce",), lambda form, batch, loss=loss, keep=0: loss, **options)
        for name, (loss, options) in fakes.items()
    }


def measure(chosen, budget=None):
    batch = batches.synthetic_batch(6, 4, 16, torch.float32, CPU)
    compared = loss_throughput.LossComparison("ce", batch, chosen, budget or Budget(seconds=0.01))
    compared.clock = lambda run, device: (run(), 1.0)[1]  # ms
    measured = compared.measure("forward+backward")
    return {row.implementation: row for row in measured}


def lean(b):
    return dense_losses.lean_ce(b.image, b.text, b.scale)


def test_out_of_memory_is_a_row():
    def greedy(b):
        return lean(b) + torch.empty(2**58, dtype=torch.uint8).sum()

    def never(b):
        raise AssertionError("must be refused by its estimate")

    chosen = fake_implementations(greedy=(greedy, {}), never=(never, {"copies": 10**15}), good=(lean, {}))
    measured = measure(chosen)
    assert measured["greedy"].status == measured["never"].status == "out of memory"
    assert measured["greedy"].time_ms_p50 is measured["never"].time_ms_p50 is None
    assert "not tried" in measured["never"].note
    assert measured["good"].status == "ok"
    assert measured["good"].values["gradient_error"] < 1e-5
    text = report.table([rows.as_row(row, {}) for row in measured.values()], report.LOSS_ERRORS)
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["good", "greedy:", "never:"]
    assert text.count("out of memory") == 2


def test_what_is_refused_is_a_row():
    budget = Budget(minutes=1)
    budget.record(("ce", "slow", "forward+backward"), 1e9, call_s=1e9, spent_s=1e9)
    row = measure(fake_implementations(slow=(lean, {})), budget)["slow"]
    assert (row.status, row.rounds) == ("skipped", 0)
    assert "expected" in row.note


def test_a_long_first_call_is_the_only_round():
    calls = []

    def loss(b):
        calls.append(b)
        return lean(b)

    budget = Budget(minutes=1e-9, seconds=0.0, clock=lambda: 0.0)  # its calls are long from 6e-11 s on
    row = measure(fake_implementations(long=(loss, {})), budget)["long"]
    assert (row.status, row.rounds) == ("ok", 1)
    assert row.time_ms_p50 > 0
    assert len(calls) <= 4  # to warm up, and up to three for the memory: none to time it
    row = measure(fake_implementations(short=(loss, {})), Budget(seconds=0.04))["short"]
    assert (row.time_ms_p50, row.rounds) == (1.0, 10)  # its share, one of four, in rounds of 1 ms


def test_errors_are_measured_against_float64():
    def wrong(b):
        return 1.01 * lean(b)

    def wrong_for_texts(b):
        return lean(b) + b.text.sum() - b.text.detach().sum()

    def rounded(b):
        return losses.reference("ce", b)(b)

    measured = measure(fake_implementations(wrong=(wrong, {}), texts=(wrong_for_texts, {}), rounded=(rounded, {})))
    texts, wrong_row, rounded_row = (measured[name].values for name in ("texts", "wrong", "rounded"))
    assert texts["gradient_error"] > 0.1
    assert max(texts["loss_error"], texts["scale_error"]) < 1e-5
    assert 0 < rounded_row["gradient_error"] < 1e-5  # 0 if the truth were float32, too
    errors = tuple(wrong_row[f"{what}_error"] for what in ("loss", "gradient", "scale"))
    assert errors == pytest.approx((0.01, 0.01, 0.01), rel=1e-3)


@pytest.mark.parametrize("form", ["ce", "bce"])
def test_peak_memory_counts_scratch_kept_between_calls(form):
    """The CPU backend keeps its tiles, so a call that is measured must not find those of the call before."""
    batch = batches.synthetic_batch(21, 36, 16, torch.float32, CPU)  # more than one matrix holds
    loss = losses.implementations()["betaclip/blockwise"].build(form, batch)
    found = []

    def run():
        found.append(kept_bytes())
        return loss(batch)

    run()
    assert kept_bytes() > 0
    harness.with_peak_bytes(run, CPU, seconds=0)
    assert found[-1] == 0 and kept_bytes() > 0


def test_bound():
    inputs = 2 * 9216 * 512
    row = {"n": "9216", "dim": "512", "dtype": "float32", "device": "cpu-2x"}
    assert loss_throughput.bound_bytes(row) == 2 * inputs * 4 + 96 * 2**20
    assert loss_throughput.bound_bytes({**row, "budget_bytes": "1000"}) == 2 * inputs * 4 + 96 * 2**20 + 1000
    gpu = {**row, "dtype": "bfloat16", "device": "nvidia-h100"}
    assert loss_throughput.bound_bytes(gpu) == 4 * inputs * 2 + 512 * 10**6


def test_recorded_rows_of_ours_keep_the_bound():
    recorded = rows.read_rows(RESULTS / "cpu-2x-intel-xeon-processor.csv")
    ours = [row for row in recorded if row["implementation"] == "betaclip/blockwise"]
    assert ours and all(float(row["peak_bytes"]) <= loss_throughput.bound_bytes(row) for row in ours)


def made(*argv):
    return list(loss_throughput.comparisons(loss_throughput.arguments(["--device", "cpu", *argv]), None))


def test_sizes_ascend_over_all_forms_and_small_ones_are_among_them():
    """A limit of time then leaves out the largest, not a form."""
    names = made()
    sizes = [int(name.split("= ")[1]) for name in names]
    assert sizes == sorted(sizes)
    assert {"clip, N = 96", "siglip, N = 288", "ce, N = 108", "bce, N = 288", "ce, N = 9216"} <= set(names)
    assert made("--forms", "bce", "clip", "--sizes", "72") == ["bce, N = 72", "clip, N = 72"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sizes", "100"], "expected multiples of K = 36 from 72 on, got 100"),
        (["--implementations", "nobody"], "expected some of published"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit):
        loss_throughput.arguments([*argv, "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_a_failure_of_ours_fails_the_run(monkeypatch, tmp_path):
    def broken(b):
        raise ValueError("no")

    chosen = fake_implementations(**{"betaclip/x": (broken, {}), "compiled": (lean, {})})
    monkeypatch.setattr(loss_throughput, "implementations", lambda: chosen)
    run = partial(loss_throughput.BENCHMARK.main, loss_throughput.arguments, loss_throughput.comparisons)
    assert run(["--smoke", "--device", "cpu", "--output", str(tmp_path)]) == 1


@pytest.mark.slow
def test_smoke_run(tmp_path, monkeypatch, capfd):
    pytest.importorskip("matplotlib")
    measured, shown = smoke_run("loss_throughput.py", tmp_path, monkeypatch, capfd)
    assert_drawn(tmp_path)
    table = {name: x for name, x in losses.implementations().items() if name != "compiled"}
    expected = {(form, name, phase) for name, x in table.items() for form in x.forms for phase in rows.PHASES}
    assert len(measured) == len(expected)
    assert {(row["form"], row["implementation"], row["phase"]) for row in measured} == expected
    for row in measured:
        assert row["implementation"] in shown
        assert (row["n"], row["dim"], row["k"]) == ("96", "64", "12" if row["form"] in ("ce", "bce") else "1")
        assert row["torch"] == torch.__version__
        if row["status"] != "ok":
            assert row["status"].startswith("unavailable: ")
            continue
        middle = assert_timed(row)
        assert float(row["loss_error"]) < 1e-5
        assert (row["gradient_error"] == "") == (row["phase"] == "forward")
        ours = row["implementation"].startswith("betaclip")
        assert (row["budget_bytes"] or "0") == (str(256 * 2**20) if ours and row["form"] in ("ce", "clip") else "0")
        flop = losses.loss_flop(row["form"], row["phase"], 96, 64, 96 * 96)
        assert float(row["share_of_mm"]) == pytest.approx(flop / middle / 1e9 / float(row["mm_tflops"]), rel=1e-3)
        if row["gradient_error"]:
            assert float(row["gradient_error"]) < 1e-4
            assert float(row["scale_error"]) < 1e-4
    ran = {row["implementation"] for row in measured if row["status"] == "ok"}
    assert {"published", "dense", "betaclip/blockwise"} <= ran
