"""The losses that are compared are one loss; FLOP and memory are what the formulas say."""

from functools import partial

import pytest
import torch
from common import batches, comparison, harness, losses
from common.rows import BOTH
from support.loss_batches import small_batch, value_and_gradients, worst_error

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, known in losses.implementations().items() for form in known.forms]
)
def test_implementations_compute_the_same_loss(name, form, monkeypatch):
    if name == "compiled" and form == "bce":
        pytest.skip("compiles the code of dense: once is enough")
    if name == "compiled":  # the compiler's machine code is its own affair, and takes it long
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    batch = small_batch(form)
    try:
        loss = losses.implementations()[name].build(form, batch)
    except harness.Unavailable as reason:
        pytest.skip(str(reason))
    truth = value_and_gradients(losses.reference(form, batch), batch)
    assert worst_error(value_and_gradients(loss, batch), truth) < 1e-9


@pytest.mark.parametrize("form", ["ce", "clip"])
def test_loss_from_linear_layers_with_cross_entropy(form):
    """What peers compute, by its formula; on some of the batch too, which is how libraries are warmed up."""

    def cross_entropy(x, y, own):
        return torch.nn.functional.cross_entropy(x @ y.T, own)

    batch = small_batch(form)
    loss = losses.both_ways(cross_entropy, batch)
    for b in (batch, batch.to_leaves(images=slice(3))):
        truth = value_and_gradients(losses.reference(form, b), b)
        assert worst_error(value_and_gradients(loss, b), truth) < 1e-9


def test_forms_of_one_text_are_clip_and_siglip():
    """Against the formulas of the papers, as open_clip may not be installed."""
    batch = small_batch("siglip")
    v, t = (torch.nn.functional.normalize(x.squeeze(1), dim=-1) for x in (batch.image, batch.text))
    logits, own = batch.scale * v @ t.T, torch.arange(len(v))
    clip = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    sign = 2 * torch.eye(len(v), dtype=torch.float64) - 1
    siglip = -torch.nn.functional.logsigmoid(sign * (logits + batch.bias)).sum() / len(v)
    assert abs(losses.reference("clip", batch)(batch) - clip) < 1e-12
    assert abs(losses.reference("siglip", batch)(batch) - siglip) < 1e-12


def test_flop_formulas():
    n, dim = 9216, 512
    for form, products in (("ce", 4), ("clip", 4), ("bce", 3), ("siglip", 3)):
        assert losses.loss_flop(form, "forward", n, dim) == 2 * n * n * dim
        assert losses.loss_flop(form, "forward+backward", n, dim) == products * 2 * n * n * dim
        assert losses.loss_flop(form, "forward+backward", n, dim, n * n) == 3 * 2 * n * n * dim


@pytest.mark.parametrize("form", ["ce", "bce"])
@pytest.mark.parametrize("name", ["published", "dense"])
def test_memory_estimates_are_from_above_and_not_wild(name, form):
    """A run is refused by the estimate, so one that is too low would let the machine run out of memory."""
    if harness.with_peak_bytes(lambda: None, CPU, 0)[1] is None:
        pytest.skip("peak memory needs Linux's /proc/self/clear_refs")
    rows = 2900  # matrices beyond malloc's largest heap block
    batch = batches.synthetic_batch(rows, 1, 16, torch.float32, CPU)
    implementation = losses.implementations()[name]
    loss = implementation.build(form, batch)
    run = comparison.Call(lambda: loss(batch), batch.leaves).run(BOTH, torch.ones(()))
    _, peak, _ = harness.with_peak_bytes(run, CPU, seconds=0)
    copies = peak / (4 * rows**2)
    assert copies <= implementation.copies <= 5 * copies
