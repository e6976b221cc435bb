"""open_clip models too small to learn anything, and texts for them, packed and padded."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from betaclip.model.texts import RaggedTexts

START, END, VOCABULARY = 90, 91, 92
# Their configuration, as a name for ``ModelConfig``.
TINY = json.dumps(
    {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 40, "layers": 2, "head_width": 10},
        "text_cfg": {"context_length": 77, "vocab_size": 92, "width": 24, "heads": 3, "layers": 2},
    }
)


def clip_model(kind: type[nn.Module] = CLIP, *, vision: Any = (), text: Any = (), **options: Any) -> Any:
    """A model with random weights, norms, biases and layer scales, whose sizes all differ."""
    vision = {"image_size": 24, "patch_size": 8, "width": 40, "layers": 3, "head_width": 10} | dict(vision)
    text = {"context_length": 77, "vocab_size": VOCABULARY, "width": 24, "heads": 3, "layers": 3} | dict(text)
    model = kind(12, vision, text, **options)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5 if parameter.shape == (40,) else 0.0, std=0.3)
    return model


def hierarchy(seed: int, images: int = 5, longest: int = 12) -> list[list[list[int]]]:
    """Texts of few words between start and end token, so that they share prefixes; one image has no text."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> list[int]:
        words = torch.randint(1, 4, (int(torch.randint(longest, (), generator=generator)),), generator=generator)
        return [START, *words.tolist(), END]

    texts = [[text() for _ in range(1 + 3 * i % 7)] for i in range(images)]
    texts[1] = []
    texts[-1] = [*texts[0][:2], [END], *texts[-1]]  # two that another image has too, and one of a single token
    return texts


def padded(texts: RaggedTexts, width: int) -> Tensor:
    """(N, width) tokens, 0 after each text, as open_clip's tokenizer makes them."""
    return nn.utils.rnn.pad_sequence(
        [*texts.tokens.split(texts.lengths.tolist()), torch.zeros(width, dtype=torch.int64)], batch_first=True
    )[:-1]


def gradients(out: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a weighted sum of ``out``; outputs of the same shape have the same weights."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out)
    return list(torch.autograd.grad((out * weights).sum(), parameters))
