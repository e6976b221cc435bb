"""Texts of a batch of images as the tokens that exist: one flat tensor, nothing padded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from betaclip.model.packing import Packing, pack


@dataclass(frozen=True)
class RaggedTexts:
    """N texts of B images, any number of texts per image and of tokens per text.

    All tensors are on the CPU, where the text tower plans its work; it moves what it needs.

    tokens: (T,) int64, text after text, each from its start token to its end token inclusive.
    lengths: (N,) int64 tokens of each text, at least 1.
    image_index: (N,) int64 image of each text, sorted. An image's first text is its caption.
    num_images: B; images without any text are legal.
    """

    tokens: Tensor
    lengths: Tensor
    image_index: Tensor
    num_images: int

    @classmethod
    def of(cls, texts: Iterable[Sequence[Sequence[int] | Tensor]]) -> "RaggedTexts":
        """From the token sequences of each image's texts."""
        per_image = [[torch.as_tensor(t, dtype=torch.int64) for t in image] for image in texts]
        flat = [t for image in per_image for t in image]
        counts = torch.tensor([len(image) for image in per_image], dtype=torch.int64)
        return cls(
            torch.cat(flat) if flat else torch.empty(0, dtype=torch.int64),
            torch.tensor([len(t) for t in flat], dtype=torch.int64),
            torch.arange(len(per_image)).repeat_interleave(counts),
            len(per_image),
        )

    def __post_init__(self) -> None:
        for name in ("tokens", "lengths", "image_index"):
            tensor = getattr(self, name)
            if tensor.dim() != 1 or tensor.dtype != torch.int64 or tensor.device.type != "cpu":
                got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                raise ValueError(f"{name}: expected one dimension of int64 on the CPU, got {got}")
        if len(self.lengths) != len(self.image_index):
            raise ValueError(f"image_index: expected shape {tuple(self.lengths.shape)} as lengths, "
                             f"got {tuple(self.image_index.shape)}")  # fmt: skip
        if len(self.lengths) and int(self.lengths.min()) < 1:
            raise ValueError(f"lengths: expected at least 1, got {int(self.lengths.min())}")
        if int(self.lengths.sum()) != len(self.tokens):
            raise ValueError(f"lengths: expected a sum of {len(self.tokens)} as there are tokens, "
                             f"got {int(self.lengths.sum())}")  # fmt: skip
        index = self.image_index
        if len(index) and (bool((index.diff() < 0).any()) or int(index[0]) < 0 or int(index[-1]) >= self.num_images):
            raise ValueError(f"image_index: expected sorted numbers below {self.num_images}, got {index.tolist()}")

    @cached_property
    def packing(self) -> Packing:
        """How the text tower computes these texts. Kept, also by pickle: a data worker can make it ahead."""
        return pack(self.tokens, self.lengths)

    @property
    def counts(self) -> Tensor:
        """(B,) texts of each image."""
        return torch.bincount(self.image_index, minlength=self.num_images)

    @property
    def max_texts_per_image(self) -> int:
        """The largest number of texts of any image."""
        return int(self.counts.max()) if self.num_images else 0

    def slots(self, width: int | None = None) -> tuple[Tensor, Tensor]:
        """(B, K) text in each slot, 0 where there is none, and (B, K) bool whether there is one; K = ``width`` or the
        largest number of texts of any image."""
        width = self.max_texts_per_image if width is None else width
        counts = self.counts
        place = torch.arange(width)
        valid = place < counts[:, None]
        return torch.where(valid, (counts.cumsum(0) - counts)[:, None] + place, 0), valid

    def of_images(self, begin: int, end: int) -> "RaggedTexts":
        """The texts of images ``begin`` to ``end``, numbered from 0."""
        first, last = (int(torch.searchsorted(self.image_index, i)) for i in (begin, end))
        token = torch.cat((self.lengths.new_zeros(1), self.lengths.cumsum(0)))
        return RaggedTexts(
            self.tokens[int(token[first]) : int(token[last])],
            self.lengths[first:last],
            self.image_index[first:last] - begin,
            end - begin,
        )
