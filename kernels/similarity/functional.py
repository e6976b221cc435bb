"""Two-sided statistics of any rows, for losses of your own: the public operations, with their checks."""

from typing import Any

import torch
from torch import Tensor

from betaclip.kernels.backends import expect
from betaclip.kernels.precision import DTYPES, accumulation_dtype
from betaclip.kernels.similarity.operators import Backend, SoftplusSums, resolve_backend, two_sided_logsumexp


def similarity_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    *,
    x_text: Tensor | None = None,
    y_text: Tensor | None = None,
    backend: Backend = "auto",
    strict: bool = False,
    keep: int | str = "auto",
) -> tuple[Tensor, Tensor]:
    """Row-wise and column-wise log-sum-exp of ``scale * x @ y.T`` over pairs of different images.

    Equivalent to:

        s = scale * x.float() @ y.float().T
        excluded = (x_group[:, None] == y_group) | (x_group[:, None] < 0) | (y_group < 0)
        s = s.masked_fill(excluded, -torch.inf)
        return s.logsumexp(1), s.logsumexp(0)

    in O((N + M) * D) memory, from one product per tile (2*N*M*D FLOP forward, 6*N*M*D backward, 4*N*M*D where ``keep``
    has room for all exponentials), accumulated in float32 (float64 for float64 inputs); deterministic. Differentiable
    once in ``x``, ``y`` and ``scale``.

    Args:
        x: (N, D) image embeddings, any norm.
        y: (M, D) text embeddings of the same dtype and device.
        scale: () inverse temperature, floating point; read on the device.
        x_group: (N,) integer image id of each row, below 2^31 - 1; pairs of equal ids are left out. ``< 0`` marks
            padding, which takes part in nothing and may hold anything. None: each row has an image of its own.
        y_group: (M,) likewise.
        x_text, y_text: (N,) and (M,) integer text ids: pairs of equal ids are left out as well, unless they are
            negative; a row without an id equals no other.
        backend: ``"auto"``, ``"triton"``, ``"cuda"`` (Hopper, half precision; never taken by ``"auto"`` yet),
            ``"blockwise"`` or ``"reference"``; or a ``SimilarityBackend`` object.
        strict: on a GPU, raise an error where ``"auto"`` would take a slower backend than the fused one.
        keep: how many bytes of exponentials may be kept from forward to backward, which then need not compute them
            again. All take 4*N*M bytes (8*N*M in float64); otherwise as many blocks are kept as fit. Gradients have the
            same bits whatever is kept. ``"auto"``: 256 MiB on the CPU, 0 elsewhere. Nothing is kept if no gradient is
            needed; only ``"blockwise"`` keeps any, and for other backends the number has no effect.

    Returns:
        lse_x (N,) and lse_y (M,), in nats, float32 (float64); ``-inf`` for a row without any pair.

    Raises:
        ValueError: shapes, dtypes or devices disagree; ``keep`` is neither ``"auto"`` nor a number of bytes.
        NotImplementedError: the backend cannot serve these tensors; the message says why.

    Example:
        >>> import torch
        >>> from betaclip.kernels.similarity import similarity_logsumexp
        >>> x, y = torch.eye(3), torch.eye(3)
        >>> lse_x, lse_y = similarity_logsumexp(x, y, torch.tensor(2.0))
        >>> print(lse_x)  # log(e^2 + 2)
        tensor([2.2395, 2.2395, 2.2395])
        >>> image = torch.arange(3)
        >>> print(similarity_logsumexp(x, y, torch.tensor(2.0), image, image)[0])  # without the diagonal: log(2)
        tensor([0.6931, 0.6931, 0.6931])
    """
    x, y, scale, _, *ids = _prepare(x, y, scale, None, x_group, y_group, x_text, y_text)
    backend = resolve_backend("similarity_logsumexp", backend, x, y, x.dtype, strict)
    lse_x, lse_y, _ = two_sided_logsumexp(x, y, scale, *ids, None, 0, 0, (), x.dtype, backend, keep=keep)
    return lse_x[0], lse_y[0]


def similarity_softplus(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    *,
    x_text: Tensor | None = None,
    y_text: Tensor | None = None,
    backend: Backend = "auto",
    strict: bool = False,
) -> Tensor:
    """Row sums of ``softplus(scale * x @ y.T + bias)`` over pairs of different images.

    Equivalent to:

        s = scale * x.float() @ y.float().T + bias
        excluded = (x_group[:, None] == y_group) | (x_group[:, None] < 0) | (y_group < 0)
        return torch.nn.functional.softplus(s).masked_fill(excluded, 0).sum(1)

    in O((N + M) * D) memory, accumulated in float32 (float64 for float64 inputs); deterministic.
    Differentiable once in ``x``, ``y``, ``scale`` and ``bias``.

    Args:
        bias: () added to every logit, or None.
        x, y, scale, x_group, y_group, x_text, y_text, backend, strict: as for :func:`similarity_logsumexp`.

    Returns:
        (N,) float32 (float64), in nats; 0 for a row without any pair.

    Raises:
        ValueError, NotImplementedError: as for :func:`similarity_logsumexp`.

    Example:
        >>> import torch
        >>> from betaclip.kernels.similarity import similarity_softplus
        >>> x, y = torch.eye(2), torch.eye(2)
        >>> print(similarity_softplus(x, y, torch.tensor(10.0), torch.tensor(-5.0)))  # log(1 + e^5) + log(1 + e^-5)
        tensor([5.0134, 5.0134])
    """
    x, y, scale, bias, *ids = _prepare(x, y, scale, bias, x_group, y_group, x_text, y_text)
    backend = resolve_backend("similarity_softplus", backend, x, y, x.dtype, strict)
    rows, _ = SoftplusSums.apply(x, y, scale, bias, *ids, None, None, False, False, 0, 0, (), x.dtype, backend)
    return rows[0]


def _prepare(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_image_id: Tensor | None,
    y_image_id: Tensor | None,
    x_text_id: Tensor | None,
    y_text_id: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments as the operators take them: checked, padded rows 0, scalars in accumulation dtype, ids as
    contiguous int32; no ids of y where they are those of x, and else both or none."""
    for name, value in (("x", x), ("y", y)):
        if value.dim() != 2:
            raise ValueError(f"{name}: expected (rows, D), got shape {tuple(value.shape)}")
        if value.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: expected D = {x.shape[1]} as in x, got shape {tuple(y.shape)}")
    expect("y", y, "as in x", dtype=x.dtype)
    for name, scalar in (("scale", scale), ("bias", bias)):
        if scalar is not None and (scalar.dim() != 0 or not scalar.is_floating_point()):
            raise ValueError(f"{name}: expected a 0-d floating-point tensor, got {scalar.dtype} {tuple(scalar.shape)}")
    ids = {"x_group": x_image_id, "y_group": y_image_id, "x_text": x_text_id, "y_text": y_text_id}
    for name, of_rows in ids.items():
        expect(name, of_rows, "", shape=(x if name.startswith("x") else y).shape[:1])
        if of_rows is not None and not _is_integer(of_rows):
            raise ValueError(f"{name}: expected an integer dtype, got {of_rows.dtype}")
    for name, tensor in {"y": y, "scale": scale, "bias": bias, **ids}.items():
        expect(name, tensor, "as for x", device=x.device)
    # Rows without image ids match nothing: an id of the other side is below 2^31 - 1.
    image_ids = _both_or_none(x, y, x_image_id, y_image_id, 2**31 - 1)
    text_ids = _both_or_none(x, y, x_text_id, y_text_id, -1)
    x, y = _zero_padding(x, image_ids[0]), _zero_padding(y, image_ids[0] if y_image_id is x_image_id else image_ids[1])
    dtype = accumulation_dtype(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    return x, y, scale.to(dtype), bias, *image_ids, *text_ids


def _both_or_none(
    x: Tensor, y: Tensor, x_id: Tensor | None, y_id: Tensor | None, otherwise: int
) -> tuple[Tensor | None, Tensor | None]:
    """Ids as contiguous int32, ``otherwise`` on a side that has none; none of y where they are those of x."""
    if x_id is y_id:
        return None if x_id is None else x_id.to(torch.int32).contiguous(), None
    return tuple(  # type: ignore[return-value]
        rows.new_full((rows.shape[0],), otherwise, dtype=torch.int32)
        if of_rows is None
        else of_rows.to(torch.int32).contiguous()
        for rows, of_rows in ((x, x_id), (y, y_id))
    )


def _is_integer(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def _zero_padding(rows: Tensor, image_id: Tensor | None) -> Tensor:
    """Padded rows must be finite inside the operators, so that a weight of 0 removes them.

    The result is a tensor of its own: x and y may be the same, and Dynamo takes no tensor twice.
    """
    return rows.view_as(rows) if image_id is None else rows.masked_fill((image_id < 0)[:, None], 0)
