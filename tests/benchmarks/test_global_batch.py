"""The benchmark of the global batch measures what it says: bytes, the model and its limits, rows, what is printed."""

import importlib
import sys
from dataclasses import replace
from math import inf

import pytest
import torch
import torch.distributed as dist
from support.paths import ROOT
from support.ranks import processes

sys.path.insert(0, str(ROOT / "benchmarks"))

comparison, cost, global_batch, global_comparison, global_losses, harness, implementations, smoke, traffic = map(
    importlib.import_module,
    (
        "comparison",
        "global_batch_cost",
        "global_batch",
        "global_comparison",
        "global_losses",
        "harness",
        "implementations",
        "smoke",
        "traffic",
    ),
)

CPU = torch.device("cpu")
BOTH, FORWARD = comparison.PHASES
FREE = cost.Link(inf, 0.0)
LINKED = cost.Machine(1e12, cost.Link(1e9, 1e-6), cost.Link(1e8, 5e-6), node=2, rails=2)
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


@pytest.mark.parametrize(
    ("form", "transport", "phase", "expected"),
    [  # a shard: texts 160, numbers of images 40, statistics 40 home and 80 out, gradients 320 bytes
        ("ce", "all_gather", FORWARD, 3 * (160 + 40 + 40)),
        ("ce", "all_gather", BOTH, 3 * (160 + 40 + 40) + 3 * (80 + 320)),
        ("bce", "all_gather", FORWARD, 3 * (160 + 40)),
        ("bce", "all_gather", BOTH, 3 * (160 + 40 + 320)),
        ("ce", "ring", FORWARD, 3 * (160 + 40) + 4 * 40),
        ("ce", "ring", BOTH, 3 * (160 + 40) + 4 * 40 + 3 * (160 + 40 + 80) + 4 * 320),
        ("bce", "ring", FORWARD, 3 * (160 + 40)),
        ("bce", "ring", BOTH, 3 * (160 + 40) + 4 * 320),
    ],
)
def test_sent_bytes(form, transport, phase, expected):
    work = cost.Work(form, 4, 10, 8, 2)
    assert cost.sent_bytes(work, transport, phase) == expected
    assert cost.sent_bytes(replace(work, ranks=1), transport, phase) == 0
    reduced = 3 * 320 if transport == "all_gather" and phase == BOTH else 0
    assert cost.sent_bytes(work, transport, phase, reduction=2) == expected + reduced


@pytest.mark.parametrize("phase", comparison.PHASES)
@pytest.mark.parametrize("form", ["ce", "bce"])
def test_ranks_share_the_arithmetic(form, phase):
    assert 4 * cost.Work(form, 4, 144, 64, 4).flop(phase) == implementations.loss_flop(form, phase, 4 * 144, 64)


@pytest.mark.parametrize("phase", comparison.PHASES)
@pytest.mark.parametrize("form", ["ce", "bce"])
@pytest.mark.parametrize("transport", global_batch.TRANSPORTS)
def test_limits_of_the_model(transport, form, phase):
    work = cost.Work(form, 8, 2304, 512, 2)
    free = cost.predict(work, transport, phase, cost.Machine(1e12, FREE, FREE, node=8))
    assert free.efficiency == pytest.approx(1)
    assert free.arithmetic_s == pytest.approx(work.flop(phase) / 1e12)
    assert cost.predict(replace(work, ranks=1), transport, phase, LINKED).efficiency == pytest.approx(1)
    one_by_one = cost.predict(work, transport, phase, replace(LINKED, overlap=False))
    assert one_by_one.time_s == pytest.approx(one_by_one.arithmetic_s + one_by_one.messages_s)
    beside = cost.predict(work, transport, phase, LINKED)
    assert max(beside.arithmetic_s, beside.messages_s) <= beside.time_s * (1 + 1e-9)
    assert beside.time_s <= (beside.arithmetic_s + beside.messages_s) * (1 + 1e-9)
    own = cost.predict(work, transport, phase, replace(LINKED, element_s=1e-9))
    assert own.time_s - beside.time_s == pytest.approx(2304 * 512 * 1e-9)


def test_messages_beside_arithmetic():
    """By hand: bound by arithmetic, where the first that comes and the last that goes are exposed; and by messages."""
    assert cost._gathered_s(3, 10, 1, 2) == 1 + 3 * 10 + 2
    assert cost._gathered_s(2, 1, 5, 7) == 2 * 5 + 2 * 7
    assert cost._round_s(3, 10, 1, 2) == 3 * 10 + 2
    assert cost._round_s(2, 1, 5, 7) == 5 + 2 * 7
    assert cost._round_s(1, 10, 0, 0) == 10


def test_collectives_use_all_rails_and_a_ring_of_sends_one():
    machine = cost.Machine(1.0, cost.Link(100.0, 0.0), cost.Link(10.0, 0.0), node=8, rails=8)
    seconds = {
        kind: [cost.seconds(cost.Message(kind, 1000), ranks, machine) for ranks in (1, 8, 16)]
        for kind in ("all_gather", "reduce_scatter", "all_to_all", "send")
    }
    assert seconds["all_gather"] == seconds["reduce_scatter"] == [0, 7 * 1000 / 100, 15 * 1000 / 80]
    assert seconds["all_to_all"] == [0, 7 * 1000 / 100, 15 * 1000 / 10]
    assert seconds["send"] == [0, 1000 / 100, 1000 / 10]
    late = replace(machine, near=cost.Link(inf, 1.0), far=cost.Link(inf, 5.0), launch_s=100.0)
    assert cost.seconds(cost.Message("all_gather", 1000), 16, late) == 100 + 14 * 1 + 1 * 5
    assert cost.seconds(cost.Message("all_reduce", 8), 16, late) == 100 + 2 * (3 * 1 + 1 * 5)


def test_gpu_table():
    heading, *lines = cost.gpu_table(global_batch.TRANSPORTS).splitlines()
    assert "all_gather" in heading and "ring" in heading
    assert [line.split()[0] for line in lines] == ["8", "64", "1,024"] * 2
    # Few rows on many nodes: one ring of sends crosses between nodes on one link.
    efficiency = {
        way: cost.predict(cost.Work("ce", 64, 2304, 512, 2), way, BOTH, cost.HOPPER).efficiency
        for way in global_batch.TRANSPORTS
    }
    assert efficiency["ring"] < efficiency["all_gather"] / 2


def known_calls():
    ranks, size = dist.get_world_size(), 4 * 20000
    own, whole = torch.ones(20000), torch.ones(ranks * 20000)
    ends = (dist.get_rank() - 1) % ranks, (dist.get_rank() + 1) % ranks
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    def send():
        operations = dist.P2POp(dist.isend, own, ends[0]), dist.P2POp(dist.irecv, torch.empty_like(own), ends[1])
        for work in dist.batch_isend_irecv(list(operations)):
            work.wait()

    others = (ranks - 1) * size
    for name, call, nccl, gloo in (
        ("_allgather_base_", lambda: gather(torch.empty_like(whole), own), others, others),
        ("_reduce_scatter_base_", lambda: reduce(torch.empty_like(own), whole.clone()), others, 2 * others),
        ("alltoall_base_", lambda: dist.all_to_all_single(torch.empty_like(whole), whole), others, others),
        ("allreduce_", lambda: dist.all_reduce(whole.clone()), 2 * others, 2 * others),
        ("send", send, size, size),
    ):
        call()  # connections are made at the first
        with traffic.Traffic() as seen:
            call()
        assert seen.calls[name] == 1, (name, seen.calls)
        assert seen.nccl_bytes == pytest.approx(nccl), name
        if seen.socket_bytes is not None:
            assert gloo <= seen.socket_bytes < gloo + 4096, (name, seen.socket_bytes, gloo)


@needs_gloo
@pytest.mark.parametrize("count", [2, 3])
def test_traffic_of_known_calls(count, tmp_path):
    processes(count, known_calls, tmp_path)


def losses_send_what_the_formula_says():
    ranks = dist.get_world_size()
    whole = implementations_batch(images=4 * ranks)
    own = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    batch = type(whole)(whole.image[own], whole.text[own], whole.scale).to_leaves()
    work = cost.Work("", ranks, 4 * 36, 64, 4)
    for form in ("ce", "bce"):
        for transport in global_batch.TRANSPORTS:
            loss = global_losses.beta_cal(form, transport)
            for phase in comparison.PHASES:
                run = comparison.phase_run(lambda loss=loss: loss(batch), batch.leaves, torch.ones(()), phase)
                run()
                with traffic.Traffic() as seen:
                    run()
                for counted, reduction in ((seen.nccl_bytes, 1), (seen.socket_bytes, 2)):
                    formula = cost.sent_bytes(replace(work, form=form), transport, phase, reduction)
                    if counted is not None:
                        assert formula <= counted < formula + 16384, (form, transport, phase, reduction, counted)


def implementations_batch(images):
    return importlib.import_module("batches").made_up_batch(images, 36, 64, torch.float32, CPU)


@needs_gloo
@pytest.mark.parametrize("count", [2, 3])
def test_losses_send_what_the_formula_says(count, tmp_path):
    processes(count, losses_send_what_the_formula_says, tmp_path)


def test_rounds_may_have_another_clock():
    assert harness.interleave({"a": lambda: None}, CPU, 0.01, clock=lambda run, device: 5.0) == {"a": [5.0, 5.0]}


def row(name="betaclip/ring", ranks=1, time=8.0, **fields):
    case = global_comparison.GlobalCase(
        "global_batch", "ce", "float32", "cpu", name, BOTH, n=96, k=12, dim=64, ranks=ranks
    )
    measured = global_comparison.GlobalMeasurement(case, time_ms_p50=time, **fields)
    return harness.as_row(measured, harness.provenance(""))


def test_efficiencies():
    rows = [row(), row(ranks=2, time=5.0), row(ranks=4, time=4.0), row("open_clip", ranks=2)]
    assert global_batch.efficiencies(rows) == [
        "ce, N = 96: betaclip/ring has the efficiency 0.80 on 2, 0.50 on 4 ranks"
    ]


def test_prediction_beside_measurement():
    assert global_comparison.predicted(row(predicted_ms=10.0)) == "10 (+25%)"
    assert global_comparison.predicted(row()) == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ranks", "0"], "--ranks: expected at least 1 and at most the number of GPUs, got 0"),
        (["--sizes", "100"], "--sizes: expected multiples of 1 ranks × 36 texts, got 100"),
        (["--sizes", "72", "--ranks", "4"], "--sizes: expected multiples of 4 ranks × 36 texts, got 72"),
        (["--implementations", "nobody"], "expected some of open_clip"),
    ],
)
def test_bad_options(argv, message, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit):
        global_batch.arguments(["--device", "cpu", *argv])
    assert message in capsys.readouterr().err


@needs_gloo
@pytest.mark.slow
def test_smoke_run(tmp_path):
    pytest.importorskip("matplotlib")
    rows, shown = smoke.smoke_run("global_batch.py", tmp_path)
    (figure,) = tmp_path.glob("*-global-batch.png")
    assert figure.read_bytes()[:4] == b"\x89PNG"
    expected = {
        (form, name, phase, ranks)
        for name, loss in global_losses.global_losses().items()
        for form in loss.forms
        for phase in comparison.PHASES
        for ranks in ("1", "2")
    }
    assert len(rows) == len(expected)
    assert {(r["form"], r["implementation"], r["phase"], r["ranks"]) for r in rows} == expected
    assert "The model for H100 or H200" in shown
    for r in rows:
        assert r["implementation"] in shown
        if r["status"] != "ok":
            assert r["status"].startswith("unavailable: ") and not r["implementation"].startswith("betaclip")
            continue
        smoke.assert_timed(r)
        assert float(r["loss_error"]) < 1e-5
        assert (r["gradient_error"] != "") == (r["phase"] == BOTH)
        if r["phase"] == BOTH:
            assert float(r["gradient_error"]) < 1e-4
        if r["implementation"].startswith("betaclip"):
            assert float(r["predicted_ms"]) > 0
            assert float(r["sent_bytes"]) >= float(r["formula_bytes"])
            if r["phase"] == BOTH:  # others' scale is their own affair: Inf-CL's is the sum of all ranks'
                assert float(r["scale_error"]) < 1e-4
