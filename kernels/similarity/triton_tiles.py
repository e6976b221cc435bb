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
    acc, x_ptr, y_ptr, start_m, start_n, N, M, stride_x, stride_y, prefix, ENDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) ``acc`` plus <x_i, y_j> of the rows from ``start_m`` and ``start_n``, over the columns of the
    slice with which the prefix ends."""
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    begin, end = 0, ENDS[0]
    for longer in tl.static_range(1, len(ENDS)):
        begin, end = tl.where(prefix >= longer, ENDS[longer - 1], begin), tl.where(prefix >= longer, ENDS[longer], end)
    for start_d in range(begin, end, BLOCK_D):
        if TMA:
            a, b = x_ptr.load([start_m, start_d]), y_ptr.load([start_n, start_d])
        else:
            offs_d = start_d + tl.arange(0, BLOCK_D)
            x_offsets = offs_m.to(tl.int64)[:, None] * stride_x + offs_d[None, :]
            y_offsets = offs_n.to(tl.int64)[:, None] * stride_y + offs_d[None, :]
            a = tl.load(x_ptr + x_offsets, mask=(offs_m < N)[:, None] & (offs_d < end)[None, :], other=0.0)
            b = tl.load(y_ptr + y_offsets, mask=(offs_n < M)[:, None] & (offs_d < end)[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def lengthened(acc, x_ratio_ptr, y_ratio_ptr, prefix, PREFIXES: tl.constexpr, offs_m, offs_n, N, M):
    """The cosines of a prefix as the sum to which the product over the next slice adds."""
    if PREFIXES > 1:  # noqa: SIM102  the compiler leaves out what follows
        if prefix + 1 < PREFIXES:
            x_ratio, y_ratio = _ratios(x_ratio_ptr, y_ratio_ptr, prefix, offs_m, offs_n, N, M)
            acc *= tl.abs(x_ratio)[:, None] * tl.abs(y_ratio)[None, :]
    return acc


@triton.jit
def through_norms(
    ds, cosines, x_ratio_ptr, y_ratio_ptr, x_radial_ptr, y_radial_ptr, tile, tiles_n,
    prefix, PREFIXES: tl.constexpr, offs_m, offs_n, N, M,
):  # fmt: skip
    """dS of a prefix, 0 where it counts as zero in a row. Sums over dS * cosine are added to those of other tiles, but
    for the longest prefix. One tile adds to each sum, and the next chunk after this one: in order."""
    if PREFIXES > 1:  # noqa: SIM102  the compiler leaves out what follows
        if prefix + 1 < PREFIXES:
            x_ratio, y_ratio = _ratios(x_ratio_ptr, y_ratio_ptr, prefix, offs_m, offs_n, N, M)
            ds = tl.where((x_ratio > 0)[:, None] & (y_ratio > 0)[None, :], ds, 0.0)
            radial = ds * cosines
            x_radial_ptr += ((tile % tiles_n).to(tl.int64) * (PREFIXES - 1) + prefix) * N
            y_radial_ptr += ((tile // tiles_n).to(tl.int64) * (PREFIXES - 1) + prefix) * M
            tl.atomic_add(x_radial_ptr + offs_m, tl.sum(radial, 1), mask=offs_m < N, sem="relaxed", scope="cta")
            tl.atomic_add(y_radial_ptr + offs_n, tl.sum(radial, 0), mask=offs_n < M, sem="relaxed", scope="cta")
    return ds


@triton.jit
def _ratios(x_ratio_ptr, y_ratio_ptr, prefix, offs_m, offs_n, N, M):
    """Norms of a prefix over those of the next, filled up to whole tiles; negative where the prefix counts as zero."""
    x_ratio = tl.load(x_ratio_ptr + prefix * pitch(N, offs_m, offs_n) + offs_m)
    y_ratio = tl.load(y_ratio_ptr + prefix * pitch(M, offs_m, offs_n) + offs_n)
    return x_ratio, y_ratio


@triton.jit
def pitch(rows, offs_m, offs_n):
    """The length of vectors over ``rows`` that are filled up to whole tiles of either side."""
    # Not max(), which Triton 3.5 computes on the device.
    SIDE: tl.constexpr = offs_m.shape[0] if offs_m.shape[0] > offs_n.shape[0] else offs_n.shape[0]
    return tl.cdiv(rows, SIDE).to(tl.int64) * SIDE


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
def store_ds(
    ds_ptr, ds, top, left, stride_prefix, stride_ds, rows, cols, x_ratio_ptr, y_ratio_ptr,
    prefix, PREFIXES: tl.constexpr, offs_m, offs_n, N, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the tile of a (rows, cols) chunk at (top, left): columns up to a multiple of 16, for which the chunk has
    room, so that threads store 16 bytes at a time. After that of the longest prefix, add to each shorter one's the sum
    of the longer ones': kept in registers, they would leave no room for the product."""
    in_chunk_m, in_chunk_n = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
    mask = (in_chunk_m < rows)[:, None] & (in_chunk_n < tl.cdiv(cols, 16) * 16)[None, :]
    pointers = ds_ptr + in_chunk_m[:, None] * stride_ds + in_chunk_n[None, :]
    tl.store(pointers + prefix * stride_prefix.to(tl.int64), ds.to(ds_ptr.dtype.element_ty), mask=mask)
    if PREFIXES > 1:  # noqa: SIM102  the compiler leaves out what follows
        if prefix + 1 == PREFIXES:
            # Loads and stores of the same pointers have the same layout, so that a thread loads what it has stored. The
            # barrier makes this right in any layout.
            tl.debug_barrier()
            for longer in range(PREFIXES - 1):
                shorter = PREFIXES - 2 - longer
                of_shorter = pointers + shorter * stride_prefix.to(tl.int64)
                ds = lengthened(ds, x_ratio_ptr, y_ratio_ptr, shorter, PREFIXES, offs_m, offs_n, N, M)
                ds += tl.load(of_shorter, mask=mask, other=0.0).to(ds.dtype)
                tl.store(of_shorter, ds.to(ds_ptr.dtype.element_ty), mask=mask)


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
