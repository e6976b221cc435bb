"""Wrappers that tools for fine-tuning put around modules."""

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """A wrapper as adapters make it: it has the weights of what it wraps, and acts when it is called."""

    def __init__(self, base: nn.MultiheadAttention) -> None:
        super().__init__()
        self.base = base
        self.in_proj_weight, self.in_proj_bias, self.out_proj = base.in_proj_weight, base.in_proj_bias, base.out_proj
        self.num_heads, self.head_dim = base.num_heads, base.head_dim

    def forward(self, *args: Tensor) -> Tensor:
        return 2 * self.base(*args)[0]


def hooked(attn: nn.MultiheadAttention, kind: str = "forward_hook") -> nn.Module:
    getattr(attn, f"register_{kind}")(lambda *_: None)
    return attn


class AdaptedLinear(nn.Module):
    """A linear layer and a trained addition to it; without the layer's own attributes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.added = nn.Parameter(torch.randn_like(base.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.added.T
