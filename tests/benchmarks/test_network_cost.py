"""The model of the network: bytes as counted of the losses, limits by hand, and the table that the page has."""

from dataclasses import replace
from math import inf

import network_cost as cost
import pytest
import torch
import torch.distributed as dist
from common import losses
from common.batches import synthetic_batch
from common.comparison import Call
from common.rows import PHASES
from common.traffic import Traffic
from support.paths import ROOT
from support.ranks import processes
from support.tiny import START

BOTH, FORWARD = PHASES
FREE = cost.Link(inf, 0.0)
LINKED = cost.Machine(1e12, cost.Link(1e9, 1e-6), cost.Link(1e8, 5e-6), node=2, rails=2)


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


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("form", ["ce", "bce"])
@pytest.mark.parametrize("transport", cost.TRANSPORTS)
def test_limits_of_the_model(transport, form, phase):
    work = cost.Work(form, 8, 2304, 512, 2)
    free = cost.predict(work, transport, phase, cost.Machine(1e12, FREE, FREE, node=8))
    assert free.efficiency == pytest.approx(1)
    assert free.arithmetic_s == pytest.approx(work.flop(phase) / 1e12)
    assert cost.predict(replace(work, ranks=1), transport, phase, LINKED).efficiency == pytest.approx(1)
    beside = cost.predict(work, transport, phase, LINKED)
    assert max(beside.arithmetic_s, beside.messages_s) <= beside.time_s * (1 + 1e-9)
    assert beside.time_s <= (beside.arithmetic_s + beside.messages_s) * (1 + 1e-9)
    own = cost.predict(work, transport, phase, replace(LINKED, element_s=1e-9))
    assert own.time_s - beside.time_s == pytest.approx(2304 * 512 * 1e-9)


def test_messages_beside_arithmetic():
    """By hand: bound by arithmetic, where the first that comes and the last that goes are exposed; and by messages."""
    assert cost.gathered_s(3, 10, 1, 2) == 1 + 3 * 10 + 2
    assert cost.gathered_s(2, 1, 5, 7) == 2 * 5 + 2 * 7
    assert cost.ring_s(3, 10, 1, 2) == 3 * 10 + 2
    assert cost.ring_s(2, 1, 5, 7) == 5 + 2 * 7
    assert cost.ring_s(1, 10, 0, 0) == 10


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


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("form", ["ce", "bce"])
def test_ranks_share_the_arithmetic(form, phase):
    assert 4 * cost.Work(form, 4, 144, 64, 4).flop(phase) == losses.loss_flop(form, phase, 4 * 144, 64)


def test_the_page_has_the_table():
    assert cost.table() in (ROOT / "docs" / "network_cost_model.md").read_text(encoding="utf-8")


def losses_send_what_the_formula_says():
    ranks = dist.get_world_size()
    whole = synthetic_batch(4 * ranks, 36, 64, torch.float32, torch.device("cpu"))
    own = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    batch = whole.to_leaves(images=own)
    work = cost.Work("", ranks, 4 * 36, 64, 4)
    for form in ("ce", "bce"):
        for transport in cost.TRANSPORTS:
            loss = losses.rank_implementations()[f"betaclip/{transport}"].build(form, batch)
            for phase in PHASES:
                run = Call(lambda loss=loss: loss(batch), batch.leaves).run(phase, torch.ones(()))
                with Traffic() as seen:
                    run()
                formula = cost.sent_bytes(replace(work, form=form), transport, phase)
                assert formula <= seen.sent_bytes < formula + 16384, (form, transport, phase, seen.sent_bytes)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize("count", [2, 3])
def test_losses_send_what_the_formula_says(count, tmp_path):
    processes(count, losses_send_what_the_formula_says, tmp_path, start_method=START)
