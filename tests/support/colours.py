"""A model that sees colours and reads their names, so that the right answers are known, and pictures for it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor, nn

from betaclip.model.texts import RaggedTexts
from betaclip.model.tokenizer import Tokenizer
from betaclip.pooling import TextConditionedPool

SIZE, GRID = 32, 4
NAMES = ("red", "green", "blue")
Squares = dict[tuple[int, int], str]  # row and column of the grid, and the name of a colour


class ColourModel(nn.Module):
    """A patch's embedding is its mean (red, green, blue), a text's how often it says each; CLS is the patches' mean.

    The pool attends by the cosine of the two, times ``sharpness``, and returns what it attends to.
    """

    def __init__(self, sharpness: float = 200.0) -> None:
        super().__init__()
        self.image_size, self.patch_grid, self.embed_dim, self.context_length = SIZE, (GRID, GRID), 4, 77
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.pool = TextConditionedPool(4, num_heads=1)
        tokenizer = Tokenizer()
        self.colour_of_token = {tokenizer(name)[1]: i for i, name in enumerate(NAMES)}
        self.images = self.texts = 0  # encoded so far
        self.averaged = False
        with torch.no_grad():
            for parameter in self.pool.parameters():
                parameter.zero_()
            query, key, value = self.pool.attn.in_proj_weight.chunk(3)
            query += sharpness * 2 * torch.eye(4)  # 2: the root of the head's width
            key += torch.eye(4)
            value += torch.eye(4)
            self.pool.attn.out_proj.weight += torch.eye(4)

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        assert not torch.is_grad_enabled() and not self.training
        assert images.shape[1:] == (3, SIZE, SIZE)
        self.images += len(images)
        mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
        patches = F.avg_pool2d(images * std + mean, SIZE // GRID).flatten(2).transpose(1, 2)
        patches = F.pad(torch.where(patches > 0.1, patches, 0), (0, 1))  # resizing spreads colours a little
        return patches.mean(1), patches

    def encode_text(self, texts: RaggedTexts) -> Tensor:
        assert not torch.is_grad_enabled() and not self.training
        self.texts += len(texts.lengths)
        embeds = torch.zeros(len(texts.lengths), 4)
        for row, tokens in enumerate(texts.tokens.split(texts.lengths.tolist())):
            for token in tokens.tolist():
                if token in self.colour_of_token:
                    embeds[row, self.colour_of_token[token]] += 1
        return embeds


def picture(squares: Squares, width: int = SIZE, height: int = SIZE) -> npt.NDArray[np.uint8]:
    """Black, with coloured squares of the grid; its cells are of any shape."""
    image = np.zeros((height, width, 3), np.uint8)
    for (row, column), name in squares.items():
        y0, y1, x0, x1 = box_of(row, column, width, height)[1::2] + box_of(row, column, width, height)[0::2]
        image[y0:y1, x0:x1, NAMES.index(name)] = 255
    return image


def box_of(row: int, column: int, width: int = SIZE, height: int = SIZE) -> tuple[int, int, int, int]:
    across, down = width // GRID, height // GRID
    return column * across, row * down, (column + 1) * across, (row + 1) * down


def save(path: Path, image: npt.NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def save_broken(path: Path) -> Path:
    """A PNG that ends too early."""
    save(path, picture({(0, 0): "red"}))
    path.write_bytes(path.read_bytes()[:-30])
    return path


def noise(seed: int, side: int = SIZE) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)


def save_seven(folder: Path) -> list[Path]:
    """Files of noise, of which the third cannot be read and the last is missing."""
    files = [save(folder / f"{i}.png", noise(i)) for i in range(7)]
    save_broken(files[2])
    files[6].unlink()
    return files
