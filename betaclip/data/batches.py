"""Examples, batches of them, and the treatment of examples that cannot be read.

A data set maps a :class:`Draw` to an :class:`Example`, or to a :class:`Bad` with the reason: bad data are found in
worker processes, where an exception would end the epoch. ``collate`` leaves them out of the batch and hands them on;
the training loop gives them to its :class:`BadData`, which reports them and stops the run when there are too many.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from betaclip.model.texts import RaggedTexts

CAPTION, SENTENCE, PHRASE = range(3)  # the levels of an example's texts
PADDING = -1  # the level of a text that only fills a slot (``betaclip.data.padding``)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """What a sampler yields: the number of an example, and the seed of everything random in it.

    An example therefore does not depend on the number of workers or their order.

    epoch: the pass over the data, from 0; a mixture's examples depend on it.
    """

    index: int
    seed: int
    epoch: int = 0


@dataclass(frozen=True)
class Example:
    """A picture with its texts.

    image: (3, H, W) float32, normalised. texts: the caption, then sentences, then phrases. tokens: the ids of each.
    levels: CAPTION, SENTENCE or PHRASE, for each text. path: where the picture is from, for messages.
    """

    image: Tensor
    texts: list[str]
    tokens: list[list[int]]
    levels: list[int]
    path: str


@dataclass(frozen=True)
class Bad:
    """An example that cannot be read, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """B images with their texts.

    images: (B, 3, H, W) float32. texts: always on the CPU. paths: where the B images are from. bad: the examples that
    are missing from the batch because they could not be read.
    """

    images: Tensor
    texts: RaggedTexts
    paths: list[str]
    bad: list[Bad]

    def of_images(self, begin: int, end: int) -> "Batch":
        """Images ``begin`` to ``end`` with their texts, as views, and without ``bad``."""
        return Batch(self.images[begin:end], self.texts.of_images(begin, end), self.paths[begin:end], [])

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its images on ``device``; the copy is asynchronous if they are pinned."""
        return replace(self, images=self.images.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch with its images in page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        return replace(self, images=self.images.pin_memory())


def collate(examples: Sequence[Example | Bad]) -> Batch:
    """Make a batch of the examples that could be read. If none could, its images are (0, 3, 0, 0)."""
    good = [example for example in examples if isinstance(example, Example)]
    return Batch(
        torch.stack([example.image for example in good]) if good else torch.empty(0, 3, 0, 0, device="cpu"),
        RaggedTexts.of((example.tokens for example in good), (example.levels for example in good)),
        [example.path for example in good],
        [example for example in examples if isinstance(example, Bad)],
    )


class BadDataError(RuntimeError):
    """More data could not be read than the run allows."""


class BadData:
    """Logs each unreadable path once, with its reason, and stops the run when there are too many.

    limit: the number of different paths that may be bad. in_a_row: how many samples in a row may be bad, whatever their
    paths: a few shards that disappeared would otherwise never be too many. ``reasons`` maps the bad paths so far to
    their reasons.
    """

    def __init__(self, limit: int, in_a_row: int = 1000) -> None:
        self.limit, self.in_a_row = limit, in_a_row
        self.reasons: dict[str, str] = {}
        self._in_a_row = 0

    def add(self, bad: Sequence[Bad], good: int = 0) -> None:
        """Log the new paths and count them.

        good: how many samples of the same batch could be read.

        Raises:
            BadDataError: too many are bad; the message lists the first of them.
        """
        self._in_a_row = 0 if good else self._in_a_row + len(bad)
        for one in bad:
            if one.path not in self.reasons:
                self.reasons[one.path] = one.reason
                _log.warning("skipped %s: %s", one.path, one.reason)
        first = "".join(f"\n  {path}: {reason}" for path, reason in list(self.reasons.items())[:5])
        if len(self.reasons) > self.limit:
            raise BadDataError(f"{len(self.reasons)} could not be read, but bad_limit is {self.limit}:{first}")
        if self._in_a_row > self.in_a_row:
            raise BadDataError(f"{self._in_a_row} samples in a row could not be read:{first}")
