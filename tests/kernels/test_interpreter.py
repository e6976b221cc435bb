"""Triton's interpreter as support/interpreted_bfloat16.py mends it: bfloat16 as PyTorch computes it."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def _kernel(a_ptr, b_ptr, product_ptr, sum_ptr, quotient_ptr, larger_ptr, wide_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)
    tl.store(product_ptr + offsets, tl.dot(a, b.T))
    tl.store(sum_ptr + offsets, a + b)
    tl.store(quotient_ptr + offsets, (a.to(tl.float32) / b.to(tl.float32)).to(tl.bfloat16))
    tl.store(larger_ptr + offsets, tl.where(a > -b, a, -b))
    tl.store(wide_ptr + offsets, a.to(tl.float64) + tl.abs(b))


def test_bfloat16_is_computed_as_by_pytorch():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(16, 16, device=device).bfloat16() for _ in range(2))
    a[0], b[0] = 1.0, 2.0**-8  # a tie, which goes to the even one of 1 and 1 + 2^-7
    a[1], b[1] = 1 + 2.0**-7, 2.0**-8  # and one that goes up
    a[2] = torch.inf
    outs = [torch.empty_like(a, dtype=dtype) for dtype in (torch.float32, *[torch.bfloat16] * 3, torch.float64)]
    _kernel[(1,)](a, b, *outs, N=16)
    product, total, quotient, larger, wide = outs
    finite = [0, 1, *range(3, 16)]
    torch.testing.assert_close(product[finite], (a.float() @ b.float().T)[finite])
    assert torch.equal(total, a + b) and total[0, 0] == 1 and total[1, 0] == 1 + 2.0**-6
    assert torch.equal(quotient, a / b)
    assert torch.equal(larger, torch.maximum(a, -b))
    assert torch.equal(wide, a.double() + b.double().abs())


def test_values_round_to_nearest_even_and_keep_nan():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bits = torch.randint(-(2**31), 2**31, (256,), dtype=torch.int64).int()
    bits[:4] = torch.tensor([0x7F800001, 0x7F7FFFFF, 0x00000001, 0x3F808000])  # NaN, largest, smallest, a tie
    x = bits.view(torch.float32).to(device)
    narrow = torch.empty_like(x, dtype=torch.bfloat16)
    _narrow[(1,)](x, narrow, N=256)
    torch.testing.assert_close(narrow, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _narrow(x_ptr, narrow_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(narrow_ptr + offsets, tl.load(x_ptr + offsets).to(tl.bfloat16))
