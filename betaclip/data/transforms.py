"""Reads images, and turns them into tensors as published: a random crop to train, a central square to evaluate."""

from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomResizedCrop, Resize

_MEAN, _STD = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
_FACTOR, _SHIFT = 1 / (255 * _STD), _MEAN / _STD


class UnreadableImageError(ValueError):
    """An image is missing or broken; the message says what is wrong with it."""


def read_image(source: str | Path | IO[bytes]) -> Image.Image:
    """The decoded RGB image of a path or a binary file.

    Raises:
        UnreadableImageError: the file is missing, is not an image, or is only a part of one.
    """
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from error


def normalize(image: Image.Image | npt.NDArray[np.uint8]) -> Tensor:
    """(3, H, W) float32 with CLIP's mean and standard deviation, from an RGB image or (H, W, 3) uint8."""
    values = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous().float()
    return values.mul_(_FACTOR).sub_(_SHIFT)


class TrainingTransform:
    """A random part of the image, resized to a square: 50 to 100 % of its area, no longer than 4:3, bicubic.

    The part is a function of ``seed``.
    """

    def __init__(self, size: int) -> None:
        self.crop = RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC)

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
