"""What a rank sends to the others while code runs: calls of torch.distributed, and bytes, counted and not derived.

Where ranks talk over TCP (gloo, on Linux) the kernel knows what this process's sockets have sent. Elsewhere the bytes
follow from the tensors of each call, by the rings in which NCCL runs its collectives.
"""

import os
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_SENT_AT = 200  # offset of tcpi_bytes_sent in Linux's struct tcp_info (since 4.19); tcpi_bytes_retrans follows

# Bytes that one of W ranks sends, of the tensors that it receives into (0) or gives (1), as NCCL's rings do.
_SENT: dict[str, tuple[int, Callable[[int, int], float]]] = {
    "_allgather_base_": (1, lambda size, ranks: (ranks - 1) * size),
    "allgather_": (1, lambda size, ranks: (ranks - 1) * size),
    "_reduce_scatter_base_": (0, lambda size, ranks: (ranks - 1) * size),
    "reduce_scatter_": (0, lambda size, ranks: (ranks - 1) * size),
    "allreduce_": (0, lambda size, ranks: 2 * (ranks - 1) * size / ranks),
    "alltoall_base_": (1, lambda size, ranks: (ranks - 1) * size / ranks),
    "alltoall_": (1, lambda size, ranks: (ranks - 1) * size / ranks),
    "scatter_": (1, lambda size, ranks: (ranks - 1) * size / ranks),  # given by the root only
    "send": (0, lambda size, ranks: size),
    "recv_": (0, lambda size, ranks: 0),
    "barrier": (0, lambda size, ranks: 0),
}


class Traffic(TorchDispatchMode):
    """Of a ``with`` block, that all ranks of the default group enter and leave together.

    calls: by name of c10d's operator; a batch of sends counts each of them. socket_bytes: sent by TCP sockets, None
    where that is unknown. nccl_bytes: what NCCL would send for these calls.
    """

    def __enter__(self) -> "Traffic":
        self.calls: Counter[str] = Counter()
        self.nccl_bytes = 0.0
        self.socket_bytes: int | None = None
        dist.barrier()
        self._begin = socket_sent_bytes()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        dist.barrier()  # until then the last bytes may wait in the kernel; it sends a few hundred itself
        end = socket_sent_bytes()
        if self._begin is not None and end is not None and dist.get_backend() == "gloo":
            self.socket_bytes = end - self._begin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            place, sent = _SENT[name]
            self.calls[name] += 1
            self.nccl_bytes += sent(_nbytes(args[place]), dist.get_world_size())
        return func(*args, **(kwargs or {}))


def _nbytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(_nbytes, tensors)) if isinstance(tensors, (list, tuple)) else 0


def socket_sent_bytes() -> int | None:
    """What the TCP sockets of this process have sent; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as own:
                if own.family not in (socket.AF_INET, socket.AF_INET6) or own.type != socket.SOCK_STREAM:
                    continue
                information = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile
            continue
        if len(information) < _SENT_AT + 16:
            return None
        sent, again = struct.unpack_from("=QQ", information, _SENT_AT)
        total += sent - again
    return total
