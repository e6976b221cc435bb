"""Attention pooling in Triton: kernels for the steps between the folded projections, and their launchers.

L latent queries of width D attend to an image's P patches x. 1 / |x_p|, computed from the loaded patches, scales the
columns of logits and weights, so that no normalised patch exists.

* forward: a program takes BLOCK_M latent queries of one image and its patches BLOCK_N at a time, with online softmax:
  logits over D in steps of BLOCK_D, then weighted sums of the same patches, BLOCK_D columns at a time. Logits never
  leave the program; weighted sums do only where P > BLOCK_N, to be rescaled. Patches come from memory once, because a
  block of them is still in cache when it is read again.
* backward: a program computes one tile of S = z x̂ᵀ and dA = g x̂ᵀ over D in steps of BLOCK_D and writes [dS; A] / |x|,
  the operand of two library products, and its latent queries' share of <x̂_p, dx̂_p>. There are no atomics.

Masked patches and patches beyond P are not read, and have weight 0. Offsets of images and patches are 64-bit.

Legend: B images, P patches, H heads, L latent queries, D width. m: latent queries of a tile, n: its patches.
``m_i``, ``l_i``: running maximum and sum of exponentials of a latent query.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from betaclip.kernels import architecture
from betaclip.kernels.architecture import Tile, choose
from betaclip.kernels.attention_pool.folded import SCRATCH_BYTES, Patches
from betaclip.kernels.attention_pool.tiles import BACKWARD, FORWARD
from betaclip.kernels.precision import accumulation_dtype, dot_precision


@triton.jit
def _valid(mask_ptr, stride_mask, pid_b, offs_n, P, HAS_MASK: tl.constexpr):
    """(BLOCK_N,) whether each patch exists and is not masked."""
    valid = offs_n < P
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + pid_b * stride_mask + offs_n, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _inverse(squares, NORM_EPS: tl.constexpr):
    """1 / |x|, 0 where |x| <= NORM_EPS"""
    norm = tl.sqrt(squares)
    return tl.where(norm <= NORM_EPS, 0.0, 1.0 / tl.where(norm <= NORM_EPS, 1.0, norm))


@triton.jit(do_not_specialize=["P", "L"])
def _attention_pool_fwd_kernel(
    x_ptr, z_ptr, mask_ptr,  # (B, P, D), (B, L, D), (B, P)
    means_ptr, lse_ptr,  # (B, L, D), (B, L): -inf for an image without valid patches
    sums_ptr,  # (B, L, D) if MANY_BLOCKS: scratch, weighted sums of the blocks before
    P, L, stride_image, stride_patch, stride_mask,
    D: tl.constexpr, NORMALIZE: tl.constexpr, NORM_EPS: tl.constexpr, HAS_MASK: tl.constexpr, MANY_BLOCKS: tl.constexpr,
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
        squares = tl.zeros((BLOCK_N,), dtype=ACC)
        for start_d in range(0, D, BLOCK_D):
            offs_d = start_d + tl.arange(0, BLOCK_D)
            x = tl.load(
                x_ptr + x_offsets[:, None] + offs_d[None, :], mask=valid[:, None] & (offs_d < D)[None, :], other=0.0
            )
            mask = (offs_m < L)[:, None] & (offs_d < D)[None, :]
            z = tl.load(z_ptr + z_offsets[:, None] + offs_d[None, :], mask=mask, other=0.0)
            s = tl.dot(z, x.T, s, input_precision=PRECISION, out_dtype=ACC)
            if NORMALIZE:
                squares += tl.sum(x.to(ACC) * x.to(ACC), 1)
        if NORMALIZE:
            inverse = _inverse(squares, NORM_EPS)
            s *= inverse[None, :]
        s = tl.where(valid[None, :], s, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        finite = tl.where(m_new == -float("inf"), 0.0, m_new)
        weights, decay = tl.exp(s - finite[:, None]), tl.exp(m_i - finite)
        l_i = l_i * decay + tl.sum(weights, 1)
        m_i = m_new
        if NORMALIZE:
            weights *= inverse[None, :]
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
            if start_n + BLOCK_N >= P:
                means = (sums * share[:, None]).to(means_ptr.dtype.element_ty)
                tl.store(means_ptr + mean_offsets, means, mask=mask)
        tl.debug_barrier()  # orders the threads' stores and loads of sums; no other program touches them
    tl.store(lse_ptr + pid_b * L + offs_m, tl.log(l_i) + m_i, mask=offs_m < L)


@triton.jit(do_not_specialize=["P", "L"])
def _attention_pool_bwd_kernel(
    x_ptr, zg_ptr, mask_ptr,  # (B, P, D), (B, L / H, 2, H, D), (B, P)
    lse_ptr, delta_ptr,  # (B, L), (B, L)
    weights_ptr, radial_ptr,  # (B, L / H, 2, H, P), (B, blocks_m, P)
    P, L, stride_image, stride_patch, stride_mask,
    H: tl.constexpr, D: tl.constexpr, NORMALIZE: tl.constexpr, NORM_EPS: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(L, BLOCK_M), tl.cdiv(P, BLOCK_N)
    pid = tl.program_id(0)
    pid_b = (pid // (blocks_m * blocks_n)).to(tl.int64)
    pid_m = pid // blocks_n % blocks_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = _valid(mask_ptr, stride_mask, pid_b, offs_n, P, HAS_MASK)
    z_rows = pid_b * 2 * L + offs_m // H * (2 * H) + offs_m % H  # rows of zg and of weights
    s = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    da = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    squares = tl.zeros((BLOCK_N,), dtype=ACC)
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
        if NORMALIZE:
            squares += tl.sum(x.to(ACC) * x.to(ACC), 1)
    lse = tl.load(lse_ptr + pid_b * L + offs_m, mask=offs_m < L, other=0.0)
    delta = tl.load(delta_ptr + pid_b * L + offs_m, mask=offs_m < L, other=0.0)
    if NORMALIZE:
        inverse = _inverse(squares, NORM_EPS)
        s *= inverse[None, :]
        da *= inverse[None, :]
    a = tl.where(valid[None, :], tl.exp(s - lse[:, None]), 0.0)
    ds = a * (da - delta[:, None])
    if NORMALIZE:
        radial = tl.sum(ds * s + a * da, 0) * inverse * inverse
        tl.store(radial_ptr + (pid_b * blocks_m + pid_m) * P + offs_n, radial, mask=offs_n < P)
        ds *= inverse[None, :]
        a *= inverse[None, :]
    weight_offsets = z_rows[:, None] * P + offs_n[None, :]
    mask = (offs_m < L)[:, None] & (offs_n < P)[None, :]
    tl.store(weights_ptr + weight_offsets, ds.to(weights_ptr.dtype.element_ty), mask=mask)
    tl.store(weights_ptr + weight_offsets + H * P, a.to(weights_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Fused:
    """``Attention`` by one kernel for each direction, with products in the dtype of the patches.

    forward_tile, backward_tile: replace the entries of the tables in ``tiles``.
    """

    forward_tile: Tile | None = None
    backward_tile: Tile | None = None
    scratch_bytes: int = SCRATCH_BYTES
    scratch_tiles: int = 0
    keeps_lse: bool = True

    def dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype

    def forward(self, x: Patches, z: Tensor, means: Tensor, tiles: Tensor) -> Tensor | None:
        tile = self.forward_tile or choose(FORWARD, architecture.architecture(z.device), z.element_size())
        lse = z.new_empty(z.shape[:2], dtype=accumulation_dtype(z.dtype))
        sums = z.new_empty(z.shape, dtype=lse.dtype) if x.rows.shape[1] > tile.block_n else None
        programs = z.shape[0] * -(-z.shape[1] // tile.block_m)
        _launch(
            _attention_pool_fwd_kernel, programs, tile, x, z, (means, lse, sums), z.shape[1],
            MANY_BLOCKS=sums is not None,
        )  # fmt: skip
        return lse

    def backward(
        self, x: Patches, zg: Tensor, lse: Tensor, delta: Tensor, weights: Tensor, tiles: Tensor
    ) -> Tensor | None:
        tile = self.backward_tile or choose(BACKWARD, architecture.architecture(zg.device), zg.element_size())
        (images, queries, _, heads, _), patches = zg.shape, x.rows.shape[1]
        blocks = -(-queries * heads // tile.block_m)
        radial = None if x.norm_eps is None else lse.new_empty(images, blocks, patches)
        _launch(
            _attention_pool_bwd_kernel, images * blocks * -(-patches // tile.block_n), tile, x, zg,
            (lse, delta, weights, radial), queries * heads, H=heads,
        )  # fmt: skip
        return None if radial is None else radial.sum(1)


def _launch(
    kernel: Any, programs: int, tile: Tile, x: Patches, z: Tensor, rest: tuple[Any, ...], latents: int, **constants: Any
) -> None:
    rows = x.rows if x.rows.stride(2) == 1 else x.rows.contiguous()
    mask = None if x.mask is None else x.mask.contiguous().view(torch.uint8)
    guard = torch.cuda.device(rows.device) if rows.is_cuda else nullcontext()
    with guard:  # Triton launches on the current device, not on that of the tensors
        kernel[(programs,)](
            rows, z, mask, *rest, rows.shape[1], latents, rows.stride(0), rows.stride(1),
            0 if mask is None else mask.stride(0),
            D=rows.shape[2], NORMALIZE=x.norm_eps is not None, NORM_EPS=x.norm_eps or 0.0, HAS_MASK=mask is not None,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
            PRECISION=dot_precision(architecture.architecture(rows.device), rows.dtype),
            ACC=tl.float64 if rows.dtype == torch.float64 else tl.float32,
            num_warps=tile.num_warps, num_stages=tile.num_stages, **constants,
        )  # fmt: skip
