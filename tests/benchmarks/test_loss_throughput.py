"""The benchmark measures what it says: baselines equal the loss, statistics, memory, rows, and what is printed."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from support.paths import ROOT
from torch.utils.flop_counter import FlopCounterMode

from betaclip import BetaCALLoss
from betaclip.kernels.memory import kept_bytes

sys.path.insert(0, str(ROOT / "benchmarks"))

batches, comparison, dense, harness, implementations, loss_throughput, report, smoke = map(
    importlib.import_module,
    ("batches", "comparison", "dense", "harness", "implementations", "loss_throughput", "report", "smoke"),
)

CPU = torch.device("cpu")
GOLDEN = json.loads((ROOT / "tests/golden/beta_cal.json").read_text())
DENSE = [("published", dense.PUBLISHED), ("lean", dense.LEAN)]


def small_batch(form="ce", masked=False, images=5, texts=4, dim=48):
    """float64 leaves; K = 1 for the forms of other libraries."""
    texts = texts if form in ("ce", "bce") else 1
    batch = batches.made_up_batch(images, texts, dim, torch.float64, CPU)
    if masked:
        mask = torch.arange(texts).expand(images, texts) < torch.tensor([4, 2, 1, 0, 3])[:, None]
        batch = replace(batch, mask=mask)
    return batch.to_leaves(bias=-2.0 if form == "siglip" else None)


def value_and_gradients(loss, batch):
    value = loss(batch)
    return value.detach(), *torch.autograd.grad(value, batch.leaves)


def worst_error(outputs, truth):
    return max((x - y).abs().max().item() for x, y in zip(outputs, truth, strict=True))


@pytest.mark.parametrize("case", range(len(GOLDEN["cases"])))
@pytest.mark.parametrize("table", [table for _, table in DENSE], ids=[name for name, _ in DENSE])
def test_dense_forms_give_the_published_values(table, case):
    case = GOLDEN["cases"][case]
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (GOLDEN["image"], GOLDEN["text"], case["logit_scale"])]
    leaves = [x.requires_grad_() for x in tensors]
    mask = torch.tensor(GOLDEN["masks"][case["mask_name"]]).bool()
    loss = table[case["form"]](*leaves, beta=case["beta"], alpha=case["alpha"], mask=mask)
    expected = [
        torch.tensor(case[name], dtype=torch.float64) for name in ("loss", "d_image", "d_text", "d_logit_scale")
    ]
    assert worst_error((loss, *torch.autograd.grad(loss, leaves)), expected) < 1e-9


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["ce", "bce"])
@pytest.mark.parametrize("table", [table for _, table in DENSE], ids=[name for name, _ in DENSE])
def test_dense_forms_equal_the_reference(table, form, masked):
    batch = small_batch(form, masked)
    module = BetaCALLoss(form, beta=0.3, padding="published", backend="reference")
    truth = value_and_gradients(lambda b: module(b.image, b.text, b.scale, mask=b.mask), batch)
    ours = value_and_gradients(lambda b: table[form](b.image, b.text, b.scale, beta=0.3, mask=b.mask), batch)
    assert worst_error(ours, truth) < 1e-9


@pytest.mark.parametrize(
    ("name", "form", "masked"),
    [
        (name, form, masked)
        for name, implementation in implementations.implementations().items()
        if name != "compiled"  # checked by the errors that the smoke run reports
        for form in implementation.forms
        for masked in ((False, True) if form in ("ce", "bce") else (False,))
    ],
)
def test_implementations_compute_the_same_loss(name, form, masked):
    batch = small_batch(form, masked)
    try:
        loss = implementations.implementations()[name].build(form, batch)
    except harness.Unavailable as reason:
        pytest.skip(str(reason))
    truth = value_and_gradients(implementations.reference(form, batch), batch)
    assert worst_error(value_and_gradients(loss, batch), truth) < 1e-9


def test_forms_of_one_text_are_clip_and_siglip():
    """Against the formulas of the papers, as open_clip may not be installed."""
    batch = small_batch("siglip")
    v, t = (torch.nn.functional.normalize(x.squeeze(1), dim=-1) for x in (batch.image, batch.text))
    logits, own = batch.scale * v @ t.T, torch.arange(len(v))
    clip = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    sign = 2 * torch.eye(len(v), dtype=torch.float64) - 1
    siglip = -torch.nn.functional.logsigmoid(sign * (logits + batch.bias)).sum() / len(v)
    without_bias = replace(batch, bias=None)
    assert abs(implementations.reference("clip", without_bias)(without_bias) - clip) < 1e-12
    assert abs(implementations.reference("siglip", batch)(batch) - siglip) < 1e-12


def test_flop_formulas():
    n, dim = 9216, 512
    for form, products in (("ce", 4), ("clip", 4), ("bce", 3), ("siglip", 3)):
        assert implementations.loss_flop(form, "forward", n, dim) == 2 * n * n * dim
        assert implementations.loss_flop(form, "forward+backward", n, dim) == products * 2 * n * n * dim


@pytest.mark.parametrize(("table", "products"), [(dense.PUBLISHED, 2), (dense.LEAN, 1)], ids=["published", "lean"])
@pytest.mark.parametrize("form", ["ce", "bce"])
def test_dense_forms_do_no_more_products_than_they_need(table, products, form):
    """Counted: S once or twice, and two gradients for each; beside it only what is within images."""
    batch = batches.made_up_batch(8, 3, 32, torch.float32, CPU)
    n, dim, within = 24, 32, 2 * 8 * 3 * 3 * 32
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(table[form](batch.image, batch.text, batch.scale), batch.leaves)
    excess = counter.get_total_flops() - products * 3 * 2 * n * n * dim
    assert excess == (0 if table is dense.PUBLISHED else 3 * within)


def test_memory_limit_formula():
    inputs = 2 * 9216 * 512
    assert implementations.memory_limit_bytes("cpu", 9216, 512, 4) == 2 * inputs * 4 + 64 * 2**20
    assert implementations.memory_limit_bytes("cuda", 9216, 512, 2) == 4 * inputs * 2 + 512 * 10**6


def needs_peak_memory():
    if harness.with_peak_bytes(lambda: None, CPU)[1] is None:
        pytest.skip("peak memory needs Linux's /proc/self/clear_refs")


@pytest.mark.parametrize("form", ["ce", "bce"])
@pytest.mark.parametrize("name", ["published", "dense"])
def test_memory_estimates_are_from_above_and_not_wild(name, form):
    """A run is refused by the estimate, so one that is too low would let the machine run out of memory."""
    needs_peak_memory()
    batch = batches.made_up_batch(3300, 1, 32, torch.float32, CPU)  # matrices beyond malloc's largest heap block
    implementation = implementations.implementations()[name]
    for phase in loss_throughput.PHASES:
        run = loss_throughput.runner(implementation.build(form, batch), batch, phase)
        _, peak, _ = harness.with_peak_bytes(run, CPU, seconds=0)
        assert peak <= implementation.estimated_bytes(phase, 3300, 32, 4) <= 4 * peak


def test_peak_memory_counts_temporaries_and_results():
    needs_peak_memory()
    mebi = 2**20

    def blocks(mebibytes):
        return [torch.ones(mebi) for _ in range(mebibytes // 4)]

    def run():
        result = blocks(40)
        blocks(160)  # gone again before the end
        return result

    for _ in range(2):
        fragments = blocks(400)
        fragments = fragments[::2]  # leaves holes in the heap, where what is measured next would hide
        result, peak, _ = harness.with_peak_bytes(run, CPU)
        assert len(result) == 10
        assert len(fragments) == 50
        assert 195 * mebi < peak < 220 * mebi


@pytest.mark.parametrize("form", ["ce", "bce"])
def test_peak_memory_counts_scratch_kept_between_calls(form):
    """The CPU backend keeps its tiles, so a call after the first allocates less than it uses."""
    needs_peak_memory()
    ours = {"betaclip/blockwise": implementations.implementations()["betaclip/blockwise"]}
    batch = batches.made_up_batch(64, 36, 64, torch.float32, CPU)
    compared = loss_throughput.LossComparison(form, batch, ours, "cpu")
    progress = report.Progress(2)
    rows = [compared.measure(phase, 0.01, progress, [])[0] for phase in loss_throughput.PHASES]
    kept = kept_bytes()
    tile = 4 * 768 * 2304
    assert kept > tile
    assert all(row.peak_bytes > tile for row in rows)


def test_foreign_cores_counts_other_processes_only():
    before = harness.busy_core_seconds()
    if before is None:
        pytest.skip("needs /proc/stat")
    begin = time.process_time()
    with harness.ForeignCores() as own:
        end = time.perf_counter() + 1
        while time.perf_counter() < end:
            pass
    used = time.process_time() - begin
    assert own.cores == pytest.approx(max(0, harness.busy_core_seconds() - before - used), abs=0.15)
    assert used > 0.3
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    with harness.ForeignCores() as disturbed:
        time.sleep(1.5)
    other.kill()
    other.wait()
    assert 0.3 < disturbed.cores < os.cpu_count() + 0.1


def test_percentiles():
    assert harness.percentiles([5.0]) == (5.0, 5.0, 5.0)
    assert harness.percentiles(range(101)) == pytest.approx((20.0, 50.0, 80.0))


def test_relative_error():
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert harness.relative_error(torch.tensor([1.5, -4.0]), truth) == pytest.approx(0.125)
    assert harness.relative_error(torch.tensor([torch.nan, -4.0]), truth) != 0.0


def test_rounds_are_interleaved_and_slow_runs_drop_out(monkeypatch):
    calls = []
    durations_ms = {"fast": 10.0, "middle": 40.0, "slow": 900.0}

    def fake_time_ms(run, device):
        calls.append(run())
        return durations_ms[calls[-1]]

    monkeypatch.setattr(harness, "time_ms", fake_time_ms)
    times = harness.interleave({name: lambda name=name: name for name in durations_ms}, CPU, seconds=0.3)
    assert times == {"fast": [10.0] * 10, "middle": [40.0] * 3, "slow": [900.0]}
    assert sorted(calls[:3]) == ["fast", "middle", "slow"]
    assert sorted(calls[3:5]) == sorted(calls[5:7]) == ["fast", "middle"]


def test_rounds_differ_in_order(monkeypatch):
    """Or one implementation would always find the cache as another leaves it."""
    calls = []
    monkeypatch.setattr(harness, "time_ms", lambda run, device: calls.append(run()) or 1.0)
    names = "abcdef"
    harness.interleave({name: lambda name=name: name for name in names}, CPU, seconds=0.06)
    rounds = ["".join(calls[i : i + len(names)]) for i in range(0, len(calls), len(names))]
    assert len(rounds) == 10
    assert all(sorted(order) == sorted(names) for order in rounds)
    assert len(set(rounds)) > 5


def test_a_run_that_fails_while_timed_leaves_the_others(monkeypatch):
    def broken():
        raise ValueError("no")

    times = harness.interleave({"broken": broken, "good": lambda: None}, CPU, seconds=0.01)
    assert times["broken"] == "failed: ValueError: no"
    assert len(times["good"]) >= 3


def test_matrix_rate_takes_the_fastest_median():
    times = {"a": [2.0, 1.0, 3.0], "b": [5.0], "c": "out of memory"}
    assert harness.matrix_tflops(times, n=1000, dim=500) == pytest.approx(2 * 1000**2 * 500 / 2e-3 / 1e12)


def test_share_of_the_matrix_rate():
    case = harness.Case("b", "ce", "float32", "cpu", "x", "forward")
    row = harness.Measurement(case).timed([8.0, 10.0, 12.0], flop=3e9, mm_tflops=0.6)
    assert (row.time_ms_p50, row.rounds) == (10.0, 3)
    assert row.share_of_mm == pytest.approx(0.5)  # 3e9 FLOP in 10 ms are 0.3 TFLOP/s


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (harness.Unavailable("needs a GPU"), "unavailable: needs a GPU"),
        (RuntimeError("bad\nlong story"), "failed: RuntimeError: bad"),
        (OSError("no /srv/me/secret/file here"), "failed: OSError: no ... here"),
    ],
)
def test_status_of_a_failure(error, status):
    assert harness.failure(error) == status


def test_out_of_memory_is_recognised_as_pytorch_raises_it():
    _, status = harness.attempt(lambda: torch.empty(2**58, dtype=torch.uint8))
    assert status == "out of memory"


def fake_implementations(**losses):
    return {
        name: implementations.Implementation(("ce",), lambda form, batch, loss=loss: loss, **options)
        for name, (loss, options) in losses.items()
    }


def measure(chosen, previous=(), seconds=0.01):
    batch = batches.made_up_batch(6, 4, 16, torch.float32, CPU)
    compared = loss_throughput.LossComparison("ce", batch, chosen, "cpu")
    progress = report.Progress(10)
    rows = compared.measure("forward+backward", seconds, progress, list(previous))
    progress.close()
    return {row.case.implementation: row for row in rows}


def test_out_of_memory_is_a_row():
    def good(b):
        return dense.lean_ce(b.image, b.text, b.scale)

    def greedy(b):
        return good(b) + torch.empty(2**58, dtype=torch.uint8).sum()

    def never(b):
        raise AssertionError("must be refused by its estimate")

    chosen = fake_implementations(greedy=(greedy, {}), never=(never, {"copies": (1e15, 1e15)}), good=(good, {}))
    rows = measure(chosen)
    assert rows["greedy"].status == rows["never"].status == "out of memory"
    assert rows["greedy"].time_ms_p50 is rows["never"].time_ms_p50 is None
    assert "not tried" in rows["never"].note
    assert rows["good"].status == "ok"
    assert rows["good"].gradient_error < 1e-5
    text = report.table([harness.as_row(row, harness.provenance("")) for row in rows.values()], loss_throughput.COLUMNS)
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["greedy", "never", "good"]
    assert text.count("out of memory") == 2


def test_hopeless_runs_are_skipped():
    chosen = fake_implementations(slow=(lambda b: dense.lean_ce(b.image, b.text, b.scale), {}))
    row = measure(chosen)["slow"]
    earlier = harness.as_row(replace(row, time_ms_p50=1e6), harness.provenance(""))
    assert measure(chosen, [earlier])["slow"].status == "skipped"
    assert measure(chosen, [{**earlier, "phase": "forward"}])["slow"].status == "ok"


def test_a_long_first_call_is_the_only_round(monkeypatch):
    monkeypatch.setattr(comparison, "LONG_S", 0.0)
    calls = []

    def loss(b):
        calls.append(b)
        return dense.lean_ce(b.image, b.text, b.scale)

    row = measure(fake_implementations(long=(loss, {})), seconds=0.0)["long"]
    assert (row.status, row.rounds) == ("ok", 1)
    assert row.time_ms_p50 > 0
    assert len(calls) <= 4  # to warm up, and up to three for the memory: none to time it
    calls.clear()
    row = measure(fake_implementations(short=(loss, {})), seconds=0.5)["short"]
    assert row.rounds >= 3


def test_errors_are_measured_against_float64():
    def wrong(b):
        return 1.01 * dense.lean_ce(b.image, b.text, b.scale)

    def wrong_for_texts(b):
        return dense.lean_ce(b.image, b.text, b.scale) + b.text.sum() - b.text.detach().sum()

    def rounded(b):
        return implementations.reference("ce", b)(b)

    rows = measure(fake_implementations(wrong=(wrong, {}), texts=(wrong_for_texts, {}), rounded=(rounded, {})))
    assert rows["texts"].gradient_error > 0.1
    assert max(rows["texts"].loss_error, rows["texts"].scale_error) < 1e-5
    assert 0 < rows["rounded"].gradient_error < 1e-5  # 0 if the truth were float32, too
    row = rows["wrong"]
    assert (row.loss_error, row.gradient_error, row.scale_error) == pytest.approx((0.01, 0.01, 0.01), rel=1e-3)


def test_made_up_batches_look_like_training():
    batch = batches.made_up_batch(64, 8, 512, torch.float32, CPU)
    v, t = (torch.nn.functional.normalize(x.detach(), dim=-1) for x in (batch.image, batch.text))
    cosines = torch.einsum("akd,bld->abkl", v, t)
    same_image = torch.eye(64).bool()[:, :, None, None].expand_as(cosines)
    own = same_image & torch.eye(8).bool()
    assert cosines[own].mean() == pytest.approx(0.45, abs=0.02)
    assert cosines[same_image & ~own].mean() == pytest.approx(0.2, abs=0.02)
    assert cosines[~same_image].mean() == pytest.approx(0.05, abs=0.02)
    assert batch.image.norm(dim=-1).std() > 0.1
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in batch.leaves)


def test_real_batches(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {"image_embeds": torch.randn(3, 2, 8), "text_embeds": torch.randn(3, 2, 8)}
    extra = {"mask": torch.tensor([[1, 1], [1, 0], [1, 1]]).bool(), "logit_scale": torch.tensor([20.0])}
    save_file({**tensors, **extra}, tmp_path / "a.safetensors")
    batch = batches.real_batch(tmp_path / "a.safetensors", torch.bfloat16, CPU)
    assert batch.image.dtype == torch.bfloat16
    assert torch.equal(batch.text.detach(), tensors["text_embeds"].bfloat16())
    assert torch.equal(batch.mask, extra["mask"])
    assert (batch.scale.shape, batch.scale.item(), batch.scale.dtype) == ((), 20.0, torch.float32)
    save_file({"image_embeds": tensors["image_embeds"]}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors: expected a tensor text_embeds"):
        batches.real_batch(tmp_path / "b.safetensors", torch.float32, CPU)
    save_file({**tensors, "mask": torch.ones(3)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"expected mask \(3, 2\), got \(3,\)"):
        batches.real_batch(tmp_path / "c.safetensors", torch.float32, CPU)


def test_rows_are_appended_and_columns_may_be_added(tmp_path):
    path = tmp_path / "new" / "x.csv"
    harness.append_rows(path, [{"a": "1", "b": "2,3"}])
    harness.append_rows(path, [{"a": "4", "b": "5"}])
    harness.append_rows(path, [{"a": "6", "c": "7"}])
    assert harness.read_rows(path) == [
        {"a": "1", "b": "2,3", "c": ""},
        {"a": "4", "b": "5", "c": ""},
        {"a": "6", "b": "", "c": "7"},
    ]


def test_summary_says_faster_or_slower():
    def row(name, time, peak):
        shared = {"form": "ce", "n": "96", "k": "1", "dim": "8", "dtype": "float32", "phase": "forward+backward"}
        return {**shared, "status": "ok", "implementation": name, "time_ms_p50": time, "peak_bytes": peak}

    rows = [row("dense", "30", "100"), row("compiled", "5", "10"), row("betaclip/x", "10", "20")]
    assert report.summary(rows, "betaclip/", ("dense", "compiled")) == [
        "ce, N = 96: betaclip/x is 3.00× faster and takes 5.00× less extra memory than dense",
        "ce, N = 96: betaclip/x is 2.00× slower and takes 2.00× more extra memory than compiled",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sizes", "100"], "expected multiples of K = 36 from 72 on, got 100"),
        (["--implementations", "nobody"], "expected some of published"),
        (["--embeddings", "missing.safetensors"], "--embeddings: "),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit):
        loss_throughput.arguments([*argv, "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_command_holds_no_folder_of_this_machine():
    command = comparison.command("loss_throughput", ["--output", "/srv/me/x", "--sizes", "72"])
    assert command == "python benchmarks/loss_throughput.py --output x --sizes 72"


def test_a_failure_of_ours_fails_the_run(monkeypatch, tmp_path):
    def broken(b):
        raise ValueError("no")

    chosen = fake_implementations(**{"betaclip/x": (broken, {})})
    monkeypatch.setattr(loss_throughput, "implementations", lambda: chosen)
    assert loss_throughput.main(["--smoke", "--device", "cpu", "--output", str(tmp_path)]) == 1


@pytest.mark.slow
def test_smoke_run(tmp_path):
    rows, shown = smoke.smoke_run("loss_throughput.py", tmp_path)
    table = implementations.implementations()
    expected = {
        (form, name, phase) for name, x in table.items() for form in x.forms for phase in loss_throughput.PHASES
    }
    assert len(rows) == len(expected)
    assert {(row["form"], row["implementation"], row["phase"]) for row in rows} == expected
    for row in rows:
        assert row["implementation"] in shown
        assert (row["n"], row["dim"], row["k"]) == ("96", "64", "12" if row["form"] in ("ce", "bce") else "1")
        assert row["torch"] == torch.__version__
        if row["status"] != "ok":
            assert row["status"].startswith("unavailable: ")
            continue
        middle = smoke.assert_timed(row)
        assert float(row["loss_error"]) < 1e-5
        assert (row["gradient_error"] == "") == (row["phase"] == "forward")
        flop = implementations.loss_flop(row["form"], row["phase"], 96, 64)
        assert float(row["share_of_mm"]) == pytest.approx(flop / middle / 1e9 / float(row["mm_tflops"]), rel=1e-3)
        if row["gradient_error"]:
            assert float(row["gradient_error"]) < 1e-4
            assert float(row["scale_error"]) < 1e-4
    ran = {row["implementation"] for row in rows if row["status"] == "ok"}
    assert {"published", "dense", "betaclip/blockwise"} <= ran


def test_plot_is_drawn_from_rows_alone(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    case = loss_throughput.LossCase(
        "loss_throughput", "ce", "float32", "cpu", "dense", "forward+backward", n=72, k=36, dim=64
    )
    source = harness.provenance("")
    small = loss_throughput.LossMeasurement(case, limit_bytes=9000).timed([1.0], 1e6, 1.0)
    small = replace(small, peak_bytes=5000)
    large = replace(small, case=replace(case, n=144), status="out of memory", time_ms_p50=None)
    harness.append_rows(tmp_path / "x.csv", [harness.as_row(row, source) for row in (small, large)])
    drawn = []
    close = pyplot.close
    pyplot.close = drawn.append
    try:
        drawn_where = comparison.figure(tmp_path / "x.csv", "loss_throughput", loss_throughput.draw)
    finally:
        pyplot.close = close
    assert drawn_where == f"figure: {tmp_path / 'x.png'}"
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    time_axes, memory_axes = drawn[0].axes
    assert [line.get_xydata().tolist() for line in time_axes.lines] == [[[72.0, 1.0]], [[144.0, 1.0]]]
    assert memory_axes.lines[0].get_xydata().tolist() == [[72.0, 5000 / 2**20]]
    close(drawn[0])
