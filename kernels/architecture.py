"""What the launchers of all Triton kernels share: can they run, and on what."""

import functools
import os
import warnings
from importlib import import_module
from importlib.util import find_spec

import numpy
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _missing() -> list[str]:
    """What keeps the kernels from running on any tensor."""
    if not find_spec("triton"):
        return ["triton is not installed"]
    if INTERPRETED and import_module("triton").__version__.startswith("3.6."):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                int(numpy.zeros(1))
        except TypeError:
            return [f"the interpreter of Triton 3.6 fails with NumPy {numpy.__version__}: it needs an older NumPy"]
    return []


_MISSING = _missing()


def why_not(x: Tensor) -> list[str]:
    """Reasons against an operation on ``x`` and others of its dtype and device; from metadata alone."""
    reasons = list(_MISSING)
    if INTERPRETED:
        if x.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter (TRITON_INTERPRET=1) computes bfloat16 products wrongly")
    elif not x.is_cuda:
        reasons.append(f"needs a GPU, the tensors are on {x.device} (TRITON_INTERPRET=1 interprets the kernels)")
    elif x.dtype == torch.float64:
        reasons.append("float64 runs only in the interpreter (TRITON_INTERPRET=1)")
    return reasons


@functools.cache
def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"``, or ``"interpreter"``."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def processors(device: torch.device) -> int:
    return 4 if INTERPRETED else int(torch.cuda.get_device_properties(device).multi_processor_count)


def precision(arch: str, dtype: torch.dtype) -> str:
    """Of tl.dot: float32 at float32's error everywhere (AMD knows no TF32x3)."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm_") else "ieee"
