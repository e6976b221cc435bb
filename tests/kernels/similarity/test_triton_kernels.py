"""The work of Triton's similarity kernels. test_operators.py tests their results in general."""

import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support.dispatches import Dispatches
from support.similarity import DEVICE, dense_logsumexp, prefix_operands, prefix_results, require
from torch.utils.flop_counter import FlopCounterMode

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

    tiles, dot = [], triton_kernels.dot
    monkeypatch.setattr(triton_kernels, "dot", lambda *args: tiles.append(1) or dot(*args))
    n, m = 20, 37
    x, y = (F.normalize(torch.randn(rows, 16), dim=1) * norms(rows) for rows in (n, m))
    ids = [torch.arange(rows) % 9 - 1 for rows in (n, m)] if with_ids else [None, None]
    ours = similarity_logsumexp(x, y, torch.tensor(scale), *ids, backend=triton_kernels.Triton(tile=TILE))
    truth = dense_logsumexp(x.double(), y.double(), scale, *ids)
    torch.testing.assert_close(torch.cat(ours).double(), truth, rtol=1e-5, atol=1e-5 * scale)
    all_tiles = -(-n // 16) * -(-m // 16)
    assert all_tiles <= len(tiles) <= passes * all_tiles
    assert (len(tiles) > all_tiles) == (passes > 1)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts products in Triton's interpreter")
def test_products_of_prefixes_are_those_of_the_longest(monkeypatch):
    """A tile takes each slice of the rows once, in each pass; so do the two library products over a chunk of dS."""
    require("triton", torch.float32)
    from betaclip.kernels.similarity import triton_kernels

    slices, dot = Counter(), triton_kernels.dot

    def counted(*args):
        place = (int(a.handle.data[0]) if hasattr(a, "handle") else a for a in (*args[3:5], args[9]))
        slices[tuple(place)] += 1
        return dot(*args)

    monkeypatch.setattr(triton_kernels, "dot", counted)
    n, m, dims = 20, 37, (16, 32, 64)
    sides = prefix_operands(n, m, dims, torch.float32, groups=False)
    with FlopCounterMode(display=False) as flop:
        prefix_results(triton_kernels.Triton(tile=TILE, chunk_rows=32), sides, 10.0)
    tiles = -(-n // TILE.block_m) * -(-m // TILE.block_n)
    assert len(slices) == tiles * len(dims) and set(slices.values()) == {4}  # both operations, forward and backward
    assert flop.get_total_flops() == 2 * 4 * n * m * dims[-1]  # dx and dy of both operations


def sorted_ids(rows: int) -> torch.Tensor:
    """Images of 6 rows, so that tiles of 16 share an image with the next."""
    return torch.arange(rows) // 6


def far_ids(rows: int) -> torch.Tensor:
    """Images of 4 rows, so that none lies in two tiles."""
    return torch.arange(rows) // 4


def padded_ids(rows: int) -> torch.Tensor:
    """As far ids, but for one row that takes no part."""
    return far_ids(rows).index_fill(0, torch.tensor(20), -1)


def shuffled_ids(rows: int) -> torch.Tensor:
    return sorted_ids(rows)[torch.randperm(rows)]


def meeting_tiles(image: list, text: list, rows: list[int], sides: tuple[int, int]) -> set[tuple[int, int]]:
    """Tiles that end beyond the rows, hold a row that takes no part, or whose ranges of ids meet."""

    def meet(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a[0] <= a[1] and b[0] <= b[1] and a[0] <= b[1] and b[0] <= a[1]

    def equal_texts(part: torch.Tensor) -> tuple[int, int]:
        part = part[part >= 0]
        return (int(part.min()), int(part.max())) if len(part) else (1, 0)

    found = set()
    for m in range(-(-rows[0] // sides[0])):
        for n in range(-(-rows[1] // sides[1])):
            tile = (m, n)
            ragged = any((i + 1) * side > count for i, side, count in zip(tile, sides, rows, strict=True))
            spans = [slice(i * side, (i + 1) * side) for i, side in zip(tile, sides, strict=True)]
            images = [ids[span] for ids, span in zip(image, spans, strict=True)] if image[0] is not None else []
            texts = [ids[span] for ids, span in zip(text, spans, strict=True)] if text[0] is not None else []
            if (
                ragged
                or any(int(part.min()) < 0 for part in images)
                or (images and meet(*((int(part.min()), int(part.max())) for part in images)))
                or (texts and meet(*map(equal_texts, texts)))
            ):
                found.add(tile)
    return found


@pytest.mark.skipif(DEVICE == "cuda", reason="counts tiles in Triton's interpreter")
@pytest.mark.parametrize(
    "image_ids, with_texts, skipped",
    [(None, False, 4), (sorted_ids, False, 1), (far_ids, False, 2), (padded_ids, False, 1), (far_ids, True, 1)],
)
def test_only_tiles_with_meeting_ids_compare_them(image_ids, with_texts, skipped, monkeypatch):
    require("triton", torch.float32)
    from betaclip.kernels.similarity import triton_kernels, triton_tiles

    n, m = rows = [84, 45]
    x, y = (F.normalize(torch.randn(count, 16), dim=1) for count in rows)
    image, text = [image_ids(count) if image_ids else None for count in rows], [None, None]
    pairs = torch.ones(n, m, dtype=torch.bool)
    if image_ids:
        pairs = (image[0][:, None] != image[1]) & (image[0][:, None] >= 0) & (image[1] >= 0)
    if with_texts:
        text = [torch.full((count,), -1) for count in rows]
        text[0][[40, 83]], text[1][3] = 5, 5
        pairs[[40, 83], 3] = False
    seen, included = set(), triton_tiles._included

    def recorded(*args):
        offs_m, offs_n = args[4:6]
        seen.add((int(offs_m.handle.data[0]) // 32, int(offs_n.handle.data[0]) // 16))
        return included(*args)

    monkeypatch.setattr(triton_tiles, "_included", recorded)
    sides = [
        Operand(values, None if i is None else i.int(), None, values.dtype, None if t is None else t.int())
        for values, i, t in zip((x, y), image, text, strict=True)
    ]
    backend, scale = triton_kernels.Triton(tile=Tile(32, 16, 16, 4, 1), chunk_rows=32), torch.tensor(5.0)
    s = (5 * x.double() @ y.double().T).masked_fill(~pairs, -torch.inf)
    meeting = meeting_tiles(image, text, rows, (32, 16))
    assert len(meeting) == 9 - skipped
    (sums,) = backend.similarity_softplus_fwd_bwd(*sides, scale, None, torch.ones(1, n), True, True)[0]
    torch.testing.assert_close(sums.double(), s.exp().log1p().sum(1), rtol=1e-5, atol=1e-5)
    assert seen == meeting
    seen.clear()
    lse, truth = backend.similarity_logsumexp_fwd(*sides, scale), [s.logsumexp(1), s.logsumexp(0)]
    torch.testing.assert_close(torch.cat(lse, 1)[0].double(), torch.cat(truth), rtol=1e-5, atol=1e-5)
    if image_ids != padded_ids:  # the second pass, for the row without any pair, compares ids everywhere
        assert seen == meeting
    seen.clear()
    backend.similarity_logsumexp_bwd(*sides, scale, *lse, *map(torch.ones_like, lse), True, True)
    assert seen == meeting


@pytest.mark.skipif(DEVICE == "cuda", reason="runs in Triton's interpreter")
def test_ids_in_any_order():
    require("triton", torch.float32)
    from betaclip.kernels.similarity.triton_kernels import Triton

    x, y = (F.normalize(torch.randn(rows, 16), dim=1) for rows in (40, 37))
    ids = [shuffled_ids(len(rows)) for rows in (x, y)]
    ours = similarity_logsumexp(x, y, torch.tensor(5.0), *ids, backend=Triton(tile=Tile(32, 16, 16, 4, 1)))
    truth = dense_logsumexp(x.double(), y.double(), 5.0, *ids)
    torch.testing.assert_close(torch.cat(ours).double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts launches on meta tensors, which the interpreter alone takes")
@pytest.mark.parametrize(
    "form, launches, most_calls",
    [
        ("ce", {"fwd": 1, "merge": 2, "bwd": 25, "id_ranges": 2}, 840),
        ("bce", {"softplus": 25, "id_ranges": 1}, 670),
        ("ce of prefixes", {"fwd": 1, "merge": 6, "bwd": 25, "id_ranges": 2}, 2300),
        ("bce of prefixes", {"softplus": 25, "id_ranges": 1}, 2000),
    ],
)
def test_what_a_whole_loss_asks_of_the_host(form, launches, most_calls, monkeypatch):
    """36 864 texts, forward and backward, on meta tensors, with the tile and chunk of sm_90: 25 chunks of dS."""
    form, _, prefixes = form.partition(" of ")
    dims = (512, 256, 128) if prefixes else None
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
    monkeypatch.setattr(triton_kernels.architecture, "architecture", lambda device: "sm_90")
    image, text = (torch.empty(1024, 36, 512, device="meta", requires_grad=True) for _ in range(2))
    backend = triton_kernels.Triton(TILES["sm_90", 2], CHUNK_ROWS["sm_90", 2])
    loss = BetaCALLoss(form, backend=backend, gather=False, dims=dims)
    with Dispatches() as calls:
        loss(image, text, torch.empty((), device="meta", requires_grad=True)).backward()
    assert counts == launches
    assert calls.names["aten.addmm.out"] == 50 * len(dims or (512,))
    assert calls.names["aten.zero_.default"] <= (4 if dims else 2)
    assert calls.names.total() <= most_calls
