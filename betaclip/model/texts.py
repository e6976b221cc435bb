"""The texts of a batch of images as one flat tensor of tokens, without padding."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from betaclip.model.packing import Packing, pack


@dataclass(frozen=True)
class RaggedTexts:
    """N texts of B images, with any number of texts per image and of tokens per text.

    All tensors stay on the CPU, whatever the default device is: there the text tower plans its work, and it copies what
    it needs to the device. Texts that were first used under ``inference_mode`` can be trained on afterwards.

    Args:
        tokens: (T,) int64, text after text, each from its start token to its end token inclusive.
        lengths: (N,) int64 tokens of each text, at least 1.
        image_index: (N,) int64 image of each text, sorted. An image's first text is its caption.
        num_images: B; an image may have no text.
        levels: (N,) int64 level of each text in its image's hierarchy (``betaclip.data.batches``), below 0 for a text
            that only fills a slot, where the mask of ``BetaCLIP.forward`` is False. None: not known, and no text is
            such a filler.

    Raises:
        ValueError: the tensors are malformed or disagree; the message names the one.

    Example:
        >>> from betaclip.model.texts import RaggedTexts
        >>> texts = RaggedTexts.of([[[7, 1, 9], [7, 9]], [[7, 2, 9]]])  # two images, with two texts and one
        >>> texts.counts.tolist(), texts.lengths.tolist()
        ([2, 1], [3, 2, 3])
    """

    tokens: Tensor
    lengths: Tensor
    image_index: Tensor
    num_images: int
    levels: Tensor | None = None

    @classmethod
    def of(
        cls, texts: Iterable[Sequence[Sequence[int] | Tensor]], levels: Iterable[Sequence[int]] | None = None
    ) -> "RaggedTexts":
        """Make them from the token sequences of each image's texts and, if they are known, the levels of these."""
        per_image = [[t.tolist() if isinstance(t, Tensor) else t for t in image] for image in texts]
        flat = [t for image in per_image for t in image]
        counts = _int64([len(image) for image in per_image])
        return cls(
            # One tensor of all tokens: a tensor for each text would take longer than all the rest of a batch's making.
            _int64(list(chain.from_iterable(flat))),
            _int64([len(t) for t in flat]),
            torch.arange(len(per_image), device="cpu").repeat_interleave(counts),
            len(per_image),
            None if levels is None else _int64(list(chain.from_iterable(levels))),
        )

    def __post_init__(self) -> None:
        for name in ("tokens", "lengths", "image_index", "levels"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.dim() != 1 or tensor.dtype != torch.int64 or tensor.device.type != "cpu":
                got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
                raise ValueError(f"{name}: expected one dimension of int64 on the CPU, got {got}")
        for name, tensor in (("image_index", self.image_index), ("levels", self.levels)):
            if tensor is not None and len(self.lengths) != len(tensor):
                raise ValueError(f"{name}: expected shape {tuple(self.lengths.shape)} as lengths, "
                                 f"got {tuple(tensor.shape)}")  # fmt: skip
        if len(self.lengths) and int(self.lengths.min()) < 1:
            raise ValueError(f"lengths: expected at least 1, got {int(self.lengths.min())}")
        if int(self.lengths.sum()) != len(self.tokens):
            raise ValueError(f"lengths: expected a sum of {len(self.tokens)} as there are tokens, "
                             f"got {int(self.lengths.sum())}")  # fmt: skip
        index = self.image_index
        if len(index) and (bool((index.diff() < 0).any()) or int(index[0]) < 0 or int(index[-1]) >= self.num_images):
            got = f"{index.tolist()!r:.80}"
            raise ValueError(f"image_index: expected sorted numbers below {self.num_images}, got {got}")

    @cached_property
    def packing(self) -> Packing:
        """The text tower's plan for these texts. It is cached and pickled, so a data worker can make it ahead."""
        return pack(self.tokens, self.lengths)

    @cached_property
    def ids(self) -> Tensor:
        """(N,) int64, at least 0: numbers that depend only on a text's tokens and are equal for equal texts.

        They are sums of the tokens times odd random numbers, one for each position. Two different texts get the same
        number with a probability of some 2^-45.
        """
        if not len(self.lengths):
            return self.lengths.new_empty(0)
        starts = (self.lengths.cumsum(0) - self.lengths).numpy()
        position = np.arange(len(self.tokens)) - starts.repeat(self.lengths.numpy())
        factors = np.random.PCG64(0).random_raw(int(self.lengths.max())) | 1  # the same on every machine
        products = (self.tokens.numpy().astype(np.uint64) + 1) * factors[position]  # modulo 2^64
        sums = np.add.reduceat(products, starts)
        return torch.from_numpy((sums >> np.uint64(1)).astype(np.int64))

    @property
    def counts(self) -> Tensor:
        """(B,) number of texts of each image."""
        return torch.bincount(self.image_index, minlength=self.num_images)

    @property
    def max_texts_per_image(self) -> int:
        """The largest number of texts that any image has."""
        return int(self.counts.max()) if self.num_images else 0

    def slots(self, texts_per_image: int | None = None) -> tuple[Tensor, Tensor]:
        """Lay the texts out as K slots per image.

        Args:
            texts_per_image: K; the largest number that any image has if None.

        Returns:
            (B, K) index of the text in each slot, 0 in empty slots; (B, K) bool, True where there is a text.
        """
        counts = self.counts
        place = torch.arange(self.max_texts_per_image if texts_per_image is None else texts_per_image, device="cpu")
        valid = place < counts[:, None]
        return torch.where(valid, (counts.cumsum(0) - counts)[:, None] + place, 0), valid

    def of_images(self, begin: int, end: int) -> "RaggedTexts":
        """The texts of images ``begin`` to ``end`` (exclusive), which are numbered from 0 again."""
        first, last = (int(torch.searchsorted(self.image_index, i)) for i in (begin, end))
        token = torch.cat((self.lengths.new_zeros(1), self.lengths.cumsum(0)))
        return RaggedTexts(
            self.tokens[int(token[first]) : int(token[last])],
            self.lengths[first:last],
            self.image_index[first:last] - begin,
            end - begin,
            None if self.levels is None else self.levels[first:last],
        )


def _int64(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")
