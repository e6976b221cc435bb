"""The work of Triton's similarity kernels. test_operators.py tests their results in general."""

import pytest
import torch
import torch.nn.functional as F
from support.similarity import DEVICE, dense_logsumexp, require

from betaclip.kernels.architecture import Tile
from betaclip.kernels.similarity.functional import similarity_logsumexp

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
