"""Reading images, and the published transforms: a random crop to train, resize and centre crop to evaluate."""

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
    """An image is missing or broken; the message says how."""


def read_image(source: str | Path | IO[bytes]) -> Image.Image:
    """The decoded RGB image of a path or a binary file.

    Raises:
        UnreadableImageError: there is no such file, or it is no image, or only a part of one.
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
    """A random part of the image, of 50 to 100 % of its area and up to 4:3 or 3:4, bicubic; a function of ``seed``."""

    def __init__(self, size: int) -> None:
        self.crop = RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC)

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        # Not torch.manual_seed, which would also set the state of CUDA's generators, and fork_rng not restore it.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return normalize(self.crop(image))


class EvaluationTransform:
    """The shorter side resized to ``size``, bicubic, and the central square."""

    def __init__(self, size: int) -> None:
        self.crop = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])

    def __call__(self, image: Image.Image) -> Tensor:
        return normalize(self.crop(image))
