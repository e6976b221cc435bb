"""One process or many: what torchrun started, DistributedDataParallel or fully_shard around the model, agreement."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from betaclip.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among ``size``, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank; the device need not have finished anything."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))  # on the CPU, which has gloo
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def of_all(self, value: Any) -> list[Any]:
        """One Python value of each rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def mean_(self, t: Tensor) -> Tensor:
        """Over ranks, in place and without waiting for the device."""
        if self.size > 1:
            dist.all_reduce(t)
            t /= self.size
        return t

    def barrier(self) -> None:
        self.any(False)


@contextmanager
def world(device: str) -> Iterator[World]:
    """The world that torchrun made, or one process.

    Raises:
        ConfigError: the device does not exist.
    """
    started = "WORLD_SIZE" in os.environ and not dist.is_initialized()
    chosen = _device(device)
    if started:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            yield World(dist.get_rank(), dist.get_world_size(), chosen)
        else:
            yield World(0, 1, chosen)
    finally:
        if started:
            dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"run.device: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"run.device: expected auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device: no CUDA device is available; take cpu, or auto")
    if device == torch.device("cuda"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def wrap(model: nn.Module, how: Literal["ddp", "fsdp"], world: World) -> nn.Module:
    """The module to call in training; ``model`` itself if there is no process group.

    Inputs are not moved: the texts' place is the CPU.
    """
    if not dist.is_initialized():
        if how == "fsdp":
            raise ConfigError("run.parallel: fsdp needs torchrun")
        return model
    if how == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
    scalars = set(_scalars(model))
    for block in (m for m in model.modules() if isinstance(m, ResidualAttentionBlock)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)
    return model


def _scalars(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that fully_shard cannot shard."""
    return [p for p in model.parameters() if p.dim() == 0]


@contextmanager
def no_sync(wrapped: nn.Module) -> Iterator[None]:
    """Gradients stay this rank's own, until a backward outside of it."""
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(False)
        yield
        wrapped.set_requires_gradient_sync(True)
    else:
        yield


def finish_gradients(wrapped: nn.Module, world: World) -> None:
    """Average over ranks what the wrapper has not."""
    if isinstance(wrapped, FSDPModule):
        for parameter in _scalars(wrapped):
            if parameter.grad is not None:
                world.mean_(parameter.grad)
