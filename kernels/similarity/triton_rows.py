"""What a loss does with rows and within images, in Triton: norms, normalised rows, cosines, the gradient of raw rows.

These are the functions of ``within_images`` for tensors on a GPU, where each takes one launch and reads embeddings
once or twice. Products are those of rows in float32, in Triton's most exact precision, whatever the process allows its
library to round.

Legend: N rows of D elements, which belong to B images with K slots each. m, n: slots of an image, of which a tile takes
BLOCK_M and BLOCK_N; d: elements of a row. ``inverse``: 1 / |x|, 0 for rows that take no part, which are not read.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from betaclip.kernels import architecture
from betaclip.kernels.precision import dot_precision
from betaclip.kernels.similarity.exponent_range import MAX_SINGLE_EXP_SPREAD

# Elements that a program of the kernels without products holds at a time, 32 or 64 for each of its threads.
_ELEMENTS = 4096
_WARPS = 4


@triton.jit(do_not_specialize=["N", "eps"])
def _similarity_inverse_norms_kernel(
    x_ptr, image_id_ptr, inverse_ptr,  # (N, D), (N,), (N,)
    N, stride_x, eps, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    taken = tl.load(image_id_ptr + offs_m, mask=offs_m < N, other=-1) >= 0
    rows = x_ptr + offs_m.to(tl.int64)[:, None] * stride_x
    total = tl.zeros((BLOCK_M,), dtype=tl.float64)  # in which squares cannot overflow
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        x = tl.load(rows + offs_d[None, :], mask=taken[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float64)
        total += tl.sum(x * x, 1)
    norm = tl.sqrt(total)
    inverse = tl.where(total < float("inf"), 1.0 / tl.where(norm <= eps, float("inf"), norm), float("nan"))
    tl.store(inverse_ptr + offs_m, tl.where(taken, inverse, 0.0).to(inverse_ptr.dtype.element_ty), mask=offs_m < N)


@triton.jit(do_not_specialize=["N"])
def _similarity_unit_rows_kernel(
    x_ptr, inverse_ptr, out_ptr,  # (N, D), (N,), (N, D)
    N, stride_x, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inverse = tl.load(inverse_ptr + offs_m, mask=offs_m < N, other=0.0)
    rows = offs_m.to(tl.int64)[:, None]
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)[None, :]
        x = _unit(x_ptr + rows * stride_x, inverse, offs_d, D)
        mask = (offs_m < N)[:, None] & (offs_d < D)
        tl.store(out_ptr + rows * D + offs_d, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _unit(row_ptrs, inverse, offs_d, D):
    """(BLOCK_M, BLOCK_D) of the normalised rows, in float32."""
    read = (inverse != 0.0)[:, None] & (offs_d < D)  # NaN, of a row that is not finite, differs from 0
    return tl.load(row_ptrs + offs_d, mask=read, other=0.0).to(tl.float32) * inverse[:, None]


@triton.jit
def _slots(slots_ptr, inverse_ptr, image, offs_k, K, HAS_SLOTS: tl.constexpr):
    """Rows in the slots of an image, and their inverse norms, 0 for empty slots; and which slots are not empty."""
    filled = offs_k < K
    rows = image * K + offs_k
    if HAS_SLOTS:
        rows = tl.load(slots_ptr + rows, mask=filled, other=-1)
        filled = rows >= 0
    return rows, tl.load(inverse_ptr + rows, mask=filled, other=0.0), filled


@triton.jit(do_not_specialize=["K"])
def _similarity_cosines_kernel(
    x_ptr, y_ptr, x_inverse_ptr, y_inverse_ptr, slots_ptr,  # (N, D), (N, D), (N,), (N,), (B, K)
    out_ptr,  # (B, K, K)
    K, stride_x, stride_y, D: tl.constexpr, HAS_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(K, BLOCK_M), tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    image = (pid // (tiles_m * tiles_n)).to(tl.int64)
    offs_m = pid // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m, inverse_m, _ = _slots(slots_ptr, x_inverse_ptr, image, offs_m, K, HAS_SLOTS)
    rows_n, inverse_n, _ = _slots(slots_ptr, y_inverse_ptr, image, offs_n, K, HAS_SLOTS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)[None, :]
        u = _unit(x_ptr + rows_m[:, None] * stride_x, inverse_m, offs_d, D)
        v = _unit(y_ptr + rows_n[:, None] * stride_y, inverse_n, offs_d, D)
        acc = tl.dot(u, v.T, acc, input_precision=PRECISION)
    mask = (offs_m < K)[:, None] & (offs_n < K)[None, :]
    tl.store(out_ptr + (image * K + offs_m)[:, None] * K + offs_n[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["K", "stride_weight_m", "stride_weight_n"])
def _similarity_received_kernel(
    y_ptr, y_inverse_ptr, slots_ptr,  # (N, D), (N,), (B, K)
    between_ptr, gain_ptr, weight_ptr, out_ptr,  # (N, D), (), (B, K, K), (N, D)
    K, stride_y, stride_weight_m, stride_weight_n,
    D: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_GAIN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the other side's normalised rows of the image give in their weights, and ``gain * between``. A program
    writes what it alone has read, so that ``out_ptr`` may be ``between_ptr``."""
    tiles_m, tiles_d = tl.cdiv(K, BLOCK_M), tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    image = (pid // (tiles_m * tiles_d)).to(tl.int64)
    offs_m = pid // tiles_d % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = (pid % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    rows_m, _own, filled_m = _slots(slots_ptr, y_inverse_ptr, image, offs_m, K, HAS_SLOTS)
    g = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start_n in range(0, K, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        rows_n, inverse_n, _ = _slots(slots_ptr, y_inverse_ptr, image, offs_n, K, HAS_SLOTS)
        weight_offsets = image * K * K + offs_m[:, None] * stride_weight_m + offs_n[None, :] * stride_weight_n
        exists = (offs_m < K)[:, None] & (offs_n < K)[None, :]
        weight = tl.load(weight_ptr + weight_offsets, mask=exists, other=0.0)
        v = _unit(y_ptr + rows_n[:, None] * stride_y, inverse_n, offs_d, D)
        g = tl.dot(weight, v, g, input_precision=PRECISION)
    mask = filled_m[:, None] & (offs_d < D)
    between = tl.load(between_ptr + rows_m[:, None] * D + offs_d, mask=mask, other=0.0)
    if HAS_GAIN:
        between *= tl.load(gain_ptr)
    tl.store(out_ptr + rows_m[:, None] * D + offs_d, g + between, mask=mask)


@triton.jit(do_not_specialize=["N"])
def _similarity_through_norm_kernel(
    x_ptr, inverse_ptr, g_ptr, out_ptr,  # (N, D), (N,), (N, D), (N, D)
    N, stride_x, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(g - u <u, g>) / |x|, with u the normalised rows and g what they receive; 0 for rows that take no part."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inverse = tl.load(inverse_ptr + offs_m, mask=offs_m < N, other=0.0)
    rows = offs_m.to(tl.int64)[:, None]
    taken = (inverse != 0.0)[:, None]
    radial = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)[None, :]
        g = tl.load(g_ptr + rows * D + offs_d, mask=taken & (offs_d < D), other=0.0)
        radial += tl.sum(g * _unit(x_ptr + rows * stride_x, inverse, offs_d, D), 1)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)[None, :]
        g = tl.load(g_ptr + rows * D + offs_d, mask=taken & (offs_d < D), other=0.0)
        g -= radial[:, None] * _unit(x_ptr + rows * stride_x, inverse, offs_d, D)
        mask = (offs_m < N)[:, None] & (offs_d < D)
        tl.store(out_ptr + rows * D + offs_d, (g * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _largest(ptr, N, SIGN: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    """The largest magnitude of N numbers, at least 0; or the largest of SIGN times the numbers that are finite."""
    largest = tl.full((BLOCK,), 0.0 if MAGNITUDE else -float("inf"), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        value = tl.load(ptr + offs, mask=offs < N, other=0.0) * SIGN
        if MAGNITUDE:
            largest = tl.maximum(largest, tl.abs(value))
        else:
            finite = (offs < N) & (tl.abs(value) < float("inf"))
            largest = tl.maximum(largest, tl.where(finite, value, -float("inf")))
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["N", "M"])
def _similarity_logsumexp_ranges_kernel(
    lse_x_ptr, lse_y_ptr, dlse_x_ptr, dlse_y_ptr,  # (P, N), (P, M), (P, N), (P, M)
    ranges_ptr,  # (P, 3): the largest incoming gradient, the largest lse_x, the smallest lse_y
    N, M, BLOCK: tl.constexpr,
):  # fmt: skip
    prefix = tl.program_id(0).to(tl.int64)
    of_x, of_y = prefix * N, prefix * M
    ranges_ptr += 3 * prefix
    gradient_x = _largest(dlse_x_ptr + of_x, N, 1.0, True, BLOCK)
    gradient_y = _largest(dlse_y_ptr + of_y, M, 1.0, True, BLOCK)
    tl.store(ranges_ptr, tl.maximum(gradient_x, gradient_y))
    tl.store(ranges_ptr + 1, _largest(lse_x_ptr + of_x, N, 1.0, False, BLOCK))
    tl.store(ranges_ptr + 2, -_largest(lse_y_ptr + of_y, M, -1.0, False, BLOCK))


@triton.jit
def _statistic_and_weight(lse_ptr, dlse_ptr, stat_ptr, weight_ptr, factor, read, write, offs, N, filled_n):
    exists, filled = offs < N, offs < filled_n
    stat = tl.load(lse_ptr + read + offs, mask=exists, other=-float("inf"))
    stat = tl.where(stat == -float("inf"), float("inf"), stat)
    gradient = tl.load(dlse_ptr + read + offs, mask=exists, other=0.0)
    weight = tl.where(factor > 0.0, gradient / tl.where(factor > 0.0, factor, 1.0), 0.0)
    tl.store(stat_ptr + write + offs, stat, mask=filled)
    tl.store(weight_ptr + write + offs, weight, mask=filled)
    return stat, weight


@triton.jit(do_not_specialize=["P", "N", "M", "filled_n", "filled_m"])
def _similarity_logsumexp_vectors_kernel(
    lse_x_ptr, lse_y_ptr, dlse_x_ptr, dlse_y_ptr, ranges_ptr,  # (P, N), (P, M), (P, N), (P, M), (P, 3)
    factor_ptr, stat_x_ptr, stat_y_ptr, weight_x_ptr, weight_y_ptr, single_exp_ok_ptr, factor_x_ptr, factor_y_ptr,
    P, N, M, filled_n, filled_m, amplification, MAX_SPREAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``chunks.LogsumexpVectors``, (P, filled_n) and (P, filled_m)."""
    pid, prefix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    factor = 0.0
    for other in range(0, P):
        factor = tl.maximum(factor, tl.load(ranges_ptr + 3 * other))
    factor /= amplification
    largest_x, min_lse = tl.load(ranges_ptr + 3 * prefix + 1), tl.load(ranges_ptr + 3 * prefix + 2)
    if pid == 0:
        tl.store(factor_ptr, factor)
        tl.store(single_exp_ok_ptr + prefix, (largest_x - min_lse < MAX_SPREAD).to(tl.int32))
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    stat, _ = _statistic_and_weight(
        lse_x_ptr, dlse_x_ptr, stat_x_ptr, weight_x_ptr, factor, prefix * N, prefix * filled_n, offs, N, filled_n
    )
    factor_x = tl.where(stat == float("inf"), 0.0, tl.exp(stat - min_lse))
    tl.store(factor_x_ptr + prefix * filled_n + offs, factor_x, mask=offs < filled_n)
    stat, weight = _statistic_and_weight(
        lse_y_ptr, dlse_y_ptr, stat_y_ptr, weight_y_ptr, factor, prefix * M, prefix * filled_m, offs, M, filled_m
    )
    factor_y = tl.where(stat == float("inf"), 0.0, tl.exp(min_lse - stat)) * weight
    tl.store(factor_y_ptr + prefix * filled_m + offs, factor_y, mask=offs < filled_m)


def inverse_norms(x: Tensor, image_id: Tensor, eps: float) -> Tensor:
    """(N,) float32 1 / |x|: 0 for rows of a negative image id or of a norm up to ``eps``, NaN for rows that are not
    finite; also where squares overflow."""
    x, out = _rows(x), torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    block_m, block_d = _blocks(x)
    with _guard(x):
        _similarity_inverse_norms_kernel[(-(-x.shape[0] // block_m),)](
            x, image_id, out, x.shape[0], x.stride(0), eps,
            D=x.shape[1], BLOCK_M=block_m, BLOCK_D=block_d, num_warps=_WARPS,
        )  # fmt: skip
    return out


def unit_rows(x: Tensor, inverse_norm: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, D) normalised rows, zero where ``inverse_norm`` is, whatever the rows hold."""
    x, out = _rows(x), torch.empty(x.shape, dtype=dtype, device=x.device)
    block_m, block_d = _blocks(x)
    with _guard(x):
        _similarity_unit_rows_kernel[(-(-x.shape[0] // block_m),)](
            x, inverse_norm, out, x.shape[0], x.stride(0),
            D=x.shape[1], BLOCK_M=block_m, BLOCK_D=block_d, num_warps=_WARPS,
        )  # fmt: skip
    return out


def cosines(x: Tensor, y: Tensor, x_inverse: Tensor, y_inverse: Tensor, slots: Tensor | None, out: Tensor) -> None:
    """Write those of the rows of each image into ``out`` (B, K, K)."""
    x, y = _rows(x), _rows(y)
    images, texts, _ = out.shape
    options = _product_options(x, texts)
    tiles = -(-texts // options["BLOCK_M"]) * -(-texts // options["BLOCK_N"])
    with _guard(x):
        _similarity_cosines_kernel[(images * tiles,)](
            x, y, x_inverse, y_inverse, slots, out, texts, x.stride(0), y.stride(0),
            HAS_SLOTS=slots is not None, **options,
        )  # fmt: skip


def raw_gradient(
    x: Tensor,
    y: Tensor,
    x_inverse: Tensor,
    y_inverse: Tensor,
    slots: Tensor | None,
    between: Tensor,
    weights: Tensor,
    gain: Tensor | None,
) -> Tensor:
    """The gradient of x (N, D), from that of its normalised rows: ``gain * between`` (N, D), and ``weights`` (B, K, K)
    times the normalised rows of y. ``between`` is written over where ``gain`` is None."""
    x, y, between = _rows(x), _rows(y), between.contiguous()
    images, texts, _ = weights.shape
    received = between if gain is None else torch.empty_like(between)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = _product_options(x, texts) | {"BLOCK_D": 64}
    programs = images * -(-texts // options["BLOCK_M"]) * -(-x.shape[1] // options["BLOCK_D"])
    block_m, block_d = _blocks(x)
    with _guard(x):
        _similarity_received_kernel[(programs,)](
            y, y_inverse, slots, between, gain, weights, received,
            texts, y.stride(0), weights.stride(1), weights.stride(2),
            HAS_SLOTS=slots is not None, HAS_GAIN=gain is not None, **options,
        )  # fmt: skip
        _similarity_through_norm_kernel[(-(-x.shape[0] // block_m),)](
            x, x_inverse, received, out, x.shape[0], x.stride(0),
            D=x.shape[1], BLOCK_M=block_m, BLOCK_D=block_d, num_warps=_WARPS,
        )  # fmt: skip
    return out


def logsumexp_vectors(
    lse_x: Tensor, lse_y: Tensor, dlse_x: Tensor, dlse_y: Tensor, amplification: float, multiple: int
) -> tuple[Tensor, ...]:
    """The common factor and the fields of ``chunks.LogsumexpVectors``, from (P, N) and (P, M) in float32."""
    given = [t.contiguous() for t in (lse_x, lse_y, dlse_x, dlse_y)]
    (prefixes, n), m = lse_x.shape, lse_y.shape[1]
    new = partial(torch.empty, dtype=lse_x.dtype, device=lse_x.device)
    rows, columns = (-(-size // multiple) * multiple for size in (n, m))
    factor, ranges = new(()), new((prefixes, 3))
    single_exp_ok = torch.empty((prefixes, 1), dtype=torch.int32, device=lse_x.device)
    stat_x, weight_x, factor_x = new((3, prefixes, rows))
    stat_y, weight_y, factor_y = new((3, prefixes, columns))
    vectors = stat_x, stat_y, weight_x, weight_y, single_exp_ok, factor_x, factor_y
    with _guard(lse_x):
        _similarity_logsumexp_ranges_kernel[(prefixes,)](*given, ranges, n, m, BLOCK=_ELEMENTS, num_warps=8)
        _similarity_logsumexp_vectors_kernel[(-(-max(rows, columns) // 1024), prefixes)](
            *given, ranges, factor, *vectors, prefixes, n, m, rows, columns, amplification,
            MAX_SPREAD=MAX_SINGLE_EXP_SPREAD[lse_x.dtype], BLOCK=1024, num_warps=_WARPS,
        )  # fmt: skip
    return factor, *vectors


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _blocks(x: Tensor) -> tuple[int, int]:
    """Rows and columns that a program holds at a time."""
    block_d = min(triton.next_power_of_2(max(x.shape[1], 16)), 1024)
    return _ELEMENTS // block_d, block_d


def _product_options(x: Tensor, texts: int) -> dict[str, Any]:
    """Tiles of 32 slots, or of 16 where those would compute a quarter more. Larger ones, and steps of 64, spill."""
    padded = {block: -(-texts // block) * block for block in (16, 32)}
    block = 32 if padded[32] <= 1.25 * padded[16] else 16
    target = architecture.architecture(x.device)
    return {
        "D": x.shape[1],
        "BLOCK_M": block,
        "BLOCK_N": block,
        "BLOCK_D": 32,
        "PRECISION": dot_precision(target, torch.float32),
        "num_warps": 4,
        "num_stages": 2,
    }


def _guard(x: Tensor) -> AbstractContextManager[Any]:
    """A kernel starts on the current device, wherever its tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
