"""The pooling benchmark measures what it says: saved bytes, ratios, what the cost model's choice loses."""

from functools import partial

import pooling_throughput
import pytest
import torch
from common import pools, rows
from common.budget import Budget
from support.smoke import assert_drawn, assert_timed, smoke_run

CPU = torch.device("cpu")
run = partial(pooling_throughput.BENCHMARK.main, pooling_throughput.arguments, pooling_throughput.comparisons)


def test_saved_bytes_of_a_known_function():
    x, y = (torch.randn(10, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)

    def forward():
        hidden = x @ weight[:8].T  # keeps x and a view of the parameter
        hidden = hidden * hidden  # keeps the product, twice
        return hidden[:5].exp() + y[:5]  # keeps the exponential

    beside = pooling_throughput.saved_bytes(forward, [weight, x, y])
    assert beside == 8 * (10 * 8 + 5 * 8)


def measured(name="betaclip/x", path="projects", time="2", k="4"):
    return {
        "form": "attention",
        "dim": "32",
        "patches": "10",
        "texts": k,
        "chosen": "projects",
        "path": path,
        "implementation": name,
        "phase": "forward+backward",
        "status": "ok",
        "time_ms_p50": time,
    }


def test_crossover_says_what_the_choice_loses():
    lines = pooling_throughput.crossover(
        [
            measured("betaclip/folded", "folds", "2"),
            measured("betaclip/triton", "folds", "1"),
            measured("betaclip/sdpa", "projects", "1.5"),
            measured("projected sdpa", "projects", "0.1"),  # not ours
            measured("betaclip/folded", "folds", "2", k="8"),
            measured("betaclip/sdpa", "projects", "1.5", k="8"),
            measured("betaclip/folded", "folds", "2", k="16"),  # nothing to compare with
        ]
    )
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "attention, D = 32, P = 10, K = 4: folds 1 ms projects 1.5 ms the model projects: 1.50× the faster's time",
        "attention, D = 32, P = 10, K = 8: folds 2 ms projects 1.5 ms the model projects: 1.00× the faster's time",
    ]
    assert pooling_throughput.crossover([measured()]) == []


def test_ratios_to_the_published_form():
    chosen = {name: pools.pool_implementations()[name] for name in ("published", "betaclip/folded")}
    batch = pools.synthetic_pool_batch(3, 4, 10, 32, 4, torch.float32, CPU)
    compared = pooling_throughput.PoolComparison("attention", batch, chosen, Budget(seconds=0.01))
    base, ours = compared.measure("forward+backward")
    assert ours.values["speedup"] == pytest.approx(base.time_ms_p50 / ours.time_ms_p50)
    assert ours.values["saved_ratio"] == pytest.approx(ours.values["saved_bytes"] / base.values["saved_bytes"])
    assert base.values["speedup"] == base.values["saved_ratio"] == 1
    assert (base.values["path"], ours.values["path"]) == ("projects", "folds")


def cases(*argv):
    return list(pooling_throughput.comparisons(pooling_throughput.arguments(list(argv)), None))


def test_sizes():
    """Everything on a GPU; on the CPU a part of it, unless it is asked for."""
    full = {
        f"{part}, D = {d}, P = {p}, K = {k}"
        for part in pools.PARTS
        for d in (512, 768)
        for p in (196, 256, 576)
        for k in (1, 6, 36, 64)
    }
    assert set(cases("--device", "cuda")) == full
    sizes = ("--dim", "512", "768", "--patches", "196", "256", "576", "--texts", "1", "6", "36", "64")
    assert set(cases("--device", "cpu", "--parts", "attention", "block", *sizes)) == full
    assert len(cases("--device", "cpu")) == 8
    crossover = cases("--device", "cpu", "--crossover")
    assert {int(case.split("K = ")[1]) for case in crossover} == set(pooling_throughput.CROSSOVER_TEXTS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--texts", "0"], "--texts: expected at least 1, got 0"),
        (["--batch", "-1"], "--batch: expected at least 1, got -1"),
        (["--dim", "100"], "--dim: expected multiples of 8 heads, got 100"),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit):
        pooling_throughput.arguments(["--device", "cpu", *argv])
    assert message in capsys.readouterr().err


def test_a_failure_of_ours_fails_the_run(monkeypatch, tmp_path, capsys):
    def broken(part, batch):
        def pool():
            raise ValueError("no")

        return pool

    chosen = {"betaclip/x": broken, "published": pools.published}
    monkeypatch.setattr(pooling_throughput, "pool_implementations", lambda: chosen)
    assert run(["--smoke", "--parts", "attention", "--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "failed: ValueError: no" in capsys.readouterr().out


def test_crossover_run(tmp_path, capsys):
    argv = ["--smoke", "--crossover", "--parts", "attention", "--device", "cpu", "--output", str(tmp_path)]
    assert run(argv) == 0
    assert "the model " in capsys.readouterr().out
    measured = rows.read_rows(next(tmp_path.glob("*-pooling.csv")))
    assert {row["form"] for row in measured} == {"attention"}
    paths = {row["implementation"]: row["path"] for row in measured if row["status"] == "ok"}
    assert paths == {"betaclip/folded": "folds", "betaclip/sdpa": "projects"}


@pytest.mark.slow
def test_smoke_run(tmp_path, monkeypatch, capfd):
    pytest.importorskip("matplotlib")
    measured, shown = smoke_run("pooling_throughput.py", tmp_path, monkeypatch, capfd)
    assert_drawn(tmp_path)
    expected = {
        (part, name, phase)
        for part in pools.PARTS
        for name in pools.pool_implementations()
        for phase in rows.PHASES
        if "compiled" not in name
    }
    assert len(measured) == len(expected)
    assert {(row["form"], row["implementation"], row["phase"]) for row in measured} == expected
    for row in measured:
        assert row["implementation"] in shown
        if row["status"] != "ok":
            assert row["status"].startswith("unavailable: ")
            continue
        assert_timed(row)
        assert float(row["output_error"]) < 1e-5
        both = row["phase"] == "forward+backward"
        assert both == (row["gradient_error"] != "") == (row["saved_bytes"] != "")
        if both:
            assert max(float(row[f"{what}_error"]) for what in ("gradient", "parameter")) < 1e-4
            assert float(row["saved_bytes"]) > 0
    ran = {row["implementation"] for row in measured if row["status"] == "ok"}
    assert {"published", "projected sdpa", "betaclip/auto", "betaclip/folded"} <= ran
