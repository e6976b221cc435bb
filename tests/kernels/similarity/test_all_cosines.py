"""The matrix of all cosines of a few hundred embeddings: the same statistics and gradients as by tiles."""

import pytest
import torch
from support.dispatches import Dispatches
from torch import Tensor

from betaclip.kernels.similarity import operators
from betaclip.kernels.similarity.all_cosines import AllCosines
from betaclip.kernels.similarity.blockwise import Blockwise
from betaclip.kernels.similarity.within_images import Images

B, K, D = 5, 3, 8
BY_TILES = Blockwise(max_matrix=0)


def operands(layout: str, dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor | None]]:
    """Rows of x and y, and ids and slots of a layout: regular, padded (padding holds anything) or ragged."""
    image_id, slots = torch.arange(B, dtype=torch.int32).repeat_interleave(K), None
    if layout == "ragged":
        counts = torch.tensor([2, 1, 3, 3, 1])
        image_id = torch.arange(B, dtype=torch.int32).repeat_interleave(counts)
        slots = torch.full((B, K), -1)
        slots[torch.arange(K) < counts[:, None]] = torch.arange(int(counts.sum()))
    x, y = (3 * torch.randn(len(image_id), D, dtype=dtype) for _ in range(2))
    if layout == "padded":
        image_id[[1, 4, 5]] = -1
        x[4], y[1] = torch.nan, torch.inf
    return (x, y), {"image_id": image_id, "slots": slots}


def both_ways(form: str, backend: Blockwise, rows, ids, scale: float, text_id=None, keep: int = 10**6):
    """Values, and gradients by rows, scale and bias."""
    x, y = (t.clone().requires_grad_() for t in rows)
    scale_, bias = (torch.tensor(s, dtype=x.dtype, requires_grad=True) for s in (scale, -1.5))
    layout = operators.RowLayout(B, K, ids["image_id"], ids["slots"], text_id)
    if form == "ce":
        *sums, cosines = operators.contrast_logsumexp(x, y, scale_, layout, x.dtype, backend, keep)
        sums = [torch.where(s.isfinite(), s, 0) for s in sums]
    else:
        weights = torch.linspace(0.5, 2, len(x), dtype=x.dtype).unsqueeze(0)
        *sums, cosines = operators.contrast_softplus(
            x, y, scale_, bias, layout, x.dtype, backend, form == "total", weights if form == "total" else None
        )
    total = sum((s * torch.linspace(1, 2, s.numel(), dtype=s.dtype).view(s.shape)).sum() for s in sums)
    total = total + (cosines * torch.linspace(-1, 2, cosines.numel(), dtype=x.dtype).view(cosines.shape)).sum()
    leaves = [x, y, scale_] if form == "ce" else [x, y, scale_, bias]
    return [*(s.detach() for s in sums), cosines.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("layout", ["regular", "padded", "ragged"])
@pytest.mark.parametrize("form", ["ce", "rows", "total"])
@pytest.mark.parametrize("scale", [-4.0, 12.0, 900.0])  # 900: one exponential does not serve both directions
def test_as_by_tiles(form, layout, scale):
    rows, ids = operands(layout)
    expected = both_ways(form, BY_TILES, rows, ids, scale)
    for keep in (10**6, 0):
        for ours, truth in zip(both_ways(form, Blockwise(), rows, ids, scale, keep=keep), expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["ce", "total"])
def test_equal_texts_are_left_out(form):
    rows, ids = operands("regular")
    text_id = torch.tensor([0, 1, -1, 0, 2, -1, -1, -1, 1, 3, 4, 5, 0, 6, 6], dtype=torch.int32)
    expected = both_ways(form, BY_TILES, rows, ids, 5.0, text_id)
    for ours, truth in zip(both_ways(form, Blockwise(), rows, ids, 5.0, text_id), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(expected, both_ways(form, BY_TILES, rows, ids, 5.0))


@pytest.mark.parametrize("norm, served", [(1.0, True), (1e-9, False), (1e9, False), (0.0, False), (torch.nan, False)])
def test_extreme_norms_are_left_to_tiles(norm, served):
    """Their products, or those of their inverse norms, could leave the range of float32."""
    (x, y), ids = operands("regular", torch.float32)
    x[7] *= norm
    cosines = AllCosines.of(x, y, ids["image_id"], None, Images(B, K, None), torch.empty(len(x) ** 2))
    assert (cosines is not None) == served
    for form in ("ce", "total"):
        ours, truth = (both_ways(form, b, (x, y), ids, 5.0) for b in (Blockwise(), BY_TILES))
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4 * served, atol=1e-5 * served, equal_nan=True)


def test_serves_few_rows_of_whole_embeddings():
    x = torch.empty(20, D)
    few = operators._few_rows
    assert few(x, B, (), "blockwise") and few(x, B, (), Blockwise(20, 20))
    assert not any(few(x, B, (), b) for b in ("reference", Blockwise(19, 20), Blockwise(20, 19), BY_TILES))
    assert not few(x, 0, (), "blockwise") and not few(x, B, (4, D), "blockwise") and not few(x[:0], B, (), "blockwise")
    assert few(torch.empty(724, D), B, (), "blockwise") and not few(torch.empty(725, D), B, (), "blockwise")


@pytest.mark.parametrize("form", ["ce", "rows", "total"])
def test_one_product_of_all_pairs_and_two_for_gradients(form):
    rows, ids = operands("regular")
    with Dispatches() as calls:
        both_ways(form, Blockwise(), rows, ids, 5.0)
    products = {name: n for name, n in calls.names.items() if "mm" in name}
    assert products == {"aten.mm.default": 3}
