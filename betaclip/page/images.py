"""Pictures as data that a page holds in itself."""

import base64
import io
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from betaclip.evaluation.regions import Box

COLOURS = colormaps["inferno"]
OVERLAY_SIDE = 48  # pixels, or a little less; the browser enlarges and smooths them
RAMP = f"linear-gradient(to right, {', '.join(to_hex(COLOURS(i / 6)) for i in range(7))})"  # in CSS


class Drawing(NamedTuple):
    """An image for ``<img>``: its data as a URI, its width and height."""

    uri: str
    width: int
    height: int


class Place(NamedTuple):
    """A box in percent of the picture that it is in."""

    left: float
    top: float
    width: float
    height: float


def drawing(image: Image.Image | npt.NDArray[np.uint8], max_side: int) -> Drawing:
    """Shrink a picture so that no side is longer than ``max_side``. What was drawn as an array is kept as it is, as
    PNG; photographs are kept as JPEG."""
    if isinstance(image, Image.Image):
        small = image.copy()
        small.thumbnail((max_side, max_side))
        return Drawing(_uri(small, "jpeg", quality=80), *small.size)
    drawn = Image.fromarray(image)
    return Drawing(_uri(drawn, "png", optimize=True), *drawn.size)


def overlay(attention: Tensor, top: float) -> str:
    """The URI of an image to lay over a picture: smoothed, and more opaque where the attention is larger.

    attention: (rows, columns), at least 0. top: the end of the scale of colours.
    """
    factor = max(1, OVERLAY_SIDE // max(attention.shape))
    smooth = F.interpolate(attention[None, None].cpu(), scale_factor=factor, mode="bicubic", align_corners=False)[0, 0]
    share = (smooth / top).clamp(0, 1).numpy()
    pixels = COLOURS(share)
    pixels[..., 3] = 0.35 + 0.5 * share
    return _uri(Image.fromarray(np.rint(255 * pixels).astype(np.uint8)), "png", optimize=True)


def place(box: Box, size: tuple[int, int]) -> Place:
    """The place of a box, in pixels of a picture of that width and height; what lies outside is cut off."""
    width, height = size
    x0, x1 = (min(max(100 * x / width, 0), 100) for x in (box[0], box[2]))
    y0, y1 = (min(max(100 * y / height, 0), 100) for y in (box[1], box[3]))
    return Place(*(round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)))


def _uri(image: Image.Image, form: str, **options: int) -> str:
    data = io.BytesIO()
    image.save(data, form, **options)
    return f"data:image/{form};base64,{base64.b64encode(data.getvalue()).decode()}"
