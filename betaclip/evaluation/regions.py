"""Boxes in a picture, on the grid of its patches."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


def on_grid(boxes: Sequence[Box], sizes: Sequence[tuple[int, int]], grid: tuple[int, int]) -> Tensor:
    """Convert boxes in pixels of pictures with the given widths and heights to (N, 4) float32, in units of patches.

    A picture is squashed to the model's square, so each axis has its own factor.
    """
    height, width = grid
    factors = [(width / w, height / h) for w, h in sizes]
    scaled = [(x0 * x, y0 * y, x1 * x, y1 * y) for (x0, y0, x1, y1), (x, y) in zip(boxes, factors, strict=True)]
    return torch.tensor(scaled, dtype=torch.float32, device="cpu").reshape(-1, 4)


def region_features(patches: Tensor, grid: tuple[int, int], boxes: Tensor, image_of_box: Tensor) -> Tensor:
    """The (N, D) features of the boxes, by RoIAlign (1 x 1, aligned) of projected patches.

    Args:
        patches: (B, P, D), in row-major order of the grid.
        grid: height and width in patches.
        boxes: (N, 4) in units of patches.
        image_of_box: (N,) int64.
    """
    maps = patches.transpose(1, 2).unflatten(2, grid)
    rois = torch.cat((image_of_box[:, None], boxes), dim=1).to(maps.dtype)
    return roi_align(maps, rois, output_size=1, aligned=True).flatten(1)


def coverage(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """The share of each patch that a box covers, (N, P), from (N, 4) boxes in units of patches."""
    height, width = grid

    def overlap(low: Tensor, high: Tensor, count: int) -> Tensor:
        edge = torch.arange(count, device=boxes.device)
        return (torch.minimum(high[:, None], edge + 1) - torch.maximum(low[:, None], edge)).clamp_min(0)

    x0, y0, x1, y1 = boxes.unbind(1)
    return (overlap(y0, y1, height)[:, :, None] * overlap(x0, x1, width)[:, None, :]).flatten(1)
