"""AdamW for the backbone and the pooling block, each with its own schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from betaclip.training.config import GroupConfig, OptimizerConfig
from betaclip.training.layer_rates import layers
from betaclip.training.parallel import by_kind

PARTS = ("backbone", "pool")


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW for the parameters that require a gradient, grouped by part of the model, weight decay, sharding and
    the layer's share of the learning rate, "lr_scale".

    The part "pool" is ``model.pool``, the rest is the backbone. Parameters with at most one dimension (biases, gains of
    norms, logit scales) are not decayed; embeddings are, the CLS token's too, as in the published recipe.
    """
    layer = layers(name for name, _ in model.named_parameters())
    groups: dict[tuple[str, float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = layer[name].scale(config.layer_decay) if name in layer else 1.0
            decays = parameter.dim() > 1 or name.endswith("class_embedding")
            # Scalars are never sharded, and the fused update does not mix sharded parameters and others.
            groups.setdefault((part_of(name), scale, decays, parameter.dim() == 0), []).append(parameter)
    decay = {True: config.weight_decay, False: 0.0}
    return torch.optim.AdamW(
        [
            {"params": parameters, "part": part, "lr_scale": scale, "weight_decay": decay[decays]}
            for (part, scale, decays, _), parameters in sorted(groups.items(), key=lambda group: group[0])
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
        rate = learning_rate(step, steps, getattr(config, group["part"]), config.schedule)
        group["lr"] = rate * group.get("lr_scale", 1.0)  # checkpoints before layer_decay have none


def highest_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate of each part; with layer-wise rates, that of its head."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        rates[group["part"]] = max(group["lr"], rates.get(group["part"], 0.0))
    return rates


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
            for kind in by_kind(parameters):
                nn.utils.clip_grads_with_norm_(kind, limit, norms[part])
    return norms


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    norms: list[Any] = [nn.utils.get_total_norm(kind) for kind in by_kind(gradients)]
    return torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
