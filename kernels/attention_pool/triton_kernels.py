"""Attention pooling in Triton: kernels for the steps between the folded projections, and their launchers.

L latent queries of width D attend to an image's P patches x. 1 / |x_p|, computed beforehand, scales the columns of
logits and weights, so that no normalised patch exists.

* forward: a program takes BLOCK_M latent queries of one image and its patches BLOCK_N at a time, with online softmax:
  logits over D in steps of BLOCK_D, then weighted sums of the same patches, BLOCK_D columns at a time. Logits never
  leave the program; weighted sums do only where P > BLOCK_N, to be rescaled. Patches come from memory once, because a
  block of them is still in cache when it is read again.
* backward: a program computes one tile of S = z x̂ᵀ and dA = g x̂ᵀ over D in steps of BLOCK_D and writes [dS; A] / |x|,
  the operand of the products that follow, and its latent queries' share of <x̂_p, dx̂_p>. There are no atomics.
* products: a program computes one tile of [dz; means] = [dS; A] x / |x|, or of the patches' gradient
  [dS; A]ᵀ [z; g] / |x| - <x̂, dx̂> x / |x|². Programs of one image follow each other, so that its patches, weights, z and
  g come from memory once; the gradient is written only once.

Masked patches and patches beyond P are not read, and have weight 0. Offsets of images and patches are 64-bit.

Legend: B images, P patches, H heads, L latent queries, D width. m: latent queries of a tile, n: its patches.
``inverse``: 1 / |x| of patches, 0 for those that count as zero. Rows of P weights are ``pitch`` elements apart.
``m_i``, ``l_i``: running maximum and sum of exponentials of a latent query.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from betaclip.kernels import architecture
from betaclip.kernels.architecture import Tile, choose
from betaclip.kernels.attention_pool.folded import Patches, Result
from betaclip.kernels.attention_pool.tiles import BACKWARD, FORWARD, PRODUCTS
from betaclip.kernels.precision import accumulation_dtype, dot_precision


@triton.jit
def _valid(mask_ptr, stride_mask, pid_b, offs_n, P, HAS_MASK: tl.constexpr):
    """(BLOCK_N,) whether each patch exists and is not masked."""
    valid = offs_n < P
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + pid_b * stride_mask + offs_n, mask=valid, other=0) != 0)
    return valid


@triton.jit(do_not_specialize=["P", "L"])
def _attention_pool_fwd_kernel(
    x_ptr, z_ptr, mask_ptr, inverse_ptr,  # (B, P, D), (B, L, D), (B, P), (B, P)
    means_ptr, lse_ptr,  # (B, L, D), (B, L): -inf for an image without valid patches
    sums_ptr,  # (B, L, D) if MANY_BLOCKS: scratch, weighted sums of the blocks before
    P, L, stride_image, stride_patch, stride_mask,
    D: tl.constexpr, NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, MANY_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(L, BLOCK_M)
    pid = tl.program_id(0)
    pid_b, pid_m = (pid // blocks_m).to(tl.int64), pid % blocks_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    z_offsets = (pid_b * L + offs_m) * D
    l_i = tl.zeros((BLOCK_M,), dtype=ACC)
    m_i = tl.full((BLOCK_M,), -float("inf"), dtype=ACC)
    for start_n in range(0, P, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        valid = _valid(mask_ptr, stride_mask, pid_b, offs_n, P, HAS_MASK)
        x_offsets = pid_b * stride_image + offs_n.to(tl.int64) * stride_patch
        s = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            x = tl.load(
                x_ptr + x_offsets[:, None] + offs_d[None, :], mask=valid[:, None] & (offs_d < D)[None, :], other=0.0
            )
            mask = (offs_m < L)[:, None] & (offs_d < D)[None, :]
            z = tl.load(z_ptr + z_offsets[:, None] + offs_d[None, :], mask=mask, other=0.0)
            s = tl.dot(z, x.T, s, input_precision=PRECISION, out_dtype=ACC)
        if NORMALIZE:
            inverse = tl.load(inverse_ptr + pid_b * P + offs_n, mask=valid, other=0.0)
            s *= inverse[None, :]
        s = tl.where(valid[None, :], s, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        finite = tl.where(m_new == -float("inf"), 0.0, m_new)
        weights, decay = tl.exp(s - finite[:, None]), tl.exp(m_i - finite)
        l_i = l_i * decay + tl.sum(weights, 1)
        m_i = m_new
        if NORMALIZE:  # read again: kept, it would take 32 of a thread's registers, which then spill at D = 64
            weights *= tl.load(inverse_ptr + pid_b * P + offs_n, mask=valid, other=0.0, volatile=True)[None, :]
        weights = weights.to(x_ptr.dtype.element_ty)
        share = 1.0 / tl.where(l_i > 0, l_i, 1.0)
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            x = tl.load(
                x_ptr + x_offsets[:, None] + offs_d[None, :], mask=valid[:, None] & (offs_d < D)[None, :], other=0.0
            )
            mean_offsets = z_offsets[:, None] + offs_d[None, :]
            mask = (offs_m < L)[:, None] & (offs_d < D)[None, :]
            sums = tl.dot(weights, x, input_precision=PRECISION, out_dtype=ACC)
            if MANY_BLOCKS:
                if start_n > 0:
                    sums += decay[:, None] * tl.load(sums_ptr + mean_offsets, mask=mask, other=0.0)
                if start_n + BLOCK_N < P:
                    tl.store(sums_ptr + mean_offsets, sums, mask=mask)
            if not MANY_BLOCKS or start_n + BLOCK_N >= P:
                means = (sums * share[:, None]).to(means_ptr.dtype.element_ty)
                tl.store(means_ptr + mean_offsets, means, mask=mask)
        tl.debug_barrier()  # orders the threads' stores and loads of sums; no other program touches them
    tl.store(lse_ptr + pid_b * L + offs_m, tl.log(l_i) + m_i, mask=offs_m < L)


@triton.jit(do_not_specialize=["P", "L"])
def _attention_pool_bwd_kernel(
    x_ptr, zg_ptr, mask_ptr, inverse_ptr,  # (B, P, D), (B, L / H, 2, H, D), (B, P), (B, P)
    lse_ptr, out_ptr, dout_ptr, bias_ptr,  # (B, L), (B, L, D / H) twice, (D,)
    weights_ptr, radial_ptr,  # (B, L / H, 2, H, P), (B, blocks_m, P)
    P, L, stride_image, stride_patch, stride_mask, pitch,
    H: tl.constexpr, D: tl.constexpr, NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(L, BLOCK_M), tl.cdiv(P, BLOCK_N)
    pid = tl.program_id(0)
    pid_b = (pid // (blocks_m * blocks_n)).to(tl.int64)
    pid_m = pid // blocks_n % blocks_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = _valid(mask_ptr, stride_mask, pid_b, offs_n, P, HAS_MASK)
    # δ = <dout, out - bias> over the head's part of both
    offs_h = tl.arange(0, BLOCK_H)
    of_head = (offs_m < L)[:, None] & (offs_h < D // H)[None, :]
    out_offsets = (pid_b * L + offs_m)[:, None] * (D // H) + offs_h[None, :]
    means = tl.load(out_ptr + out_offsets, mask=of_head, other=0.0).to(ACC)
    if HAS_BIAS:
        bias_offsets = (offs_m % H * (D // H))[:, None] + offs_h[None, :]
        means -= tl.load(bias_ptr + bias_offsets, mask=of_head, other=0.0).to(ACC)
    delta = tl.sum(means * tl.load(dout_ptr + out_offsets, mask=of_head, other=0.0).to(ACC), 1)
    z_rows = pid_b * 2 * L + offs_m // H * (2 * H) + offs_m % H  # rows of zg and of weights
    s = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    da = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        x_offsets = pid_b * stride_image + offs_n.to(tl.int64)[:, None] * stride_patch + offs_d[None, :]
        x = tl.load(x_ptr + x_offsets, mask=valid[:, None] & (offs_d < D)[None, :], other=0.0)
        z_offsets = z_rows[:, None] * D + offs_d[None, :]
        mask = (offs_m < L)[:, None] & (offs_d < D)[None, :]
        z = tl.load(zg_ptr + z_offsets, mask=mask, other=0.0)
        g = tl.load(zg_ptr + z_offsets + H * D, mask=mask, other=0.0)
        s = tl.dot(z, x.T, s, input_precision=PRECISION, out_dtype=ACC)
        da = tl.dot(g, x.T, da, input_precision=PRECISION, out_dtype=ACC)
    lse = tl.load(lse_ptr + pid_b * L + offs_m, mask=offs_m < L, other=0.0)
    if NORMALIZE:
        inverse = tl.load(inverse_ptr + pid_b * P + offs_n, mask=valid, other=0.0)
        s *= inverse[None, :]
        da *= inverse[None, :]
    a = tl.where(valid[None, :], tl.exp(s - lse[:, None]), 0.0)
    ds = a * (da - delta[:, None])
    if NORMALIZE:
        radial = tl.sum(ds * s + a * da, 0) * inverse * inverse
        tl.store(radial_ptr + (pid_b * blocks_m + pid_m) * P + offs_n, radial, mask=offs_n < P)
        ds *= inverse[None, :]
        a *= inverse[None, :]
    weight_offsets = z_rows[:, None] * pitch + offs_n[None, :]
    mask = (offs_m < L)[:, None] & (offs_n < pitch)[None, :]  # a multiple of 8: threads store 16 bytes
    tl.store(weights_ptr + weight_offsets, ds.to(weights_ptr.dtype.element_ty), mask=mask)
    tl.store(weights_ptr + weight_offsets + H * pitch, a.to(weights_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["P", "L", "shares"])
def _attention_pool_products_kernel(
    x_ptr, zg_ptr, weights_ptr,  # (B, P, D), (B, 2 L, D), (B, 2 L, P)
    radial_ptr,  # (B, shares, P)
    products_ptr, dx_ptr,  # (B, 2 L, D), (B, P, D) if HAS_DX
    P, L, stride_image, stride_patch, pitch, shares,
    D: tl.constexpr, NORMALIZE: tl.constexpr, HAS_DX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Here m are rows of a result, n columns of it, and d what is summed over: patches, or rows of zg and of weights.
    blocks_l, blocks_n = tl.cdiv(2 * L, BLOCK_M), tl.cdiv(D, BLOCK_N)
    blocks_m = blocks_l
    if HAS_DX:
        blocks_m += tl.cdiv(P, BLOCK_M)
    pid = tl.program_id(0)
    pid_b, pid_m = (pid // (blocks_m * blocks_n)).to(tl.int64), pid // blocks_n % blocks_m
    offs_n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += pid_b * stride_image
    zg_ptr += pid_b * 2 * L * D
    weights_ptr += pid_b * 2 * L * pitch
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if pid_m < blocks_l:
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        for start_d in range(0, P, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            mask = (offs_m < 2 * L)[:, None] & (offs_d < pitch)[None, :]
            weight_offsets = offs_m.to(tl.int64)[:, None] * pitch + offs_d[None, :]
            weights = tl.load(weights_ptr + weight_offsets, mask=mask, other=0.0)
            x_offsets = offs_d.to(tl.int64)[:, None] * stride_patch + offs_n[None, :]
            x = tl.load(x_ptr + x_offsets, mask=(offs_d < P)[:, None] & (offs_n < D)[None, :], other=0.0)
            acc = tl.dot(weights, x, acc, input_precision=PRECISION, out_dtype=ACC)
        offsets = (pid_b * 2 * L + offs_m)[:, None] * D + offs_n[None, :]
        mask = (offs_m < 2 * L)[:, None] & (offs_n < D)[None, :]
        tl.store(products_ptr + offsets, acc.to(products_ptr.dtype.element_ty), mask=mask)
    elif HAS_DX:
        offs_m = (pid_m - blocks_l) * BLOCK_M + tl.arange(0, BLOCK_M)
        for start_d in range(0, 2 * L, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            exists = (offs_d < 2 * L)[:, None]
            weight_offsets = offs_d.to(tl.int64)[:, None] * pitch + offs_m[None, :]
            weights = tl.load(weights_ptr + weight_offsets, mask=exists & (offs_m < pitch)[None, :], other=0.0)
            zg_offsets = offs_d.to(tl.int64)[:, None] * D + offs_n[None, :]
            zg = tl.load(zg_ptr + zg_offsets, mask=exists & (offs_n < D)[None, :], other=0.0)
            acc = tl.dot(weights.T, zg, acc, input_precision=PRECISION, out_dtype=ACC)
        mask = (offs_m < P)[:, None] & (offs_n < D)[None, :]
        if NORMALIZE:
            radial = tl.zeros((BLOCK_M,), dtype=ACC)
            for share in range(0, shares):
                radial += tl.load(radial_ptr + (pid_b * shares + share) * P + offs_m, mask=offs_m < P, other=0.0)
            x_offsets = offs_m.to(tl.int64)[:, None] * stride_patch + offs_n[None, :]
            acc -= radial[:, None] * tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(ACC)
        dx_offsets = (pid_b * P + offs_m)[:, None] * D + offs_n[None, :]
        tl.store(dx_ptr + dx_offsets, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Fused:
    """``Attention`` by one kernel for each step, with products in the dtype of the patches.

    forward_tile, backward_tile, products_tile: replace the entries of the tables in ``tiles``.
    """

    forward_tile: Tile | None = None
    backward_tile: Tile | None = None
    products_tile: Tile | None = None
    scratch_bytes: int | None = None
    kept_bytes: int | None = 0
    keeps_lse: bool = True
    interleaves: bool = True

    def dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def scratch(self, latents: int, patches: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (0, 0), (0, 0)

    def forward(
        self, x: Patches, z: Tensor, means: Tensor, lse: Tensor | None, kept: Tensor | None, scratch: Tensor
    ) -> None:
        tile = self.forward_tile or _chosen(FORWARD, z)
        many_blocks = x.rows.shape[1] > tile.block_n
        sums = z.new_empty(z.shape, dtype=accumulation_dtype(z.dtype)) if many_blocks else None
        mask, stride_mask = _mask(x)
        programs = z.shape[0] * -(-z.shape[1] // tile.block_m)
        _launch(
            _attention_pool_fwd_kernel, programs, tile, x,
            (z, mask, x.inverse_norm, means, lse, sums), z.shape[1], stride_mask,
            HAS_MASK=mask is not None, MANY_BLOCKS=many_blocks,
        )  # fmt: skip

    def backward(
        self,
        x: Patches,
        zg: Tensor,
        lse: Tensor | None,
        kept: Tensor | None,
        result: Result,
        weights: Tensor,
        dz_and_means: Tensor,
        dx: Tensor | None,
        scratch: Tensor,
    ) -> None:
        tile = self.backward_tile or _chosen(BACKWARD, zg)
        (_, images, queries, heads, width), patches = zg.shape, x.rows.shape[1]
        blocks = -(-queries * heads // tile.block_m)
        radial = None
        if x.inverse_norm is not None:
            radial = x.inverse_norm.new_empty(images, blocks, patches)
        zg, pairs, products = (_interleaved(t) for t in (zg, weights, dz_and_means))
        mask, stride_mask = _mask(x)
        _launch(
            _attention_pool_bwd_kernel, images * blocks * -(-patches // tile.block_n), tile, x,
            (zg, mask, x.inverse_norm, lse, result.out, result.dout.contiguous(), result.v_bias, pairs, radial),
            queries * heads, stride_mask, pairs.stride(1),
            H=heads, HAS_MASK=mask is not None, HAS_BIAS=result.v_bias is not None,
            BLOCK_H=triton.next_power_of_2(width // heads),
        )  # fmt: skip
        if x.single is not None:
            weights[0].masked_fill_(x.single.unsqueeze(3), 0)
        tile = self.products_tile or _chosen(PRODUCTS, zg)
        rows = (2 * queries * heads, patches) if dx is not None else (2 * queries * heads,)
        programs = images * -(-width // tile.block_n) * sum(-(-n // tile.block_m) for n in rows)
        _launch(
            _attention_pool_products_kernel, programs, tile, x, (zg, pairs, radial, products, dx), queries * heads,
            pairs.stride(1), blocks, HAS_DX=dx is not None,
        )  # fmt: skip


def _interleaved(pair: Tensor) -> Tensor:
    """(c, 2 L, ...) view of a pair, the rows query by query."""
    return pair.permute(1, 2, 0, 3, 4).flatten(1, 3)


def _chosen(table: Mapping[tuple[str, int], Tile], t: Tensor) -> Tile:
    return choose(table, architecture.architecture(t.device), t.element_size())


def _mask(x: Patches) -> tuple[Tensor | None, int]:
    """The mask as the kernels read it, and its stride."""
    mask = None if x.mask is None else x.mask.contiguous().view(torch.uint8)
    return mask, 0 if mask is None else mask.stride(0)


def _launch(
    kernel: Any, programs: int, tile: Tile, x: Patches, tensors: tuple[Any, ...], latents: int, *rest: int, **flags: Any
) -> None:
    rows = x.rows if x.rows.stride(2) == 1 else x.rows.contiguous()
    launch(
        kernel, programs, (rows, *tensors, rows.shape[1], latents, rows.stride(0), rows.stride(1), *rest),
        D=rows.shape[2], NORMALIZE=x.inverse_norm is not None,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
        PRECISION=dot_precision(architecture.architecture(rows.device), rows.dtype),
        ACC=tl.float64 if rows.dtype == torch.float64 else tl.float32,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **flags,
    )  # fmt: skip


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], **constants: Any) -> None:
    """Start a kernel on the device of its first argument: Triton launches on the current one."""
    device = arguments[0].device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(programs,)](*arguments, **constants)
