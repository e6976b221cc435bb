"""The precision in which a test runs a backend."""

import torch

HALF = [torch.float16, torch.bfloat16]


def widest(backend: str) -> torch.dtype:
    """float64, or the finest that a backend of half precision multiplies."""
    return torch.float16 if backend == "cuda" else torch.float64


def usual(backend: str) -> torch.dtype:
    """The dtype in which the backend is tested where no other is called for: on a GPU one of half precision."""
    return {"cuda": torch.float16, "triton": torch.bfloat16}.get(backend, torch.float32)
