"""The pooling operators as operators: compilation, chunks, memory, refusals, the choice of a backend."""

from collections.abc import Callable

import pytest
import torch
from support.attention_pool import DEVICE, SIZES, arguments, projected, require, some_masked, value_and_gradients
from support.precision import assert_exact, usual, widest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from betaclip.kernels.architecture import choose
from betaclip.kernels.attention_pool import operators
from betaclip.kernels.attention_pool.cost import folding_pays
from betaclip.kernels.attention_pool.folded import Eager, Pooling, attention_pool_bwd, attention_pool_fwd
from betaclip.kernels.attention_pool.operators import (
    BACKENDS,
    FOLDED,
    attention_pool,
    attention_weights,
    folded,
    folded_backward,
)
from betaclip.kernels.attention_pool.tiles import BACKWARD, FORWARD, PRODUCTS


def test_gradient_of_patches_costs_nothing_if_not_wanted():
    assert products(need_dx=True) - products(need_dx=False) == 2


def products(need_dx: bool = True, keep: bool = True, kept_bytes: int | None = None) -> float:
    """The products of a backward between latent queries and patches, for two images, one at a time."""
    b, k, p, d, heads = 2, 3, 7, 16, 4
    pooling = Pooling(*arguments(b, k, p, d), None, None, heads, None)
    attention = Eager(scratch_bytes=1, kept_bytes=kept_bytes)
    out, *statistics = attention_pool_fwd(pooling, attention, keep)
    with FlopCounterMode(display=False) as counter:
        attention_pool_bwd(pooling, out, *statistics, torch.ones_like(out), need_dx, attention)
    return (counter.get_total_flops() - 2 * b * 5 * k * d**2) / (2 * b * k * heads * p * d)


def test_weights_and_means_that_the_forward_kept_are_not_computed_again():
    weights, means = (8 * 3 * 4 * n for n in (7, 16))  # bytes of an image's
    assert products(keep=False) == 6
    assert [products(kept_bytes=n * weights - 1) for n in (1, 2, 3)] == [6, 5.5, 5]
    one = weights + means
    assert [products(kept_bytes=n) for n in (2 * one - 1, 2 * one)] == [5, 4]
    kept_images = 2 if DEVICE == "cpu" else 0  # a GPU keeps none unless told so
    assert products() == 6 - kept_images
    x, *rest = arguments(2, 3, 7, 16)
    with torch.no_grad():
        assert run_keeps(x.requires_grad_(), rest) == 0
    assert run_keeps(x, rest) == kept_images * one
    assert run_keeps(x.detach(), rest) == 0


def run_keeps(x: Tensor, rest: list[Tensor]) -> int:
    """Bytes of weights and means that a call keeps."""
    kept = []

    def run(pooling: Pooling, attention: Eager, keep: bool) -> tuple[Tensor, ...]:
        results = attention_pool_fwd(pooling, attention, keep)
        kept.extend(t.nbytes for t in results[3])
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "attention_pool_fwd", run)
        attention_pool(x, *rest, 4, backend="folded")
    return sum(kept)


@pytest.mark.parametrize("wanted", [{i} for i in range(5)] + [{0, 3}, {1, 2, 4}])
@pytest.mark.parametrize("backend", FOLDED)
def test_only_some_gradients(backend, wanted):
    tensors = arguments(3, 5, 7, 16, widest(backend))
    weight = torch.randn_like(tensors[1])
    truth = value_and_gradients(lambda *leaves: projected(*leaves, 4), weight, tensors)[1:]
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    attention_pool(*leaves, 4, backend=backend).backward(weight)
    for i, (leaf, expected) in enumerate(zip(leaves, truth, strict=True)):
        if i in wanted:
            assert_exact(leaf.grad, expected)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("pitch", [2**30, 2**31])
@pytest.mark.parametrize("apart", ["images", "patches"])
@pytest.mark.parametrize("backend", ["folded", "triton"])
def test_offsets_beyond_int32(backend, apart, pitch):
    """Images or patches so far apart that their offsets, or the pitch itself, pass 2^31; only touched pages exist."""
    require(backend, torch.bfloat16)
    if DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 8 GiB of device memory for the stride alone")
    near, *rest = arguments(3, 4, 3, 16, torch.bfloat16)
    storage = torch.empty(2 * pitch + 64, dtype=torch.bfloat16, device=DEVICE)
    strides = (pitch, 16, 1) if apart == "images" else (16, pitch, 1)
    far = storage.as_strided(near.shape, strides)
    far.copy_(near)
    runs = []
    for x in (far, near):
        x = x.detach().requires_grad_()
        out = attention_pool(x, *rest, 4, backend=backend)
        runs.append((out, *torch.autograd.grad(out.sum(), x)))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend):
    tensors, weight = arguments(5, 4, 37, 32, usual(backend)), torch.randn(5, 4, 32, device=DEVICE)
    require(backend, tensors[0].dtype)
    runs = [value_and_gradients(lambda *x: attention_pool(*x, 4, backend=backend), weight, tensors) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def opcheck(operator, *arguments):
    """Check an operator without autograd, which belongs to the function around it."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", FOLDED)
def test_opcheck(backend):
    *tensors, v_bias = arguments(3, 4, 5, 16, widest(backend))
    mask = some_masked(3, 5)
    sink = torch.randn(3, 4, 4, dtype=v_bias.dtype, device=DEVICE)
    for *given, norm_eps, need_dx in (
        (v_bias, None, None, 1e-12, True),
        (None, mask, None, 1e-12, False),
        (v_bias, mask, sink, None, True),
    ):
        opcheck(folded, *tensors, *given, True, 4, norm_eps, backend)
        results = folded(*tensors, *given, True, 4, norm_eps, backend)
        incoming = torch.ones_like(results[0])
        opcheck(folded_backward, *tensors, *given, *results, incoming, need_dx, 4, norm_eps, backend)


@pytest.mark.parametrize(
    "backend, compiler", [("folded", "aot_eager"), ("auto", "eager"), ("sdpa", "eager"), ("reference", "eager")]
)
def test_compile(backend, compiler):
    """One graph, and no wrong reuse of it at a second shape. Only the folded form has operators of ours, whose gradient
    is traced, too."""

    def loss(*leaves):
        plain, zero = (
            attention_pool(*leaves, 4, add_zero_attn=add_zero_attn, k_bias=leaves[-1], backend=backend)
            for add_zero_attn in (False, True)
        )
        return plain.square().sum() + zero.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for size in ((2, 3, 5, 16), (3, 4, 9, 16)):
        tensors = arguments(*size, torch.float32)
        tensors[0][0, 1] = 0  # a patch without direction, whose gradient is 0
        leaves = [t.requires_grad_() for t in tensors]
        eager, graph = loss(*leaves), compiled(*leaves)
        torch.testing.assert_close(graph, eager)
        for a, b in zip(torch.autograd.grad(graph, leaves), torch.autograd.grad(eager, leaves), strict=True):
            torch.testing.assert_close(a, b, atol=float(1e-5 * b.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_precision_alone(backend):
    require(backend, torch.float32)
    tensors = [t.requires_grad_() for t in arguments(2, 3, 7, 32, torch.float32)]
    runs = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            out = attention_pool(*tensors, 4, backend=backend)
            weights = attention_weights(*tensors[:3], 4)
        runs.append((out, weights, *torch.autograd.grad(out.square().sum(), tensors)))
    for plain, cast in zip(*runs, strict=True):
        assert cast.dtype == torch.float32 and torch.equal(plain, cast)


def test_double_backward_raises():
    x, *rest = arguments(2, 3, 5, 16)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(attention_pool(x, *rest, 4, backend="folded").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        dx.sum().backward()


def test_training_after_inference_mode():
    """Scratch that the CPU keeps between calls may be made in inference mode and must then serve training."""
    tensors = arguments(2, 3, 5, 16)
    with torch.inference_mode():
        expected = attention_pool(*tensors, 4, backend="folded")
    leaves = [t.requires_grad_() for t in tensors]
    out = attention_pool(*leaves, 4, backend="folded")
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))
    torch.testing.assert_close(out.detach(), expected.clone())


def saved_bytes(function: Callable[[], Tensor], excluded: list[Tensor]) -> int:
    """Bytes of distinct storages that the backward keeps, but for those of ``excluded``."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function()
    known = {t.untyped_storage().data_ptr() for t in excluded}
    del out
    return sum(size for pointer, size in storages.items() if pointer not in known)


@pytest.mark.parametrize("backend", ["folded", "triton"])
def test_keeps_no_more_than_queries_and_results(backend):
    """O(K D + P) per image beside the patches themselves: neither keys, values nor normalised patches; on the CPU also
    the weights and means, as long as they fit."""
    require(backend, torch.float32)
    b, k, p, d, heads = 2, 3, 40, 32, 4
    leaves = [t.requires_grad_() for t in arguments(b, k, p, d, torch.float32)]
    kept = saved_bytes(lambda: attention_pool(*leaves, heads, backend=backend), leaves)
    lse, norms = 4 * b * k * heads, 4 * b * p
    of_forward = 4 * b * k * heads * (p + d) if backend == "folded" and DEVICE == "cpu" else 0
    assert 4 * b * k * d + of_forward <= kept <= 2 * 4 * b * k * d + lse + norms + of_forward
    kept = saved_bytes(lambda: attention_pool(*leaves, heads, add_zero_attn=True, backend=backend), leaves)
    assert kept <= 2 * 4 * b * k * d + 2 * lse + norms + of_forward


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.ones(2, 4)}, r"x: expected \(B, P, D\) with P >= 1, got shape \(2, 4\)"),
        ({"x": torch.ones(2, 0, 4)}, r"x: expected \(B, P, D\) with P >= 1, got shape \(2, 0, 4\)"),
        ({"x": torch.ones(2, 5, 4).int()}, r"x: expected float16, bfloat16, float32 or float64, got torch.int32"),
        ({"num_heads": 3}, r"num_heads: expected a divisor of D = 4, got 3"),
        ({"num_heads": 0}, r"num_heads: expected a divisor of D = 4, got 0"),
        ({"q": torch.ones(3, 6, 4)}, r"q: expected \(2 or 1, K, 4\) as x is \(2, 5, 4\), got \(3, 6, 4\)"),
        ({"q": torch.ones(2, 6, 8)}, r"q: expected \(2 or 1, K, 4\) as x is \(2, 5, 4\), got \(2, 6, 8\)"),
        ({"q": torch.ones(2, 6, 4).double()}, r"q: expected dtype torch.float32 as x, got torch.float64"),
        ({"k_weight": torch.ones(4, 8)}, r"k_weight: expected shape \(4, 4\), got \(4, 8\)"),
        ({"v_weight": torch.ones(4)}, r"v_weight: expected shape \(4, 4\), got \(4,\)"),
        ({"v_bias": torch.ones(8)}, r"v_bias: expected shape \(4,\), got \(8,\)"),
        ({"k_bias": torch.ones(8)}, r"k_bias: expected shape \(4,\), got \(8,\)"),
        ({"k_bias": torch.ones(4).double()}, r"k_bias: expected dtype torch.float32 as x, got torch.float64"),
        ({"v_bias": torch.ones(4, device="meta")}, r"v_bias: expected device cpu as for x, got meta"),
        (
            {"mask": torch.ones(2, 5)},
            r"mask: expected bool of shape \(2, 5\), True = valid, got torch.float32 \(2, 5\)",
        ),
        ({"mask": torch.ones(2, 4) > 0}, r"mask: expected bool of shape \(2, 5\), .* got torch.bool \(2, 4\)"),
        ({"backend": "blocks"}, r"backend: expected one of 'auto', .* for attention_pool, got 'blocks'"),
    ],
)
def test_rejects(change, message):
    given = {
        "x": torch.ones(2, 5, 4),
        "q": torch.ones(2, 6, 4),
        "k_weight": torch.ones(4, 4),
        "v_weight": torch.ones(4, 4),
        "v_bias": torch.ones(4),
        "num_heads": 2,
        "mask": None,
    } | change
    with pytest.raises(ValueError, match=message):
        attention_pool(**given)


def test_named_backend_that_cannot_serve_says_why(interpreter_as_it_is):
    tensors = arguments(2, 3, 5, 16)
    dtype = torch.float64 if DEVICE == "cuda" else torch.bfloat16
    with pytest.raises(NotImplementedError, match=r"attention_pool: .*\n  triton: .*"):
        attention_pool(*(t.to(dtype) for t in tensors), 4, backend="triton")


def test_backend_from_the_environment(monkeypatch):
    """The variable applies to all operations; a name that this operation lacks leaves its choice unchanged."""
    tensors = arguments(2, 3, 5, 16)
    expected = attention_pool(*tensors, 4)
    monkeypatch.setenv("BETACLIP_BACKEND", "blockwise")
    assert torch.equal(attention_pool(*tensors, 4), expected)
    monkeypatch.setenv("BETACLIP_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="'nonsense'"):
        attention_pool(*tensors, 4)


@pytest.mark.parametrize("texts, expected", [(2, "folded"), (150, "sdpa")])
def test_auto_follows_the_cost_model(texts, expected, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    tensors = arguments(16, texts, 256, 64, torch.float32)
    named = "triton" if DEVICE == "cuda" and expected == "folded" else expected
    assert folding_pays(16, texts, 256, 64, 1, torch.float32, DEVICE) == (expected == "folded")
    assert torch.equal(attention_pool(*tensors, 1), attention_pool(*tensors, 1, backend=named))


def test_tiles_of_the_interpreter_are_small():
    """The sizes above take several tiles in every direction, the last of which is not full."""
    _, queries, patches, width, heads = SIZES[1]
    latents = queries * heads
    for table, counts in (
        (FORWARD, (latents, patches, width)),
        (BACKWARD, (latents, patches, width)),
        (PRODUCTS, (patches, width, 2 * latents)),
    ):
        tile = choose(table, "interpreter", 4)
        for count, block in zip(counts, (tile.block_m, tile.block_n, tile.block_d), strict=True):
            assert count > block and (count % block or count == 2 * latents)
