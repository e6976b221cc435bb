"""Layers shared by the pooling block and the towers, and the check that both make of an attention module."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from betaclip.kernels.fused_attention import fused_attention
from betaclip.kernels.precision import accumulation_dtype


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 (float64 for float64 inputs), whatever the dtypes of inputs and parameters."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        weight, bias = (p.to(dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class _QuickGELU(torch.autograd.Function):
    """silu(1.702 x) / 1.702, and 1.702 x.

    The derivative of the first output is that of silu at the second, so one tensor is kept and the backward is one pass
    over memory, where autograd's would be three. 1.702 x is an output so that second derivatives flow through it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        scaled = 1.702 * x
        return F.silu(scaled).mul_(1 / 1.702), scaled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_scaled: Tensor | None) -> Tensor | None:
        (scaled,) = ctx.saved_tensors
        dx = None if grad_scaled is None else 1.702 * grad_scaled
        if grad is None:
            return dx
        if not torch.is_grad_enabled():
            through_silu = torch.ops.aten.silu_backward(grad, scaled)
        else:  # silu_backward has no derivative
            sigmoid = scaled.sigmoid()
            through_silu = grad * sigmoid * (1 + scaled * (1 - sigmoid))
        return through_silu if dx is None else through_silu + dx


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the activation of OpenAI's CLIP, with fewer passes over memory than that formula."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # compilers fuse this formula; torch 2.11's would lose the gradient of apply
            return x * torch.sigmoid(1.702 * x)
        return _QuickGELU.apply(x)[0]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(len(hooks) for hooks in kinds)


def attention_not_supported_reasons(attn: nn.Module) -> list[str]:
    """The reasons why reading the weights of an attention module differs from calling it; empty if it does not.

    The pooling block and the towers read ``attn.in_proj_weight`` and compute the attention themselves. A
    parametrization takes effect whenever the weight is read. Adapters that wrap the module, other forwards and hooks
    take effect only when it is called.
    """
    if type(attn).forward is not nn.MultiheadAttention.forward or "forward" in vars(attn):
        return [f"attn has a forward of its own ({type(attn).__name__}), which would never be called"]
    return ["attn has hooks, which would never be called"] if has_hooks(attn) else []


def check_attention(attn: nn.Module, reader: str) -> None:
    """Raise NotImplementedError if ``reader``, which reads the weights, would compute something else than ``attn``."""
    if reasons := attention_not_supported_reasons(attn):
        raise NotImplementedError(
            f"{reader} reads the weights of attn, but {'; '.join(reasons)}. Adapt attn.out_proj, mlp.c_fc and "
            "mlp.c_proj instead, or parametrize attn.in_proj_weight (torch.nn.utils.parametrize)"
        )


# Sequences up to this length are short for ``attention``: on two cores forward and backward take 0.55 of the fused
# one's time for 37 patches, 0.65 for 77 tokens, and the same for 197 patches.
SHORT = 96


def attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """``F.scaled_dot_product_attention`` of (B, H, Q, W) queries, (B, H, L, W) keys and values: (B, H, Q, W).

    On the CPU PyTorch's fused attention computes the weights again in the backward. Those of short sequences are small,
    and keeping them takes less time. A single query is left to the fused one.
    """
    short = 1 < q.shape[2] and k.shape[2] <= SHORT and q.dtype in (torch.float32, torch.float64)
    if q.device.type != "cpu" or torch.compiler.is_compiling() or not short:
        return fused_attention(q, k, v, is_causal=is_causal)
    logits = q @ (k * q.shape[3] ** -0.5).mT
    if is_causal:
        later = torch.ones(logits.shape[2:], dtype=torch.bool, device=q.device).triu_(1)
        logits.masked_fill_(later, -torch.inf)
    return logits.softmax(-1) @ v
