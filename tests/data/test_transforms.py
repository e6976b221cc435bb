"""Reading images, broken ones too, and the transforms."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms import RandomResizedCrop

from betaclip.data.transforms import EvaluationTransform, TrainingTransform, UnreadableImageError, normalize, read_image


def _picture(width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _file(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def test_reads(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(_file(_picture(), "PNG"))
    for source in (path, str(path), io.BytesIO(path.read_bytes())):
        assert np.array_equal(read_image(source), _picture())


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_reads_as_rgb(mode):
    assert read_image(io.BytesIO(_file(_picture().convert(mode), "TIFF"))).mode == "RGB"


RAMP = np.tile(np.arange(256, dtype=np.uint16) * 257, (4, 1))
GREY = np.stack([RAMP // 257] * 3, -1)


def _png_of_16_bits(values: np.ndarray, colour: int) -> bytes:
    """Write a PNG of 16 bits, which Pillow cannot with several channels; colour: 0, 2, 4 or 6, as in PNG."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    size = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "data",
    [
        _file(Image.fromarray(RAMP), "PNG"), _file(Image.fromarray(RAMP), "TIFF"),
        _file(Image.fromarray(RAMP.astype(">u2")), "TIFF"), _png_of_16_bits(RAMP, 0),
        _png_of_16_bits(np.stack([RAMP] * 3, -1), 2), _png_of_16_bits(np.stack([RAMP, ~(0 * RAMP)], -1), 4),
        _png_of_16_bits(np.stack([RAMP, RAMP, RAMP, ~(0 * RAMP)], -1), 6),
        b"P5 256 4 65535\n" + RAMP.astype(">u2").tobytes(),
        b"P5 256 4 255\n" + (RAMP // 257).astype(np.uint8).tobytes(),
        b"P6 256 4 65535\n" + np.stack([RAMP] * 3, -1).astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "tiff big-endian", "png L", "png RGB", "png LA", "png RGBA", "pgm", "pgm of 8 bits", "ppm"],
)  # fmt: skip
def test_16_bits_are_scaled(data):
    image = read_image(io.BytesIO(data))
    assert image.mode == "RGB" and np.array_equal(image, GREY)


def test_12_bits_are_scaled():
    """Two pixels in three bytes, in a TIFF whose numbers are little-endian."""
    values = np.linspace(0, 4095, 64).round().astype(np.uint16)
    packed = b"".join(bytes((a >> 4, (a & 15) << 4 | b >> 8, b & 255)) for a, b in values.reshape(-1, 2).tolist())
    tags = {256: 64, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    ending = struct.pack("<H", len(tags)) + entries + bytes(4)
    image = read_image(io.BytesIO(b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + ending))
    assert np.abs(np.asarray(image)[0, :, 0] - np.linspace(0, 255, 64)).max() <= 0.6


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_of_unknown_range_are_refused(dtype):
    data = _file(Image.fromarray((RAMP / 65535).astype(dtype)), "TIFF")
    with pytest.raises(UnreadableImageError, match="unknown range"):
        read_image(io.BytesIO(data))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(form, orientation):
    """Pictures are turned as by ImageOps.exif_transpose; 0 and 9 are no orientations."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    _picture().save(buffer, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    with Image.open(buffer) as stored:
        assert np.array_equal(read_image(buffer, upright=False), stored)
        assert np.array_equal(read_image(buffer), ImageOps.exif_transpose(stored))
    assert read_image(buffer).size == ((30, 40) if 5 <= orientation <= 8 else (40, 30))


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*" + b"\xff" * 40, b"x" * 99])
def test_broken_exif_is_none(exif):
    buffer = io.BytesIO()
    _picture().save(buffer, "JPEG", exif=exif)
    assert read_image(buffer).size == (40, 30)


def test_what_would_take_too_long_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", str(tmp_path)):
        with pytest.raises(UnreadableImageError, match="is not a regular file"):
            read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(UnreadableImageError, match="40 x 30 pixels, more"),
    ):
        read_image(io.BytesIO(_file(_picture(), "PNG")))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(form, share):
    data = _file(_picture(), form)
    with pytest.raises(UnreadableImageError):
        read_image(io.BytesIO(data[: int(share * len(data))]))


def test_missing_or_no_image(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"FileNotFoundError: .*nothing\.jpg"):
        read_image(tmp_path / "nothing.jpg")
    with pytest.raises(UnreadableImageError, match="UnidentifiedImageError"):
        read_image(io.BytesIO(b"<html>404</html>"))
    with pytest.raises(UnreadableImageError, match="UnidentifiedImageError"):
        read_image(io.BytesIO(b""))


def test_normalize():
    values = normalize(np.stack([np.full((2, 5), v, np.uint8) for v in (0, 128, 255)], -1))
    assert values.shape == (3, 2, 5) and values.dtype == torch.float32
    expected = [-0.48145466 / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    torch.testing.assert_close(values[:, 0, 0], torch.tensor(expected))


def test_training_transform():
    transform, image = TrainingTransform(24), _picture(400, 300)
    first, again, other = (transform(image, seed) for seed in (3, 3, 4))
    assert first.shape == (3, 24, 24)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_interpolation_of_the_training_transform():
    """The same part of the image, in the released code as torchvision resizes by default."""
    image = _picture(400, 300)
    bicubic, bilinear = (TrainingTransform(24, name)(image, 3) for name in ("bicubic", "bilinear"))
    torch.manual_seed(3)
    assert torch.equal(bilinear, normalize(RandomResizedCrop(24, scale=(0.5, 1.0))(image)))
    assert 0 < (bicubic - bilinear).abs().mean() < 0.2


def test_training_transform_crops_the_published_share():
    crops = TrainingTransform(24).crop
    shares = []
    for _ in range(300):
        _, _, height, width = crops.get_params(_picture(), crops.scale, crops.ratio)
        shares.append(height * width / (40 * 30))
        assert 0.7 <= width / height <= 1.4
    assert 0.45 <= min(shares) < 0.6 and max(shares) > 0.9


def test_training_transform_leaves_the_random_state():
    before = torch.get_rng_state()
    TrainingTransform(24)(_picture(), 3)
    assert torch.equal(torch.get_rng_state(), before)
    first = TrainingTransform(24)(_picture(), 3)
    torch.manual_seed(99)
    assert torch.equal(TrainingTransform(24)(_picture(), 3), first)


def test_evaluation_transform():
    image = Image.new("RGB", (60, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))  # the central square is blue
    values = EvaluationTransform(10)(image)
    assert values.shape == (3, 10, 10)
    blue = normalize(np.array([[[0, 0, 255]]], np.uint8))
    torch.testing.assert_close(values[:, 3:7, 3:7], blue.expand(3, 4, 4))
