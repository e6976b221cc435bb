"""Causal self-attention of packed texts.

Legend: M nodes, R rows of attention, U distinct texts, W = heads · width of a head. Rows are gathered from the nodes'
queries, keys and values; each node takes its result from one of its rows.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from betaclip.kernels.fused_attention import fused_attention
from betaclip.layers import attention
from betaclip.model.packing import Bucket, Packing, Rows, to_device


class _Gather(torch.autograd.Function):
    """Gather rows, (M, W) -> (R, W). In the backward each node sums its rows in a fixed order, without atomics."""

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
    """Gather rows at unique indices: (R, W) -> (M, W)."""

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
    """Split (R, parts, heads, width) into views (num_texts, heads, length, width), bucket by bucket and part by part.

    The backward writes all their gradients into one tensor in one pass, where autograd takes three.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, buckets: tuple[Bucket, ...]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.buckets = rows.shape, buckets
        return _by_heads(rows, buckets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].new_empty(ctx.shape)
        for part, value in zip(_by_heads(grad, ctx.buckets), grads, strict=True):
            part.copy_(value)
        return grad, None


def _by_heads(rows: Tensor, buckets: tuple[Bucket, ...]) -> tuple[Tensor, ...]:
    pieces = rows.split([bucket.num_texts * bucket.length for bucket in buckets])
    return tuple(
        part
        for piece, bucket in zip(pieces, buckets, strict=True)
        for part in piece.unflatten(0, bucket).permute(2, 0, 3, 1, 4)
    )


class PackedAttention(ABC):
    """The attention of one batch's texts, on the device, for all layers.

    Code that depends on the lengths of texts is excluded from ``torch.compile``, which would recompile for every batch.
    """

    def __init__(self, packing: Packing, rows: Rows, device: torch.device) -> None:
        self.rows = rows.to(device)
        self.ends = to_device(packing.ends, device)

    def at_ends(self, x: Tensor) -> Tensor:
        """Gather the texts' last tokens: (M, W) -> (U, W)."""
        return _Pick.apply(x, self.ends)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def causal(self, qkv: Tensor, heads: int) -> Tensor:
        """Causal attention of all nodes: (M, 3 W) queries, keys and values -> (M, W)."""
        rows = self._gather(qkv).unflatten(1, (3, heads, -1))
        return _Pick.apply(self._causal(rows).flatten(1), self.rows.row)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def last(self, q: Tensor, kv: Tensor, heads: int) -> Tensor:
        """Attention of the last tokens to their texts: (U, W) queries, (M, 2 W) keys and values -> (U, W)."""
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

    Padding follows each text, so that causal attention never reads it.
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
            out = attention(q, k, v, is_causal=True)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)

    def _last(self, q: Tensor, rows: Tensor) -> Tensor:
        if not self.buckets:
            return q
        counts = [bucket.num_texts for bucket in self.buckets]
        keys_values, outs = _Heads.apply(rows, self.buckets), []
        for i, (query, lengths) in enumerate(zip(q.split(counts), self.lengths.split(counts), strict=True)):
            k, v = keys_values[2 * i : 2 * i + 2]
            exists = torch.arange(k.shape[2], device=q.device) < lengths[:, None]
            outs.append(fused_attention(query[:, :, None], k, v, exists[:, None, None])[:, :, 0])
        return torch.cat(outs)


class Sequences(PackedAttention):
    """PyTorch's variable-length attention without padding, for CUDA in half precision."""

    def __init__(self, packing: Packing, device: torch.device) -> None:
        super().__init__(packing, packing.flat_rows, device)
        self.longest = int(packing.lengths[-1]) if len(packing.lengths) else 0
        starts = F.pad(packing.lengths.cumsum(0), (1, 0)).to(torch.int32)
        self.starts = to_device(starts, device)
        self.single = to_device(torch.arange(len(starts), dtype=torch.int32, device="cpu"), device)

    def _causal(self, rows: Tensor) -> Tensor:
        q, k, v = rows.unbind(1)
        return self._attention(q, k, v, self.starts, self.longest, (-1, 0))

    def _last(self, q: Tensor, rows: Tensor) -> Tensor:
        k, v = rows.unbind(1)
        return self._attention(q, k, v, self.single, 1, (-1, -1))

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, q_longest: int, window: tuple[int, int]
    ) -> Tensor:
        # Newer PyTorch may prefer cuDNN, reported to be slow here and once wrong; see also fused_attention.
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out: Any = varlen_attn(q, k, v, q_starts, self.starts, q_longest, self.longest, window_size=window)
        return out


def packed_attention(packing: Packing, device: torch.device, dtype: torch.dtype, head_width: int) -> PackedAttention:
    """Choose the faster attention: sequences without padding where flash attention runs, else buckets."""
    flash = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    half = dtype in (torch.float16, torch.bfloat16)
    if flash and half and head_width % 8 == 0 and head_width <= 256 and len(packing.lengths):
        return Sequences(packing, device)
    return Buckets(packing, device)
