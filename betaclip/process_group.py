"""The processes that work together: a process group of torch.distributed, or a single process without one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from betaclip.errors import ConfigError


@dataclass(frozen=True)
class ProcessGroup:
    """This process's rank among ``size`` processes.

    With size > 1, every method except :meth:`shard_range` is a collective: all ranks must call the same methods in the
    same order, with tensors on a device that the group's backend serves. A single process needs no torch.distributed.

    group: None stands for the default process group, or for no group if ``size`` is 1.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup | DeviceMesh | None = None) -> ProcessGroup:
        """This process in ``group``; by default in the default process group, or alone if there is none.

        Raises:
            ValueError: ``group`` is a mesh with several dimensions, or this process is not in it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"process_group: expected a DeviceMesh of one dimension, got {group.ndim} (slice it)")
            group = group.get_group()
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("process_group: expected one that this rank is in, got one of other ranks")
        return cls(rank, dist.get_world_size(group), group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shard_range(self, total: int) -> range:
        """This rank's share of ``total`` samples: consecutive, in the order of the ranks, sizes at most one apart."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank. Communicates on the CPU, and does not wait for a GPU's queued work."""
        if self.size == 1:
            return flag
        return bool(self.max(torch.tensor(int(flag), device="cpu")))

    def barrier(self) -> None:
        self.any(False)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, in the order of the ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in their order, (sum of n, ...), from this rank's (n, ...); n may differ, or be 0."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        sizes = self.sum(counts).tolist()
        sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows  # gloo has no bool
        padded = sent.new_zeros(max(sizes), *sent.shape[1:])
        padded[: len(sent)] = sent
        gathered = sent.new_empty(self.size * max(sizes), *sent.shape[1:])
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.14
        all_gather(gathered, padded, group=self.group)
        shards = gathered.unflatten(0, (self.size, max(sizes)))
        return torch.cat([shard[:n] for shard, n in zip(shards, sizes, strict=True)]).to(rows.dtype)

    def sum(self, t: Tensor) -> Tensor:
        """The element-wise sum over ranks, without a gradient."""
        return self._reduce(t, "SUM")

    def max(self, t: Tensor) -> Tensor:
        """The element-wise maximum over ranks, without a gradient. Backends disagree on NaN, so there must be none."""
        return self._reduce(t, "MAX")

    def mean_(self, t: Tensor) -> Tensor:
        """Replace ``t`` by its element-wise mean over ranks, without waiting for the device."""
        if self.size > 1:
            dist.all_reduce(t, group=self.group)
            t /= self.size
        return t

    def _reduce(self, t: Tensor, operation: str) -> Tensor:
        if self.size == 1:
            return t.detach()
        reduced = t.detach().clone()
        dist.all_reduce(reduced, getattr(dist.ReduceOp, operation), group=self.group)
        return reduced


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def initialized(device: str) -> Iterator[tuple[ProcessGroup, torch.device]]:
    """Yield the default process group and this process's device. Under torchrun, initialise and destroy the group.

    Args:
        device: "cpu", "cuda", "cuda:N", or "auto": a GPU if there is one. "cuda" is the GPU of torchrun's LOCAL_RANK.

    Raises:
        ConfigError: the device does not exist.
    """
    chosen = local_device(device)
    launched = "WORLD_SIZE" in os.environ and dist.is_available() and not dist.is_initialized()
    if launched:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield ProcessGroup.of(), chosen
    finally:
        if launched:
            dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """This process's device: "cpu", "cuda", "cuda:N", or "auto"; as :func:`initialized` takes it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: expected auto or cpu, as no CUDA device is available; got {name!r}")
    if device == torch.device("cuda"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
