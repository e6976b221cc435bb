"""The precision in which a test runs a backend."""

import torch
from torch import Tensor

HALF = [torch.float16, torch.bfloat16]


def widest(backend: str) -> torch.dtype:
    """float64, or the finest that the backend multiplies: Triton has float64 in its interpreter alone."""
    if backend == "triton" and torch.cuda.is_available():
        return torch.float32
    return torch.float16 if backend == "cuda" else torch.float64


def usual(backend: str) -> torch.dtype:
    """The dtype in which the backend is tested where no other is called for: on a GPU one of half precision."""
    return {"cuda": torch.float16, "triton": torch.bfloat16}.get(backend, torch.float32)


def assert_exact(ours: Tensor, truth: Tensor, name: str = "") -> None:
    """Equal but for rounding in the dtype of the truth."""
    exact = truth.dtype == torch.float64
    atol = 1e-12 if exact else 2e-5 * float(truth.abs().max())
    rtol = 1e-9 if exact else 1e-5
    torch.testing.assert_close(ours, truth, rtol=rtol, atol=atol, msg=lambda message: f"{name} {message}".strip())
