"""Counts what a rank sends to the others: calls of torch.distributed, and the bytes that follow from them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Bytes that one of W ranks sends for each byte of the tensors that it receives into (0) or gives (1), by the rings of
# NCCL's collectives. Names are c10d's, without "_" at their ends and "_base".
_SENT: dict[str, tuple[int, Callable[[int], float]]] = {
    "allgather": (1, lambda ranks: ranks - 1),
    "reduce_scatter": (0, lambda ranks: ranks - 1),
    "allreduce": (0, lambda ranks: 2 * (ranks - 1) / ranks),
    "alltoall": (1, lambda ranks: (ranks - 1) / ranks),
    "scatter": (1, lambda ranks: (ranks - 1) / ranks),  # given by the root only
    "send": (0, lambda ranks: 1),
    "recv": (0, lambda ranks: 0),
    "barrier": (0, lambda ranks: 0),
}


class Traffic(TorchDispatchMode):
    """Counts within a ``with`` block.

    calls: by name of c10d's operator; a batch of sends counts each of them. sent_bytes: what NCCL sends for them.
    """

    def __enter__(self) -> "Traffic":
        self.calls: Counter[str] = Counter()
        self.sent_bytes = 0.0
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1].strip("_").removesuffix("_base")
            place, sent = _SENT[name]
            self.calls[name] += 1
            self.sent_bytes += _nbytes(args[place]) * sent(dist.get_world_size())
        return func(*args, **(kwargs or {}))


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(_nbytes, tensors)) if isinstance(tensors, (list, tuple)) else 0
