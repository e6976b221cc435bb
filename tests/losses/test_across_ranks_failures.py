"""What losses over several ranks refuse, and ranks that disagree or die."""

import os
import threading
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.batches_of_ranks import SCALE, D, K, own_part, whole_batch
from support.forkserver import HANG_S
from support.ranks import processes, start

from betaclip import BetaCALLoss, ClipLoss, SigLipLoss, beta_cal_ce_loss
from betaclip.losses.across_ranks import TRANSPORTS

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


def second_derivative_raises() -> None:
    image, text, _ = whole_batch((1, 1))
    part = own_part((1, 1))
    leaf = image[part].requires_grad_()
    loss = BetaCALLoss(gather=True)(leaf, text[part], torch.tensor(5.0, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_second_derivative_raises(tmp_path):
    processes(2, second_derivative_raises, tmp_path)


def ranks_disagree() -> None:
    """All ranks raise an error instead of waiting for each other."""
    image, text, _ = whole_batch((1, 1))
    part, rank = own_part((1, 1)), dist.get_rank()
    leaf = image[part].clone().requires_grad_()
    for transport in TRANSPORTS:
        loss = BetaCALLoss(gather=transport)
        with pytest.raises(RuntimeError, match=r"different losses: D: \[8, 6\] by rank"):
            loss(*(t[part, :, : 8 - 2 * rank] for t in (image, text)), SCALE)
        with pytest.raises(RuntimeError, match=r"different losses: dtype: .*float64.*float32"):
            loss(*(t[part].to((torch.float64, torch.float32)[rank]) for t in (image, text)), SCALE)
        with (
            pytest.raises(RuntimeError, match=r"different losses: a gradient is wanted: \[1, 0\] by rank"),
            torch.set_grad_enabled(rank == 0),
        ):
            loss(leaf, text[part], SCALE)
        given = image[part], text[part], SCALE
        bias = torch.tensor(1.0, dtype=torch.float64)
        for name, values, own, options in (
            ("form", "ce, bce", BetaCALLoss(("ce", "bce")[rank], gather=transport), {}),
            ("padding", "published, ignore", BetaCALLoss(padding=("published", "ignore")[rank], gather=transport), {}),
            ("bias", "True, False", BetaCALLoss("bce", gather=transport), {"logit_bias": (bias, None)[rank]}),
            ("gather", "all_gather, ring", BetaCALLoss("bce", gather=TRANSPORTS[rank]), {}),
            ("conditioned", "True, False", loss, {"conditioned_negatives": (torch.ones(1, K, 2), None)[rank]}),
            ("reduction", "none, mean", BetaCALLoss(reduction=("none", "mean")[rank], gather=transport), {}),
            ("smoothed", "True, False", BetaCALLoss(label_smoothing=(0.1, 0.0)[rank], gather=transport), {}),
            ("weighted", "True, False", loss, {"weights": (torch.ones(1, K), None)[rank]}),
            ("extra", "True, False", loss, {"extra_texts": (torch.ones(3, D), None)[rank]}),
            (r"dims \(checksums\)", r"\d+, \d+", BetaCALLoss(dims=((D, 4), (D, 3))[rank], gather=transport), {}),
            ("text_ids", "True, False", loss, {"text_ids": (torch.ones(1, K).long(), None)[rank]}),
        ):
            with pytest.raises(RuntimeError, match=rf"gather: .*different losses: {name}: \[{values}\] by rank"):
                own(*given, **options)
        one = image[part, 0], text[part, 0], SCALE
        with pytest.raises(RuntimeError, match=r"different losses: loss: \[ClipLoss, BetaCALLoss\] by rank"):
            ClipLoss(gather=transport)(*one) if rank == 0 else loss(*given)
    torch.testing.assert_close(
        loss(*given), BetaCALLoss(gather=False)(image, text, SCALE)
    )  # nothing is left in the way


def test_ranks_disagree(tmp_path):
    processes(2, ranks_disagree, tmp_path)


def one_rank_fails(transport: str, fails: str) -> None:
    image, text, _ = whole_batch((1, 1, 1))
    part = own_part((1, 1, 1))
    if dist.get_rank() == 1 and fails == "dies":
        os._exit(7)  # as if killed
    leaf = image[part].clone().requires_grad_()
    # All ranks are up, and have little to do: this limit ends only the wait for a rank that does not come.
    group = dist.new_group(timeout=timedelta(seconds=10)) if fails != "dies" else None
    loss = BetaCALLoss(gather=transport, process_group=group)(leaf, text[part], SCALE)
    if dist.get_rank() == 1:
        threading.Event().wait()  # until the test kills this process
    loss.backward()


def test_rank_that_fails_leaves_no_hang(tmp_path):
    """The others raise, by the lost connection or the group's timeout, and say what they were waiting for."""
    contexts = {}
    for transport, fails in product(TRANSPORTS, ("dies", "stays away from the backward")):  # they wait side by side
        (folder := tmp_path / f"{transport} {fails}").mkdir()
        contexts[transport, fails] = start(3, one_rank_fails, folder, transport, fails)
    for (transport, fails), context in contexts.items():
        waiting = [context.processes[rank] for rank in (0, 2)]
        for process in waiting:
            process.join(HANG_S)
        context.processes[1].kill()
        assert [process.exitcode for process in waiting] == [1, 1], (transport, fails)
        for rank in (0, 2):
            message = Path(context.error_files[rank]).read_bytes().decode(errors="replace")
            expected = f"gather='{transport}', rank {rank} of 3: another rank failed, or did not call the same loss"
            assert expected in message, message


def test_needs_a_process_group():
    x = torch.ones(2, K, D)
    with pytest.raises(RuntimeError, match="gather=True: no process group is initialised"):
        BetaCALLoss(gather=True)(x, x, torch.tensor(1.0))


def test_rejects():
    x, scale = torch.ones(2, K, D), torch.tensor(1.0)
    for module in (BetaCALLoss, ClipLoss, SigLipLoss):
        with pytest.raises(ValueError, match="gather: expected a bool, 'auto', 'all_gather', 'ring', got 'star'"):
            module(gather="star")
    with pytest.raises(ValueError, match="gather: expected a bool"):
        beta_cal_ce_loss(x, x, scale, gather="star")
    with pytest.raises(ValueError, match="process_group: expected None without gather"):
        beta_cal_ce_loss(x, x, scale, gather=False, process_group=object())


def rejects_dtensors() -> None:
    from torch.distributed.tensor import distribute_tensor

    x = torch.ones(2, K, D)
    sharded = distribute_tensor(x, dist.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"text_embeds: expected this rank's own tensor, got a DTensor"):
        BetaCALLoss(gather=True)(x, sharded, torch.tensor(1.0))


def test_rejects_dtensors(tmp_path):
    processes(1, rejects_dtensors, tmp_path)
