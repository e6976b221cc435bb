"""Values and gradients of the similarity operators, against the dense form in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.precision import HALF, usual, widest
from support.similarity import (
    CHECKS,
    DEVICE,
    DTYPES,
    FAST,
    check_prefixes,
    operands,
    prefix_operands,
    prefix_results,
    require,
    small,
    value_and_gradients,
)
from torch import Tensor

from betaclip.kernels.similarity.blockwise import Blockwise
from betaclip.kernels.similarity.contract import Operand, SimilarityBackend
from betaclip.kernels.similarity.functional import similarity_logsumexp, similarity_softplus
from betaclip.kernels.similarity.operators import (
    BACKENDS,
    local_backend,
)


def triton_backend() -> SimilarityBackend:
    """With chunks of dS so small that a test has several of them."""
    from betaclip.kernels.similarity.triton_kernels import Triton

    return Triton(chunk_rows=32 if DEVICE == "cpu" else 1024)


# N, M, D: aligned to the interpreter's tiles; ragged rows; ragged everything. No two sizes of a case are equal.
SIZES = [(96, 64, 32), (101, 64, 32), (75, 131, 40)]
# Each backend in two dtypes, one with image ids and one without.
CASES = [(name, dtype, groups) for name in BACKENDS for dtype, groups in zip(DTYPES[name], (True, False), strict=True)]


@CHECKS
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend, dtype, groups", CASES)
def test_matches_reference(check, backend, dtype, size, groups):
    check(backend, dtype, 20.0, *size, groups)


@CHECKS
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference_in_half_precision(check, backend, dtype):
    check(backend, dtype, 20.0, 101, 75, 64, True)


@CHECKS
@pytest.mark.parametrize("d", [64, 96, 384])
@pytest.mark.parametrize("backend", FAST)
def test_matches_reference_at_every_depth(check, backend, d):
    check(backend, usual(backend), 20.0, 33, 50, d, True)


@CHECKS
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("d", [1, 8, 13, 72, 1000, 1024])
def test_cuda_matches_reference_at_odd_depths(check, dtype, d, cuda):
    check("cuda", dtype, 20.0, 51, 97, d, True)


@pytest.mark.gpu
@CHECKS
@pytest.mark.parametrize("d", [64, 96, 384, 512, 640, 768, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_matches_reference_on_gpu(check, backend, dtype, d):
    check(backend, dtype, 20.0, 5003, 4211, d, True)


@pytest.mark.parametrize(
    "dtype, n, m, dims, groups",
    [
        (torch.float64, 37, 20, (24, 32, 70), True),  # slices that end within a step of a tile
        (torch.float64, 20, 35, (32, 96), False),
        (torch.float16, 35, 20, (8, 40), True),
        (torch.bfloat16, 37, 20, (32, 64), True),
    ],
)
def test_prefixes_in_one_pass(dtype, n, m, dims, groups):
    require("triton", dtype)
    check_prefixes(triton_backend(), prefix_operands(n, m, dims, dtype, groups=groups), 20.0)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_prefixes_and_gradients_of_one_side(needs):
    require("triton", torch.float64)
    check_prefixes(triton_backend(), prefix_operands(34, 20, (5, 31), torch.float64), 9.0, *needs)


@pytest.mark.parametrize("scale", [0.0, -30.0, 400.0])
def test_prefixes_at_extreme_logits(scale):
    """At 400 the statistics of some rows lie far below the shift, and one exponential does not serve both sides."""
    require("triton", torch.float32)
    sides = prefix_operands(34, 20, (4, 8), torch.float32, groups=False)
    sides[0].rows[:, 0] += 3
    sides[1].rows[:, 0] += 3
    sides[0].rows[7] *= -1
    sides[1].rows[5, :4] *= -1
    sides = tuple(replace(side, inverse_norm=side.rows.norm(dim=1).reciprocal()) for side in sides)
    check_prefixes(triton_backend(), sides, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("dims", [(128, 256, 512), (64, 100, 768)])
def test_prefixes_in_one_pass_on_gpu(dims, dtype):
    """Several chunks of dS, the last of them ragged."""
    check_prefixes(triton_backend(), prefix_operands(3001, 2207, dims, dtype), 20.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prefixes_are_deterministic_on_gpu(dtype):
    sides = prefix_operands(1003, 711, (64, 256, 512), dtype)
    for first, second in zip(*(prefix_results(triton_backend(), sides, 20.0) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


@CHECKS
@pytest.mark.parametrize("scale", [100.0, 400.0])
@pytest.mark.parametrize("backend", FAST)
def test_extreme_logits(check, backend, scale):
    """Logits far beyond the range of one shift: rows are computed again with their true maximum."""
    check(backend, usual(backend), scale, 49, 66, 8, True)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_similarities_at_the_limit(backend, sign):
    """Every logit +100 or -100 at ragged sizes: what pads a tile (S = 0) must not show."""
    n, m, d = 45, 71, 16
    x, y = (torch.zeros(rows, d, dtype=usual(backend), device=DEVICE) for rows in (n, m))
    x[:, 0], y[:, 0] = 1, sign
    s = torch.tensor(100.0, device=DEVICE)
    x.requires_grad_(), y.requires_grad_()
    lse_x, lse_y = similarity_logsumexp(x, y, s, backend=small(backend))
    log = torch.tensor([m, n], dtype=torch.float64).log()
    torch.testing.assert_close(lse_x, torch.full_like(lse_x, sign * 100 + log[0]))
    torch.testing.assert_close(lse_y, torch.full_like(lse_y, sign * 100 + log[1]))
    dx, _ = torch.autograd.grad(lse_x.sum() + lse_y.sum(), (x, y))
    expected = 100 * sign * (1 + m / n)  # softmax sums to 1 along either direction
    torch.testing.assert_close(dx[:, 0], torch.full_like(dx[:, 0], expected))
    total = similarity_softplus(x, y, s, backend=small(backend))
    expected = m * F.softplus(torch.tensor(sign * 100.0, dtype=torch.float64))
    torch.testing.assert_close(total, torch.full_like(total, expected.item()))


@pytest.mark.parametrize("backend", FAST)
def test_row_far_below_the_others(backend):
    """A row whose statistic lies 187 nats under the largest logit of its tile keeps float32's accuracy."""
    x, y = (torch.zeros(20, 4, dtype=usual(backend), device=DEVICE) for _ in range(2))
    x[:, 0], y[:, 0], x[7, 0] = 1, 1, -0.875
    x.requires_grad_()
    lse_x, _ = similarity_logsumexp(x, y, torch.tensor(100.0, device=DEVICE), backend=small(backend))
    assert lse_x[7].item() == pytest.approx(-87.5 + torch.tensor(20.0).log().item(), rel=1e-6)
    (dx,) = torch.autograd.grad(lse_x[7], x)
    assert dx[7, 0].item() == pytest.approx(100, rel=1e-5 if dx.dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("backend", FAST)
def test_tiny_softplus_keeps_its_relative_accuracy(backend):
    """softplus(-25) = 1.4e-11 is far below float32's spacing at 1: log(1 + e) would give 0."""
    x, y = (torch.ones(33, 1, dtype=usual(backend), device=DEVICE) for _ in range(2))
    rows = similarity_softplus(
        x, y, torch.tensor(-20.0, device=DEVICE), torch.tensor(-5.0, device=DEVICE), backend=backend
    )
    expected = 33 * F.softplus(torch.tensor(-25.0, dtype=torch.float64)).item()
    assert rows[0].item() == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_softplus_in_float64(backend):
    x, y = (torch.ones(33, 1, dtype=torch.float64, device=DEVICE) for _ in range(2))
    require(backend, x.dtype)
    scale, bias = (torch.tensor(v, dtype=torch.float64, device=DEVICE) for v in (-40.0, -5.0))
    rows = similarity_softplus(x, y, scale, bias, backend=small(backend))
    expected = 33 * torch.tensor(-45.0, dtype=torch.float64).exp().item()
    assert rows[0].item() == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("logit", [-20.0, -3.0, -1.0, -0.3, 0.0, 0.3, 60.0])
@pytest.mark.parametrize("backend", FAST)
def test_softplus_over_its_range(backend, logit):
    x, y = (torch.ones(3, 1, dtype=usual(backend), device=DEVICE) for _ in range(2))
    rows = similarity_softplus(x, y, torch.tensor(logit, device=DEVICE), backend=small(backend))
    expected = 3 * F.softplus(torch.tensor(logit, dtype=torch.float64)).item()
    assert rows[0].item() == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("scale, bias", [(-300.0, -1.0), (3.0, 2.0), (3.0, 200.0)])
@pytest.mark.parametrize("backend", FAST)
def test_negative_scale_and_positive_bias(backend, scale, bias):
    x = F.normalize(torch.randn(41, 8, device=DEVICE), dim=1).to(usual(backend))
    s, b = torch.tensor(scale, device=DEVICE), torch.tensor(bias, device=DEVICE)
    for operation, arguments in ((similarity_logsumexp, (x, -x[:30], s)), (similarity_softplus, (x, -x[:30], s, b))):
        ours, truth = (operation(*arguments, backend=name) for name in (backend, "reference"))
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("size", [1e-8, 1e6])
@pytest.mark.parametrize("backend", FAST)
def test_half_precision_gradients_of_any_size(backend, size):
    """Incoming gradients far outside of float16, and sigmoids of a late SigLIP's bias near its smallest number."""
    x, y = (F.normalize(torch.randn(n, 32, device=DEVICE), dim=1).half() for n in (64, 48))
    scale, bias = torch.tensor(5.0, device=DEVICE), torch.tensor(-16.0, device=DEVICE)
    sides = [Operand(rows, None, None, torch.float16) for rows in (x, y)]
    lse = local_backend("similarity_logsumexp", "reference", *sides).similarity_logsumexp_fwd(*sides, scale)
    incoming = [size * torch.ones_like(t) for t in lse]

    def run(name: str) -> list[Tensor]:
        chosen = local_backend("similarity_softplus", small(name), *sides)
        softmax = chosen.similarity_logsumexp_bwd(*sides, scale, *lse, *incoming, True, True)
        return [*softmax, *chosen.similarity_softplus_fwd_bwd(*sides, scale, bias, incoming[0], True, True)]

    for ours, truth in zip(run(backend), run("reference"), strict=True):
        assert (ours - truth).norm() <= 2e-2 * truth.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_integers(backend):
    """Each sum is a power of two and every product an integer: a wrong index is a wrong integer.

    x_i . y_j = 8 where j % 8 == i % 8 and both rows have different groups, else 0. With scale ln 2, exp(S) is
    256 or 1, so exp(lse) counts the pairs of either kind.
    """
    n, m, d = 50, 67, 8
    eye = torch.eye(d, dtype=usual(backend), device=DEVICE)
    x, y = (eye[torch.arange(rows, device=DEVICE) % d] for rows in (n, m))
    x *= 8
    x_group, y_group = torch.arange(n, device=DEVICE) // 3, torch.arange(m, device=DEVICE) // 5
    x_group[-4:] = -1
    scale = torch.tensor(2.0, device=DEVICE).log()
    lse_x, lse_y = similarity_logsumexp(x, y, scale, x_group, y_group, backend=small(backend))
    taken = (x_group[:, None] != y_group) & (x_group[:, None] >= 0)
    counts = torch.where((x @ y.T) == 8, 256, 1) * taken
    assert torch.equal(lse_x.exp().round().long(), counts.sum(1))
    assert torch.equal(lse_y.exp().round().long(), counts.sum(0))


@pytest.mark.parametrize("backend", FAST)
def test_unsorted_groups(backend):
    x, y, x_group, y_group = operands(61, 83, 24, widest(backend))
    order_x, order_y = torch.randperm(61, device=DEVICE), torch.randperm(83, device=DEVICE)
    require(backend, x.dtype)
    scale = torch.tensor(10.0, dtype=torch.float64, device=DEVICE)
    sorted_x, sorted_y = similarity_logsumexp(x, y, scale, x_group, y_group, backend=small(backend))
    mixed_x, mixed_y = similarity_logsumexp(
        x[order_x], y[order_y], scale, x_group[order_x], y_group[order_y], backend=backend
    )
    torch.testing.assert_close(mixed_x, sorted_x[order_x])
    torch.testing.assert_close(mixed_y, sorted_y[order_y])


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_that_are_views(backend):
    """Every other element, and one for all, in the dtype that kernels read."""
    x, y, _, _ = operands(21, 30, 8, widest(backend))
    require(backend, x.dtype)
    scale = torch.tensor(2.0, device=DEVICE)
    pairs = torch.arange(42, dtype=torch.int32, device=DEVICE).view(21, 2) % 5
    views = pairs[:, 0], pairs[2, :1].expand(30)
    assert not any(group.is_contiguous() for group in views)
    ours = similarity_logsumexp(x, y, scale, *views, backend=small(backend))
    truth = similarity_logsumexp(x, y, scale, *(group.contiguous() for group in views), backend="reference")
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_texts_take_no_part(backend, grouped):
    """Against the formula, with gradients: ids on both sides, some of them negative."""
    x, y, x_group, y_group = operands(75, 101, 24, widest(backend), groups=grouped)
    require(backend, x.dtype)
    x_text, y_text = (torch.randint(-2, 9, (len(rows),), device=DEVICE) for rows in (x, y))
    scale, bias = (torch.tensor(v, dtype=torch.float64, device=DEVICE) for v in (10.0, -1.0))
    out = (x_text[:, None] == y_text) & (y_text >= 0)
    if grouped:
        out |= (x_group[:, None] == y_group) | (x_group[:, None] < 0) | (y_group < 0)
    weight = torch.rand(len(x) * 2 + len(y), dtype=torch.float64, device=DEVICE)

    def ours(x, y, scale, bias):
        ids, texts = (x_group, y_group), {"x_text": x_text, "y_text": y_text, "backend": small(backend)}
        statistics = similarity_logsumexp(x, y, scale, *ids, **texts)
        return torch.cat((*statistics, similarity_softplus(x, y, scale, bias, *ids, **texts)))

    def dense(x, y, scale, bias):
        s = (scale * x @ y.T).masked_fill(out, -torch.inf)
        return torch.cat((s.logsumexp(1), s.logsumexp(0), F.softplus(s + bias).sum(1)))

    found = value_and_gradients(ours, weight, x, y, scale, bias)
    truth = value_and_gradients(dense, weight, x.double(), y.double(), scale, bias)
    tolerance = 2e-2 if x.dtype in HALF else 1e-5 if x.dtype == torch.float32 else 1e-9
    for a, t in zip(found, truth, strict=True):
        assert torch.equal(a.isfinite(), t.isfinite())
        torch.testing.assert_close(a.double(), t, rtol=tolerance, atol=tolerance * float(t[t.isfinite()].abs().max()))


@pytest.mark.parametrize("backend", FAST)
def test_equal_texts_in_lost_rows(backend):
    """Rows far below the shift are formed again with their true maxima; equal texts stay out of these too."""
    x, y = (torch.zeros(20, 4, dtype=usual(backend), device=DEVICE) for _ in range(2))
    x[:, 0], y[:, 0], x[7, 0] = 1, 1, -0.875
    texts = torch.full((20,), -1, device=DEVICE)
    texts[7] = 3
    others = torch.where(torch.arange(20, device=DEVICE) < 5, 3, texts)
    scale = torch.tensor(100.0, device=DEVICE)
    of_rows, _ = similarity_logsumexp(x, y, scale, x_text=texts, y_text=others, backend=small(backend))
    _, of_columns = similarity_logsumexp(y, x, scale, x_text=others, y_text=texts, backend=small(backend))
    for lse in (of_rows, of_columns):
        assert lse[7].item() == pytest.approx(-87.5 + torch.tensor(14.0).log().item(), rel=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_ids_of_texts_on_one_side_only(backend):
    x, y, x_group, y_group = operands(21, 30, 8, widest(backend))
    require(backend, x.dtype)
    scale, given = torch.tensor(2.0, device=DEVICE), (x_group, y_group)
    ours = similarity_logsumexp(x, y, scale, *given, x_text=x_group.clamp_min(0), backend=small(backend))
    torch.testing.assert_close(ours, similarity_logsumexp(x, y, scale, *given, backend=small(backend)))


@pytest.mark.parametrize("in_order", [True, False])
def test_groups_over_several_ranges_of_rows(in_order):
    """The blockwise form looks for pairs of the same image range by range."""
    x, y, x_group, y_group = operands(460, 380, 8)  # fewer pairs are all compared
    if not in_order:
        x_group, y_group = (group[torch.randperm(len(group), device=DEVICE)] for group in (x_group, y_group))
    scale = torch.tensor(2.0, dtype=x.dtype, device=DEVICE)
    ours, truth = (
        similarity_logsumexp(x, y, scale, x_group, y_group, backend=b)
        for b in (Blockwise(40, 56, search_rows=7), "reference")
    )
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_on_one_side_only_mark_padding(backend):
    x, y, x_group, _ = operands(41, 30, 16, widest(backend))
    require(backend, x.dtype)
    scale = torch.tensor(5.0, dtype=torch.float64, device=DEVICE)
    _, lse_y = similarity_logsumexp(x, y, scale, x_group, None, backend=small(backend))
    truth = (scale * x[x_group >= 0].double() @ y.double().T).logsumexp(0)
    torch.testing.assert_close(lse_y, truth.to(lse_y.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_rows_may_hold_anything(backend):
    x, y, x_group, y_group = operands(41, 30, 16, usual(backend))
    require(backend, x.dtype)
    clean = [
        similarity_softplus(x, y, torch.tensor(9.0, device=DEVICE), None, x_group, y_group, backend=small(backend))
    ]
    x[x_group < 0], y[y_group < 0] = torch.nan, torch.inf
    x.requires_grad_(), y.requires_grad_()
    scale = torch.tensor(9.0, device=DEVICE, requires_grad=True)
    rows = similarity_softplus(x, y, scale, None, x_group, y_group, backend=small(backend))
    lse_x, lse_y = similarity_logsumexp(x, y, scale, x_group, y_group, backend=small(backend))
    torch.testing.assert_close(rows, clean[0])
    loss = rows.sum() + lse_x[x_group >= 0].sum() + lse_y[y_group >= 0].sum()
    for gradient in torch.autograd.grad(loss, (x, y, scale)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n, m", [(0, 5), (5, 0), (1, 1), (3, 4)])
def test_degenerate_sizes(backend, n, m):
    """No row, no column, or nothing but pairs of one group: no statistic, finite gradients."""
    ones = {"dtype": usual(backend), "device": DEVICE, "requires_grad": True}
    x, y = torch.ones(n, 8, **ones), torch.ones(m, 8, **ones)
    groups = torch.zeros(n, dtype=torch.int64, device=DEVICE), torch.zeros(m, dtype=torch.int64, device=DEVICE)
    scale = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    lse_x, lse_y = similarity_logsumexp(x, y, scale, *groups, backend=backend)
    rows = similarity_softplus(x, y, scale, None, *groups, backend=backend)
    assert (lse_x == -torch.inf).all() and (lse_y == -torch.inf).all() and (rows == 0).all()
    loss = torch.where(lse_x.isfinite(), lse_x, 0).sum() + torch.where(lse_y.isfinite(), lse_y, 0).sum() + rows.sum()
    for gradient in torch.autograd.grad(loss, (x, y, scale)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("padded", ["x", "y"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_side_all_padding(backend, padded):
    ones = {"dtype": usual(backend), "device": DEVICE, "requires_grad": True}
    x, y = (torch.ones(rows, 8, **ones) for rows in (5, 6))
    groups = [torch.arange(rows, device=DEVICE) for rows in (5, 6)]
    groups["xy".index(padded)] -= 100
    scale = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    lse_x, lse_y = similarity_logsumexp(x, y, scale, *groups, backend=small(backend))
    rows = similarity_softplus(x, y, scale, None, *groups, backend=small(backend))
    assert (lse_x == -torch.inf).all() and (lse_y == -torch.inf).all() and (rows == 0).all()
    gradients = torch.autograd.grad(
        [lse_x, lse_y, rows], (x, y, scale), [torch.ones_like(t) for t in (lse_x, lse_y, rows)]
    )
    for gradient in gradients:
        assert (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    require(backend, torch.float64)
    x, y, _, _ = operands(5, 6, 3)
    scale, bias = (torch.tensor(v, dtype=torch.float64, device=DEVICE, requires_grad=True) for v in (3.0, -0.5))
    x_group = torch.tensor([0, 0, 1, -1, 2], device=DEVICE)
    y_group = torch.tensor([0, 1, 1, -1, 3, 4], device=DEVICE)
    x.requires_grad_(), y.requires_grad_()

    def finite_logsumexp(x, y, scale):
        lse_x, lse_y = similarity_logsumexp(x, y, scale, x_group, y_group, backend=small(backend))
        return lse_x[x_group >= 0], lse_y[y_group >= 0]

    fast = backend == "triton"  # random projections of the Jacobian: its interpreter is slow
    assert torch.autograd.gradcheck(finite_logsumexp, (x, y, scale), fast_mode=fast)
    assert torch.autograd.gradcheck(
        lambda x, y, scale, bias: similarity_softplus(x, y, scale, bias, x_group, y_group, backend=small(backend)),
        (x, y, scale, bias),
        fast_mode=fast,
    )
