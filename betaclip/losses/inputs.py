"""The inputs of the losses: checked, and brought into one form."""

import functools
import inspect
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from betaclip.kernels.backends import expect
from betaclip.kernels.precision import DTYPES, accumulation_dtype, autocast_dtype
from betaclip.kernels.similarity.operators import BACKENDS, Backend, RowLayout
from betaclip.losses.across_ranks import TRANSPORTS, renumbered
from betaclip.losses.prefixes import Dims, Prefixes

FORMS = ("ce", "bce")
PADDINGS = ("ignore", "published")
DIVISORS = ("pairs", "rows")
REDUCTIONS = ("mean", "none")
GATHERS = ("auto", *TRANSPORTS)  # or a bool
_FIRST_ROWS = 64  # compared first, since rows that are not alike show there
_compared_on: set[str] = set()  # types of GPUs whose tensors have been compared
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Batch(NamedTuple):
    """Checked inputs.

    image, text: (N, D), the longest of the prefixes of embeddings. scale: () in accumulation dtype. valid: (B, K) bool,
    or None if all texts are valid. dtype: of the matrix products. depth: of whole embeddings.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    layout: RowLayout
    valid: Tensor | None
    dtype: torch.dtype
    depth: int
    prefixes: Prefixes

    def all_rows(self) -> RowLayout:
        """The layout in which padded rows take part like others."""
        images, texts_per_image, _, slots, _ = self.layout
        if slots is not None:
            return self.layout
        ids = torch.arange(images, dtype=torch.int32, device=self.image.device)
        return self.layout._replace(image_id=ids.repeat_interleave(texts_per_image))

    def as_given(self, slots: Tensor) -> Tensor:
        """(B, K) as it is, or (N,) of a ragged batch."""
        return slots if self.layout.slots is None else self.layout.to_rows(slots)

    def valid_pairs(self) -> Tensor | None:
        """(B, K, K) bool, or None if all pairs are valid."""
        return None if self.valid is None else self.valid.unsqueeze(2) & self.valid.unsqueeze(1)


def prepare(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    mask: Tensor | None,
    image_index: Tensor | None,
    padding: str,
    dims: Dims | None = None,
) -> Batch:
    check_choice("padding", padding, PADDINGS)
    if padding == "published" and image_index is not None:
        raise ValueError("padding: expected 'ignore' with image_index (a ragged batch has no padding), got 'published'")
    _check_embeddings(image_embeds, text_embeds, mask, image_index)
    dtype = torch.promote_types(image_embeds.dtype, text_embeds.dtype)
    if dtype != torch.float64:
        dtype = autocast_dtype(image_embeds.device.type) or dtype
    scale = as_scalar("logit_scale", logit_scale, image_embeds, accumulation_dtype(dtype))
    depth, prefixes = image_embeds.shape[-1], Prefixes.of(dims)
    image_embeds, text_embeds = (prefixes.longest(embeds) for embeds in (image_embeds, text_embeds))
    if image_index is not None:
        layout = _ragged(image_index)
        assert layout.slots is not None
        return Batch(image_embeds, text_embeds, scale, layout, layout.slots >= 0, dtype, depth, prefixes)
    images, texts_per_image, _ = image_embeds.shape
    ids = torch.arange(images * texts_per_image, dtype=torch.int32, device=image_embeds.device) // texts_per_image
    if mask is not None:
        ids = torch.where(mask.flatten(), ids, -1)
    layout = RowLayout(images, texts_per_image, ids, None)
    image, text = image_embeds.flatten(0, 1), text_embeds.flatten(0, 1)
    return Batch(image, text, scale, layout, mask, dtype, depth, prefixes)


def _check_embeddings(
    image_embeds: Tensor, text_embeds: Tensor, mask: Tensor | None, image_index: Tensor | None
) -> None:
    expected = "(B, K, D), or (N, D) with image_index" if image_index is None else "(N, D) with image_index"
    for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        check_tensor(name, embeds)
        if embeds.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {embeds.dtype}")
        if embeds.dim() != (3 if image_index is None else 2):
            raise ValueError(f"{name}: expected {expected}, got shape {tuple(embeds.shape)}")
    expect("text_embeds", text_embeds, "as image_embeds", shape=image_embeds.shape)
    for name, value in (("mask", mask), ("image_index", image_index)):
        if value is not None:
            check_tensor(name, value)
    if mask is not None and image_index is not None:
        raise ValueError("mask: expected None with image_index (leave padded rows out instead), got a tensor")
    expect("mask", mask, shape=image_embeds.shape[:-1])
    expect("image_index", image_index, shape=image_embeds.shape[:-1])
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask: expected dtype torch.bool (True = valid), got {mask.dtype}")
    if image_index is not None and image_index.dtype not in _INDEX_DTYPES:
        raise ValueError(f"image_index: expected an integer dtype, got {image_index.dtype}")
    for name, value in (("text_embeds", text_embeds), ("mask", mask), ("image_index", image_index)):
        expect(name, value, "as image_embeds", device=image_embeds.device)


def _ragged(image_index: Tensor) -> RowLayout:
    """Slots of a ragged batch. Reads four numbers back to the host: the check, and the slots' shape."""
    index = image_index.to(torch.int64)
    rows = torch.arange(len(index), device=index.device)
    if len(index) == 0:
        return RowLayout(0, 0, index.to(torch.int32), index.view(0, 0))
    position = rows - torch.searchsorted(index, index)
    image = (position == 0).cumsum(0) - 1
    unsorted, lowest, images, texts_per_image = torch.stack(
        ((index[1:] < index[:-1]).any().to(torch.int64), index.min(), image[-1] + 1, position.max() + 1)
    ).tolist()
    if unsorted:
        raise ValueError("image_index: expected sorted values, rows of one image next to each other, got unsorted ones")
    if lowest < 0:
        raise ValueError(f"image_index: expected values >= 0, got {lowest}")
    slots = torch.full((images, texts_per_image), -1, dtype=torch.int64, device=index.device)
    slots[image, position] = rows
    return RowLayout(images, texts_per_image, image.to(torch.int32), slots)


def weights_of_pairs(batch: Batch, alpha: float, beta: Tensor | float, pair_weights: Tensor | None) -> Tensor:
    """(K, K) or (B, K, K) weights in accumulation dtype."""
    images, texts_per_image, like = batch.layout.images, batch.layout.texts_per_image, batch.scale
    if pair_weights is not None:
        check_tensor("pair_weights", pair_weights)
        shape = (texts_per_image, texts_per_image)
        if tuple(pair_weights.shape) not in (shape, (images, *shape)):
            expected = f"{shape} or {(images, *shape)}"
            raise ValueError(f"pair_weights: expected shape {expected}, got {tuple(pair_weights.shape)}")
        if pair_weights.is_complex():
            raise ValueError(f"pair_weights: expected real weights, got {pair_weights.dtype}")
        expect("pair_weights", pair_weights, "as image_embeds", device=like.device)
        return pair_weights.to(like.dtype)
    own = torch.eye(texts_per_image, dtype=torch.bool, device=like.device)
    return torch.where(own, alpha, as_scalar("beta", beta, like, like.dtype))


def prepare_row_weights(batch: Batch, weights: Tensor | None, padding: str) -> Tensor | None:
    """(B, K) weights of the rows in accumulation dtype; 0 in padded slots, unless these count."""
    if weights is None:
        return None
    check_tensor("weights", weights)
    layout = batch.layout
    rows = (layout.images, layout.texts_per_image) if layout.slots is None else (batch.image.shape[0],)
    expect("weights", weights, "as image_embeds", shape=torch.Size(rows), device=batch.image.device)
    if weights.is_complex():
        raise ValueError(f"weights: expected real weights, got {weights.dtype}")
    if weights.requires_grad:
        raise ValueError(
            "weights: expected constants, got a tensor that requires a gradient (multiply the rows of reduction='none')"
        )
    weights = layout.to_slots(weights.to(batch.scale.dtype).flatten(), 0)
    return weights if batch.valid is None or padding == "published" else weights.masked_fill(~batch.valid, 0)


def prepare_text_ids(
    batch: Batch, text_ids: Tensor | None, extra_texts: Tensor | None, extra_ids: Tensor | None, several_ranks: bool
) -> tuple[Batch, Tensor | None]:
    """The batch with the ids of its texts, and (E,) those of the extra ones; None if no ids are given.

    Ids are any integers, negative for a text that equals no other. On one rank they are numbered anew, to fit int32.
    """
    if text_ids is None:
        if extra_ids is not None:
            raise ValueError("extra_text_ids: expected text_ids with them, got None")
        return batch, None
    layout = batch.layout
    rows = (layout.images, layout.texts_per_image) if layout.slots is None else (batch.image.shape[0],)
    extra_rows = extra_texts.shape[:1] if isinstance(extra_texts, Tensor) else ()
    if extra_ids is not None and extra_texts is None:
        raise ValueError("extra_text_ids: expected extra_texts with them, got None")
    named = (
        ("text_ids", text_ids, rows, "as image_embeds"),
        ("extra_text_ids", extra_ids, extra_rows, "as extra_texts"),
    )
    for name, ids, shape, like in named:
        if ids is None:
            continue
        check_tensor(name, ids)
        expect(name, ids, like, shape=torch.Size(shape), device=batch.image.device)
        if ids.dtype not in _INDEX_DTYPES:
            raise ValueError(f"{name}: expected an integer dtype, got {ids.dtype}")
    own = text_ids.flatten().to(torch.int64)
    extra = own.new_full(extra_rows or (0,), -1) if extra_ids is None else extra_ids.to(torch.int64)
    if not several_ranks:
        own, extra = renumbered(torch.cat((own, extra))).split((len(own), len(extra)))
        own, extra = own.contiguous(), extra.contiguous()
    return batch._replace(layout=layout._replace(text_id=own)), extra


def warn_if_beta_cancels(image_embeds: Tensor, batch: Batch, beta: Tensor | float) -> None:
    """Warn, once per process, if all texts of each image have one image embedding in common: the targets' sum of logits
    in the softmax form is then the same for every ``beta``.

    An expanded view says so itself. Values are compared where that costs little: on the CPU, and once per process on a
    GPU, because the host waits for the answer.
    """
    if torch.compiler.is_compiling() or batch.layout.texts_per_image < 2:
        return
    if not isinstance(beta, Tensor) and beta == 0:
        return
    rows, expanded = batch.image.detach(), image_embeds.dim() == 3 and image_embeds.stride(1) == 0
    if not expanded and not _may_compare(rows):
        return
    plain = batch.layout.slots is None and batch.valid is None  # the first two rows are those of the first image
    if not expanded and plain and len(rows) and not torch.equal(rows[0], rows[1]):
        return
    if expanded or _rows_of_an_image_are_equal(rows, batch.layout.image_id):
        _warn_that_beta_cancels()


def _may_compare(rows: Tensor) -> bool:
    device_type = rows.device.type
    if type(rows) is not Tensor or device_type == "meta" or device_type in _compared_on:  # a subclass may be fake
        return False
    if device_type == "cpu":
        return True
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    _compared_on.add(device_type)
    return True


def _rows_of_an_image_are_equal(rows: Tensor, image_id: Tensor) -> bool:
    """Whether some image has several rows, and all neighbouring rows of one image are equal."""
    for end in (_FIRST_ROWS, len(rows)):
        x, ids = rows[:end], image_id[:end]
        neighbours = (ids[1:] == ids[:-1]) & (ids[1:] >= 0)
        if not neighbours.any() or not torch.equal(x[1:][neighbours], x[:-1][neighbours]):
            return False
    return True


@functools.cache
def _warn_that_beta_cancels() -> None:
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("betaclip", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        "beta: has no effect in the softmax form if all texts of an image have the same image embedding, as here; give "
        "each text an image embedding of its own (TextConditionedPool does), or use the sigmoid form",
        stacklevel=level,
    )


def as_scalar(name: str, value: Tensor | float, like: Tensor, dtype: torch.dtype) -> Tensor:
    """() on the device of ``like``; a one-element tensor counts as a scalar, as in SigLIP's models."""
    if isinstance(value, (int, float)):  # not a union, which Dynamo of torch 2.9 cannot trace
        return torch.full((), float(value), dtype=dtype, device=like.device)  # unlike torch.tensor, no copy to wait for
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point scalar, got {value.dtype} of shape {tuple(value.shape)}")
    expect(name, value, "as image_embeds", device=like.device)
    return value.reshape(()).to(dtype)


def check_gather(gather: object) -> None:
    if not isinstance(gather, bool) and gather not in GATHERS:
        raise ValueError(f"gather: expected a bool, {', '.join(map(repr, GATHERS))}, got {gather!r}")


def check_backend(backend: Backend) -> None:
    """A name must be known; an object is taken as it is."""
    if isinstance(backend, str):
        check_choice("backend", backend, ("auto", *BACKENDS))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_weight(name: str, value: Tensor | float) -> None:
    """Numbers are checked, and constant tensors on the CPU; others are taken as they are, without reading them."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.requires_grad or value.numel() != 1 or torch.compiler.is_compiling():
            return
        value = float(value)
    if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite weight >= 0, got {value!r}")


def one_text_per_image(
    image_embeds: Tensor, text_embeds: Tensor, weights: Tensor | None, text_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(B, 1, D), (B, 1, D), (B, 1) and (B, 1) from (B, D), (B, D), (B,) and (B,).

    Raises:
        ValueError: they have other shapes.
    """
    for name, embeds in (("image_embeds", image_embeds), ("text_embeds", text_embeds)):
        check_tensor(name, embeds)
        if embeds.dim() != 2:
            raise ValueError(f"{name}: expected (B, D), got shape {tuple(embeds.shape)}")
    expect("text_embeds", text_embeds, "as image_embeds", shape=image_embeds.shape)
    for name, rows in (("weights", weights), ("text_ids", text_ids)):
        if rows is not None:
            check_tensor(name, rows)
            expect(name, rows, "as image_embeds", shape=image_embeds.shape[:1])
    weights, text_ids = (None if rows is None else rows.unsqueeze(1) for rows in (weights, text_ids))
    return image_embeds.unsqueeze(1), text_embeds.unsqueeze(1), weights, text_ids


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if hasattr(value, "device_mesh"):
        raise ValueError(
            f"{name}: expected this rank's own tensor, got a DTensor (pass its to_local(), and gather=True)"
        )
