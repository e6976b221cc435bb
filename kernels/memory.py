"""Scratch memory that the CPU keeps between calls, huge pages, and copies whose rows are aligned for vector loads.

On the CPU, touching new pages takes several times as long as the work done in them, and the allocator returns large
blocks to the system as soon as they are freed.
"""

import ctypes
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# More than the scratch of any tiles that are meant to stay in cache, and the normalised rows of N = 16384 at D = 512. A
# larger request is freed after its use.
MAX_KEPT_BYTES = 64 * 2**20

# Smaller tensors hold too few whole huge pages (2 MiB) for a call of the system to pay.
_MIN_HUGE_BYTES = 4 * 2**20
_MADV_HUGEPAGE = 14  # of <sys/mman.h> on Linux


class _Kept(threading.local):
    """A thread's buffers by the number of blocks around theirs, and by dtype; and how many blocks are open."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[int, torch.dtype], Tensor] = {}
        self.depth = 0


_kept = _Kept()


@contextmanager
def scratch(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, max_kept_bytes: int = MAX_KEPT_BYTES
) -> Iterator[list[Tensor]]:
    """One uninitialised tensor of each shape, valid inside the ``with`` block.

    On the CPU, every call in a thread returns the same memory, unless the tensors take more than ``max_kept_bytes``.
    A block inside another one has memory of its own.
    """
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes)
    if device.type == "cpu" and total * dtype.itemsize <= max_kept_bytes:
        place = _kept.depth, dtype
        buffer = _kept.buffers.get(place)
        if buffer is None or buffer.numel() < total:
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written in training
                buffer = _kept.buffers[place] = on_huge_pages(torch.empty(total, dtype=dtype, device=device))
    else:
        buffer = on_huge_pages(torch.empty(total, dtype=dtype, device=device))
    _kept.depth += 1
    try:
        parts = buffer[:total].split(sizes)
        yield [part if len(shape) == 1 else part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    finally:
        _kept.depth -= 1


def on_huge_pages(t: Tensor) -> Tensor:
    """``t`` itself, a new tensor, whose pages the system is asked to make 2 MiB large where it is large and on the CPU.

    Its first touch then faults once in 2 MiB instead of 512 times. Linux alone takes the advice, where transparent huge
    pages are enabled or left to such advice, as usual; NumPy gives it for its own arrays.
    """
    if sys.platform == "linux" and t.device.type == "cpu" and t.nbytes >= _MIN_HUGE_BYTES:
        page = 4096
        first = -(-t.data_ptr() // page) * page
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(t.data_ptr() + t.nbytes - first), _MADV_HUGEPAGE
        )
    return t


def kept_bytes() -> int:
    """How many bytes of scratch this thread keeps."""
    return sum(buffer.nbytes for buffer in _kept.buffers.values())


def forget() -> None:
    """Free the scratch that this thread keeps."""
    _kept.buffers.clear()


def aligned(t: Tensor, multiple: int) -> Tensor:
    """``t`` (rows, D) if vector loads and the tensor memory accelerator can read it, else a copy with zero columns.

    Depth and stride of the result are multiples of ``multiple`` elements, and its rows start at multiples of 16 bytes.
    """
    rows, depth = t.shape
    in_place = t.stride(1) == 1 and t.stride(0) >= depth and t.data_ptr() % 16 == 0
    if in_place and depth % multiple == 0 and t.stride(0) % multiple == 0:
        return t
    padded = t.new_zeros(rows, -(-depth // multiple) * multiple)
    padded[:, :depth] = t
    return padded
