"""AdamW for the backbone and the pooling block, each with its own schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from betaclip.training.config import GroupConfig, OptimizerConfig

PARTS = ("backbone", "pool")


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW for the parameters that require a gradient, grouped by part of the model, weight decay and sharding.

    The part "pool" is ``model.pool``, the rest is the backbone. Parameters with at most one dimension (biases, gains of
    norms, logit scales) are not decayed; embeddings are, the CLS token's too, as in the published recipe.
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
        fused=True,  # it can skip an update on the device; on a CPU it is also the fastest
    )


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    return "pool" if name.startswith("pool.") else "backbone"


def learning_rate(step: int, steps: int, config: GroupConfig, schedule: str = "exact") -> float:
    """The rate of update ``step`` = 0 ... steps - 1. It rises linearly from ``initial_lr`` to ``lr``, which it reaches
    in update ``warmup``, and falls by half a cosine to ``final_lr``, which it reaches in the last update.

    In the "published" schedule it reaches ``lr`` one update earlier, where it stays for two updates, and the fall ends
    one update later, after the last.
    """
    shift, warmup = int(schedule == "published"), config.warmup_steps(steps)
    if step < warmup:
        return config.initial_lr + (config.lr - config.initial_lr) * step / max(1, warmup - shift)
    done = (step - warmup) / max(1, steps - 1 - warmup + shift)
    return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, config: OptimizerConfig) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, getattr(config, group["part"]), config.schedule)


def clip_gradients(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> dict[str, Tensor]:
    """Scale each part's gradients down to its ``clip_norm``, if it has one, without waiting for the device.

    Returns:
        () the norm of all gradients of each part, before clipping.
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
            # PyTorch does not clip sharded parameters and others in one list.
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
