"""Two-sided statistics of any rows, for losses of your own: the public operations, with their checks."""

import torch
from torch import Tensor

from betaclip.kernels.backends import expect
from betaclip.kernels.precision import DTYPES, accumulation_dtype
from betaclip.kernels.similarity.operators import Backend, LogSumExp, SoftplusSums, resolve_backend


def similarity_logsumexp(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    *,
    backend: Backend = "auto",
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Row-wise and column-wise log-sum-exp of ``scale * x @ y.T`` over pairs of different images.

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
        x_group: (N,) integer image id of each row, below 2^31 - 1; pairs of equal ids are left out. ``< 0`` marks
            padding, which takes part in nothing and may hold anything. None: each row has an image of its own.
        y_group: (M,) likewise.
        backend: ``"auto"``, ``"triton"``, ``"cuda"`` (Hopper, half precision; never taken by ``"auto"`` yet),
            ``"blockwise"`` or ``"reference"``; or a ``SimilarityBackend`` object.
        strict: on a GPU, refuse what ``"auto"`` would leave to a slower backend than the fused one.

    Returns:
        lse_x (N,) and lse_y (M,), in nats, float32 (float64); ``-inf`` for a row without any pair.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
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
    x, y, scale, _, *image_ids = _prepare(x, y, scale, None, x_group, y_group)
    backend = resolve_backend("similarity_logsumexp", backend, x, y, x.dtype, strict)
    lse_x, lse_y, _ = LogSumExp.apply(x, y, scale, *image_ids, None, 0, 0, x.dtype, backend)
    return lse_x, lse_y


def similarity_softplus(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    *,
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
        x, y, scale, x_group, y_group, backend, strict: as for :func:`similarity_logsumexp`.

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
    x, y, scale, bias, *image_ids = _prepare(x, y, scale, bias, x_group, y_group)
    backend = resolve_backend("similarity_softplus", backend, x, y, x.dtype, strict)
    rows, _ = SoftplusSums.apply(x, y, scale, bias, *image_ids, None, None, False, False, 0, 0, x.dtype, backend)
    return rows


def softplus_total(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_group: Tensor | None,
    y_group: Tensor | None,
    row_weights: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """() the sum of :func:`similarity_softplus`, times constant ``row_weights`` (N,) if they are given.

    The gradient, if it is wanted, is formed together with the value: 6*N*M*D FLOP for both instead of 8.
    """
    x, y, scale, bias, *image_ids = _prepare(x, y, scale, bias, x_group, y_group)
    backend = resolve_backend("similarity_softplus", backend, x, y, x.dtype)
    total, _ = SoftplusSums.apply(
        x, y, scale, bias, *image_ids, None, row_weights, True, torch.is_grad_enabled(), 0, 0, x.dtype, backend
    )
    return total


def _prepare(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, x_image_id: Tensor | None, y_image_id: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The arguments as the operators take them: checked, padded rows 0, scalars in accumulation dtype, image ids as
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
    for name, image_id, rows in (("x_group", x_image_id, x), ("y_group", y_image_id, y)):
        expect(name, image_id, "", shape=rows.shape[:1])
        if image_id is not None and not _is_integer(image_id):
            raise ValueError(f"{name}: expected an integer dtype, got {image_id.dtype}")
    others = {"y": y, "scale": scale, "bias": bias, "x_group": x_image_id, "y_group": y_image_id}
    for name, tensor in others.items():
        expect(name, tensor, "as for x", device=x.device)
    same_ids = x_image_id is y_image_id
    if x_image_id is not None or y_image_id is not None:
        # Rows without image ids match nothing: an id of the other side is below 2^31 - 1.
        x_image_id, y_image_id = (
            rows.new_full((rows.shape[0],), 2**31 - 1, dtype=torch.int32)
            if image_id is None
            else image_id.to(torch.int32).contiguous()
            for rows, image_id in ((x, x_image_id), (y, y_image_id))
        )
    x, y = _zero_padding(x, x_image_id), _zero_padding(y, y_image_id)
    dtype = accumulation_dtype(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    return x, y, scale.to(dtype), bias, x_image_id, None if same_ids else y_image_id


def _is_integer(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def _zero_padding(rows: Tensor, image_id: Tensor | None) -> Tensor:
    """Padded rows must be finite inside the operators, so that a weight of 0 removes them.

    The result is a tensor of its own: x and y may be the same, and Dynamo takes no tensor twice.
    """
    return rows.view_as(rows) if image_id is None else rows.masked_fill((image_id < 0)[:, None], 0)
