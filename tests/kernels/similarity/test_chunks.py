"""Chunks of dS: what they cost the host, and their size where memory is short."""

import pytest
import torch
from support.dispatches import Dispatches
from torch.utils._python_dispatch import TorchDispatchMode

from betaclip.kernels.similarity import chunks
from betaclip.kernels.similarity.chunks import Accumulators


def accumulate(n: int, m: int, chunk_rows: int, need_dx: bool = True, need_dy: bool = True, multiple: int = 1):
    """dx, dy and dscale of a dS of random numbers, and the dense dS."""
    x, y = torch.randn(n, 8, dtype=torch.float64), torch.randn(m, 8, dtype=torch.float64)
    dense = torch.randn(n, m, dtype=torch.float64)
    sums = Accumulators(x, y, 7, chunk_rows, need_dx, need_dy, multiple)
    for row, col, row_end, col_end, ds in sums.chunks():
        ds.copy_(dense[row:row_end, col:col_end])
    return sums.finish(torch.tensor(3.0), torch.tensor(0.5)), x, y, dense


@pytest.mark.parametrize("need_dx, need_dy", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("chunk_rows", [16, 64])
def test_sums_of_chunks(need_dx, need_dy, chunk_rows, monkeypatch):
    monkeypatch.setattr(chunks, "PRODUCT_ELEMENTS", 100)  # several parts of dscale
    (dx, dy, dscale), x, y, dense = accumulate(50, 33, chunk_rows, need_dx, need_dy)
    torch.testing.assert_close(dx, (1.5 * dense @ y)[:, :7] if need_dx else x.new_empty(0))
    torch.testing.assert_close(dy, (1.5 * dense.T @ x)[:, :7] if need_dy else y.new_empty(0))
    torch.testing.assert_close(dscale, 0.5 * (dense * (x @ y.T)).sum())


def test_places_with_a_gradient_of_their_own():
    x, y = torch.randn(50, 9, dtype=torch.float64), torch.randn(33, 9, dtype=torch.float64)
    dense, places = torch.randn(2, 50, 33, dtype=torch.float64), [slice(0, 4), slice(4, 9)]
    sums = Accumulators(x, y, 9, 16, True, True, places=places)
    for row, col, row_end, col_end, ds in sums.chunks():
        ds.copy_(dense[:, row:row_end, col:col_end])
    dx, dy, dscale = sums.finish(torch.tensor(3.0), torch.tensor(0.5))
    for place, ds in zip(places, dense, strict=True):
        torch.testing.assert_close(dx[:, place], 1.5 * ds @ y[:, place])
        torch.testing.assert_close(dy[:, place], 1.5 * ds.T @ x[:, place])
    torch.testing.assert_close(
        dscale, 0.5 * sum((ds * (x[:, p] @ y[:, p].T)).sum() for p, ds in zip(places, dense, strict=True))
    )


def test_a_chunk_costs_two_calls():
    """The two products, and nothing else."""
    counts = []
    for n, m in ((32, 48), (64, 96)):
        x, y = torch.randn(n, 8), torch.randn(m, 8)
        with Dispatches() as calls:
            sums = Accumulators(x, y, 8, 16, True, True)
            total = sum(1 for _ in sums.chunks())
            sums.finish(torch.tensor(1.0), torch.tensor(1.0))
        assert total == n * m // 256
        assert calls.names["aten.addmm.out"] == 2 * total
        counts.append(calls.names.total() - 2 * total)
    assert counts[0] == counts[1] <= 20


class ShortOfMemory(TorchDispatchMode):
    """No tensor has more than ``limit`` rows and columns."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func == torch.ops.aten.new_empty.default and min(args[1][-2:]) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limit, chunk_rows, multiple, expected", [(2000, 6016, 128, 1536), (3100, 3000, 1, 3000)])
def test_chunks_shrink_where_memory_is_short(limit, chunk_rows, multiple, expected):
    x = torch.empty(7000, 8, device="meta")
    with ShortOfMemory(limit):
        sums = Accumulators(x, x, 8, chunk_rows, True, True, multiple)
    assert sums.chunk_rows == expected and sums.workspace.shape == (1, expected, -(-expected // 16) * 16)


def test_no_memory_at_all_is_an_error():
    x = torch.empty(7000, 8, device="meta")
    with ShortOfMemory(8), pytest.raises(torch.OutOfMemoryError):
        Accumulators(x, x, 8, 8192, True, True, 128)
