"""The similarity operations in Triton: kernels, and the launchers around them. Imported where Triton runs.

A program forms (BLOCK_M, BLOCK_N) tiles of S = scale * x y^T from D in steps of BLOCK_D and never stores S.
Differences are taken in nats, where they are nearly exact, before an exponential scales them to octaves.

* forward: one rectangle of tiles per program. e = exp(S - lse_shift), one exponential for both directions; sums over
  rows stay in registers along a row of tiles, sums over columns go to the strip's own row of ``col_sum``. One shift for
  the whole launch makes all partial sums merge by addition.
* merge: adds the partial sums. Blocks with a row so far below the shift that terms may be lost are done again with true
  maxima: tiles of the same products, at most once more for rows and once for columns, whatever the norms.
* backward: one square chunk of dS at a time in a workspace, made by one kernel, for two library products.

Row offsets are 64-bit, except within the chunk of dS. Scale, bias and incoming gradients are read on the device;
nothing here waits for it. ``triton_tiles`` forms a tile and leaves pairs out.

Sums in memory grow by atomic additions that one thread of one program makes, in order: results are deterministic, and
no other thread needs to see a sum before the kernel ends, for which AMD's barrier would not be enough.

Legend: N rows of x, M rows of y, D depth. m, n: rows and columns of S within a tile. S (N, M) logits, of which
``s`` is a tile. ``m_i``, ``l_i``: running maximum and sum of exponentials of a row. x_ptr and y_ptr are tensor
descriptors where TMA is set.
"""

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools import tensor_descriptor

from betaclip.kernels import architecture
from betaclip.kernels.architecture import Tile, choose
from betaclip.kernels.memory import aligned
from betaclip.kernels.precision import dot_precision, row_norms
from betaclip.kernels.similarity.chunks import Accumulators, amplification, filled, logsumexp_vectors
from betaclip.kernels.similarity.contract import Operand
from betaclip.kernels.similarity.exponent_range import MAX_ABOVE_SHIFT, MAX_BELOW_SHIFT
from betaclip.kernels.similarity.prefix_rows import PrefixRows
from betaclip.kernels.similarity.tiles import (
    CHUNK_ROWS,
    PREFIX_FORWARD_TILES,
    PREFIX_TILES,
    SOFTPLUS_GRADIENT_TILES,
    TILES,
    rectangles,
)
from betaclip.kernels.similarity.triton_tiles import (
    all_pairs_included,
    dot,
    exp,
    image_ids,
    lengthened,
    log1p,
    masked,
    pitch,
    store_ds,
    store_id_range,
    through_norms,
)


@triton.jit(do_not_specialize=["N", "M", "x_blocks"])
def _similarity_id_ranges_kernel(
    x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr,
    x_range_ptr, y_range_ptr,  # (x_blocks, 4), (y_blocks, 4)
    N, M, x_blocks,
    HAS_IMAGE_ID: tl.constexpr, HAS_TEXT_ID: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < x_blocks:
        store_id_range(x_range_ptr, x_image_id_ptr, x_text_id_ptr, pid, N, BLOCK_M, HAS_IMAGE_ID, HAS_TEXT_ID)
    else:
        block = pid - x_blocks
        store_id_range(y_range_ptr, y_image_id_ptr, y_text_id_ptr, block, M, BLOCK_N, HAS_IMAGE_ID, HAS_TEXT_ID)


@triton.jit(do_not_specialize=["N", "M", "strip_tiles", "range_tiles", "ranges"])
def _similarity_logsumexp_fwd_kernel(
    x_ptr, y_ptr, scale_ptr, x_ratio_ptr, y_ratio_ptr, lse_shift_ptr,
    x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr,
    x_range_ptr, y_range_ptr, row_sum_ptr, col_sum_ptr,  # (ranges, P, N), (strips, P, M), zero
    N, M, stride_x, stride_y, strip_tiles, range_tiles, ranges,
    ENDS: tl.constexpr, HAS_IMAGE_ID: tl.constexpr, HAS_TEXT_ID: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    pid_strip, pid_range = pid // ranges, pid % ranges
    scale, lse_shift = tl.load(scale_ptr), tl.load(lse_shift_ptr)
    PREFIXES: tl.constexpr = len(ENDS)
    row_sum_ptr += pid_range.to(tl.int64) * PREFIXES * N
    col_sum_ptr += pid_strip.to(tl.int64) * PREFIXES * M
    end_m = tl.minimum((pid_strip + 1) * strip_tiles * BLOCK_M, N)
    end_n = tl.minimum((pid_range + 1) * range_tiles * BLOCK_N, M)
    for start_m in range(pid_strip * strip_tiles * BLOCK_M, end_m, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        row_sum = tl.zeros((BLOCK_M,), dtype=ACC)
        for start_n in range(pid_range * range_tiles * BLOCK_N, end_n, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            all_included = all_pairs_included(
                x_range_ptr, y_range_ptr, start_m, start_n, N, M, HAS_IMAGE_ID, HAS_TEXT_ID, BLOCK_M, BLOCK_N
            )
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
            for prefix in range(PREFIXES):
                acc = dot(
                    acc, x_ptr, y_ptr, start_m, start_n, N, M, stride_x, stride_y,
                    prefix, ENDS, BLOCK_M, BLOCK_N, BLOCK_D, TMA, PRECISION, ACC,
                )  # fmt: skip
                s = masked(
                    acc * scale, all_included, x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr,
                    offs_m, offs_n, N, M, HAS_IMAGE_ID, HAS_TEXT_ID,
                )  # fmt: skip
                e = exp(s - lse_shift, ACC)
                # This program alone adds to sums in memory, and in each row of tiles the same thread to the same sum:
                # in order.
                col_sums = col_sum_ptr + prefix * M.to(tl.int64) + offs_n
                tl.atomic_add(col_sums, tl.sum(e, 0), mask=offs_n < M, sem="relaxed", scope="cta")
                if PREFIXES == 1:
                    row_sum += tl.sum(e, 1)
                else:
                    row_sums = row_sum_ptr + prefix * N.to(tl.int64) + offs_m
                    tl.atomic_add(row_sums, tl.sum(e, 1), mask=offs_m < N, sem="relaxed", scope="cta")
                acc = lengthened(acc, x_ratio_ptr, y_ratio_ptr, prefix, PREFIXES, offs_m, offs_n, N, M)
        if PREFIXES == 1:
            tl.store(row_sum_ptr + offs_m, row_sum, mask=offs_m < N)


@triton.jit(do_not_specialize=["N", "M", "stride_sum", "parts"])
def _similarity_logsumexp_merge_kernel(
    x_ptr, y_ptr, scale_ptr, x_ratio_ptr, y_ratio_ptr, lse_shift_ptr,
    x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr,
    sum_ptr, lse_ptr,  # (parts, N), (N,) of the last prefix in ENDS
    N, M, stride_x, stride_y, stride_sum, parts,
    MIN_TRUSTED_SUM: tl.constexpr, ENDS: tl.constexpr, HAS_IMAGE_ID: tl.constexpr, HAS_TEXT_ID: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    PREFIXES: tl.constexpr = len(ENDS)
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    x_image_id = image_ids(x_image_id_ptr, offs_m, N, HAS_IMAGE_ID)
    total = tl.zeros((BLOCK_M,), dtype=ACC)
    part_ptrs = sum_ptr + offs_m
    for _ in range(parts):
        total += tl.load(part_ptrs, mask=offs_m < N, other=0.0)
        part_ptrs += stride_sum
    lse = tl.log(total) + tl.load(lse_shift_ptr)
    lost = (x_image_id >= 0) & ((total < MIN_TRUSTED_SUM) | (total == float("inf")))
    if tl.max(lost.to(tl.int32), 0) > 0:
        scale = tl.load(scale_ptr)
        m_i = tl.full((BLOCK_M,), -float("inf"), dtype=ACC)
        l_i = tl.zeros((BLOCK_M,), dtype=ACC)
        for start_n in range(0, M, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
            for prefix in range(PREFIXES):
                acc = dot(
                    acc, x_ptr, y_ptr, start_m, start_n, N, M, stride_x, stride_y,
                    prefix, ENDS, BLOCK_M, BLOCK_N, BLOCK_D, TMA, PRECISION, ACC,
                )  # fmt: skip
                acc = lengthened(acc, x_ratio_ptr, y_ratio_ptr, prefix, PREFIXES, offs_m, offs_n, N, M)
            s = masked(
                acc * scale, False, x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr,
                offs_m, offs_n, N, M, HAS_IMAGE_ID, HAS_TEXT_ID,
            )  # fmt: skip
            m_new = tl.maximum(m_i, tl.max(s, 1))
            finite = tl.where(tl.abs(m_new) == float("inf"), 0.0, m_new)
            l_i = l_i * exp(m_i - finite, ACC) + tl.sum(exp(s - finite[:, None], ACC), 1)
            m_i = m_new
        lse = tl.where(lost, tl.log(l_i) + tl.where(tl.abs(m_i) == float("inf"), 0.0, m_i), lse)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < N)


@triton.jit(do_not_specialize=["N", "M", "chunk_m", "chunk_n", "end_m", "end_n"])
def _similarity_logsumexp_bwd_kernel(
    x_ptr, y_ptr, scale_ptr, x_ratio_ptr, y_ratio_ptr,
    x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr, x_range_ptr, y_range_ptr,
    # chunks.LogsumexpVectors: (P, N) or (P, M), filled up to whole tiles, which 16-byte loads may read
    stat_x_ptr, stat_y_ptr, weight_x_ptr, weight_y_ptr, single_exp_ok_ptr, factor_x_ptr, factor_y_ptr,
    # (column tiles of a chunk, P - 1, N), (row tiles of a chunk, P - 1, M): sums over dS * cosine, to which chunks add
    x_radial_ptr, y_radial_ptr,
    ds_ptr,  # (P, end_m - chunk_m, end_n - chunk_n), rows with room for a multiple of 16
    N, M, stride_x, stride_y, stride_prefix, stride_ds, chunk_m, chunk_n, end_m, end_n,
    ENDS: tl.constexpr, HAS_IMAGE_ID: tl.constexpr, HAS_TEXT_ID: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dS = weight_x p + weight_y q with p = exp(s - stat_x) and q = exp(s - stat_y)."""
    scale = tl.load(scale_ptr)
    PREFIXES: tl.constexpr = len(ENDS)
    tiles_n = tl.cdiv(end_n - chunk_n, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(end_m - chunk_m, BLOCK_M) * tiles_n, tl.num_programs(0)):
        top, left = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N  # within the chunk
        start_m, start_n = chunk_m + top, chunk_n + left
        offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
        all_included = all_pairs_included(
            x_range_ptr, y_range_ptr, start_m, start_n, N, M, HAS_IMAGE_ID, HAS_TEXT_ID, BLOCK_M, BLOCK_N
        )
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for prefix in range(PREFIXES):
            acc = dot(
                acc, x_ptr, y_ptr, start_m, start_n, N, M, stride_x, stride_y,
                prefix, ENDS, BLOCK_M, BLOCK_N, BLOCK_D, TMA, PRECISION, ACC,
            )  # fmt: skip
            s = masked(
                acc * scale, all_included, x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr,
                offs_m, offs_n, N, M, HAS_IMAGE_ID, HAS_TEXT_ID,
            )  # fmt: skip
            of_x, of_y = prefix * pitch(N, offs_m, offs_n), prefix * pitch(M, offs_m, offs_n)
            ds = exp(s - tl.load(stat_x_ptr + of_x + offs_m)[:, None], ACC)
            weight_x = tl.load(weight_x_ptr + of_x + offs_m)
            if tl.load(single_exp_ok_ptr + prefix):
                factor_x, factor_y = tl.load(factor_x_ptr + of_x + offs_m), tl.load(factor_y_ptr + of_y + offs_n)
                ds *= weight_x[:, None] + factor_x[:, None] * factor_y[None, :]
            else:
                stat_y, weight_y = tl.load(stat_y_ptr + of_y + offs_n), tl.load(weight_y_ptr + of_y + offs_n)
                ds = weight_x[:, None] * ds + weight_y[None, :] * exp(s - stat_y[None, :], ACC)
            ds = through_norms(
                ds, acc, x_ratio_ptr, y_ratio_ptr, x_radial_ptr, y_radial_ptr, tile, tiles_n,
                prefix, PREFIXES, offs_m, offs_n, N, M,
            )  # fmt: skip
            acc = lengthened(acc, x_ratio_ptr, y_ratio_ptr, prefix, PREFIXES, offs_m, offs_n, N, M)
            store_ds(
                ds_ptr, ds, top, left, stride_prefix, stride_ds, end_m - chunk_m, end_n - chunk_n,
                x_ratio_ptr, y_ratio_ptr, prefix, PREFIXES, offs_m, offs_n, N, M, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "M", "chunk_m", "chunk_n", "end_m", "end_n"])
def _similarity_softplus_kernel(
    x_ptr, y_ptr, scale_ptr, x_ratio_ptr, y_ratio_ptr, bias_ptr,
    x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr, x_range_ptr, y_range_ptr,
    weight_ptr,  # (P, N) incoming gradients
    softplus_ptr, sigmoid_ptr,  # (column tiles of a chunk, P, N): sums of rows, to which each chunk adds
    x_radial_ptr, y_radial_ptr, ds_ptr,  # as in the kernel above
    N, M, stride_x, stride_y, stride_prefix, stride_ds, chunk_m, chunk_n, end_m, end_n,
    ENDS: tl.constexpr, HAS_IMAGE_ID: tl.constexpr, HAS_TEXT_ID: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """softplus(s) = max(s, 0) + log1p(e) and sigmoid(s) = (1 or e) / (1 + e), with e = exp(-|s|)."""
    scale = tl.load(scale_ptr)
    PREFIXES: tl.constexpr = len(ENDS)
    tiles_n = tl.cdiv(end_n - chunk_n, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(end_m - chunk_m, BLOCK_M) * tiles_n, tl.num_programs(0)):
        top, left = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N  # within the chunk
        start_m, start_n = chunk_m + top, chunk_n + left
        offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
        all_included = all_pairs_included(
            x_range_ptr, y_range_ptr, start_m, start_n, N, M, HAS_IMAGE_ID, HAS_TEXT_ID, BLOCK_M, BLOCK_N
        )
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for prefix in range(PREFIXES):
            acc = dot(
                acc, x_ptr, y_ptr, start_m, start_n, N, M, stride_x, stride_y,
                prefix, ENDS, BLOCK_M, BLOCK_N, BLOCK_D, TMA, PRECISION, ACC,
            )  # fmt: skip
            s = acc * scale
            if HAS_BIAS:
                s += tl.load(bias_ptr)
            s = masked(
                s, all_included, x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr,
                offs_m, offs_n, N, M, HAS_IMAGE_ID, HAS_TEXT_ID,
            )  # fmt: skip
            e = exp(-tl.abs(s), ACC)
            softplus = tl.maximum(s, 0.0) + log1p(e, ACC)
            # One tile adds to each of these sums, and the next chunk after this one: in order.
            of_sums = ((tile % tiles_n).to(tl.int64) * PREFIXES + prefix) * N
            row_sums = softplus_ptr + of_sums + offs_m
            tl.atomic_add(row_sums, tl.sum(softplus, 1), mask=offs_m < N, sem="relaxed", scope="cta")
            if HAS_GRADIENT:
                sigmoid = tl.where(s >= 0, 1.0, e) / (1.0 + e)
                if HAS_BIAS:
                    row_sums = sigmoid_ptr + of_sums + offs_m
                    tl.atomic_add(row_sums, tl.sum(sigmoid, 1), mask=offs_m < N, sem="relaxed", scope="cta")
                weight = tl.load(weight_ptr + prefix * N.to(tl.int64) + offs_m, mask=offs_m < N, other=0.0)
                ds = sigmoid * weight[:, None]
                ds = through_norms(
                    ds, acc, x_ratio_ptr, y_ratio_ptr, x_radial_ptr, y_radial_ptr, tile, tiles_n,
                    prefix, PREFIXES, offs_m, offs_n, N, M,
                )  # fmt: skip
                store_ds(
                    ds_ptr, ds, top, left, stride_prefix, stride_ds, end_m - chunk_m, end_n - chunk_n,
                    x_ratio_ptr, y_ratio_ptr, prefix, PREFIXES, offs_m, offs_n, N, M, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            acc = lengthened(acc, x_ratio_ptr, y_ratio_ptr, prefix, PREFIXES, offs_m, offs_n, N, M)


_TileTable = Mapping[tuple[str, int], Tile]


@dataclass(frozen=True)
class Triton:
    """The ``SimilarityBackend`` of these kernels. ``tile`` and ``chunk_rows`` stand in for the tables of ``tiles``."""

    serves_prefixes = True
    tile: Tile | None = None
    chunk_rows: int | None = None

    def similarity_logsumexp_fwd(self, x: Operand, y: Operand, scale: Tensor) -> tuple[Tensor, Tensor]:
        launch = _Launch(self, x, y, scale, of_prefixes=PREFIX_FORWARD_TILES)
        n, m, prefixes = launch.x.shape[0], launch.y.shape[0], len(launch.ends)
        tiles_m, tiles_n = launch.tiles(n, m)
        strips, ranges = rectangles(tiles_m, tiles_n, launch.programs)
        row_sum, col_sum = launch.new(ranges, prefixes, n).zero_(), launch.new(strips, prefixes, m).zero_()
        # 0 where it can be: an exponent's rounding error grows with its size.
        lse_shift = (launch.bound() - MAX_ABOVE_SHIFT[launch.dtype]).clamp(0, torch.finfo(launch.dtype).max)
        launch(
            _similarity_logsumexp_fwd_kernel, strips * ranges,
            lse_shift, *launch.ids, *launch.id_ranges(), row_sum, col_sum, n, m, launch.x.stride(0), launch.y.stride(0),
            -(-tiles_m // strips), -(-tiles_n // ranges), ranges,
        )  # fmt: skip
        statistics = []
        for side, sums in ((launch, row_sum), (launch.swapped(), col_sum)):
            rows, others = side.x.shape[0], side.y.shape[0]
            lse = side.new(prefixes, rows)
            for prefix, (of_prefix, out) in enumerate(zip(sums.unbind(1), lse, strict=True)):
                side(
                    _similarity_logsumexp_merge_kernel, side.tiles(rows, others)[0],
                    lse_shift, *side.ids, of_prefix, out, rows, others,
                    side.x.stride(0), side.y.stride(0), of_prefix.stride(0), of_prefix.shape[0],
                    ends=launch.ends[: prefix + 1], MIN_TRUSTED_SUM=math.exp(-MAX_BELOW_SHIFT[launch.dtype]),
                )  # fmt: skip
            statistics.append(lse)
        return statistics[0], statistics[1]

    def similarity_logsumexp_bwd(
        self,
        x: Operand,
        y: Operand,
        scale: Tensor,
        lse_x: Tensor,
        lse_y: Tensor,
        dlse_x: Tensor,
        dlse_y: Tensor,
        need_dx: bool,
        need_dy: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        launch = _Launch(self, x, y, scale)
        sums, radial = launch.accumulators(need_dx, need_dy), launch.radial_sums()
        factor, vectors = logsumexp_vectors(lse_x, lse_y, dlse_x, dlse_y, x.dtype, launch.side)
        ids = *launch.ids, *launch.id_ranges()
        for row, col, row_end, col_end, ds in sums.chunks():
            tiles = math.prod(launch.tiles(row_end - row, col_end - col))
            launch(
                _similarity_logsumexp_bwd_kernel, min(tiles, launch.programs),
                *ids, *vectors, *radial, ds, launch.x.shape[0], launch.y.shape[0], launch.x.stride(0),
                launch.y.stride(0), ds.stride(0), ds.stride(1), row, col, row_end, col_end,
            )  # fmt: skip
        return launch.gradients(sums, radial, factor)

    def similarity_softplus_fwd(self, x: Operand, y: Operand, scale: Tensor, bias: Tensor | None) -> Tensor:
        launch = _Launch(self, x, y, scale)
        n, m = launch.x.shape[0], launch.y.shape[0]
        sums, ids = launch.row_sums(len(launch.ends)), (*launch.ids, *launch.id_ranges())
        for col in range(0, m, launch.chunk_rows):
            bounds = 0, col, n, min(col + launch.chunk_rows, m)
            _softplus_chunk(launch, ids, bias, None, (sums, None), (None, None), None, bounds)
        return sums.sum(0)

    def similarity_softplus_fwd_bwd(
        self,
        x: Operand,
        y: Operand,
        scale: Tensor,
        bias: Tensor | None,
        drows: Tensor,
        need_dx: bool,
        need_dy: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        launch = _Launch(self, x, y, scale, SOFTPLUS_GRADIENT_TILES)
        sums, radial = launch.accumulators(need_dx, need_dy), launch.radial_sums()
        rows, ids = launch.row_sums(len(launch.ends)), (*launch.ids, *launch.id_ranges())
        sigmoid = None if bias is None else torch.zeros_like(rows)
        factor = drows.abs().max() / amplification(x.dtype, len(launch.ends))
        weight = torch.where(factor > 0, drows / factor, 0)
        for row, col, row_end, col_end, ds in sums.chunks():
            _softplus_chunk(launch, ids, bias, weight, (rows, sigmoid), radial, ds, (row, col, row_end, col_end))
        dbias = scale.new_zeros(()) if sigmoid is None else (sigmoid.sum(0) * drows).sum()
        return rows.sum(0), *launch.gradients(sums, radial, factor), dbias


class _Launch:
    """The arguments that all launches on a pair of operands share."""

    def __init__(
        self,
        backend: Triton,
        x: Operand,
        y: Operand,
        scale: Tensor,
        tiles: _TileTable = TILES,
        of_prefixes: _TileTable = PREFIX_TILES,
    ) -> None:
        self.depth = x.rows.shape[1]
        self.scale, self.dtype = scale, x.accumulation
        self.ids = x.image_id, y.image_id, x.text_id, y.text_id
        target = architecture.architecture(x.rows.device)
        several = len(x.slices) > 1
        self.normalised = x.inverse_norm is not None
        self.tile = backend.tile or choose(of_prefixes if several else tiles, target, x.dtype.itemsize)
        prefixes = [PrefixRows.of(side, self.tile.block_d) for side in (x, y) if several]
        self.prefixes = tuple(prefixes)
        if several:
            self.x, self.y = (side.rows for side in self.prefixes)
        else:
            self.x, self.y = (aligned(side.matrix(side.dtype), 16) for side in (x, y))
        self.ends = self.prefixes[0].ends if several else (self.x.shape[1],)
        self.side = max(self.tile.block_m, self.tile.block_n)
        self.ratios = tuple(filled(side.ratios, self.side, 0.0) for side in self.prefixes) or (None, None)
        chunk_rows = backend.chunk_rows or choose(CHUNK_ROWS, target, x.dtype.itemsize)
        # Whole tiles, of which those of rows and of columns begin at multiples of their sizes.
        self.chunk_rows = -(-chunk_rows // self.side) * self.side
        self.programs = self.tile.programs * architecture.multiprocessors(self.x.device)
        self.constants = {
            "HAS_IMAGE_ID": x.image_id is not None,
            "HAS_TEXT_ID": x.text_id is not None,
            "PRECISION": dot_precision(target, self.x.dtype),
            "ACC": tl.float64 if self.dtype == torch.float64 else tl.float32,
        }

    def swapped(self) -> "_Launch":
        swapped = copy.copy(self)
        swapped.x, swapped.y, swapped.ratios = self.y, self.x, self.ratios[::-1]
        x_image_id, y_image_id, x_text_id, y_text_id = self.ids
        swapped.ids = y_image_id, x_image_id, y_text_id, x_text_id
        return swapped

    def tiles(self, rows: int, cols: int) -> tuple[int, int]:
        """How many tiles cover (rows, cols)."""
        return -(-rows // self.tile.block_m), -(-cols // self.tile.block_n)

    def __call__(
        self, kernel: Any, programs: int, *args: Any, ends: tuple[int, ...] | None = None, **constants: Any
    ) -> None:
        """Run ``kernel`` with the operands, the scale and the ratios of norms, then ``args``; over the prefixes that
        have ``ends``, by default all."""
        tile, x, y = self.tile, self.x, self.y
        if tile.tma:
            x, y = _descriptor(x, tile.block_m, tile.block_d), _descriptor(y, tile.block_n, tile.block_d)
        with self._guard():
            kernel[(programs,)](
                x, y, self.scale, *self.ratios, *args, **self.constants, **constants, ENDS=ends or self.ends,
                TMA=tile.tma,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip

    def _guard(self) -> AbstractContextManager[Any]:
        """A kernel starts on the current device, wherever its tensors are."""
        return torch.cuda.device(self.x.device) if self.x.is_cuda else nullcontext()

    def id_ranges(self) -> tuple[Tensor | None, Tensor | None]:
        """Ranges of the ids in each tile's rows and columns, (tiles, 4) each; None if there are no ids."""
        if self.ids[0] is None and self.ids[2] is None:
            return None, None
        n, m = self.x.shape[0], self.y.shape[0]
        x_ranges, y_ranges = (self.x.new_empty(blocks, 4, dtype=torch.int32) for blocks in self.tiles(n, m))
        x_blocks = x_ranges.shape[0]
        flags = {name: self.constants[name] for name in ("HAS_IMAGE_ID", "HAS_TEXT_ID")}
        with self._guard():
            _similarity_id_ranges_kernel[(x_blocks + y_ranges.shape[0],)](
                *self.ids, x_ranges, y_ranges, n, m, x_blocks,
                BLOCK_M=self.tile.block_m, BLOCK_N=self.tile.block_n, **flags,
            )  # fmt: skip
        return x_ranges, y_ranges

    def accumulators(self, need_dx: bool, need_dy: bool) -> Accumulators:
        places = self.prefixes[0].places if self.prefixes else ()
        depth = self.x.shape[1] if self.prefixes else self.depth
        return Accumulators(self.x, self.y, depth, self.chunk_rows, need_dx, need_dy, self.side, places)

    def gradients(
        self, sums: Accumulators, radial: tuple[Tensor | None, Tensor | None], factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, dy and dscale from dS without the ``factor``."""
        dx, dy, dscale = sums.finish(self.scale, factor)
        if self.prefixes:
            dx, dy = (
                side.gradient(products, of_side.sum(0) * (self.scale * factor)) if products.dim() == 2 else products
                for side, products, of_side in zip(self.prefixes, (dx, dy), radial, strict=True)
                if of_side is not None
            )
        return dx, dy, dscale

    def row_sums(self, prefixes: int) -> Tensor:
        """(column tiles of a chunk, prefixes, N) zeros."""
        n, m = self.x.shape[0], self.y.shape[0]
        return self.new(self.tiles(n, min(m, self.chunk_rows))[1], prefixes, n).zero_()

    def radial_sums(self) -> tuple[Tensor | None, Tensor | None]:
        """Zeros for sums over rows and over columns of all prefixes but the longest; None if there is no other."""
        if not self.prefixes:
            return None, None
        n, m, shorter = self.x.shape[0], self.y.shape[0], len(self.ends) - 1
        of_columns = self.new(self.tiles(min(n, self.chunk_rows), m)[0], shorter, m).zero_()
        return self.row_sums(shorter), of_columns

    def bound(self) -> Tensor:
        """() the largest possible |S|. Normalised rows are rounded."""
        if self.prefixes or self.normalised:
            return self.scale.abs() * (1 + 2**-6)
        return self.scale.abs() * _max_norm(self.x, self.dtype) * _max_norm(self.y, self.dtype)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.x.device)


def _descriptor(t: Tensor, *block: int) -> Any:
    return tensor_descriptor.TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def _max_norm(x: Tensor, dtype: torch.dtype) -> Tensor:
    """() of the finite rows: the others make their own statistics so, and must not move those of others."""
    norms = row_norms(x, dtype)
    return torch.where(norms.isfinite(), norms, 0).max()


def _softplus_chunk(
    launch: _Launch,
    ids: tuple[Tensor | None, ...],
    bias: Tensor | None,
    weight: Tensor | None,
    sums: tuple[Tensor, Tensor | None],
    radial: tuple[Tensor | None, Tensor | None],
    ds: Tensor | None,
    bounds: tuple[int, int, int, int],
) -> None:
    """Add a chunk's ``sums`` over rows, of softplus, and of sigmoid if there is a bias to differentiate; write dS into
    ``ds`` and add to its ``radial`` sums if it is given."""
    row, col, row_end, col_end = bounds
    strides = (0, 0) if ds is None else (ds.stride(0), ds.stride(1))
    launch(
        _similarity_softplus_kernel, min(math.prod(launch.tiles(row_end - row, col_end - col)), launch.programs),
        bias, *ids, weight, *sums, *radial, ds,
        launch.x.shape[0], launch.y.shape[0], launch.x.stride(0), launch.y.stride(0), *strides,
        row, col, row_end, col_end, HAS_BIAS=bias is not None, HAS_GRADIENT=ds is not None,
    )  # fmt: skip
