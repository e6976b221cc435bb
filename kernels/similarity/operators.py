"""Two-sided statistics of all pairwise similarities, without the matrix of similarities.

S_ij = scale * <x_i, y_j> (+ bias), over the pairs (i, j) of different images. The log-sum-exp serves softmax losses,
the softplus sigmoid losses. Each has one operator and one backward operator, which serve both uses:

* ``similarity_logsumexp`` and ``similarity_softplus`` (functional.py) take any rows as they are;
* :func:`contrast_logsumexp` and :func:`contrast_softplus`, for losses over images with many texts, normalise rows on
  the way and also return the cosines within images, so that targets, weights and masks are ordinary PyTorch.

A backend is a name, or an object that keeps the contract of ``SimilarityBackend``. A name runs a ``torch.library``
operator, which torch.compile takes into its graph. An object, such as a backend across several processes, runs the
same function directly.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import nvtx
import torch
from torch import Tensor

from betaclip.kernels.architecture import triton_not_supported_reasons
from betaclip.kernels.backends import (
    always_supported,
    count_run,
    define_operator,
    needed_gradients,
    refuse_second_derivative,
    resolve,
    run_operator,
    without_autocast,
)
from betaclip.kernels.memory import MAX_KEPT_BYTES, on_huge_pages, scratch
from betaclip.kernels.similarity import cuda_backend
from betaclip.kernels.similarity.all_cosines import AllCosines
from betaclip.kernels.similarity.blockwise import Blockwise
from betaclip.kernels.similarity.contract import Operand, SimilarityBackend, zero_rows
from betaclip.kernels.similarity.each_prefix import EachPrefix
from betaclip.kernels.similarity.reference import Reference
from betaclip.kernels.similarity.within_images import Images, cosines, inverse_norms, may_be_padded, raw_gradients

BACKENDS: dict[str, Callable[[Tensor, Tensor], list[str]]] = {
    "triton": triton_not_supported_reasons,
    "cuda": cuda_backend.not_supported_reasons,
    "blockwise": always_supported,
    "reference": always_supported,
}
Backend = str | SimilarityBackend

# The bytes of exponentials that ``keep="auto"`` lets a softmax form keep from forward to backward, by type of device.
# On the CPU 256 MiB hold all of them up to N = 8192. No GPU backend keeps any.
KEEP_BYTES = {"cpu": 256 * 2**20}

# On the CPU, normalised rows are formed once per call, if those of both sides fit into the scratch that a thread keeps.
# Those of 16-bit rows take twice the memory of the inputs: more elements than this are widened a block at a time.
_WIDENED_ELEMENTS = 2**21


def local_backend(operation: str, backend: Backend, x: Operand, y: Operand) -> SimilarityBackend:
    """The object behind a backend's resolved name, which is about to run ``operation``. Backends of an architecture's
    own are chosen here."""
    if isinstance(backend, str):
        if 0 in (x.rows.shape[0], y.rows.shape[0]):  # kernels have nothing to launch there
            backend = "reference"
        count_run(operation, backend)
        backend = _backend_of(backend)
    return backend if getattr(backend, "serves_prefixes", False) else EachPrefix(backend)


def _backend_of(name: str) -> SimilarityBackend:
    if name == "triton":
        from betaclip.kernels.similarity.triton_kernels import Triton  # Triton may not be installed

        return Triton()
    backends: dict[str, type[SimilarityBackend]] = {
        "cuda": cuda_backend.Cuda,
        "blockwise": Blockwise,
        "reference": Reference,
    }
    return backends[name]()


def keep_bytes(keep: int | str, device: torch.device) -> int:
    """The number of bytes that ``keep`` stands for where tensors are on ``device``.

    Raises:
        ValueError: it is neither "auto" nor a number of bytes.
    """
    if keep == "auto":
        return KEEP_BYTES.get(device.type, 0)
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
        raise ValueError(f"keep: expected 'auto' or a number of bytes of at least 0, got {keep!r}")
    return keep


class RowLayout(NamedTuple):
    """How N rows belong to B images of up to K texts.

    image_id: (N,) int32 image of each row, -1 for a row that takes no part.
    slots: (B, K) int64 row in each slot, -1 for none; None if row b * K + k is in slot (b, k).
    text_id: (N,) integer id of each row's text, < 0 if it equals no other; None if all texts differ. int32, unless the
        backend spans ranks.
    """

    images: int
    texts_per_image: int
    image_id: Tensor
    slots: Tensor | None
    text_id: Tensor | None = None

    def to_slots(self, rows: Tensor, fill: float) -> Tensor:
        """(..., B, K) from (..., N)."""
        if self.slots is None:
            return rows.unflatten(-1, (self.images, self.texts_per_image))
        return torch.where(self.slots >= 0, rows[..., self.slots.clamp_min(0)], fill)

    def to_rows(self, slots: Tensor) -> Tensor:
        """A vector over rows (N,) from (B, K), without what empty slots hold."""
        if self.slots is None:
            return slots.flatten()
        count = self.image_id.shape[0]
        places = torch.where(self.slots >= 0, self.slots, count).flatten()  # empty slots go behind the rows
        return slots.new_zeros(count + 1).scatter(0, places, slots.flatten())[:count]


def contrast_logsumexp(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    layout: RowLayout,
    dtype: torch.dtype,
    backend: Backend,
    keep: int | str = "auto",
    dims: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of each row's logits with the *other* images, both ways, and the cosines within images.

    Pairs of different images whose texts are equal are left out.

    Args:
        image, text: (N, D) embeddings, any norm, any floating dtype; N = B * K, or ragged.
        scale: () in accumulation dtype.
        layout: which image each row belongs to.
        dtype: of the normalised rows in the matrix products.
        backend: an object, or a name that ``resolve_backend`` returned.
        keep: as for ``similarity_logsumexp``.
        dims: lengths of P prefixes of the embeddings, ascending up to D, each normalised by itself; empty for whole
            embeddings alone, P = 1.

    Returns:
        (P, N) image to text, (P, N) text to image, and (P, B, K, K) cosines, in accumulation dtype.
    """
    return two_sided_logsumexp(
        image, text, scale, layout.image_id, None, layout.text_id, None, layout.slots,
        layout.images, layout.texts_per_image, dims, dtype, backend, keep=keep,
    )  # fmt: skip


def two_sided_logsumexp(x: Tensor, *arguments: Any, keep: int | str) -> tuple[Tensor, Tensor, Tensor]:
    """The operator with its gradients, from its other arguments. Exponentials are kept only where a backward may
    follow."""
    budget = keep_bytes(keep, x.device)
    return LogSumExp.apply(x, *arguments, budget if torch.is_grad_enabled() else 0)


def contrast_softplus(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: RowLayout,
    dtype: torch.dtype,
    backend: Backend,
    total: bool = True,
    row_weights: Tensor | None = None,
    dims: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Sums of softplus of all logits between different images, and the (P, B, K, K) cosines within images.

    With ``total`` the sum is () that of all rows, times constant ``row_weights`` (P, N) if they are given. Its
    gradient, if it is wanted, is formed together with the value, which saves forming the logits again. Otherwise sums
    are (P, N) those of each row. The other arguments are those of :func:`contrast_logsumexp`.
    """
    return SoftplusSums.apply(
        image, text, scale, bias, layout.image_id, None, layout.text_id, None, layout.slots, row_weights, total,
        torch.is_grad_enabled(),
        layout.images, layout.texts_per_image, dims, dtype, backend,
    )  # fmt: skip


def resolve_backend(
    operation: str, backend: Backend, x: Tensor, y: Tensor, dtype: torch.dtype, strict: bool = False
) -> Backend:
    """A name is resolved for the dtype of the products."""
    if not isinstance(backend, str):
        return backend
    x, y = (rows.new_empty((0, rows.shape[1]), dtype=dtype) for rows in (x, y))
    return resolve(operation, backend, BACKENDS, x, y, strict=strict)


# What the operators share: x is (N, D), y (M, D). With ``images`` B > 0 they are embeddings of B images with up to
# ``texts_per_image`` texts: rows are normalised, and the (B, K, K) cosines within images are formed too. With 0, rows
# are used as they are and cosines are empty. Without ``y_image_id`` or ``y_text_id``, columns have the ids of the rows,
# since Dynamo takes no tensor twice. ``dims`` are those of ``Operand``, P = max(len(dims), 1). ``dtype`` is that of the
# matrix products.
_IDS = "Tensor? x_image_id, Tensor? y_image_id, Tensor? x_text_id, Tensor? y_text_id, Tensor? slots"
_OPTIONS = "SymInt images, SymInt texts_per_image, int[] dims, ScalarType dtype, str backend"


@without_autocast
def _logsumexp(  # type: ignore[no-untyped-def]
    x, y, scale, x_image_id, y_image_id, x_text_id, y_text_id, slots,
    keep, images, texts_per_image, dims, dtype, backend: Backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-sum-exps (P, N) and (P, M), cosines, and up to ``keep`` bytes of exponentials for the backward."""
    layout = Images(images, texts_per_image, slots)
    kept = on_huge_pages(scale.new_empty(_kept_elements(x, y, scale, keep, backend)))
    with _all_cosines("similarity_logsumexp", x, y, x_image_id, x_text_id, layout, dims, backend, kept) as few:
        if few is not None:
            return *few.logsumexp(scale), few.within_images(), kept
    with _operands(x, y, scale, x_image_id, y_image_id, x_text_id, y_text_id, images, dims, dtype) as operands:
        with nvtx.annotate("between images", domain="betaclip"):
            chosen = _with_kept(local_backend("similarity_logsumexp", backend, *operands), kept)
            lse_x, lse_y = chosen.similarity_logsumexp_fwd(*operands, scale)
        return lse_x, lse_y, _cosines(operands, scale, layout), kept


@without_autocast
def _logsumexp_backward(  # type: ignore[no-untyped-def]
    x, y, scale, x_image_id, y_image_id, x_text_id, y_text_id, slots,
    lse_x, lse_y, kept, dlse_x, dlse_y, dcosines, need_dx, need_dy,
    images, texts_per_image, dims, dtype, backend: Backend,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx and dy like x and y, or (0,) where they are not needed, and dscale ()."""
    layout = Images(images, texts_per_image, slots)
    with _all_cosines("similarity_logsumexp", x, y, x_image_id, x_text_id, layout, dims, backend, kept, True) as few:
        if few is not None:
            dlogits = few.logsumexp_gradient(scale, lse_x, lse_y, dlse_x, dlse_y)
            dx, dy, dscale = few.gradients(dlogits, scale, dcosines, need_dx, need_dy)
            return dx.to(x.dtype), dy.to(y.dtype), dscale
    with _operands(x, y, scale, x_image_id, y_image_id, x_text_id, y_text_id, images, dims, dtype) as operands:
        with nvtx.annotate("between images, backward", domain="betaclip"):
            chosen = _with_kept(local_backend("similarity_logsumexp", backend, *operands), kept)
            dx, dy, dscale = chosen.similarity_logsumexp_bwd(
                *operands, scale, lse_x, lse_y, dlse_x, dlse_y, need_dx, need_dy
            )
        return *_finish(operands, dx, dy, dcosines, layout), dscale


@without_autocast
def _softplus(  # type: ignore[no-untyped-def]
    x, y, scale, bias, x_image_id, y_image_id, x_text_id, y_text_id, slots, row_weights,
    with_gradients, need_dx, need_dy, keep, images, texts_per_image, dims, dtype, backend: Backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sums of rows (P, N) and cosines; if wanted, also the gradients of the rows' weighted total by the normalised
    rows, scale and bias, in accumulation dtype; and up to ``keep`` bytes of cosines for the backward."""
    layout = Images(images, texts_per_image, slots)
    kept = scale.new_empty(_kept_elements(x, y, scale, keep, backend))
    nothing = (scale.new_zeros(shape) for shape in ((0,), (0,), (), ()))
    if not with_gradients:
        with _all_cosines("similarity_softplus", x, y, x_image_id, x_text_id, layout, dims, backend, kept) as few:
            if few is not None:
                return few.softplus_sums(scale, bias), few.within_images(), *nothing, kept
    with _operands(x, y, scale, x_image_id, y_image_id, x_text_id, y_text_id, images, dims, dtype) as operands:
        with nvtx.annotate("between images", domain="betaclip"):
            chosen = local_backend("similarity_softplus", backend, *operands)
            if with_gradients:
                drows = scale.new_ones(max(len(dims), 1), x.shape[0]) if row_weights is None else row_weights
                rows, dx, dy, dscale, dbias = chosen.similarity_softplus_fwd_bwd(
                    *operands, scale, bias, drows, need_dx, need_dy
                )
            else:
                rows = chosen.similarity_softplus_fwd(*operands, scale, bias)
                dx, dy, dscale, dbias = nothing
        return rows, _cosines(operands, scale, layout), dx, dy, dscale, dbias, kept


@without_autocast
def _softplus_backward(  # type: ignore[no-untyped-def]
    x, y, scale, bias, x_image_id, y_image_id, x_text_id, y_text_id, slots, formed, kept, dsums, dcosines, need_dx,
    need_dy, images, texts_per_image, dims, dtype, backend: Backend, write_over: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx and dy like x and y, or (0,) where they are not needed, dscale and dbias ().

    ``dsums`` is the incoming gradient of the rows (P, N); or that of their total (), whose gradients are ``formed``,
    which ``write_over`` allows to be written over.
    """
    layout = Images(images, texts_per_image, slots)
    if not formed:
        with _all_cosines("similarity_softplus", x, y, x_image_id, x_text_id, layout, dims, backend, kept, True) as few:
            if few is not None:
                dlogits = few.softplus_gradient(scale, bias, dsums)
                dbias = dlogits.sum()
                dx, dy, dscale = few.gradients(dlogits, scale, dcosines, need_dx, need_dy)
                return dx.to(x.dtype), dy.to(y.dtype), dscale, dbias
    with _operands(x, y, scale, x_image_id, y_image_id, x_text_id, y_text_id, images, dims, dtype) as operands:
        if formed:
            dx, dy, dscale, dbias = formed
            dx, dy = _finish(operands, dx, dy, dcosines, layout, dsums, write_over)
            return dx, dy, dsums * dscale, dsums * dbias
        with nvtx.annotate("between images, backward", domain="betaclip"):
            chosen = local_backend("similarity_softplus", backend, *operands)
            _, dx, dy, dscale, dbias = chosen.similarity_softplus_fwd_bwd(
                *operands, scale, bias, dsums, need_dx, need_dy
            )
        return *_finish(operands, dx, dy, dcosines, layout), dscale, dbias


def _few_rows(x: Tensor, images: int, dims: Sequence[int], backend: Backend) -> bool:
    """Whether ``AllCosines`` serves embeddings (N, D) of images, unless their norms are extreme; by shapes alone."""
    blocks = Blockwise() if backend == "blockwise" else backend
    if not isinstance(blocks, Blockwise) or x.device.type != "cpu" or not images or dims:
        return False
    return 0 < x.shape[0] <= min(blocks.rows, blocks.cols) and x.shape[0] ** 2 <= blocks.max_matrix


@contextmanager
def _all_cosines(  # type: ignore[no-untyped-def]
    operation: str, x, y, image_id, text_id, images: Images, dims, backend: Backend, room: Tensor, filled: bool = False
) -> Iterator[AllCosines | None]:
    """The matrix of a few rows that runs ``operation`` instead of tiles, inside the ``with`` block; None if these have
    to. The columns of embeddings of images have the ids of the rows."""
    if not _few_rows(x, images.num_images, dims, backend):
        yield None
        return
    with _wide_rows(x, y, room.dtype) as rows:
        few = AllCosines.of(*rows, image_id, text_id, images, room, filled)
        if few is not None and isinstance(backend, str):
            count_run(operation, backend)
        yield few


@contextmanager
def _wide_rows(x: Tensor, y: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """x and y in ``dtype``, in scratch unless they have it already."""
    if x.dtype == dtype == y.dtype:
        yield x, y
        return
    with scratch([tuple(t.shape) for t in (x, y)], dtype, x.device) as (wide_x, wide_y):
        yield wide_x.copy_(x), wide_y.copy_(y)


def _kept_elements(x: Tensor, y: Tensor, scale: Tensor, keep: int, backend: Backend) -> int | torch.SymInt:
    """How many exponentials there is room for: none but ``Blockwise`` keeps any. This depends on shapes alone, for
    graphs of any size; where rows are padded, what is left over is never touched."""
    if backend != "blockwise" and not isinstance(backend, Blockwise):
        return 0
    return torch.sym_min(x.shape[0] * y.shape[0], keep // scale.dtype.itemsize)


def _with_kept(backend: SimilarityBackend, kept: Tensor) -> SimilarityBackend:
    return replace(backend, kept=kept) if isinstance(backend, Blockwise) else backend


@contextmanager
def _operands(  # type: ignore[no-untyped-def]
    x, y, scale, x_image_id, y_image_id, x_text_id, y_text_id, images, dims, dtype
) -> Iterator[tuple[Operand, Operand]]:
    """Both operands, whose normalised rows, where they are formed, are valid inside the ``with`` block."""
    if y_image_id is None:
        y_image_id = x_image_id
    if y_text_id is None:
        y_text_id = x_text_id
    dims = tuple(dims)
    if not images:
        yield (
            Operand(x, x_image_id, None, dtype, x_text_id, dims=dims),
            Operand(y, y_image_id, None, dtype, y_text_id, dims=dims),
        )
        return
    padded_x = may_be_padded(x_image_id)
    padded_y = padded_x if y_image_id is x_image_id else may_be_padded(y_image_id)
    fit = x.device.type == "cpu" and (x.numel() + y.numel()) * scale.itemsize <= MAX_KEPT_BYTES
    formed = [fit and (t.dtype == scale.dtype or t.numel() <= _WIDENED_ELEMENTS) for t in (x, y)]
    shapes = [tuple(t.shape) if form else (0,) for t, form in zip((x, y), formed, strict=True)]
    with scratch(shapes, scale.dtype, x.device) as room:
        unit_x, unit_y = (unit if form else None for unit, form in zip(room, formed, strict=True))
        yield (
            _embeddings(x, x_image_id, x_text_id, padded_x, scale.dtype, dtype, dims, unit_x),
            _embeddings(y, y_image_id, y_text_id, padded_y, scale.dtype, dtype, dims, unit_y),
        )


def _embeddings(  # type: ignore[no-untyped-def]
    rows, image_id, text_id, padded: bool, accumulation, dtype, dims, unit: Tensor | None
) -> Operand:
    """Rows to be normalised; their normalised copy is formed in ``unit``."""
    wide = rows if unit is None or rows.dtype == unit.dtype else unit.copy_(rows)
    inverse, complete = inverse_norms(wide, image_id, accumulation, padded)
    if unit is not None:
        torch.mul(wide, inverse.unsqueeze(1), out=unit)
        if not complete:
            zero_rows(unit, inverse)
    return Operand(rows, image_id, inverse, dtype, text_id, complete, dims, unit)


def _cosines(operands: tuple[Operand, Operand], scale: Tensor, images: Images) -> Tensor:
    x, y = operands
    if x.inverse_norm is None:
        return _empty_cosines(scale, images.num_images, images.texts_per_image, x.dims)
    return cosines(x, y, images)


def _finish(
    operands: tuple[Operand, Operand],
    dx: Tensor,
    dy: Tensor,
    dcosines: Tensor,
    images: Images,
    gain: Tensor | None = None,
    write_over: bool = True,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and y themselves, from those of the rows that a backend multiplied, times ``gain``; these may
    be written over."""
    if operands[0].inverse_norm is None:
        if gain is not None:
            dx, dy = (g.mul_(gain) if write_over else g * gain for g in (dx, dy))
        return dx.to(operands[0].rows.dtype), dy.to(operands[1].rows.dtype)
    return raw_gradients(*operands, images, dx, dy, dcosines, gain, write_over)


logsumexp = define_operator(
    "similarity_logsumexp", _logsumexp, f"Tensor x, Tensor y, Tensor scale, {_IDS}, SymInt keep, {_OPTIONS}", 4
)
logsumexp_backward = define_operator(
    "similarity_logsumexp_backward",
    _logsumexp_backward,
    f"Tensor x, Tensor y, Tensor scale, {_IDS}, Tensor lse_x, Tensor lse_y, Tensor kept, "
    f"Tensor dlse_x, Tensor dlse_y, Tensor dcosines, bool need_dx, bool need_dy, {_OPTIONS}",
    3,
)
softplus = define_operator(
    "similarity_softplus",
    _softplus,
    f"Tensor x, Tensor y, Tensor scale, Tensor? bias, {_IDS}, Tensor? row_weights, bool with_gradients, "
    f"bool need_dx, bool need_dy, SymInt keep, {_OPTIONS}",
    7,
)
softplus_backward = define_operator(
    "similarity_softplus_backward",
    _softplus_backward,
    f"Tensor x, Tensor y, Tensor scale, Tensor? bias, {_IDS}, Tensor[] formed, Tensor kept, Tensor dsums, "
    f"Tensor dcosines, bool need_dx, bool need_dy, {_OPTIONS}",
    4,
)
logsumexp_backward.register_autograd(refuse_second_derivative)
softplus_backward.register_autograd(refuse_second_derivative)


@logsumexp.register_fake
def _(  # type: ignore[no-untyped-def]
    x, y, scale, x_image_id, y_image_id, x_text_id, y_text_id, slots,
    keep, images, texts_per_image, dims, dtype, backend,
):  # fmt: skip
    lse_x, lse_y = (scale.new_empty(max(len(dims), 1), rows.shape[0]) for rows in (x, y))
    kept = scale.new_empty(_kept_elements(x, y, scale, keep, backend))
    return lse_x, lse_y, _empty_cosines(scale, images, texts_per_image, dims), kept


@logsumexp_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    x, y, scale, x_image_id, y_image_id, x_text_id, y_text_id, slots,
    lse_x, lse_y, kept, dlse_x, dlse_y, dcosines, need_dx, need_dy, *options,
):  # fmt: skip
    return _fake_gradient(x, need_dx), _fake_gradient(y, need_dy), torch.empty_like(scale)


@softplus.register_fake
def _(  # type: ignore[no-untyped-def]
    x, y, scale, bias, x_image_id, y_image_id, x_text_id, y_text_id, slots, row_weights,
    with_gradients, need_dx, need_dy, keep, images, texts_per_image, dims, dtype, backend,
):  # fmt: skip
    gradients = (_fake_gradient(t, with_gradients and need, scale.dtype) for t, need in ((x, need_dx), (y, need_dy)))
    rows = scale.new_empty(max(len(dims), 1), x.shape[0])
    kept = scale.new_empty(_kept_elements(x, y, scale, keep, backend))
    cosines_ = _empty_cosines(scale, images, texts_per_image, dims)
    return rows, cosines_, *gradients, torch.empty_like(scale), torch.empty_like(scale), kept


@softplus_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    x, y, scale, bias, x_image_id, y_image_id, x_text_id, y_text_id, slots,
    formed, kept, dsums, dcosines, need_dx, need_dy, *options,
):  # fmt: skip
    return _fake_gradient(x, need_dx), _fake_gradient(y, need_dy), torch.empty_like(scale), torch.empty_like(scale)


def _empty_cosines(scale: Tensor, images: int, texts_per_image: int, dims: Sequence[int]) -> Tensor:
    return scale.new_empty(max(len(dims), 1), images, texts_per_image, texts_per_image)


def _fake_gradient(x: Tensor, needed: bool, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape if needed else (0,), dtype=dtype or x.dtype, device=x.device)


class LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x, y, scale, x_image_id, y_image_id, x_text_id, y_text_id, slots,
        images, texts_per_image, dims, dtype, backend, keep,
    ):  # fmt: skip
        options = images, texts_per_image, dims, dtype, backend
        rows = x, y, scale, x_image_id, y_image_id, x_text_id, y_text_id, slots
        keep = keep if any(ctx.needs_input_grad) else 0
        lse_x, lse_y, cosines_, kept = run_operator(logsumexp, _logsumexp, *rows, keep, *options)
        ctx.save_for_backward(*rows, lse_x, lse_y, kept)
        ctx.options = options
        return lse_x, lse_y, cosines_

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        gradients = run_operator(
            logsumexp_backward, _logsumexp_backward, *ctx.saved_tensors, *incoming, *needs, *ctx.options
        )
        return needed_gradients(ctx, *gradients)


class SoftplusSums(torch.autograd.Function):
    """Sums of rows; with ``total`` their sum, weighted if weights are given, whose gradient is formed early unless rows
    are so few that their cosines are kept instead."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x, y, scale, bias, x_image_id, y_image_id, x_text_id, y_text_id, slots,
        row_weights, total, grad_enabled, images, texts_per_image, dims, dtype, backend,
    ):  # fmt: skip
        rows = x, y, scale, bias, x_image_id, y_image_id, x_text_id, y_text_id, slots
        options = images, texts_per_image, dims, dtype, backend
        needs, wanted = ctx.needs_input_grad[:2], grad_enabled and any(ctx.needs_input_grad)
        # Graphs serve any number of rows.
        few = wanted and not torch.compiler.is_compiling() and _few_rows(x, images, dims, backend)
        early, keep = total and wanted and not few, x.shape[0] ** 2 * scale.itemsize if few else 0
        sums, cosines_, *formed, kept = run_operator(
            softplus, _softplus, *rows, row_weights, early, *needs, keep, *options
        )
        ctx.save_for_backward(*rows, row_weights, kept, *(formed if early else ()))
        ctx.options, ctx.total = options, total
        if total:
            # Element by element, since autocast would make a product of vectors half precision.
            sums = sums.sum() if row_weights is None else (sums * row_weights).sum()
        return sums, cosines_

    @staticmethod
    def backward(ctx: Any, dsums: Tensor, dcosines: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        saved = ctx.saved_tensors  # once: checkpoints compute them at each access
        rows, row_weights, kept, formed = saved[:9], saved[9], saved[10], list(saved[11:])
        if ctx.total and not formed:
            dsums = dsums.expand(1, len(rows[0])) if row_weights is None else dsums * row_weights
        # A graph that is freed needs the early gradients no more, and a copy of them would take as much memory as the
        # inputs. The operator itself, which graphs of torch.compile hold, mutates nothing.
        write_over = not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()
        gradients = run_operator(
            softplus_backward, lambda *arguments: _softplus_backward(*arguments, write_over),
            *rows, formed, kept, dsums, dcosines, *needs, *ctx.options,
        )  # fmt: skip
        return needed_gradients(ctx, *gradients)
