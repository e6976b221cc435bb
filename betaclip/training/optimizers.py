"""AdamW over the backbone and the pooling block, each with a schedule of its own."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from betaclip.training.config import GroupConfig, OptimizerConfig

PARTS = ("backbone", "pool")


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW on what requires a gradient, in groups: backbone and pool, with and without weight decay, and scales.

    The pooling block is what ``model.pool`` holds. Biases, gains of norms, logit scales and whatever else has one
    dimension are not decayed; embeddings are, the CLS token's too, as in the published recipe.
    """
    groups: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 or name.endswith("class_embedding")
            # Scalars are never sharded, and the fused update does not mix sharded parameters and others.
            groups.setdefault((part_of(name), decays, parameter.dim() == 0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "part": part, "weight_decay": config.weight_decay if decays else 0.0}
            for (part, decays, _), parameters in sorted(groups.items())
        ],
        lr=config.backbone.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,  # it can skip an update without the host knowing; on a CPU it is also the fastest
    )


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return "pool" if name.startswith("pool.") else "backbone"


def learning_rate(step: int, steps: int, config: GroupConfig) -> float:
    """Of update ``step`` = 0 ... steps - 1: ``initial_lr`` linearly to ``lr``, which it has in update ``warmup``, then
    half a cosine to ``final_lr``, which it has in the last."""
    if step < config.warmup:
        return config.initial_lr + (config.lr - config.initial_lr) * step / config.warmup
    done = (step - config.warmup) / max(1, steps - 1 - config.warmup)
    return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, config: OptimizerConfig) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, getattr(config, group["part"]))


def clip_gradients(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> dict[str, Tensor]:
    """() norm of all gradients of each part, before they are scaled down to the part's ``clip_norm``, if it has one.

    Without waiting for the device.
    """
    norms = {}
    for part in PARTS:
        groups = [group for group in optimizer.param_groups if group["part"] == part]
        parameters = [p for group in groups for p in group["params"] if p.grad is not None]
        if not parameters:
            continue
        norms[part] = _norm(p.grad for p in parameters if p.grad is not None)
        limit = getattr(config, part).clip_norm
        if limit is not None:
            # Sharded parameters and others apart: one list of both is not allowed.
            for kind in _by_kind(parameters):
                nn.utils.clip_grads_with_norm_(kind, limit, norms[part])
    return norms


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    norms: list[Any] = [nn.utils.get_total_norm(kind) for kind in _by_kind(gradients)]
    return torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()


def _by_kind(tensors: Iterable[Any]) -> list[list[Any]]:
    tensors = list(tensors)
    kinds = [[t for t in tensors if isinstance(t, DTensor) is sharded] for sharded in (False, True)]
    return [kind for kind in kinds if kind]
