"""open_clip's transformer blocks, over the same modules, with the computations that the towers add."""

from collections.abc import Iterable
from typing import Any

import torch
from open_clip.transformer import QuickGELU as OpenClipQuickGELU
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from betaclip.layers import QuickGELU, attention_not_supported_reasons, check_attention, has_hooks


class Block(ResidualAttentionBlock):  # type: ignore[misc]
    """A block that takes over the modules of an open_clip block.

    Called with open_clip's arguments it computes what that block did; subclasses add arguments of their own. It stays
    a ``ResidualAttentionBlock`` for code that looks for these, and its parameters keep their names.
    """

    def __init__(self, block: ResidualAttentionBlock) -> None:
        nn.Module.__init__(self)  # open_clip's would make new modules
        for name, module in block.named_children():
            self.add_module(name, module)
        self.training = block.training
        if type(self.mlp.gelu) is OpenClipQuickGELU:
            self.mlp.gelu = QuickGELU().train(self.training)

    def in_projection(self) -> tuple[Tensor, Tensor]:
        """(3 W, W) weight and (3 W,) bias of queries, keys and values.

        Raises:
            NotImplementedError: ``attn`` is wrapped or has hooks.
        """
        check_attention(self.attn, "the tower")
        return self.attn.in_proj_weight, self.attn.in_proj_bias

    def add_attended(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream ``x`` after the attention's result and the MLP."""
        x = x + self.ls_1(self.attn.out_proj(attended))
        return x + self.ls_2(self.mlp(self.ln_2(x)))


def blocks_not_supported_reasons(blocks: Iterable[Any], tower: str) -> list[str]:
    """Why the blocks of a tower cannot be replaced; empty if they can."""
    blocks = list(blocks)
    kinds = sorted({type(block).__name__ for block in blocks if type(block) is not ResidualAttentionBlock})
    if kinds:
        return [f"the {tower} tower has blocks of type {', '.join(kinds)}, not ResidualAttentionBlock"]
    reasons = {f"the {tower} tower's {reason}" for b in blocks for reason in attention_not_supported_reasons(b.attn)}
    if any(has_hooks(block) for block in blocks):
        reasons.add(f"the {tower} tower's blocks have hooks; register them once the model is made")
    return sorted(reasons)


def replace_blocks(blocks: nn.ModuleList, kind: type[Block]) -> None:
    """Replace each block, in place, by one of ``kind`` over the same modules."""
    for i, block in enumerate(blocks):
        blocks[i] = kind(block)


def run_block(block: nn.Module, x: Tensor, checkpointing: bool, **options: Any) -> Tensor:
    """``block(x, **options)``, with ``checkpointing`` computed again in the backward."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False, **options)
    return block(x, **options)
