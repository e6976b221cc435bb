"""Triton kernels of the similarity operations.

A program forms (BLOCK_M, BLOCK_N) tiles of S = scale * x y^T from D in steps of BLOCK_D and never stores S.
Differences are taken in nats, where they are nearly exact, before an exponential scales them to octaves.

* forward: one rectangle of tiles per program. e = exp(S - reference), one exponential for both directions;
  sums over rows stay in registers along a row of tiles, sums over columns go to the strip's own row of
  ``col_sum``. One reference for the whole launch makes all partial sums merge by addition: no atomics.
* merge: adds the partial sums; a row that lies so far below the reference that terms may be lost is done again
  with its true maximum (a second exponential per element, for such rows only).
* backward: a chunk of dS into a workspace, for two library products. x is read once per tile of columns.

Logits of rows whose group is negative, and of pairs of equal groups, are replaced and not multiplied away: what
padded rows hold, NaN included, reaches nothing. Row offsets are 64-bit, except within the chunk of dS.
"""

import triton
import triton.language as tl


@triton.jit
def _products(
    x, y, row, col, N, M, stride_x, stride_y,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) <x_i, y_j> of rows from ``row`` and ``col``; x, y are pointers or tensor descriptors."""
    products = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    for start in range(0, D, BLOCK_D):
        if TMA:
            a, b = x.load([row, start]), y.load([col, start])
        else:
            depth = start + tl.arange(0, BLOCK_D)
            x_offsets = rows.to(tl.int64)[:, None] * stride_x + depth[None, :]
            y_offsets = cols.to(tl.int64)[:, None] * stride_y + depth[None, :]
            a = tl.load(x + x_offsets, mask=(rows < N)[:, None] & (depth < D)[None, :], other=0.0)
            b = tl.load(y + y_offsets, mask=(cols < M)[:, None] & (depth < D)[None, :], other=0.0)
        products = tl.dot(a, b.T, products, input_precision=PRECISION, out_dtype=ACC)
    return products


@triton.jit
def _groups(group_ptr, rows, N, HAS_GROUP: tl.constexpr):
    """Group ids, -1 for rows that take no part; 0 everywhere if there are no groups."""
    if HAS_GROUP:
        return tl.load(group_ptr + rows, mask=rows < N, other=-1)
    return tl.where(rows < N, 0, -1)


@triton.jit
def _included(x_group, y_group, HAS_GROUP: tl.constexpr):
    """(BLOCK_M, BLOCK_N) pairs that take part."""
    included = (x_group >= 0)[:, None] & (y_group >= 0)[None, :]
    if HAS_GROUP:
        included = included & (x_group[:, None] != y_group[None, :])
    return included


@triton.jit(do_not_specialize=["N", "M", "strip_tiles", "range_tiles", "ranges"])
def _similarity_logsumexp_fwd_kernel(
    x, y, scale_ptr, reference_ptr, x_group_ptr, y_group_ptr,
    row_sum_ptr, col_sum_ptr,  # (ranges, N), (strips, M), zero
    N, M, stride_x, stride_y, strip_tiles, range_tiles, ranges,
    D: tl.constexpr, HAS_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    strip, part = tl.program_id(0) // ranges, tl.program_id(0) % ranges
    scale, reference = tl.load(scale_ptr), tl.load(reference_ptr)
    row_sum_ptr += part.to(tl.int64) * N
    col_sum_ptr += strip.to(tl.int64) * M
    last_row = tl.minimum((strip + 1) * strip_tiles * BLOCK_M, N)
    last_col = tl.minimum((part + 1) * range_tiles * BLOCK_N, M)
    for row in range(strip * strip_tiles * BLOCK_M, last_row, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        x_group = _groups(x_group_ptr, rows, N, HAS_GROUP)
        row_sum = tl.zeros((BLOCK_M,), dtype=ACC)
        for col in range(part * range_tiles * BLOCK_N, last_col, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            s = _products(x, y, row, col, N, M, stride_x, stride_y, D, BLOCK_M, BLOCK_N, BLOCK_D, TMA, PRECISION, ACC)
            included = _included(x_group, _groups(y_group_ptr, cols, M, HAS_GROUP), HAS_GROUP)
            e = tl.where(included, tl.exp(s * scale - reference), 0.0)
            row_sum += tl.sum(e, 1)
            # This program alone touches these sums; the barrier orders its threads from one row of tiles to the next.
            col_sum = tl.load(col_sum_ptr + cols, mask=cols < M, other=0.0) + tl.sum(e, 0)
            tl.store(col_sum_ptr + cols, col_sum, mask=cols < M)
            tl.debug_barrier()
        tl.store(row_sum_ptr + rows, row_sum, mask=rows < N)


@triton.jit(do_not_specialize=["N", "M", "parts"])
def _similarity_logsumexp_merge_kernel(
    x, y, scale_ptr, reference_ptr, x_group_ptr, y_group_ptr,
    sum_ptr, lse_ptr,  # (parts, N), (N,)
    N, M, stride_x, stride_y, parts,
    LEAST: tl.constexpr, D: tl.constexpr, HAS_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    x_group = _groups(x_group_ptr, rows, N, HAS_GROUP)
    total = tl.zeros((BLOCK_M,), dtype=ACC)
    pointers = sum_ptr + rows
    for _ in range(parts):
        total += tl.load(pointers, mask=rows < N, other=0.0)
        pointers += N
    lse = tl.log(total) + tl.load(reference_ptr)
    lost = (x_group >= 0) & (total < LEAST)
    if tl.max(lost.to(tl.int32), 0) > 0:
        scale = tl.load(scale_ptr)
        top = tl.full((BLOCK_M,), -float("inf"), dtype=ACC)
        above = tl.zeros((BLOCK_M,), dtype=ACC)
        for col in range(0, M, BLOCK_N):
            s = _products(x, y, row, col, N, M, stride_x, stride_y, D, BLOCK_M, BLOCK_N, BLOCK_D, TMA, PRECISION, ACC)
            y_group = _groups(y_group_ptr, col + tl.arange(0, BLOCK_N), M, HAS_GROUP)
            s = tl.where(_included(x_group, y_group, HAS_GROUP), s * scale, -float("inf"))
            highest = tl.maximum(top, tl.max(s, 1))
            finite = tl.where(highest == -float("inf"), 0.0, highest)
            above = above * tl.exp(top - finite) + tl.sum(tl.exp(s - finite[:, None]), 1)
            top = highest
        lse = tl.where(lost, tl.log(above) + top, lse)
    tl.store(lse_ptr + rows, lse, mask=rows < N)


@triton.jit(do_not_specialize=["N", "M", "row_start", "col_start", "row_end", "col_end"])
def _similarity_logsumexp_bwd_kernel(
    x, y, scale_ptr, x_group_ptr, y_group_ptr,
    stat_x_ptr, stat_y_ptr,  # (N,), (M,) log-sum-exp, +inf for rows without any pair
    weight_x_ptr, weight_y_ptr,  # (N,), (M,) incoming gradients
    narrow_ptr, factor_x_ptr, factor_y_ptr,  # (), (N,), (M,): see the docstring
    ds_ptr,  # (row_end - row_start, col_end - col_start)
    N, M, stride_x, stride_y, stride_ds, row_start, col_start, row_end, col_end,
    D: tl.constexpr, HAS_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dS = weight_x p + weight_y q with p = exp(s - stat_x) and q = exp(s - stat_y).

    If ``narrow``, q = p exp(stat_x - stat_y) = p factor_x factor_y / weight_y: one exponential for both.
    """
    scale, narrow = tl.load(scale_ptr), tl.load(narrow_ptr)
    col_tiles = tl.cdiv(col_end - col_start, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(row_end - row_start, BLOCK_M) * col_tiles, tl.num_programs(0)):
        top, left = tile // col_tiles * BLOCK_M, tile % col_tiles * BLOCK_N  # within the chunk
        row, col = row_start + top, col_start + left
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        s = _products(x, y, row, col, N, M, stride_x, stride_y, D, BLOCK_M, BLOCK_N, BLOCK_D, TMA, PRECISION, ACC)
        x_group, y_group = _groups(x_group_ptr, rows, N, HAS_GROUP), _groups(y_group_ptr, cols, M, HAS_GROUP)
        s = tl.where(_included(x_group, y_group, HAS_GROUP), s * scale, -float("inf"))
        stat_x = tl.load(stat_x_ptr + rows, mask=rows < row_end, other=float("inf"))
        weight_x = tl.load(weight_x_ptr + rows, mask=rows < row_end, other=0.0)
        ds = tl.exp(s - stat_x[:, None])
        if narrow:
            factor_x = tl.load(factor_x_ptr + rows, mask=rows < row_end, other=0.0)
            factor_y = tl.load(factor_y_ptr + cols, mask=cols < col_end, other=0.0)
            ds *= weight_x[:, None] + factor_x[:, None] * factor_y[None, :]
        else:
            stat_y = tl.load(stat_y_ptr + cols, mask=cols < col_end, other=float("inf"))
            weight_y = tl.load(weight_y_ptr + cols, mask=cols < col_end, other=0.0)
            ds = weight_x[:, None] * ds + weight_y[None, :] * tl.exp(s - stat_y[None, :])
        offsets = (top + tl.arange(0, BLOCK_M))[:, None] * stride_ds + left + tl.arange(0, BLOCK_N)[None, :]
        inside = (rows < row_end)[:, None] & (cols < col_end)[None, :]
        tl.store(ds_ptr + offsets, ds.to(ds_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _log1p(e, ACC: tl.constexpr):
    """log(1 + e) for 0 <= e <= 1, exact relative to its value (2e-7 in float32), also where 1 + e rounds to 1."""
    if ACC == tl.float64:
        return tl.where(e < 1e-5, e * (1.0 - e * (0.5 - e / 3.0)), tl.log(1.0 + e))
    # Polynomial of least relative error on [0, 1]: multiply-adds instead of the special function unit.
    p = 0.00523262398 * e - 0.0295049571
    p = p * e + 0.0782254932
    p = p * e - 0.136632069
    p = p * e + 0.191059885
    p = p * e - 0.248429775
    p = p * e + 0.333190962
    p = p * e - 0.499994931
    p = p * e + 0.99999997
    return p * e


@triton.jit(do_not_specialize=["N", "M", "row_start", "col_start", "row_end", "col_end"])
def _similarity_softplus_kernel(
    x, y, scale_ptr, bias_ptr, x_group_ptr, y_group_ptr,
    weight_ptr,  # (N,) incoming gradients
    softplus_ptr, sigmoid_ptr,  # (column tiles, row_end - row_start): sums of each tile's rows
    ds_ptr,  # (row_end - row_start, col_end - col_start)
    N, M, stride_x, stride_y, stride_ds, row_start, col_start, row_end, col_end,
    D: tl.constexpr, HAS_GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """softplus(s) = max(s, 0) + log1p(e) and sigmoid(s) = (1 or e) / (1 + e), with e = exp(-|s|)."""
    scale = tl.load(scale_ptr)
    col_tiles = tl.cdiv(col_end - col_start, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(row_end - row_start, BLOCK_M) * col_tiles, tl.num_programs(0)):
        top, left = tile // col_tiles * BLOCK_M, tile % col_tiles * BLOCK_N  # within the chunk
        row, col = row_start + top, col_start + left
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        s = _products(x, y, row, col, N, M, stride_x, stride_y, D, BLOCK_M, BLOCK_N, BLOCK_D, TMA, PRECISION, ACC)
        s *= scale
        if HAS_BIAS:
            s += tl.load(bias_ptr)
        # The chunk's end is the groups' end: columns beyond it belong to another chunk.
        x_group = _groups(x_group_ptr, rows, row_end, HAS_GROUP)
        y_group = _groups(y_group_ptr, cols, col_end, HAS_GROUP)
        s = tl.where(_included(x_group, y_group, HAS_GROUP), s, -float("inf"))
        e = tl.exp(-tl.abs(s))
        softplus = tl.maximum(s, 0.0) + _log1p(e, ACC)
        partial = tile % col_tiles * (row_end - row_start) + top + tl.arange(0, BLOCK_M)
        tl.store(softplus_ptr + partial, tl.sum(softplus, 1), mask=rows < row_end)
        if HAS_GRADIENT:
            sigmoid = tl.where(s >= 0, 1.0, e) / (1.0 + e)
            if HAS_BIAS:
                tl.store(sigmoid_ptr + partial, tl.sum(sigmoid, 1), mask=rows < row_end)
            weight = tl.load(weight_ptr + rows, mask=rows < row_end, other=0.0)
            ds = (sigmoid * weight[:, None]).to(ds_ptr.dtype.element_ty)
            inside = (rows < row_end)[:, None] & (cols < col_end)[None, :]
            offsets = (top + tl.arange(0, BLOCK_M))[:, None] * stride_ds + left + tl.arange(0, BLOCK_N)[None, :]
            tl.store(ds_ptr + offsets, ds, mask=inside)
