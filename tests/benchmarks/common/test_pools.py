"""The poolings that are compared are one pooling; FLOP are what the formulas say."""

import pytest
import torch
from common import harness, pools
from common.comparison import Call
from common.rows import BOTH
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
IMAGES, TEXTS, PATCHES, DIM, HEADS = SIZES = (3, 5, 7, 32, 4)  # projecting takes fewer FLOP
FEW_TEXTS = (3, 1, 7, 32, 4)  # folding does


def small_batch(sizes=SIZES):
    return pools.synthetic_pool_batch(*sizes, torch.float64, CPU)


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


@pytest.mark.parametrize("part", pools.PARTS)
@pytest.mark.parametrize("sizes", [SIZES, FEW_TEXTS])
def test_least_flop_is_counted(sizes, part):
    batch = small_batch(sizes)
    counts = []
    for plain in (pools.ProjectedPool(DIM, HEADS, explicit_attention), FoldedPool(DIM, HEADS)):
        pool = pools.bound(plain, part, batch)
        with FlopCounterMode(display=False) as counter:
            value = pool()
        counts.append(counter.get_total_flops())
        torch.testing.assert_close(value, pools.published(part, batch)())
    assert counts.index(min(counts)) == (sizes is FEW_TEXTS)
    assert pools.least_flop(part, "forward", *sizes) == min(counts)
    assert pools.least_flop(part, "forward+backward", *sizes) == 3 * min(counts)


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
        pytest.skip("compiles the code of projected sdpa; test_losses has compiled_afresh")
    batch = small_batch()
    try:
        pool = pools.pool_implementations()[name](part, batch)
    except harness.Unavailable as reason:
        pytest.skip(str(reason))
    incoming = torch.randn(IMAGES, TEXTS, DIM, dtype=torch.float64)
    truth, ours = (Call(x, batch.leaves(part)).run(BOTH, incoming)() for x in (pools.published(part, batch), pool))
    assert len(ours) == 3 + (4 if part == "attention" else 10)
    torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


def test_parameters_are_shared_and_must_agree():
    batch = small_batch()
    pool = pools.PublishedPool(DIM, HEADS)
    pools.bound(pool, "block", batch)
    assert all(x is y for x, y in zip(pool.parameters(), batch.pool.parameters(), strict=True))
    pool.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"\['extra.weight', 'extra.bias'\] are missing"):
        pools.bound(pool, "block", batch)


@pytest.mark.parametrize("part", pools.PARTS)
def test_synthetic_weights_make_attention_neither_flat_nor_one_hot(part):
    batch = pools.synthetic_pool_batch(4, 6, 100, 256, 8, torch.float32, CPU)
    x, t = (torch.nn.functional.normalize(y.detach(), dim=-1) for y in (batch.patches, batch.queries))
    weight = batch.pool.attn.in_proj_weight.detach().unflatten(0, (3, 8, 32))
    q, k = (torch.einsum("bnd,hed->bhne", y, w) for y, w in ((t, weight[0]), (x, weight[1])))
    assert 0.5 < (q @ k.mT / 32**0.5).std() < 2
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in batch.leaves(part))
