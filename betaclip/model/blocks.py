"""open_clip's transformer blocks as the towers here need them: other computations over the same modules.

A block becomes another kind by its ``__class__``: the kinds have no state of their own, so parameters, their names,
hooks and wrappers stay, and a model of open_clip stays one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class _QuickGELU(torch.autograd.Function):
    """silu(1.702 x) / 1.702, whose derivative is silu's at 1.702 x: one tensor kept, one pass back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = 1.702 * x
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(grad, *ctx.saved_tensors)


class LeanQuickGELU(QuickGELU):  # type: ignore[misc]
    """open_clip's with half the passes over memory."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGELU.apply(x)


def why_not_blocks(blocks: Iterable[nn.Module], tower: str) -> list[str]:
    """Why the blocks of a tower cannot become others."""
    kinds = sorted({type(block).__name__ for block in blocks if type(block) is not ResidualAttentionBlock})
    return [f"the {tower} tower has blocks of kind {kind}" for kind in kinds]


def adopt(blocks: Sequence[Any], kind: type[nn.Module], last: type[nn.Module]) -> None:
    """Make them of a kind, and the last one of another."""
    for block in blocks:
        block.__class__ = kind
        if type(block.mlp.gelu) is QuickGELU:
            block.mlp.gelu.__class__ = LeanQuickGELU
    blocks[-1].__class__ = last


def run(block: nn.Module, x: Tensor, checkpointing: bool, **options: Any) -> Tensor:
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False, **options)
    return block(x, **options)
