"""Values and gradients of the pooling operators, against the reference in float64."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.attention_pool import DEVICE, SIZES, arguments, projected, require, some_masked, value_and_gradients
from support.precision import HALF, assert_exact, usual, widest
from torch import Tensor

from betaclip.kernels.attention_pool.folded import Eager, ImageChunks, Pooling
from betaclip.kernels.attention_pool.operators import (
    BACKENDS,
    FOLDED,
    PROJECTED,
    Backend,
    attention_pool,
    attention_weights,
)

NAMES = ("x", "q", "k_weight", "v_weight", "v_bias", "k_bias")
# Two chunks of images of (3, 5, 37, 40, 8) in float64.
SMALL_SCRATCH = 2 * 8 * (40 * 4 * 77 + 2 * 37 * 40)


def with_scratch(backend: str, scratch_bytes: int = SMALL_SCRATCH, kept_bytes: int | None = None) -> Backend:
    """A folding backend with so little scratch that it takes several chunks of images; other backends unchanged."""
    if backend == "folded":
        return Eager(scratch_bytes, kept_bytes)
    if backend == "triton":
        from betaclip.kernels.attention_pool.triton_kernels import Fused

        return Fused(scratch_bytes=scratch_bytes)
    return backend


def check(
    backend: str,
    dtype: torch.dtype,
    size: tuple[int, int, int, int, int],
    masked: bool = False,
    normalize: bool = True,
    ulps: float = 32,
    scratch_bytes: int = SMALL_SCRATCH,
    zero: bool = False,
    kept_bytes: int | None = None,
) -> None:
    """Error at most twice that of PyTorch's own attention in the same dtype, plus a few ulps of the largest value."""
    require(backend, dtype)
    *shape, heads = size
    tensors = arguments(*shape, dtype)
    if not normalize:
        tensors[0] = F.normalize(tensors[0], dim=-1)
    if zero:
        tensors.append(torch.randn(shape[3], dtype=torch.float64).to(DEVICE, dtype))
    mask = some_masked(shape[0], shape[2]) if masked else None
    weight = torch.randn(*shape[:2], shape[3], dtype=torch.float64, device=DEVICE)

    def ours(*leaves: Tensor) -> Tensor:
        options = {"add_zero_attn": True, "k_bias": leaves[5]} if zero else {}
        options |= {"normalize": normalize, "backend": with_scratch(backend, scratch_bytes, kept_bytes)}
        return attention_pool(*leaves[:5], heads, mask, **options)

    def plain(*leaves: Tensor) -> Tensor:
        return projected(*leaves[:5], heads, mask, normalize, *leaves[5:])

    truth = value_and_gradients(plain, weight, [t.double() for t in tensors])
    eager = value_and_gradients(plain, weight, tensors)
    names = ("out", *NAMES[: len(tensors)])
    for name, a, b, t in zip(names, value_and_gradients(ours, weight, tensors), eager, truth, strict=True):
        assert a.dtype == dtype, name
        size_, error, allowed = t.abs().max(), (a.double() - t).abs().max(), (b.double() - t).abs().max()
        # With one patch the gradient of the softmax is 0, a difference of numbers around 1.
        floor = ulps * torch.finfo(dtype).eps * size_.clamp_min(1)
        assert error <= 2 * allowed + floor, f"{name}: error {error:.2e}, eager {allowed:.2e}, size {size_:.2e}"


@pytest.mark.parametrize(
    "dtype, masked, normalize",
    [(torch.float32, True, True), (torch.float64, False, True), (torch.float64, True, False)],
)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(backend, dtype, size, masked, normalize):
    check(backend, dtype, size, masked, normalize)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference_in_half_precision(backend, dtype):
    # On the CPU float16 runs as bfloat16 products, with an eighth of its precision.
    check(backend, dtype, (3, 5, 37, 64, 8), True, ulps=16 if DEVICE == "cuda" or dtype == torch.bfloat16 else 128)


@pytest.mark.parametrize("dtype, masked, normalize", [(torch.float32, False, False), (torch.float64, True, True)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_key_of_zeros(backend, dtype, size, masked, normalize):
    # The gradient of one patch is what is left of a product whose part along the patch, larger by far, is taken away.
    check(backend, dtype, size, masked, normalize, ulps=128, zero=True)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", BACKENDS)
def test_key_of_zeros_in_half_precision(backend, dtype):
    ulps = 16 if DEVICE == "cuda" or dtype == torch.bfloat16 else 128
    check(backend, dtype, SIZES[0], True, ulps=ulps, zero=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_keys_counts_beside_a_key_of_zeros_alone(backend):
    tensors = arguments(2, 3, 7, 16, widest(backend))
    k_bias = torch.randn_like(tensors[-1])
    plain = attention_pool(*tensors, 4, backend=backend)
    assert torch.equal(attention_pool(*tensors, 4, k_bias=k_bias, backend=backend), plain)
    zero = attention_pool(*tensors, 4, add_zero_attn=True, backend=backend)
    torch.testing.assert_close(zero, projected(*tensors, 4, zero_and_k_bias=torch.zeros_like(k_bias)))
    assert (zero - plain).abs().max() > 0.01


@pytest.mark.parametrize("p, d", [(19, 64), (300, 24), (19, 96), (19, 384), (17, 640)])
@pytest.mark.parametrize("backend", FOLDED)
def test_matches_reference_at_every_width(backend, p, d):
    check(backend, usual(backend), (1, 3, p, d, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("p", [1, 49, 196, 257, 1024])
@pytest.mark.parametrize("d", [64, 96, 384, 512, 640, 768, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_matches_reference_on_the_gpu(dtype, d, p):
    for masked in (False, True):
        check("triton", dtype, (3, 7, p, d, 8), masked, ulps=64)


@pytest.mark.parametrize("patches", [1, 5])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("backend", FOLDED)
def test_one_valid_patch_gives_queries_no_gradient(backend, dtype, normalize, patches):
    """Its weight is 1 whatever the query and the key weight, which large patches used to hide."""
    require(backend, dtype)
    tensors = arguments(3, 4, patches, 32, dtype)
    tensors[0] = 30 * tensors[0]
    mask = None
    if patches > 1:
        mask = torch.zeros(3, patches, dtype=torch.bool, device=DEVICE)
        mask[torch.arange(3), torch.tensor([0, 2, 4])] = True
    leaves = [t.clone().requires_grad_() for t in tensors]
    attention_pool(*leaves, 4, mask, normalize=normalize, backend=backend).float().square().sum().backward()
    for leaf in leaves[1:3]:
        assert not leaf.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_integers(backend):
    """Equal logits and small integers: means of patches that any error of an index would change visibly."""
    b, k, p, d, heads = 3, 2, 8, 16, 4
    options = {"dtype": widest(backend), "device": DEVICE}
    x, q = torch.randint(-4, 5, (b, p, d), **options), torch.zeros(b, k, d, **options)
    k_weight, v_weight = (torch.randint(-3, 4, (d, d), **options) for _ in range(2))
    v_bias = torch.arange(d, **options)
    out = attention_pool(x, q, k_weight, v_weight, v_bias, heads, normalize=False, backend=backend)
    expected = (x.sum(1) @ v_weight.T / p + v_bias)[:, None].expand_as(out)
    assert torch.equal(out, expected)  # sums of integers over 8: exact in any order


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    require(backend, torch.float64)
    *tensors, mask = *arguments(2, 2, 3, 4), some_masked(2, 3)
    leaves = [t.requires_grad_() for t in tensors]
    for given in (None, mask):
        assert torch.autograd.gradcheck(
            lambda *leaves, given=given: attention_pool(*leaves, 2, given, backend=backend),
            leaves,
            nondet_tol=0,
            fast_mode=backend == "triton",  # random projections of the Jacobian: its interpreter is slow
        )
    leaves.append(torch.randn(4, dtype=torch.float64, device=DEVICE, requires_grad=True))

    def with_zero(*leaves: Tensor) -> Tensor:
        return attention_pool(*leaves[:5], 2, mask, add_zero_attn=True, k_bias=leaves[5], backend=backend)

    assert torch.autograd.gradcheck(with_zero, leaves, nondet_tol=0, fast_mode=True)


@pytest.mark.parametrize("backend", FOLDED)
def test_chunks_of_images(backend):
    """One image at a time, a last chunk that is smaller, all at once: statistics and gradients find their images."""
    b, k, p, d, heads = 5, 3, 7, 16, 4
    pooling = Pooling(*arguments(b, k, p, d), None, None, heads, None)
    sizes = (1, 10_000, 20_000, 40_000, 80_000, 2**22)
    assert {1, 2, 3, 5} <= {ImageChunks(pooling, pooling.x.new_empty(0), Eager(size), True).step for size in sizes}
    for size in sizes:
        check(backend, widest(backend), (b, k, p, d, heads), True, scratch_bytes=size)
    check(backend, widest(backend), (b, k, p, d, heads), True, scratch_bytes=20_000, zero=True)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kept_images", [0, 3, 5])
def test_kept_weights_and_means(kept_images, zero):
    """None of them, the weights of some of the images, or both of all; in chunks of two."""
    size = 5, 3, 7, 16, 4
    kept_bytes = kept_images * 8 * 3 * 4 * (7 + 16 * (kept_images == 5))
    check("folded", torch.float64, size, True, scratch_bytes=20_000, zero=zero, kept_bytes=kept_bytes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_shared_by_all_images(backend):
    x, q, *rest = arguments(3, 5, 7, 16, widest(backend))
    q = q[:1].requires_grad_()
    weight = torch.randn(3, 5, 16, dtype=x.dtype, device=DEVICE)
    ours = torch.autograd.grad(attention_pool(x, q, *rest, 4, backend=backend), q, weight)
    truth = torch.autograd.grad(projected(x, q, *rest, 4), q, weight)
    assert ours[0].shape == (1, 5, 16)
    assert_exact(ours[0], truth[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_bias(backend):
    *tensors, v_bias = arguments(2, 3, 7, 16, widest(backend))
    with_bias = attention_pool(*tensors, v_bias, 4, backend=backend)
    torch.testing.assert_close(attention_pool(*tensors, None, 4, backend=backend) + v_bias, with_bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_patches_may_hold_anything(backend):
    x, *rest = arguments(3, 4, 9, 16, widest(backend))
    mask = some_masked(3, 9)
    clean = x.masked_fill(~mask[..., None], 1.0).requires_grad_()
    dirty = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    outs = [attention_pool(x, *rest, 4, mask, backend=backend) for x in (clean, dirty)]
    assert torch.equal(outs[0], outs[1]) and not outs[0][-1].any() and outs[0][0].any()
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out, x in zip(outs, (clean, dirty), strict=True)]
    assert torch.equal(gradients[0], gradients[1])
    assert not gradients[0][~mask].any() and gradients[0][0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_masked_patches(backend):
    """Valid patches after, between and before whole blocks of masked ones, for an online softmax to step over."""
    x, *rest = arguments(3, 4, 50, 16, widest(backend))
    mask = torch.zeros(3, 50, dtype=torch.bool, device=DEVICE)
    mask[0, 45:], mask[1, 20:25], mask[2, :2] = True, True, True
    weight = torch.randn(3, 4, 16, dtype=torch.float64, device=DEVICE)
    ours = value_and_gradients(lambda *leaves: attention_pool(*leaves, 4, mask, backend=backend), weight, [x, *rest])
    truth = value_and_gradients(lambda *leaves: projected(*leaves, 4, mask), weight, [x, *rest])
    for a, t in zip(ours, truth, strict=True):
        assert_exact(a, t)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_patches_count_as_zero(backend):
    """Normalised they stay 0, with a gradient of 0 where a division by their norm would give inf."""
    x, *rest = arguments(2, 4, 9, 16, widest(backend))
    x[0, 3] = 0
    x[1, 5] *= 1e-20
    x.requires_grad_()
    out = attention_pool(x, *rest, 4, backend=backend)
    torch.testing.assert_close(out, projected(x.detach().where(x.norm(dim=-1, keepdim=True) > 1e-12, 0), *rest, 4))
    (dx,) = torch.autograd.grad(out.square().sum(), x)
    assert dx.isfinite().all() and not dx[0, 3].any() and not dx[1, 5].any() and dx[0, 2].any()


@pytest.mark.parametrize("scale", [1e3, 1e-3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend, scale):
    """One patch gets all attention, or all get the same: no overflow, a gradient of 0 where the softmax saturates."""
    require(backend, torch.float32)
    x, q, *rest = arguments(2, 3, 21, 32, torch.float32)
    tensors = [x, q * scale, *rest, torch.randn(32, device=DEVICE)]
    weight = torch.randn(2, 3, 32, dtype=torch.float64, device=DEVICE)

    def both(pool: Callable[..., Tensor], leaves: tuple[Tensor, ...], **with_zero: Tensor | bool) -> Tensor:
        return pool(*leaves[:5], 4) + pool(*leaves[:5], 4, **with_zero)

    def ours(*leaves: Tensor) -> Tensor:
        pool = partial(attention_pool, backend=backend)
        return both(pool, leaves, add_zero_attn=True, k_bias=leaves[5])

    def plain(*leaves: Tensor) -> Tensor:
        return both(projected, leaves, zero_and_k_bias=leaves[5])

    found = value_and_gradients(ours, weight, tensors)
    truth = value_and_gradients(plain, weight, [t.double() for t in tensors])
    for name, a, t in zip(("out", *NAMES), found, truth, strict=True):
        # Logits of some thousands are known to 1e-3 at best in float32; and a softmax's gradient to 1e-7 of 1.
        floor = 1e-6 * (float(tensors[1].abs().max()) if name in ("k_weight", "k_bias") else 1)
        torch.testing.assert_close(a.double(), t, atol=float(1e-2 * t.abs().max()) + floor, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noncontiguous(backend):
    """Patches that leave out a class token, transposed, expanded; queries cut out of a wider tensor."""
    dtype = widest(backend)
    _, _, *rest = arguments(1, 1, 1, 16, dtype)
    wide = torch.randn(4, 11, 40, dtype=dtype, device=DEVICE)
    q = wide[:3, 2:7, 3:19]
    views = {
        "without a class token": wide[:3, 1:, 24:],
        "transposed": wide.permute(0, 2, 1)[:3, :, :1].expand(3, 40, 16),
        "columns apart": wide[:3, :, 1:33:2],
        "expanded": wide[:1, :, :16].expand(3, 11, 16),
        "images apart": torch.randn(11, 3, 16, dtype=dtype, device=DEVICE).transpose(0, 1),
    }
    for name, x in views.items():
        leaves = [t.detach().requires_grad_() for t in (x, q)]
        copies = [t.detach().contiguous().requires_grad_() for t in (x, q)]
        weight = torch.randn(3, 5, 16, dtype=dtype, device=DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
        ours = torch.autograd.grad(attention_pool(*leaves, *rest, 4, backend=backend), leaves, weight)
        truth = torch.autograd.grad(projected(*copies, *rest, 4), copies, weight)
        for a, b in zip(ours, truth, strict=True):
            assert_exact(a, b, name)


@pytest.mark.parametrize("images, texts", [(0, 3), (3, 0)])
@pytest.mark.parametrize("backend", ["folded", *PROJECTED])
def test_nothing_to_pool(backend, images, texts):
    tensors = [t.requires_grad_() for t in arguments(images, texts, 5, 16)]
    out = attention_pool(*tensors, 4, backend=backend)
    assert out.shape == (images, texts, 16)
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), tensors))


def test_attention_weights():
    x, q, k_weight, *_ = arguments(3, 4, 7, 16)
    mask = some_masked(3, 7)
    for given in (None, mask):
        weights = attention_weights(x, q, k_weight, 4, given)
        assert weights.shape == (3, 4, 7)
        # Pooling the patches' own indicator vectors gives the attention back.
        heads = projected_attention(F.normalize(x, dim=-1), q, k_weight, 4, given)
        torch.testing.assert_close(weights, heads)
        k_bias = torch.randn(16, dtype=torch.float64, device=DEVICE)
        with_zero = attention_weights(x, q, k_weight, 4, given, add_zero_attn=True, k_bias=k_bias)
        heads = projected_attention(F.normalize(x, dim=-1), q, k_weight, 4, given, k_bias)
        torch.testing.assert_close(with_zero, heads)
    assert not weights[-1].any() and not with_zero[-1].any()
    torch.testing.assert_close(weights[:-1].sum(-1), torch.ones_like(weights[:-1, :, 0]))


def projected_attention(x, q, k_weight, heads, mask, zero_and_k_bias=None):
    by_head = []
    for h in range(heads):
        part = slice(h * x.shape[2] // heads, (h + 1) * x.shape[2] // heads)
        logits = q[:, :, part] @ (x @ k_weight[part].T).mT / (x.shape[2] // heads) ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], -torch.inf)
        if zero_and_k_bias is not None:
            of_bias = q[:, :, part] @ zero_and_k_bias[part] / (x.shape[2] // heads) ** 0.5
            logits = torch.cat((logits + of_bias[..., None], torch.zeros_like(logits[..., :1])), -1)
        by_head.append(logits.softmax(-1).nan_to_num(0)[..., : x.shape[1]])
    return torch.stack(by_head).mean(0)
