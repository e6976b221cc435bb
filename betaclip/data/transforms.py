"""Reads images, and turns them into tensors: a random crop to train, a central square to evaluate."""

from pathlib import Path
from typing import IO, Literal

import numpy as np
import numpy.typing as npt
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomResizedCrop, Resize

_MEAN, _STD = (torch.tensor(values, device="cpu").view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
_FACTOR, _SHIFT = 1 / (255 * _STD), _MEAN / _STD

Interpolation = Literal["bicubic", "bilinear"]

_BITS_PER_SAMPLE = 258  # TIFF's tag
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ValueError):
    """An image is missing or broken; the message says what is wrong with it."""


def read_image(source: str | Path | IO[bytes], *, upright: bool = True) -> Image.Image:
    """The decoded RGB image of a path or a binary file.

    16 bits are scaled to 8. Wider numbers are refused, because what is black and white among them is not known.

    Args:
        upright: turn the image as its EXIF orientation says; not where boxes count pixels as they are stored.

    Raises:
        UnreadableImageError: the file is missing, is not an image or only a part of one, has more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``, or numbers of unknown range.
    """
    try:
        if isinstance(source, str | Path) and Path(source).exists() and not Path(source).is_file():
            raise UnreadableImageError(f"{source} is not a regular file")
        with Image.open(source) as image:
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise UnreadableImageError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
            decoded = to_rgb(image)
            return _upright(image, decoded) if upright else decoded
    except (MemoryError, UnreadableImageError):
        raise
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB. Pillow's own conversion clips wider numbers at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] if isinstance(image, TiffImageFile) else 16
        white = 2**bits - 1
        values = np.asarray(image).astype(np.float32) * np.float32(255 / white)
        return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImageError(f"pixels of {'32-bit integers' if image.mode == 'I' else 'floats'}: unknown range")
    return image.convert("RGB")


def _upright(image: Image.Image, decoded: Image.Image) -> Image.Image:
    """``decoded``, turned by the EXIF orientation of ``image``; not at all if its EXIF data cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises whatever broken data lead it to, and the image itself is whole
        return decoded
    return decoded if turn is None else decoded.transpose(turn)


def normalize(image: Image.Image | npt.NDArray[np.uint8]) -> Tensor:
    """(3, H, W) float32 with CLIP's mean and standard deviation, from an RGB image or (H, W, 3) uint8."""
    values = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous().float()
    return values.mul_(_FACTOR).sub_(_SHIFT)


def denormalize(image: Tensor) -> npt.NDArray[np.uint8]:
    """The (H, W, 3) uint8 that :func:`normalize` made (3, H, W) of."""
    return ((image.cpu() + _SHIFT) / _FACTOR).round_().clamp_(0, 255).byte().permute(1, 2, 0).numpy()


class TrainingTransform:
    """A random part of the image, resized to a square: 50 to 100 % of its area, no longer than 4:3.

    The part is a function of ``seed``. The released code resizes it by bilinear interpolation, torchvision's default.
    """

    def __init__(self, size: int, interpolation: Interpolation = "bicubic") -> None:
        self.crop = RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=InterpolationMode(interpolation))

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        # torch.manual_seed would also set the states of CUDA's generators, which this fork_rng does not restore.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return normalize(self.crop(image))


class EvaluationTransform:
    """The central square of the image, after its shorter side is resized to ``size``, bicubic."""

    def __init__(self, size: int) -> None:
        self.crop = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])

    def __call__(self, image: Image.Image) -> Tensor:
        return normalize(self.crop(image))
