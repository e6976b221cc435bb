"""PyTorch's fused attention, computed by any of its kernels but cuDNN's."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_ALL_BUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """``F.scaled_dot_product_attention``, with right gradients on Hopper.

    There PyTorch prefers cuDNN's kernels in 16 bits. With torch 2.11 on an H100 they seemed to take the strides of
    one gradient for those of another of the same shape: gradients were wrong by 5 to 59 % where that of the result was
    a slice of another tensor after it had been a whole one in an earlier call, and a training run had NaN.
    """
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)
    with sdpa_kernel(_ALL_BUT_CUDNN):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)
