"""The baselines are the loss, in as few products as they need."""

import json

import pytest
import torch
from common import batches
from common import dense_losses as dense
from support.loss_batches import small_batch, value_and_gradients, worst_error
from support.paths import ROOT
from torch.utils.flop_counter import FlopCounterMode

from betaclip import BetaCALLoss

CPU = torch.device("cpu")
GOLDEN = json.loads((ROOT / "tests/golden/beta_cal.json").read_text())
CASES = [case for case in GOLDEN["cases"] if case["mask_name"] == "all"]
DENSE = [("published", dense.PUBLISHED), ("lean", dense.LEAN)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['form']}, beta {case['beta']}")
@pytest.mark.parametrize("table", [table for _, table in DENSE], ids=[name for name, _ in DENSE])
def test_dense_forms_give_the_published_values(table, case):
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (GOLDEN["image"], GOLDEN["text"], case["logit_scale"])]
    leaves = [x.requires_grad_() for x in tensors]
    assert case["alpha"] == 1
    loss = table[case["form"]](*leaves, beta=case["beta"])
    expected = [
        torch.tensor(case[name], dtype=torch.float64) for name in ("loss", "d_image", "d_text", "d_logit_scale")
    ]
    assert worst_error((loss, *torch.autograd.grad(loss, leaves)), expected) < 1e-9


@pytest.mark.parametrize("form", ["ce", "bce"])
@pytest.mark.parametrize("table", [table for _, table in DENSE], ids=[name for name, _ in DENSE])
def test_dense_forms_equal_the_reference(table, form):
    batch = small_batch(form)
    module = BetaCALLoss(form, beta=0.3, padding="published", backend="reference")
    truth = value_and_gradients(lambda b: module(b.image, b.text, b.scale), batch)
    ours = value_and_gradients(lambda b: table[form](b.image, b.text, b.scale, beta=0.3), batch)
    assert worst_error(ours, truth) < 1e-9


@pytest.mark.parametrize(("table", "products"), [(dense.PUBLISHED, 2), (dense.LEAN, 1)], ids=["published", "lean"])
@pytest.mark.parametrize("form", ["ce", "bce"])
def test_dense_forms_do_no_more_products_than_they_need(table, products, form):
    """Counted: S once or twice, and two gradients for each; beside it only what is within images."""
    batch = batches.synthetic_batch(8, 3, 32, torch.float32, CPU)
    n, dim, within = 24, 32, 2 * 8 * 3 * 3 * 32
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(table[form](batch.image, batch.text, batch.scale), batch.leaves[:3])
    excess = counter.get_total_flops() - products * 3 * 2 * n * n * dim
    assert excess == (0 if table is dense.PUBLISHED else 3 * within)
