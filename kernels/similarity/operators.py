"""Two-sided statistics of all pairwise similarities, without the matrix of similarities.

S_ij = scale * <x_i, y_j> (+ bias), over the pairs (i, j) whose groups differ. ``similarity_logsumexp`` serves
softmax losses, ``similarity_softplus`` sigmoid losses. Each is one ``torch.library`` operator whose backend is
a string argument: fake, autograd and checks are written once, here.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from betaclip.kernels.backends import resolve, without_autocast
from betaclip.kernels.precision import DTYPES, accumulation_dtype
from betaclip.kernels.similarity import (
    blockwise as similarity_blockwise,
)
from betaclip.kernels.similarity import (
    cuda_backend as similarity_cuda,
)
from betaclip.kernels.similarity import (
    reference as similarity_reference,
)
from betaclip.kernels.similarity import (
    triton_backend as similarity_triton,
)
from betaclip.kernels.similarity.operand import Operand

_MODULES: dict[str, ModuleType] = {
    "triton": similarity_triton,
    "cuda": similarity_cuda,
    "blockwise": similarity_blockwise,
    "reference": similarity_reference,
}
BACKENDS: dict[str, Callable[[Tensor, Tensor], list[str]]] = {name: m.why_not for name, m in _MODULES.items()}


def similarity_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Row-wise and column-wise log-sum-exp of ``scale * x @ y.T`` over pairs of different groups.

    Equivalent to:

        s = scale * x.float() @ y.float().T
        excluded = (x_group[:, None] == y_group) | (x_group[:, None] < 0) | (y_group < 0)
        s = s.masked_fill(excluded, -torch.inf)
        return s.logsumexp(1), s.logsumexp(0)

    in O((N + M) * D) memory, from one product per tile (2*N*M*D FLOP forward, 6*N*M*D backward), accumulated
    in float32 (float64 for float64 inputs); deterministic. Differentiable once in ``x``, ``y`` and ``scale``.

    Args:
        x: (N, D) image embeddings, any norm.
        y: (M, D) text embeddings of the same dtype and device.
        scale: () inverse temperature, floating point; read on the device.
        x_group: (N,) integer group of each row, below 2^31 - 1; ``< 0`` is padding, which takes part in nothing and
            may hold anything. None: each row is in a group of its own.
        y_group: (M,) likewise.
        backend: ``"auto"``, ``"triton"``, ``"cuda"`` (Hopper, half precision; never taken by ``"auto"`` yet),
            ``"blockwise"`` or ``"reference"``.

    Returns:
        lse_x (N,) and lse_y (M,), in nats, float32 (float64); ``-inf`` for a row without any pair.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        NotImplementedError: the backend cannot serve these tensors; the message says why.
    """
    scale, _, x_group, y_group = _check(x, y, scale, None, x_group, y_group)
    x, y = _zero_padding(x, x_group), _zero_padding(y, y_group)
    backend = resolve("similarity_logsumexp", backend, BACKENDS, x, y)
    return logsumexp(x, y, scale, x_group, y_group, backend)


def similarity_softplus(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Row sums of ``softplus(scale * x @ y.T + bias)`` over pairs of different groups.

    Equivalent to:

        s = scale * x.float() @ y.float().T + bias
        excluded = (x_group[:, None] == y_group) | (x_group[:, None] < 0) | (y_group < 0)
        return torch.nn.functional.softplus(s).masked_fill(excluded, 0).sum(1)

    in O((N + M) * D) memory, accumulated in float32 (float64 for float64 inputs); deterministic.
    Differentiable once in ``x``, ``y``, ``scale`` and ``bias``.

    Args:
        bias: () added to every logit, or None.
        x, y, scale, x_group, y_group, backend: as for :func:`similarity_logsumexp`.

    Returns:
        (N,) float32 (float64), in nats; 0 for a row without any pair.

    Raises:
        ValueError, NotImplementedError: as for :func:`similarity_logsumexp`.
    """
    scale, bias, x_group, y_group = _check(x, y, scale, bias, x_group, y_group)
    x, y = _zero_padding(x, x_group), _zero_padding(y, y_group)
    backend = resolve("similarity_softplus", backend, BACKENDS, x, y)
    return softplus(x, y, scale, bias, x_group, y_group, backend)


def _check(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, x_group: Tensor | None, y_group: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Raise on malformed tensors; scalars in accumulation dtype, and groups as contiguous int32, both or none."""
    for name, value in (("x", x), ("y", y)):
        if value.dim() != 2:
            raise ValueError(f"{name}: expected (rows, D), got shape {tuple(value.shape)}")
        if value.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: expected D = {x.shape[1]} as in x, got shape {tuple(y.shape)}")
    if x.dtype != y.dtype:
        raise ValueError(f"y: expected dtype {x.dtype} as in x, got {y.dtype}")
    for name, scalar in (("scale", scale), ("bias", bias)):
        if scalar is not None and (scalar.dim() != 0 or not scalar.is_floating_point()):
            raise ValueError(f"{name}: expected a 0-d floating-point tensor, got {scalar.dtype} {tuple(scalar.shape)}")
    for name, group, rows in (("x_group", x_group, x), ("y_group", y_group, y)):
        if group is None:
            continue
        if group.shape != rows.shape[:1]:
            raise ValueError(f"{name}: expected shape ({rows.shape[0]},), got {tuple(group.shape)}")
        if group.is_floating_point() or group.is_complex() or group.dtype == torch.bool:
            raise ValueError(f"{name}: expected an integer dtype, got {group.dtype}")
    for name, tensor in (("y", y), ("scale", scale), ("bias", bias), ("x_group", x_group), ("y_group", y_group)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as for x, got {tensor.device}")
    if x_group is not None or y_group is not None:
        # Rows without groups of their own match nothing: a group of the other side is below 2^31 - 1.
        x_group, y_group = (
            rows.new_full((rows.shape[0],), 2**31 - 1, dtype=torch.int32)
            if group is None
            else group.to(torch.int32).contiguous()
            for rows, group in ((x, x_group), (y, y_group))
        )
    dtype = accumulation_dtype(x.dtype)
    return scale.to(dtype), None if bias is None else bias.to(dtype), x_group, y_group


def _zero_padding(rows: Tensor, group: Tensor | None) -> Tensor:
    """The operators' own contract: padded rows are finite, so that a weight of 0 removes them."""
    return rows if group is None else rows.masked_fill((group < 0)[:, None], 0)


def _operands(x: Tensor, y: Tensor, x_group: Tensor | None, y_group: Tensor | None) -> tuple[Operand, Operand]:
    return Operand(x, x_group, None, x.dtype), Operand(y, y_group, None, y.dtype)


def implementation(backend: str, x: Operand, y: Operand) -> ModuleType:
    """The backend's module; nothing to launch on an empty side, where only the dense form has defined results."""
    return _MODULES["reference" if 0 in (x.rows.shape[0], y.rows.shape[0]) else backend]


@torch.library.custom_op("betaclip::similarity_logsumexp", mutates_args=())
@without_autocast
def logsumexp(
    x: Tensor, y: Tensor, scale: Tensor, x_group: Tensor | None, y_group: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    operands = _operands(x, y, x_group, y_group)
    return implementation(backend, *operands).similarity_logsumexp_fwd(*operands, scale)


@logsumexp.register_fake
def _(x, y, scale, x_group, y_group, backend):  # type: ignore[no-untyped-def]
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(x.shape[0], dtype=dtype), y.new_empty(y.shape[0], dtype=dtype)


@torch.library.custom_op("betaclip::similarity_logsumexp_backward", mutates_args=())
@without_autocast
def logsumexp_backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_group: Tensor | None,
    y_group: Tensor | None,
    lse_x: Tensor,
    lse_y: Tensor,
    dlse_x: Tensor,
    dlse_y: Tensor,
    need_dx: bool,
    need_dy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (N, D), dy (M, D) and dscale () in accumulation dtype; a gradient not needed is empty."""
    operands = _operands(x, y, x_group, y_group)
    return implementation(backend, *operands).similarity_logsumexp_bwd(
        *operands, scale, lse_x, lse_y, dlse_x, dlse_y, need_dx, need_dy
    )


@logsumexp_backward.register_fake
def _(x, y, scale, x_group, y_group, lse_x, lse_y, dlse_x, dlse_y, need_dx, need_dy, backend):  # type: ignore[no-untyped-def]
    return _fake_gradients(x, y, need_dx, need_dy)


def _fake_gradients(x: Tensor, y: Tensor, need_dx: bool, need_dy: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    dx, dy = (t.new_empty(t.shape if need else (0,), dtype=dtype) for t, need in ((x, need_dx), (y, need_dy)))
    return dx, dy, x.new_empty((), dtype=dtype)


@torch.library.custom_op("betaclip::similarity_softplus", mutates_args=())
@without_autocast
def softplus(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_group: Tensor | None,
    y_group: Tensor | None,
    backend: str,
) -> Tensor:
    operands = _operands(x, y, x_group, y_group)
    return implementation(backend, *operands).similarity_softplus_fwd(*operands, scale, bias)


@softplus.register_fake
def _(x, y, scale, bias, x_group, y_group, backend):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


@torch.library.custom_op("betaclip::similarity_softplus_with_gradients", mutates_args=())
@without_autocast
def softplus_with_gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_group: Tensor | None,
    y_group: Tensor | None,
    drows: Tensor,
    need_dx: bool,
    need_dy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Row sums of softplus, and dx, dy, dscale, dbias for their incoming gradient ``drows`` (N,).

    The gradient needs no statistic of the whole matrix, so both come from one pass: a loss that knows its
    ``drows`` beforehand, such as a plain mean, saves the recomputation (6*N*M*D FLOP in all instead of 8).
    """
    operands = _operands(x, y, x_group, y_group)
    return implementation(backend, *operands).similarity_softplus_fwd_bwd(
        *operands, scale, bias, drows, need_dx, need_dy
    )


@softplus_with_gradients.register_fake
def _(x, y, scale, bias, x_group, y_group, drows, need_dx, need_dy, backend):  # type: ignore[no-untyped-def]
    dx, dy, dscale = _fake_gradients(x, y, need_dx, need_dy)
    return x.new_empty(x.shape[0], dtype=dscale.dtype), dx, dy, dscale, torch.empty_like(dscale)


def _save_logsumexp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _logsumexp_autograd(ctx: Any, dlse_x: Tensor, dlse_y: Tensor) -> tuple[Tensor | None, ...]:
    need_dx, need_dy, need_dscale, *_ = ctx.needs_input_grad
    x, y, *rest = ctx.saved_tensors
    dx, dy, dscale = logsumexp_backward(x, y, *rest, dlse_x, dlse_y, need_dx, need_dy, ctx.backend)
    return _cast(dx, x, need_dx), _cast(dy, y, need_dy), dscale if need_dscale else None, None, None, None


def _save_softplus(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _softplus_autograd(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    need_dx, need_dy, need_dscale, need_dbias, *_ = ctx.needs_input_grad
    x, y, *rest = ctx.saved_tensors
    _, dx, dy, dscale, dbias = softplus_with_gradients(x, y, *rest, drows, need_dx, need_dy, ctx.backend)
    return (
        _cast(dx, x, need_dx),
        _cast(dy, y, need_dy),
        dscale if need_dscale else None,
        dbias if need_dbias else None,
        None,
        None,
        None,
    )


def _cast(gradient: Tensor, like: Tensor, needed: bool) -> Tensor | None:
    return gradient.to(like.dtype) if needed else None


logsumexp.register_autograd(_logsumexp_autograd, setup_context=_save_logsumexp)
softplus.register_autograd(_softplus_autograd, setup_context=_save_softplus)
