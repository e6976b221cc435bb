"""The kernels for rows of one image, beside what PyTorch's operators do in their place."""

import pytest
import torch
from support.precision import HALF

pytest.importorskip("triton")
from support.similarity import DEVICE

from betaclip.kernels.similarity import chunks, triton_rows, within_images
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.within_images import Images

DTYPES = [torch.float32, *HALF]


@pytest.fixture(params=[(3, 5, None), (3, 5, "slots"), (1, 37, None), (4, 1, None)], ids=str)
def batch(request):
    """Images, and two sides of rows with padding, rows without direction, and rows that hold NaN where none is read."""
    images, texts, ragged = request.param
    rows = images * texts
    slots = None
    image_id = torch.arange(images, dtype=torch.int32).repeat_interleave(texts)
    if ragged:
        slots = torch.arange(rows).view(images, texts).clone()
        slots[1, 2:] = -1
        slots[2] = torch.arange(7, 12)
        image_id, rows = torch.tensor([0] * 5 + [1] * 2 + [2] * 5, dtype=torch.int32), 12
    else:
        image_id[-2:-1] = -1
    sides = [torch.randn(rows, 24) for _ in range(2)]
    sides[0][0] = 0
    for side in sides:
        side[image_id < 0] = torch.nan
    return Images(images, texts, None if slots is None else slots.to(DEVICE)), image_id.to(DEVICE), sides


def operand(x, image_id, dtype):
    inverse = triton_rows.inverse_norms(x, image_id, 1e-12)
    return Operand(x, image_id, inverse, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_norms(dtype):
    x = torch.randn(40, 70, dtype=torch.float64)
    x[0], x[1], x[2, 3], x[3, 4] = 0, 1e-14, torch.inf, torch.nan
    x[4] *= 1e20 if dtype != torch.float16 else 1e3
    x = x.to(DEVICE, dtype)[:, :67]  # rows with a gap
    image_id = torch.zeros(40, dtype=torch.int32, device=DEVICE)
    image_id[5] = -1
    inverse = triton_rows.inverse_norms(x, image_id, 1e-12)
    truth = 1 / x.double().norm(dim=1)
    assert inverse[[0, 1, 5]].tolist() == [0, 0, 0] and inverse[[2, 3]].isnan().all()
    rest = [4, *range(6, 40)]
    torch.testing.assert_close(inverse[rest].double(), truth[rest], rtol=1e-6, atol=0)
    unit = triton_rows.unit_rows(x, inverse, torch.float32)
    assert not unit[[0, 1, 5]].any() and unit[[2, 3]].isnan().any(1).all()
    torch.testing.assert_close(unit[rest].double(), x[rest].double() * truth[rest, None], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gain", [None, 0.5])
def test_cosines_and_gradients(dtype, gain, batch, monkeypatch):
    images, image_id, sides = batch
    x, y = (operand(side.to(DEVICE, dtype), image_id, dtype) for side in sides)
    found = torch.full((images.num_images, images.texts_per_image, images.texts_per_image), torch.nan, device=DEVICE)
    triton_rows.cosines(x.rows, y.rows, x.inverse_norm, y.inverse_norm, images.slots, found)
    monkeypatch.setattr(within_images, "row_kernels_serve", lambda rows: False)
    truth = within_images.cosines(x, y, images)[0]
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)

    weights, between = torch.randn_like(truth), [torch.randn(side.shape, device=DEVICE) for side in sides]
    for side in between:
        side[image_id < 0] = 0
    gain = None if gain is None else torch.tensor(gain, device=DEVICE)
    given = [side.clone() for side in between], weights.unsqueeze(0), gain
    truth = within_images.raw_gradients(x, y, images, *given[0], *given[1:])
    monkeypatch.setattr(within_images, "row_kernels_serve", lambda rows: True)
    found = within_images.raw_gradients(x, y, images, *between, *given[1:])
    ulp = torch.finfo(dtype).eps
    for ours, theirs in zip(found, truth, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=max(ulp, 1e-5), atol=max(ulp, 1e-5) * float(theirs.abs().max()))


@pytest.mark.parametrize("multiple", [1, 32])
def test_logsumexp_vectors(multiple):
    """Rows without any pair, and rows whose sum overflowed, in sight."""
    lse_x, lse_y, dlse_x, dlse_y = (torch.randn(2, n, device=DEVICE) for n in (45, 1100, 45, 1100))
    lse_x[0, 3], lse_y[0, 7], lse_y[1, 9], lse_x[1, 5] = -torch.inf, -torch.inf, torch.inf, 300
    dlse_x[0, 3], dlse_y[0, 7] = 0, 0
    factor, truth = chunks.logsumexp_vectors(lse_x, lse_y, dlse_x, dlse_y, torch.float16, multiple)
    found = triton_rows.logsumexp_vectors(
        lse_x, lse_y, dlse_x, dlse_y, chunks.amplification(torch.float16, 2), multiple
    )
    assert truth.single_exp_ok.tolist() == [[1], [0]]
    for ours, theirs in zip(found, (factor, *truth), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
