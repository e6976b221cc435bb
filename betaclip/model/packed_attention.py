"""Causal self-attention of packed texts: from what the nodes of their tree project to, and back to the nodes."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from betaclip.model.packing import Packing, Rows, to_device


class _Gather(torch.autograd.Function):
    """(M, W) -> (R, W), whose backward gathers too: each node sums its rows in one order, without atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, node: Tensor, users: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(users, starts)
        return x.index_select(0, node)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        users, starts = ctx.saved_tensors
        return F.embedding_bag(users, grad, starts, mode="sum"), None, None, None


class _Pick(torch.autograd.Function):
    """(R, W) -> (M, W), the rows at ``index``, no two of which are one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, index, grad), None


class _Heads(torch.autograd.Function):
    """(R, parts, heads, width) of buckets (texts, tokens) -> each bucket's parts, (texts, heads, tokens, width).

    They are views; in the backward their gradients are written side by side once, which autograd does in three passes.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, buckets: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.buckets = rows.shape, buckets
        return _by_heads(rows, buckets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].new_empty(ctx.shape)
        for part, value in zip(_by_heads(grad, ctx.buckets), grads, strict=True):
            part.copy_(value)
        return grad, None


def _by_heads(rows: Tensor, buckets: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
    pieces = rows.split([texts * tokens for texts, tokens in buckets])
    return tuple(
        part
        for piece, bucket in zip(pieces, buckets, strict=True)
        for part in piece.unflatten(0, bucket).permute(2, 0, 3, 1, 4)
    )


class PackedAttention(ABC):
    """A batch's texts on the device, for the attention of all layers.

    M nodes, R rows of attention, U distinct texts, W = heads · width of a head.
    What depends on the lengths of texts stays out of ``torch.compile``, which would compile again for every batch.
    """

    def __init__(self, packing: Packing, rows: Rows, device: torch.device) -> None:
        self.rows = rows.to(device)
        self.ends = to_device(packing.ends, device)

    def of_ends(self, x: Tensor) -> Tensor:
        """(M, W) -> (U, W) of the texts' last tokens."""
        return _Pick.apply(x, self.ends)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def causal(self, qkv: Tensor, heads: int) -> Tensor:
        """(M, 3 W) -> (M, W)"""
        rows = self._gather(qkv).unflatten(1, (3, heads, -1))
        return _Pick.apply(self._causal(rows).flatten(1), self.rows.row)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def last(self, q: Tensor, kv: Tensor, heads: int) -> Tensor:
        """(U, W) queries of the texts' last tokens, (M, 2 W) -> (U, W)"""
        rows = self._gather(kv).unflatten(1, (2, heads, -1))
        return self._last(q.unflatten(1, (heads, -1)), rows).flatten(1)

    def _gather(self, x: Tensor) -> Tensor:
        return _Gather.apply(x, self.rows.node, self.rows.users, self.rows.starts)

    @abstractmethod
    def _causal(self, rows: Tensor) -> Tensor:
        """(R, 3, heads, width) -> (R, heads, width)"""

    @abstractmethod
    def _last(self, q: Tensor, rows: Tensor) -> Tensor:
        """(U, heads, width), (R, 2, heads, width) -> (U, heads, width)"""


class Buckets(PackedAttention):
    """One fused attention per bucket of texts of similar length, for any device and dtype.

    Padding comes last, where no token of the text looks.
    """

    def __init__(self, packing: Packing, device: torch.device) -> None:
        super().__init__(packing, packing.padded_rows, device)
        self.buckets = packing.buckets
        self.lengths = to_device(packing.lengths, device)

    def _causal(self, rows: Tensor) -> Tensor:
        if not self.buckets:
            return rows[:, 0]
        parts, outs = _Heads.apply(rows, self.buckets), []
        for i in range(0, len(parts), 3):
            q, k, v = parts[i : i + 3]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)

    def _last(self, q: Tensor, rows: Tensor) -> Tensor:
        if not self.buckets:
            return q
        texts = [texts for texts, _ in self.buckets]
        keys_values, outs = _Heads.apply(rows, self.buckets), []
        for i, (query, lengths) in enumerate(zip(q.split(texts), self.lengths.split(texts), strict=True)):
            k, v = keys_values[2 * i : 2 * i + 2]
            exists = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
            outs.append(F.scaled_dot_product_attention(query[:, :, None], k, v, exists[:, None, None])[:, :, 0])
        return torch.cat(outs)


class Sequences(PackedAttention):
    """PyTorch's attention of sequences of any lengths, for CUDA in half precision. Nothing is padded."""

    def __init__(self, packing: Packing, device: torch.device) -> None:
        super().__init__(packing, packing.flat_rows, device)
        self.longest = int(packing.lengths[-1]) if len(packing.lengths) else 0
        starts = F.pad(packing.lengths.cumsum(0), (1, 0)).to(torch.int32)
        self.starts = to_device(starts, device)
        self.single = to_device(torch.arange(len(starts), dtype=torch.int32), device)

    def _causal(self, rows: Tensor) -> Tensor:
        q, k, v = rows.unbind(1)
        return self._attention(q, k, v, self.starts, self.longest, (-1, 0))

    def _last(self, q: Tensor, rows: Tensor) -> Tensor:
        k, v = rows.unbind(1)
        return self._attention(q, k, v, self.single, 1, (-1, -1))

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, q_longest: int, window: tuple[int, int]
    ) -> Tensor:
        # Newer versions may prefer cuDNN, which has been reported slow here and once faulty.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out: Any = varlen_attn(q, k, v, q_starts, self.starts, q_longest, self.longest, window_size=window)
        return out


def packed_attention(packing: Packing, device: torch.device, dtype: torch.dtype, head_width: int) -> PackedAttention:
    """The fastest that can serve: sequences without padding where flash attention runs, else buckets."""
    flash = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    half = dtype in (torch.float16, torch.bfloat16)
    if flash and half and head_width % 8 == 0 and head_width <= 256 and len(packing.lengths):
        return Sequences(packing, device)
    return Buckets(packing, device)
