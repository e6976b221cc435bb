"""Rows laid out for one pass over all prefixes, against prefixes that are normalised one by one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.prefix_rows import PrefixRows

DIMS = (3, 4, 9)


def operand(rows: Tensor, dims: tuple[int, ...] = DIMS) -> Operand:
    norms = rows.norm(dim=1)
    return Operand(rows, None, torch.where(norms > 0, norms.reciprocal(), 0), rows.dtype, dims=dims)


def some_rows(count: int) -> Tensor:
    """One whose first prefix is small, one whose first is zero, one whose first two are, and one that is zero."""
    rows = torch.randn(count, DIMS[-1], dtype=torch.float64)
    rows[1, :3] *= 1e-6
    rows[2, :3], rows[3, :4], rows[4] = 0, 0, 0
    return rows


@pytest.mark.parametrize("multiple", [1, 4])
def test_partial_sums_are_cosines(multiple):
    x, y = some_rows(6), some_rows(7)
    of_x, of_y = (PrefixRows.of(operand(rows), multiple) for rows in (x, y))
    assert all(place.start % multiple == place.stop % multiple == 0 for place in of_x.places)
    assert of_x.ends == of_y.ends and of_x.ends[-1] == of_x.rows.shape[1] <= 9 + 3 * (multiple - 1)
    assert float(of_x.rows.abs().max()) <= 1 + 1e-12
    total = torch.zeros(6, 7, dtype=torch.float64)
    for prefix, (dim, place) in enumerate(zip(DIMS, of_x.places, strict=True)):
        total += of_x.rows[:, place] @ of_y.rows[:, place].T
        torch.testing.assert_close(total, F.normalize(x[:, :dim], dim=1) @ F.normalize(y[:, :dim], dim=1).T)
        if prefix + 1 < len(DIMS):
            total *= of_x.ratios[prefix].abs()[:, None] * of_y.ratios[prefix].abs()
    assert (of_x.ratios < 0).tolist() == [[row in range(2, 5) for row in range(6)], [row in (3, 4) for row in range(6)]]


def test_gradient_is_that_of_prefixes_normalised_one_by_one():
    """dS of each prefix is any matrix here; the kernels form these sums for it."""
    x, y = some_rows(6), some_rows(7)
    ds = torch.randn(len(DIMS), 6, 7, dtype=torch.float64)
    of_x, of_y = (PrefixRows.of(operand(rows), 4) for rows in (x, y))
    unit = F.normalize(x, dim=1).requires_grad_()
    cosines = [F.normalize(unit[:, :dim], dim=1) @ F.normalize(y[:, :dim], dim=1).T for dim in DIMS[:-1]]
    cosines.append(unit @ F.normalize(y, dim=1).T)  # the norm of the longest is the caller's
    for prefix, ratios in enumerate(of_x.ratios):
        ds[prefix, ratios < 0] = 0
    (expected,) = torch.autograd.grad(sum((d * c).sum() for d, c in zip(ds, cosines, strict=True)), unit)
    radial = torch.stack([(d * c).sum(1) for d, c in zip(ds[:-1], cosines, strict=False)]).detach()
    sums = [ds[2]]
    for prefix in (1, 0):
        sums.append(ds[prefix] + sums[-1] * of_x.ratios[prefix].abs()[:, None] * of_y.ratios[prefix].abs())
    pairs = zip(sums[::-1], of_x.places, strict=True)
    products = torch.cat([of_slice @ of_y.rows[:, place] for of_slice, place in pairs], 1)
    torch.testing.assert_close(of_x.gradient(products, radial), expected)


def test_rows_that_take_no_part_may_hold_anything():
    rows = some_rows(6)
    side = operand(rows)
    rows[[1, 5]], side.inverse_norm[[1, 5]] = torch.nan, 0
    found = PrefixRows.of(side, 4)
    assert found.rows.isfinite().all() and found.ratios.isfinite().all() and (found.rows[[1, 5]] == 0).all()
    assert found.gradient(torch.ones_like(found.rows), torch.ones(2, 6, dtype=torch.float64)).isfinite().all()


def test_float16_holds_small_prefixes():
    """As rows of the whole they would be below its smallest number."""
    rows = some_rows(6).float()
    rows[:, :3] *= 1e-3
    side = operand(rows)
    half = PrefixRows.of(Operand(rows, None, side.inverse_norm, torch.float16, dims=DIMS), 1).rows
    torch.testing.assert_close(half.float(), PrefixRows.of(side, 1).rows, rtol=1e-3, atol=1e-6)
