"""The pooling benchmark measures what it says: one result everywhere, FLOP, saved bytes, rows, and what is printed."""

import importlib
import sys

import pytest
import torch
from support.paths import ROOT
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "benchmarks"))

comparison, harness, pooling_throughput, pools, smoke = map(
    importlib.import_module, ("comparison", "harness", "pooling_throughput", "pools", "smoke")
)

CPU = torch.device("cpu")
IMAGES, TEXTS, PATCHES, DIM, HEADS = SIZES = (3, 5, 7, 32, 4)


def small_batch(dtype=torch.float64):
    return pools.made_up_pool_batch(*SIZES, dtype, CPU)


def explicit_attention(q, k, v):
    """Products that the counter of FLOP sees."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


class FoldedPool(pools.PublishedPool):
    """The algebra whose products are counted: keys, values and their biases' share of the logits never exist."""

    def attend(self, patches, queries):
        x, t = (torch.nn.functional.normalize(y, dim=-1) for y in (patches, queries))
        w_q, w_k, w_v = (w.unflatten(0, (HEADS, -1)) for w in self.attn.in_proj_weight.chunk(3))
        b_q, _, b_v = (b.unflatten(0, (HEADS, 1, -1)) for b in self.attn.in_proj_bias.chunk(3))
        latent = (t[:, None] @ w_q.mT + b_q) @ w_k  # (B, H, K, D)
        weights = (latent @ x[:, None].mT * (DIM // HEADS) ** -0.5).softmax(-1)
        pooled = (weights @ x[:, None]) @ w_v.mT + b_v
        return self.attn.out_proj(pooled.transpose(1, 2).flatten(2))


PLAIN = {False: lambda: pools.ProjectedPool(DIM, HEADS, explicit_attention), True: lambda: FoldedPool(DIM, HEADS)}


@pytest.mark.parametrize("part", pools.PARTS)
@pytest.mark.parametrize("fold", [False, True])
def test_flop_formulas(fold, part):
    batch = small_batch()
    pool = pools.bound(PLAIN[fold](), part, batch)
    with FlopCounterMode(display=False) as counter:
        value = pool()
    assert counter.get_total_flops() == pools.forward_flop(part, *SIZES, fold=fold)
    torch.testing.assert_close(value, pools.published(part, batch)())


def test_least_flop_switches_where_folding_costs_more():
    per_image = 2 * (2 * 196 * 512**2 + 2 * 64 * 196 * 512 + 2 * 64 * 512**2)
    assert pools.least_flop("attention", "forward", 10, 64, 196, 512, 8) == 10 * per_image
    per_image = 2 * (2 * 8 * 6 * 196 * 512 + 4 * 6 * 512**2)
    assert pools.least_flop("attention", "forward+backward", 10, 6, 196, 512, 8) == 3 * 10 * per_image
    mlp = 2 * 8 * 6 * 512**2
    assert pools.least_flop("block", "forward", 10, 6, 196, 512, 8) == 10 * (per_image + mlp)


@pytest.mark.parametrize("part", pools.PARTS)
@pytest.mark.parametrize("name", pools.pool_implementations())
def test_implementations_compute_the_same(name, part):
    if "compiled" in name:
        pytest.skip("checked by the errors that the smoke run reports")
    batch = small_batch()
    try:
        pool = pools.pool_implementations()[name].build(part, batch)
    except harness.Unavailable as reason:
        pytest.skip(str(reason))
    incoming = torch.randn(IMAGES, TEXTS, DIM, dtype=torch.float64)
    leaves, phase = batch.leaves(part), comparison.PHASES[0]
    truth = comparison.phase_run(pools.published(part, batch), leaves, incoming, phase)()
    ours = comparison.phase_run(pool, leaves, incoming, phase)()
    assert len(ours) == 3 + (4 if part == "attention" else 10)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


def test_parameters_are_shared_and_must_agree():
    batch = small_batch()
    pool = pools.PublishedPool(DIM, HEADS)
    pools.bound(pool, "block", batch)
    assert all(x is batch.parameters[name] for name, x in pool.named_parameters())
    pool.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"\['extra.weight', 'extra.bias'\] are missing"):
        pools.bound(pool, "block", batch)


def test_saved_bytes_of_a_known_function():
    x, y = (torch.randn(10, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(20, 8, dtype=torch.float64, requires_grad=True)

    def forward():
        hidden = x @ weight[:8].T  # keeps x and a view of the parameter
        hidden = hidden * hidden  # keeps the product, twice
        return hidden[:5].exp() + y[:5]  # keeps the exponential

    beside, with_inputs = pooling_throughput.saved_bytes(forward, [weight], [x, y])
    assert beside == 8 * (10 * 8 + 5 * 8)
    assert with_inputs == beside + x.nbytes


@pytest.mark.parametrize("part", pools.PARTS)
def test_made_up_weights_make_attention_neither_flat_nor_one_hot(part):
    batch = pools.made_up_pool_batch(4, 6, 100, 256, 8, torch.float32, CPU)
    x, t = (torch.nn.functional.normalize(y.detach(), dim=-1) for y in (batch.patches, batch.queries))
    weight = batch.parameters["attn.in_proj_weight"].detach().unflatten(0, (3, 8, 32))
    q, k = (torch.einsum("bnd,hed->bhne", y, w) for y, w in ((t, weight[0]), (x, weight[1])))
    assert 0.5 < (q @ k.mT / 32**0.5).std() < 2
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in batch.leaves(part))


def measurement(name="published", path="projects", time=2.0, saved=100, texts=4):
    case = pooling_throughput.PoolCase(
        "pooling_throughput", "attention", "float32", "cpu", name, "forward+backward", 3, texts, 10, 32, 8
    )
    fields = {"path": path, "chosen": "projects", "saved_bytes": saved, "time_ms_p50": time}
    return pooling_throughput.PoolMeasurement(case, **fields)


def test_ratios_to_the_published_form():
    row = pooling_throughput.compared(measurement("x", time=0.5, saved=30), measurement())
    assert (row.speedup, row.saved_ratio) == pytest.approx((4.0, 0.3))


def test_crossover_says_what_the_choice_loses():
    measured = [
        measurement("betaclip/folded", "folds", 2.0),
        measurement("betaclip/triton", "folds", 1.0),
        measurement("betaclip/sdpa", "projects", 1.5),
        measurement("projected sdpa", "projects", 0.1),  # not ours
        measurement("betaclip/folded", "folds", 2.0, texts=8),
        measurement("betaclip/sdpa", "projects", 1.5, texts=8),
        measurement("betaclip/folded", "folds", 2.0, texts=16),  # nothing to compare with
    ]
    lines = pooling_throughput.crossover([harness.as_row(row, harness.provenance("")) for row in measured])
    assert [" ".join(line.split()) for line in lines] == [
        "attention, D = 32, P = 10, K = 4: folds 1 ms projects 1.5 ms the model projects: 1.50× the faster's time",
        "attention, D = 32, P = 10, K = 8: folds 2 ms projects 1.5 ms the model projects: 1.00× the faster's time",
    ]


def cases(*argv):
    return list(pooling_throughput.sizes(pooling_throughput.arguments(list(argv))))


def test_sizes():
    """All of the issue on a GPU; on the CPU a part of them, unless they are asked for."""
    full = {
        (part, d, p, k) for part in pools.PARTS for d in (512, 768) for p in (196, 256, 576) for k in (1, 6, 36, 64)
    }
    assert set(cases("--device", "cuda")) == full
    asked = ("--dim", "512", "768", "--patches", "196", "256", "576", "--texts", "1", "6", "36", "64")
    assert set(cases("--device", "cpu", *asked)) == full
    assert cases("--device", "cpu")[-2:] == [("block", 512, 196, 6), ("block", 512, 196, 36)]
    assert len(cases("--device", "cpu")) == 10
    assert {k for *_, k in cases("--device", "cpu", "--crossover")} == set(pooling_throughput.CROSSOVER_TEXTS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--texts", "0"], "--texts: expected at least 1, got 0"),
        (["--batch", "-1"], "--batch: expected at least 1, got -1"),
        (["--dim", "100"], "--dim: expected multiples of 8 heads, got 100"),
        (["--implementations", "nobody"], "expected some of published"),
        (["--device", "meta"], "--device: expected cpu or cuda, got meta"),
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

    chosen = {"betaclip/x": pools.PoolImplementation(broken), "published": pools.PoolImplementation(pools.published)}
    monkeypatch.setattr(pooling_throughput, "pool_implementations", lambda: chosen)
    assert pooling_throughput.main(["--smoke", "--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "failed: ValueError: no" in capsys.readouterr().out


def test_crossover_run(tmp_path, capsys):
    argv = ["--smoke", "--crossover", "--device", "cpu", "--output", str(tmp_path)]
    assert pooling_throughput.main(argv) == 0
    assert "the model " in capsys.readouterr().out
    rows = harness.read_rows(next(tmp_path.glob("*-pooling.csv")))
    assert {row["form"] for row in rows} == set(pools.PARTS)
    paths = {row["implementation"]: row["path"] for row in rows if row["status"] == "ok"}
    assert paths == {"betaclip/folded": "folds", "betaclip/sdpa": "projects"}


@pytest.mark.slow
def test_smoke_run(tmp_path):
    pytest.importorskip("matplotlib")
    rows, shown = smoke.smoke_run("pooling_throughput.py", tmp_path)
    (figure,) = tmp_path.glob("*-pooling.png")
    assert figure.read_bytes()[:4] == b"\x89PNG"
    expected = {
        (part, name, phase)
        for part in pools.PARTS
        for name in pools.pool_implementations()
        for phase in comparison.PHASES
    }
    assert len(rows) == len(expected)
    assert {(row["form"], row["implementation"], row["phase"]) for row in rows} == expected
    for row in rows:
        assert row["implementation"] in shown
        if row["status"] != "ok":
            assert row["status"].startswith("unavailable: ")
            continue
        smoke.assert_timed(row)
        assert float(row["output_error"]) < 1e-5
        both = row["phase"] == "forward+backward"
        assert both == (row["gradient_error"] != "") == (row["saved_bytes"] != "")
        if both:
            assert max(float(row[f"{what}_error"]) for what in ("gradient", "parameter")) < 1e-4
            assert float(row["saved_with_inputs_bytes"]) >= float(row["saved_bytes"]) > 0
    ran = {row["implementation"] for row in rows if row["status"] == "ok"}
    assert {"published", "projected sdpa", "projected sdpa, compiled", "betaclip/auto", "betaclip/folded"} <= ran
