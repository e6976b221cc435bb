"""FLAIR's pooling block: LayerNorms of queries, keys and values, a key of zeros, no MLP."""

import pytest
import torch
from safetensors.torch import load_file
from support.paths import GOLDEN
from support.pooling import DEVICE, FLAIR_BLOCK, block, inputs, published
from torch import Tensor

from betaclip import TextConditionedPool
from betaclip.kernels.attention_pool.operators import BACKENDS
from betaclip.losses.flair import text_conditioned_loss

FLAIR = load_file(GOLDEN / "flair.safetensors")  # of FLAIR's released code, in float64: 5 images with 3 texts each


def flair_pool(backend: str = "auto") -> TextConditionedPool:
    """The block of the released values."""
    pool, start = TextConditionedPool(32, 8, **FLAIR_BLOCK, backend=backend).double(), "visual_proj."
    state = {name.removeprefix(start): t for name, t in FLAIR.items() if name.startswith(start)}
    pool.load_state_dict(state | {"logit_scale": pool.logit_scale})
    return pool.to(DEVICE)


def require(backend: str, *tensors: Tensor) -> None:
    if reasons := BACKENDS[backend](*tensors, *tensors):
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("backend", BACKENDS)
def test_flair_values_and_gradients(backend):
    """Pooled embeddings, attention, and the text-conditioned sigmoid loss with every gradient, to 1e-10."""
    require(backend, FLAIR["image_tokens"].to(DEVICE))
    names = ("image_tokens", "text_features", "logit_scale", "logit_bias")
    patches, texts, scale, bias = leaves = [FLAIR[name].clone().to(DEVICE).requires_grad_() for name in names]
    pool, chosen = flair_pool(backend), FLAIR["chosen_texts"].to(DEVICE)
    pooled, attention = pool(patches, texts.view(5, 3, 32), need_weights=True)
    exactly = {"atol": 1e-12, "rtol": 1e-10}
    torch.testing.assert_close(pooled, FLAIR["pooled"].to(DEVICE), **exactly)
    torch.testing.assert_close(attention, FLAIR["attention"][..., :-1].to(DEVICE), **exactly)  # the last is the zero's
    own = chosen // 3 == torch.arange(5, device=DEVICE)[:, None]
    scores = pool.score(patches, texts, texts=chosen)
    loss = text_conditioned_loss(scores, own, scale, logit_bias=bias)
    torch.testing.assert_close(loss, FLAIR["tcs.loss"].to(DEVICE), **exactly)
    loss.backward()
    gradients = {f"visual_proj.{name}": p.grad for name, p in pool.named_parameters() if name != "logit_scale"}
    gradients |= {name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    assert len(gradients) == 14
    for name, gradient in gradients.items():
        truth = FLAIR[f"tcs.grad.{name}"].to(DEVICE)
        torch.testing.assert_close(gradient, truth, atol=1e-10 * float(truth.abs().max()), rtol=1e-10, msg=name)


@pytest.mark.parametrize("backend", ["folded", "sdpa", "reference"])
def test_masks_of_flair_block(backend):
    """Masked rows may hold anything, give zeros and get zero gradients; the rest is as if they were not there."""
    pool, (patches, queries) = flair_pool(backend), (torch.randn(3, n, 32, dtype=torch.float64) for n in (7, 5))
    patches, queries = patches.to(DEVICE), queries.to(DEVICE)
    patch_mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4, [False] * 7], device=DEVICE)
    query_mask = torch.arange(5, device=DEVICE) < torch.tensor([[5], [3], [2]], device=DEVICE)
    leaves = [
        t.masked_fill(~mask[..., None], torch.nan).requires_grad_()
        for t, mask in ((patches, patch_mask), (queries, query_mask))
    ]
    out, weights = pool(*leaves, patch_mask=patch_mask, query_mask=query_mask, need_weights=True)
    alone, attention = pool(patches[1:2, :3], queries[1:2, :3], need_weights=True)
    torch.testing.assert_close(out[1, :3], alone[0])
    torch.testing.assert_close(weights[1, :3, :3], attention[0])
    assert not out[1, 3:].any() and not out[2].any() and not weights[2].any()
    assert (weights[0].sum(-1) < 1).all() and (weights[0].sum(-1) > 0).all()
    gradients = torch.autograd.grad(
        out.square().sum(), [*leaves, *(p for name, p in pool.named_parameters() if name != "logit_scale")]
    )
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][~patch_mask].any() and not gradients[1][~query_mask].any() and not gradients[0][2].any()
    assert gradients[0][0].all() and gradients[1][1, :3].all()


@pytest.mark.parametrize("backend", ["folded", "sdpa"])
def test_key_of_zeros_beside_the_published_block(backend):
    """add_zero_attn alone: normalised patches, the keys' bias, and the MLP, as nn.MultiheadAttention has it."""
    pool, leaves = block(backend=backend, add_zero_attn=True), [t.requires_grad_() for t in inputs()]
    wanted = [*leaves, *(p for name, p in pool.named_parameters() if name != "logit_scale")]
    ours, truth = pool(*leaves), published(pool, *leaves)[0]
    torch.testing.assert_close(ours, truth)
    weight = torch.randn_like(truth)
    for a, b in zip(*(torch.autograd.grad(out, wanted, weight) for out in (ours, truth)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["folded", "sdpa"])
def test_dtypes_of_flair_block(backend):
    """LayerNorms, softmax and the products of weights in float32, also under autocast; gradients keep their dtypes."""
    exact, (patches, texts) = (
        flair_pool(backend),
        (FLAIR[name].to(DEVICE) for name in ("image_tokens", "text_features")),
    )
    truth, pool = exact(patches, texts[:4]).detach(), flair_pool(backend).float()
    with torch.autocast(DEVICE, torch.bfloat16):
        leaf = patches.float().requires_grad_()
        out, scores = (
            pool(leaf, texts[:4].float()),
            pool.score(leaf, texts.float(), texts=FLAIR["chosen_texts"].to(DEVICE)),
        )
    assert out.dtype == torch.bfloat16 and scores.dtype == torch.float32
    torch.testing.assert_close(out.double(), truth, atol=2e-2 * float(truth.abs().max()), rtol=0)
    assert torch.autograd.grad(scores.sum(), leaf)[0].dtype == torch.float32
    half = exact.bfloat16()(patches.bfloat16(), texts[:4].bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), truth, atol=4e-2 * float(truth.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["ln_k", "ln_v"])
def test_layer_norms_that_are_read(name):
    """Their parameters take effect; what only a call would run is refused, and so are two eps."""
    pool, patches, texts = flair_pool(), FLAIR["image_tokens"].to(DEVICE), FLAIR["text_features"].to(DEVICE)
    getattr(pool, name).eps = 1e-3
    with pytest.raises(NotImplementedError, match="expected the same eps in both, got "):
        pool(patches, texts)
    getattr(pool, name).eps = 1e-5
    getattr(pool, name).register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match=f"reads the weights of ln_k and ln_v, but {name} has hooks"):
        pool(patches, texts)
