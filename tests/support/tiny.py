"""A BetaCLIP too small to learn anything, and batches for it."""

import json
import sys
from typing import Any

import torch
from open_clip.model import CLIP
from torch.utils.data import Dataset

from betaclip.data.batches import Bad, Batch, Draw, Example
from betaclip.model.beta_clip import BetaCLIP, ModelConfig
from betaclip.model.texts import RaggedTexts

# How to start processes: a fork needs no imports, but cannot backpropagate once autograd has used a GPU.
START = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"

# A ModelConfig.name: open_clip's vocabulary, and otherwise as small as can be.
TOKENIZER_MODEL = json.dumps(
    {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
)

IMAGE_SIZE = 16
WORDS = 50


def tiny_model(seed: int = 0, **options: Any) -> BetaCLIP:
    """options: of open_clip's model."""
    torch.manual_seed(seed)
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
    text = {"context_length": 16, "vocab_size": WORDS, "width": 16, "heads": 2, "layers": 2}
    return BetaCLIP(CLIP(8, vision, text, **options), ModelConfig(pool_heads=2))


def tiny_batch(images: int, seed: int = 0) -> Batch:
    """Image i has 1 + i % 3 texts: a caption, a sentence, a phrase."""
    torch.manual_seed(seed)
    texts = [[torch.randint(1, WORDS, (2 + (i + j) % 5,)) for j in range(1 + i % 3)] for i in range(images)]
    levels = [list(range(len(image))) for image in texts]
    paths = [f"picture {i}" for i in range(images)]
    return Batch(torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE), RaggedTexts.of(texts, levels), paths, [])


class TinyDataset(Dataset[Example | Bad]):
    """Pictures of noise. Indices in ``bad`` cannot be read; those in ``poisoned`` have an infinite pixel."""

    def __init__(self, length: int, bad: tuple[int, ...] = (), poisoned: tuple[int, ...] = ()) -> None:
        self.length, self.bad, self.poisoned = length, bad, poisoned

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, draw: Draw) -> Example | Bad:
        path = f"picture {draw.index}"
        if draw.index in self.bad:
            return Bad(path, "torn")
        random = torch.Generator().manual_seed(draw.seed)
        image = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=random)
        tokens = [torch.randint(1, WORDS, (4,), generator=random).tolist() for _ in range(1 + draw.index % 3)]
        if draw.index in self.poisoned:
            image[0, 0, 0] = torch.inf
        return Example(image, [""] * len(tokens), tokens, [0] * len(tokens), path)
