"""The work of Triton's similarity kernels. test_operators.py tests their results in general."""

import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support.calls import CountedCalls
from support.similarity import DEVICE, dense_logsumexp, require

from betaclip import BetaCALLoss
from betaclip.kernels.architecture import Tile
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.functional import similarity_logsumexp
from betaclip.kernels.similarity.tiles import CHUNK_ROWS, TILES

TILE = Tile(16, 16, 16, 4, 1)


def unit_norms(rows: int) -> torch.Tensor:
    return torch.ones(rows, 1)


def near_ten(rows: int) -> torch.Tensor:
    return 10 + torch.linspace(-1, 1, rows)[:, None]


def any_norms(rows: int) -> torch.Tensor:
    return 10 ** torch.linspace(-3, 3, rows)[:, None]


def one_large(rows: int) -> torch.Tensor:
    norms = torch.ones(rows, 1)
    norms[7] = 1e4
    return norms


@pytest.mark.skipif(DEVICE == "cuda", reason="counts tiles in Triton's interpreter")
@pytest.mark.parametrize(
    "norms, scale, with_ids, passes",
    [(unit_norms, 50.0, True, 1), (near_ten, 3.0, False, 3), (any_norms, 1.0, True, 3), (one_large, 20.0, False, 3)],
)
def test_passes_over_rows_of_any_norms(norms, scale, with_ids, passes, monkeypatch):
    """Each tile is multiplied once, and where norms leave the range of one shift, at most once more for each side."""
    require("triton", torch.float32)
    from betaclip.kernels.similarity import triton_kernels

    tiles, dot = [], triton_kernels._dot
    monkeypatch.setattr(triton_kernels, "_dot", lambda *args: tiles.append(1) or dot(*args))
    n, m = 20, 37
    x, y = (F.normalize(torch.randn(rows, 16), dim=1) * norms(rows) for rows in (n, m))
    ids = [torch.arange(rows) % 9 - 1 for rows in (n, m)] if with_ids else [None, None]
    ours = similarity_logsumexp(x, y, torch.tensor(scale), *ids, backend=triton_kernels.Triton(tile=TILE))
    truth = dense_logsumexp(x.double(), y.double(), scale, *ids)
    torch.testing.assert_close(torch.cat(ours).double(), truth, rtol=1e-5, atol=1e-5 * scale)
    all_tiles = -(-n // 16) * -(-m // 16)
    assert all_tiles <= len(tiles) <= passes * all_tiles
    assert (len(tiles) > all_tiles) == (passes > 1)


def sorted_ids(rows: int) -> torch.Tensor:
    """Images of 6 rows, so that tiles of 16 share an image with the next."""
    return torch.arange(rows) // 6


def far_ids(rows: int) -> torch.Tensor:
    """Images of 4 rows, so that none lies in two tiles."""
    return torch.arange(rows) // 4


def shuffled_ids(rows: int) -> torch.Tensor:
    return sorted_ids(rows)[torch.randperm(rows)]


def padded_ids(rows: int) -> torch.Tensor:
    """As far ids, but for one row in the second block that takes no part."""
    return far_ids(rows).index_fill(0, torch.tensor(20), -1)


ALL_TILES = {(m, n) for m in range(4) for n in range(3)}


@pytest.mark.skipif(DEVICE == "cuda", reason="counts tiles in Triton's interpreter")
@pytest.mark.parametrize(
    "image_ids, text_ids, tested",
    [
        (None, None, {(3, 0), (3, 1), (3, 2)}),  # where rows end within a tile
        (sorted_ids, None, ALL_TILES - {(0, 2), (2, 0)}),
        (padded_ids, None, ALL_TILES - {(0, 2), (2, 0)}),
        (far_ids, None, {(0, 0), (1, 1), (2, 2), (3, 0), (3, 1), (3, 2)}),
        (shuffled_ids, None, ALL_TILES),
        # One text in the first and last rows of x, and in the last block of y.
        (far_ids, "texts", {(0, 0), (1, 1), (2, 2), (3, 0), (3, 1), (3, 2), (0, 2)}),
    ],
)
def test_only_tiles_with_meeting_ids_compare_them(image_ids, text_ids, tested, monkeypatch):
    require("triton", torch.float32)
    from betaclip.kernels.similarity import triton_kernels

    n, m = 52, 48
    x, y = (F.normalize(torch.randn(rows, 16), dim=1) for rows in (n, m))
    ids = [image_ids(rows) if image_ids else None for rows in (n, m)]
    text = [torch.full((rows,), -1) for rows in (n, m)] if text_ids else [None, None]
    pairs = torch.ones(n, m, dtype=torch.bool)
    if image_ids:
        pairs = (ids[0][:, None] != ids[1]) & (ids[0][:, None] >= 0) & (ids[1] >= 0)
    if text_ids:
        text[0][[3, 50]], text[1][40] = 5, 5
        pairs[[3, 50], 40] = False
    seen, included = set(), triton_kernels._included

    def recorded(*args):
        offs_m, offs_n = args[4:6]
        seen.add((int(offs_m.handle.data[0]) // 16, int(offs_n.handle.data[0]) // 16))
        return included(*args)

    monkeypatch.setattr(triton_kernels, "_included", recorded)
    sides = [
        Operand(rows, None if i is None else i.int(), None, rows.dtype, None if t is None else t.int())
        for rows, i, t in zip((x, y), ids, text, strict=True)
    ]
    backend, scale = triton_kernels.Triton(tile=TILE, chunk_rows=32), torch.tensor(5.0)
    s = (5 * x.double() @ y.double().T).masked_fill(~pairs, -torch.inf)
    truth = s.exp().log1p().sum(1)
    sums = backend.similarity_softplus_fwd_bwd(*sides, scale, None, torch.ones(n), True, True)[0]
    torch.testing.assert_close(sums.double(), truth, rtol=1e-5, atol=1e-5)
    assert seen == tested
    seen.clear()
    lse = backend.similarity_logsumexp_fwd(*sides, scale)
    torch.testing.assert_close(
        torch.cat(lse).double(), torch.cat([s.logsumexp(1), s.logsumexp(0)]), rtol=1e-5, atol=1e-5
    )
    if not (lse[0] == -torch.inf).any():  # otherwise the second pass compares ids everywhere
        assert seen == tested
    seen.clear()
    backend.similarity_logsumexp_bwd(*sides, scale, *lse, *map(torch.ones_like, lse), True, True)
    assert seen == tested


@pytest.mark.parametrize(
    "form, launches, most_calls",
    [
        ("ce", {"fwd": 1, "merge": 2, "bwd": 25, "id_ranges": 2}, 840),
        ("bce", {"softplus": 25, "id_ranges": 1}, 660),
    ],
)
def test_what_a_whole_loss_asks_of_the_host(form, launches, most_calls, monkeypatch):
    """36 864 texts, forward and backward, on meta tensors, with the tile and chunk of sm_90: 25 chunks of dS."""
    triton_kernels = pytest.importorskip("betaclip.kernels.similarity.triton_kernels")
    counts = Counter()

    def launched(kernel):
        counts[re.sub("_kernel|_?similarity_|logsumexp_", "", kernel.fn.__name__)] += 1

    class Ranges:
        fn = triton_kernels._similarity_id_ranges_kernel.fn

        def __getitem__(self, programs):
            return lambda *args, **options: launched(self)

    monkeypatch.setattr(triton_kernels, "_similarity_id_ranges_kernel", Ranges())
    monkeypatch.setattr(triton_kernels._Launch, "__call__", lambda self, kernel, *args, **options: launched(kernel))
    monkeypatch.setattr(triton_kernels, "aligned", lambda t, multiple: t)  # meta tensors have no addresses
    image, text = (torch.empty(1024, 36, 512, device="meta", requires_grad=True) for _ in range(2))
    backend = triton_kernels.Triton(TILES["sm_90", 2], CHUNK_ROWS["sm_90", 2])
    loss = BetaCALLoss(form, backend=backend, gather=False)
    with CountedCalls() as calls:
        loss(image, text, torch.empty((), device="meta", requires_grad=True)).backward()
    assert counts == launches
    assert calls.names["aten.addmm.out"] == 50 and calls.names["aten.zero_.default"] <= 2
    assert calls.names.total() <= most_calls
