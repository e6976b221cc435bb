"""Pictures inside the page."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from betaclip.page.images import drawing, overlay, place


def pixels(uri: str, mode: str) -> np.ndarray:
    form, _, content = uri.removeprefix("data:image/").partition(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.format == form.upper()
        return np.asarray(image.convert(mode))


def test_drawing():
    """A photograph is shrunk, and keeps its shape; what was drawn keeps its pixels."""
    photo = Image.new("RGB", (1000, 500), (200, 30, 30))
    small = drawing(photo, 100)
    assert small[1:] == (100, 50) and photo.size == (1000, 500)
    assert small.uri.startswith("data:image/jpeg;") and np.abs(pixels(small.uri, "RGB") - (200, 30, 30)).max() < 4
    drawn = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    exact = drawing(drawn, 100)
    assert exact[1:] == (30, 20) and np.array_equal(pixels(exact.uri, "RGB"), drawn)


def test_overlay_is_brightest_where_the_attention_is():
    attention = torch.zeros(4, 6)
    attention[1, 4] = 8
    shown = pixels(overlay(attention, top=8), "RGBA").astype(int)
    height, width, _ = shown.shape
    assert height / width == 4 / 6 and height >= 24
    brightness = shown[..., :3].sum(-1)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert (row * 4 // height, column * 6 // width) == (1, 4)
    assert abs(shown[0, 0, 3] - 0.35 * 255) < 2 and shown[row, column, 3] > 0.75 * 255
    even = pixels(overlay(torch.ones(4, 6), top=2), "RGBA")
    assert len(np.unique(even.reshape(-1, 4), axis=0)) == 1 and abs(int(even[0, 0, 3]) - 0.6 * 255) < 2


def test_place():
    assert place((10, 20, 30, 60), (100, 200)) == (10, 10, 20, 20)
    assert place((-5, 0, 300, 50), (100, 100)) == (0, 0, 100, 50)
