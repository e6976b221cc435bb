"""Scratch memory that the CPU keeps between calls, and copies whose rows are aligned for vector loads.

On the CPU, touching new pages takes several times as long as the work done in them, and the allocator returns large
blocks to the system as soon as they are freed.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# More than the scratch of any tiles that are meant to stay in cache. A larger request is freed after its use.
MAX_KEPT_BYTES = 64 * 2**20


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.in_use = False


_kept = _Kept()


@contextmanager
def scratch(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device, max_kept_bytes: int = MAX_KEPT_BYTES
) -> Iterator[list[Tensor]]:
    """One uninitialised tensor of each shape, valid inside the ``with`` block.

    On the CPU, every call in a thread returns the same memory, unless the tensors take more than ``max_kept_bytes``.

    Raises:
        RuntimeError: a block is already open in this thread; both would have the same memory.
    """
    if _kept.in_use:
        raise RuntimeError(
            "scratch: expected no open block in this thread, got a nested one; ask for all shapes at once"
        )
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes)
    if device.type == "cpu" and total * dtype.itemsize <= max_kept_bytes:
        buffer = _kept.buffers.get(dtype)
        if buffer is None or buffer.numel() < total:
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written in training
                buffer = _kept.buffers[dtype] = torch.empty(total, dtype=dtype, device=device)
    else:
        buffer = torch.empty(total, dtype=dtype, device=device)
    _kept.in_use = True
    try:
        yield [part.view(shape) for part, shape in zip(buffer[:total].split(sizes), shapes, strict=True)]
    finally:
        _kept.in_use = False


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
