"""DistributedDataParallel or fully_shard around a model, and when its gradients are reduced over ranks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch.distributed as dist
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from betaclip.errors import ConfigError
from betaclip.process_group import ProcessGroup


def wrap(model: nn.Module, how: Literal["ddp", "fsdp"], process_group: ProcessGroup) -> nn.Module:
    """The module to call in training: ``model`` wrapped, or ``model`` itself if there is no process group.

    The wrapper moves no inputs, as texts stay on the CPU.

    Raises:
        ConfigError: fsdp without a process group.
    """
    if not dist.is_initialized():
        if how == "fsdp":
            raise ConfigError("run.parallel: fsdp needs a process group; start the command with torchrun")
        return model
    if how == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    device_type = next(model.parameters()).device.type
    mesh = dist.device_mesh.init_device_mesh(device_type, (process_group.size,))
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


def by_kind(tensors: Iterable[Any]) -> list[list[Any]]:
    """Those that are not sharded, and those that are; without an empty list."""
    tensors = list(tensors)
    kinds = [[t for t in tensors if isinstance(t, DTensor) is sharded] for sharded in (False, True)]
    return [kind for kind in kinds if kind]


@contextmanager
def no_sync(wrapped: nn.Module) -> Iterator[None]:
    """Within it, gradients accumulate on each rank; the first backward outside reduces them."""
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(False)
        yield
        wrapped.set_requires_gradient_sync(True)
    else:
        yield


def finish_gradients(wrapped: nn.Module, process_group: ProcessGroup) -> None:
    """Average over ranks the gradients that the wrapper does not reduce."""
    if isinstance(wrapped, FSDPModule):
        for parameter in _scalars(wrapped):
            if parameter.grad is not None:
                process_group.mean_(parameter.grad)
