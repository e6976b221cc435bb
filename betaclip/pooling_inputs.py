"""The arguments of pooling, checked."""

import torch
from torch import Tensor

from betaclip.kernels.backends import expect
from betaclip.kernels.precision import DTYPES, autocast_dtype


def check_inputs(
    patches: Tensor, queries: Tensor, patch_mask: Tensor | None, query_mask: Tensor | None, weight: Tensor
) -> None:
    """Raise a ValueError for malformed arguments. weight: the module's in_proj_weight, (3 D, D)."""
    width = weight.shape[1]
    if patches.dim() != 3 or patches.shape[1] == 0 or patches.shape[2] != width:
        raise ValueError(f"patches: expected (B, P, {width}) with P >= 1, got shape {tuple(patches.shape)}")
    images = patches.shape[0]
    shared = queries.dim() == 2 and queries.shape[1] == width
    if not shared and (queries.dim() != 3 or queries.shape[::2] != (images, width)):
        expected = f"({images}, K, {width}) or (K, {width}) as patches are {tuple(patches.shape)}"
        raise ValueError(f"queries: expected {expected}, got shape {tuple(queries.shape)}")
    for name, tensor in (("patches", patches), ("queries", queries)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != weight.device:
            raise ValueError(f"{name}: expected device {weight.device} as for the module, got {tensor.device}")
        if tensor.dtype != weight.dtype and autocast_dtype(tensor.device.type) is None:
            expected = f"dtype {weight.dtype} as in the module's weights, or autocast"
            raise ValueError(f"{name}: expected {expected}, got {tensor.dtype}")
    for name, mask, shape in (
        ("patch_mask", patch_mask, patches.shape[:2]),
        ("query_mask", query_mask, (images, queries.shape[-2])),
    ):
        if mask is None:
            continue
        if mask.shape != shape or mask.dtype != torch.bool:
            expected = f"bool of shape {tuple(shape)}, True = valid"
            raise ValueError(f"{name}: expected {expected}, got {mask.dtype} {tuple(mask.shape)}")
        if mask.device != patches.device:
            raise ValueError(f"{name}: expected device {patches.device} as for patches, got {mask.device}")


def check_pairs(
    patches: Tensor, queries: Tensor, images: Tensor | None, texts: Tensor | None, query_mask: Tensor | None
) -> None:
    """Raise a ValueError for arguments that only ``score`` takes, or takes in another form."""
    if queries.dim() != 2:
        raise ValueError(f"queries: expected (M, D), got shape {tuple(queries.shape)}")
    count = len(queries)
    if query_mask is not None:
        if query_mask.shape != (count,) or query_mask.dtype != torch.bool:
            expected = f"bool of shape ({count},), True = valid"
            raise ValueError(f"query_mask: expected {expected}, got {query_mask.dtype} {tuple(query_mask.shape)}")
        expect("query_mask", query_mask, "as for queries", device=queries.device)
    if images is not None:
        if images.dim() != 2 or len(images) != count or images.dtype not in (torch.int64, torch.int32):
            expected = f"integers of shape ({count}, J)"
            raise ValueError(f"images: expected {expected}, got {images.dtype} {tuple(images.shape)}")
        if images.numel() and not 0 <= int(images.min()) <= int(images.max()) < len(patches):
            got = f"{int(images.min())} to {int(images.max())}"
            raise ValueError(f"images: expected numbers from 0 to {len(patches) - 1}, got {got}")
    if texts is None:
        return
    if images is not None:
        raise ValueError("texts: expected None with images, which choose the pairs too, got a tensor")
    _check_numbers(patches, texts, count)


def check_texts(patches: Tensor, queries: Tensor, texts: Tensor, query_mask: Tensor | None) -> None:
    """Raise a ValueError for numbers of texts that ``forward`` cannot take."""
    if queries.dim() != 2:
        raise ValueError(f"queries: expected (M, D) with texts, which number them, got shape {tuple(queries.shape)}")
    if query_mask is not None:
        raise ValueError("query_mask: expected None with texts, which are below 0 for none, got a tensor")
    _check_numbers(patches, texts, len(queries))


def _check_numbers(patches: Tensor, texts: Tensor, count: int) -> None:
    """texts: for each of B images numbers up to ``count`` - 1."""
    expect("texts", texts, "as for patches", device=patches.device)
    if texts.dim() != 2 or len(texts) != len(patches) or texts.dtype not in (torch.int64, torch.int32):
        expected = f"integers of shape ({len(patches)}, Q)"
        raise ValueError(f"texts: expected {expected}, got {texts.dtype} {tuple(texts.shape)}")
    if texts.device.type == "cpu" and texts.numel() and int(texts.max()) >= count:
        raise ValueError(f"texts: expected numbers up to {count - 1}, or below 0 for none, got {int(texts.max())}")
