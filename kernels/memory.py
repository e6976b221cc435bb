"""Scratch memory of the CPU backends, kept between calls, and of the others, taken anew.

Fresh pages cost the CPU several times what is done with them, and its allocator returns large blocks at once.
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# More than any tile or group of images takes that is meant to stay in cache; a call that needs more gives it back.
MOST_KEPT_BYTES = 64 * 2**20

_kept = threading.local()


def scratch(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """One tensor of each shape, not initialised. On the CPU the same memory in every call of a thread, up to
    ``MOST_KEPT_BYTES``: an operator asks once, and nothing that it returns may lie in there."""
    sizes = [math.prod(shape) for shape in shapes]
    whole = sum(sizes)
    if device.type == "cpu" and whole * dtype.itemsize <= MOST_KEPT_BYTES:
        buffers = _kept.__dict__
        key = str(dtype)
        if key not in buffers or buffers[key].numel() < whole:
            with torch.inference_mode(False):  # a buffer made in inference mode could not be written in training
                buffers[key] = torch.empty(whole, dtype=dtype, device=device)
        buffer = buffers[key][:whole]
    else:
        buffer = torch.empty(whole, dtype=dtype, device=device)
    return [part.view(shape) for part, shape in zip(buffer.split(sizes), shapes, strict=True)]


def kept_bytes() -> int:
    """How much this thread keeps."""
    return sum(buffer.nbytes for buffer in _kept.__dict__.values())


def forget() -> None:
    """Let go of what this thread keeps."""
    _kept.__dict__.clear()
