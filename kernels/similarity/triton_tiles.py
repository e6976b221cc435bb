"""What ``triton_kernels`` does with a tile of logits: form it, leave pairs out, take exponentials, store dS.

Logits of rows whose image id is negative, and of pairs of the same image or text, are replaced and not multiplied
away: what padded rows hold, NaN included, reaches nothing. A tile reads ids only if their ranges, formed once per
operation, leave open whether all of its pairs take part: next to the diagonal, as a rule. The legend is that of
``triton_kernels``.
"""

import triton
import triton.language as tl


@triton.jit
def dot(
    x_ptr, y_ptr, start_m, start_n, N, M, stride_x, stride_y,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) <x_i, y_j> of the rows from ``start_m`` and ``start_n``."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    for start_d in range(0, D, BLOCK_D):
        if TMA:
            a, b = x_ptr.load([start_m, start_d]), y_ptr.load([start_n, start_d])
        else:
            offs_d = start_d + tl.arange(0, BLOCK_D)
            x_offsets = offs_m.to(tl.int64)[:, None] * stride_x + offs_d[None, :]
            y_offsets = offs_n.to(tl.int64)[:, None] * stride_y + offs_d[None, :]
            a = tl.load(x_ptr + x_offsets, mask=(offs_m < N)[:, None] & (offs_d < D)[None, :], other=0.0)
            b = tl.load(y_ptr + y_offsets, mask=(offs_n < M)[:, None] & (offs_d < D)[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def image_ids(image_id_ptr, rows, N, HAS_IMAGE_ID: tl.constexpr):
    """Image ids, -1 for rows that take no part; 0 everywhere if there are none."""
    if HAS_IMAGE_ID:
        return tl.load(image_id_ptr + rows, mask=rows < N, other=-1)
    return tl.where(rows < N, 0, -1)


@triton.jit
def _text_id(text_id_ptr, rows, N, ABSENT: tl.constexpr, HAS_TEXT_ID: tl.constexpr):
    """Text ids, ``ABSENT``, which differs between the two sides, for a text that equals no other; if there are none,
    anything."""
    if HAS_TEXT_ID:
        text_id = tl.load(text_id_ptr + rows, mask=rows < N, other=-1)
        return tl.where(text_id >= 0, text_id, ABSENT)
    return rows


@triton.jit
def _included(
    x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr, offs_m, offs_n, N, M,
    HAS_IMAGE_ID: tl.constexpr, HAS_TEXT_ID: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) pairs that take part."""
    x_image_id = image_ids(x_image_id_ptr, offs_m, N, HAS_IMAGE_ID)
    y_image_id = image_ids(y_image_id_ptr, offs_n, M, HAS_IMAGE_ID)
    x_text_id = _text_id(x_text_id_ptr, offs_m, N, -1, HAS_TEXT_ID)
    y_text_id = _text_id(y_text_id_ptr, offs_n, M, -2, HAS_TEXT_ID)
    included = (x_image_id >= 0)[:, None] & (y_image_id >= 0)[None, :]
    if HAS_IMAGE_ID:
        included = included & (x_image_id[:, None] != y_image_id[None, :])
    if HAS_TEXT_ID:
        included = included & (x_text_id[:, None] != y_text_id[None, :])
    return included


@triton.jit
def store_id_range(
    range_ptr, image_id_ptr, text_id_ptr, block, N,
    BLOCK: tl.constexpr, HAS_IMAGE_ID: tl.constexpr, HAS_TEXT_ID: tl.constexpr,
):  # fmt: skip
    """Smallest and largest image id of a block of rows, -1 for rows beyond N, and of the text ids that equal others."""
    range_ptr += 4 * block
    rows = block * BLOCK + tl.arange(0, BLOCK)
    if HAS_IMAGE_ID:
        image_id = image_ids(image_id_ptr, rows, N, HAS_IMAGE_ID)
        tl.store(range_ptr, tl.min(image_id, 0))
        tl.store(range_ptr + 1, tl.max(image_id, 0))
    if HAS_TEXT_ID:
        text_id = _text_id(text_id_ptr, rows, N, -1, HAS_TEXT_ID)
        tl.store(range_ptr + 2, tl.min(tl.where(text_id >= 0, text_id, 2147483647), 0))
        tl.store(range_ptr + 3, tl.max(text_id, 0))


@triton.jit
def all_pairs_included(
    x_range_ptr, y_range_ptr, start_m, start_n, N, M,
    HAS_IMAGE_ID: tl.constexpr, HAS_TEXT_ID: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether ranges of ids suffice to see that all pairs of a tile take part."""
    included = (start_m + BLOCK_M <= N) & (start_n + BLOCK_N <= M)
    x_offset, y_offset = start_m // BLOCK_M * 4, start_n // BLOCK_N * 4
    if HAS_IMAGE_ID:
        x_first, x_last = _id_range(x_range_ptr, x_offset)
        y_first, y_last = _id_range(y_range_ptr, y_offset)
        included = included & (x_first >= 0) & (y_first >= 0) & ((x_last < y_first) | (y_last < x_first))
    if HAS_TEXT_ID:
        x_first, x_last = _id_range(x_range_ptr, x_offset + 2)
        y_first, y_last = _id_range(y_range_ptr, y_offset + 2)
        included = included & ((x_last < y_first) | (y_last < x_first))
    return included


@triton.jit
def _id_range(range_ptr, offset):
    return tl.load(range_ptr + offset), tl.load(range_ptr + offset + 1)


@triton.jit
def masked(
    s, all_included, x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr, offs_m, offs_n, N, M,
    HAS_IMAGE_ID: tl.constexpr, HAS_TEXT_ID: tl.constexpr,
):  # fmt: skip
    """Logits, -inf where a pair takes no part."""
    if not all_included:
        included = _included(
            x_image_id_ptr, y_image_id_ptr, x_text_id_ptr, y_text_id_ptr, offs_m, offs_n, N, M,
            HAS_IMAGE_ID, HAS_TEXT_ID,
        )  # fmt: skip
        s = tl.where(included, s, -float("inf"))
    return s


@triton.jit
def exp(x, ACC: tl.constexpr):
    """e^x. In float32, as in tl.exp, by the special function unit; results below 2^-126 are 0, which saves the three
    instructions that would keep them."""
    if ACC == tl.float64:
        return tl.exp(x)
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def store_ds(ds_ptr, ds, top, left, stride_ds, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store the tile of a (rows, cols) chunk at (top, left); columns up to a multiple of 16, for which the chunk has
    room, so that threads store 16 bytes at a time."""
    offs_m, offs_n = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
    mask = (offs_m < rows)[:, None] & (offs_n < tl.cdiv(cols, 16) * 16)[None, :]
    tl.store(ds_ptr + offs_m[:, None] * stride_ds + offs_n[None, :], ds.to(ds_ptr.dtype.element_ty), mask=mask)


@triton.jit
def log1p(e, ACC: tl.constexpr):
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
