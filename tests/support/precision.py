"""The precision in which a test runs a backend."""

import torch

HALF = [torch.float16, torch.bfloat16]


def widest(backend: str, dtype: torch.dtype = torch.float64) -> torch.dtype:
    """``dtype``, or the finest that a backend of half precision multiplies."""
    return torch.float16 if backend == "cuda" else dtype
