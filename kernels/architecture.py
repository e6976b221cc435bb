"""The architecture that the Triton kernels run on, the reasons why they cannot run, and the choice of a tile.

A tile table maps (architecture, bytes per element) to a value, and :func:`choose` reads it. To tune an architecture,
add its entry to the tables in ``similarity/tiles.py`` and ``attention_pool/tiles.py``. To give it other kernels, write
a backend class in a file of its own, such as ``similarity/triton_sm100.py``, and return it from the operation's
``local_backend`` where :func:`architecture` returns its name.
"""

import functools
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TypeVar

import numpy
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# What Triton's interpreter computes as hardware does. It takes bfloat16 for integers, unless mended as in the tests.
INTERPRETED_DTYPES = {torch.float16, torch.float32, torch.float64}

_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class Tile:
    """Block sizes and compiler options of one kernel.

    A tile is ``block_m`` by ``block_n`` logits, computed over the depth D in steps of ``block_d``. In the similarity
    kernels m counts rows of x and n rows of y; in attention pooling m counts latent queries and n patches.

    programs: how many programs share a multiprocessor. tma: operands come through the tensor memory accelerator.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    programs: int = 1
    tma: bool = False


def choose(table: Mapping[tuple[str, int], _Entry], architecture: str, itemsize: int) -> _Entry:
    """The entry for an architecture such as ``"sm_90"`` and elements of ``itemsize`` bytes (8 counts as 4).

    An architecture without an entry takes that of its family's first, as sm_103 that of sm_100, or of its vendor's
    oldest, gfx942 or sm_80.
    """
    itemsize = min(itemsize, 4)
    oldest = "gfx942" if architecture.startswith("gfx") else "sm_80"
    names = (architecture, f"{architecture[:-1]}0", oldest)
    return next(table[name, itemsize] for name in names if (name, itemsize) in table)


def _reasons_on_every_device() -> list[str]:
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


_REASONS_ON_EVERY_DEVICE = _reasons_on_every_device()


def triton_not_supported_reasons(x: Tensor, *others: Tensor) -> list[str]:
    """Why Triton cannot run an operation on ``x`` and others of its dtype and device; from metadata alone."""
    reasons = list(_REASONS_ON_EVERY_DEVICE)
    if INTERPRETED:
        if x.dtype not in INTERPRETED_DTYPES:
            dtype = str(x.dtype).removeprefix("torch.")
            reasons.append(f"Triton's interpreter (TRITON_INTERPRET=1) computes {dtype} products wrongly")
    elif not x.is_cuda:
        reasons.append(f"needs a GPU, the tensors are on {x.device} (TRITON_INTERPRET=1 interprets the kernels)")
    elif x.dtype == torch.float64:
        reasons.append("float64 runs only in the interpreter (TRITON_INTERPRET=1)")
    return reasons


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of the device's architecture, such as ``"sm_90"`` or ``"gfx942"``, or ``"interpreter"``."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 4 if INTERPRETED else int(torch.cuda.get_device_properties(device).multi_processor_count)
