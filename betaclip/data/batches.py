"""Examples, batches of them, and what to do about those that cannot be read.

A dataset maps a :class:`Draw` to an :class:`Example`, or to a :class:`Bad` with the reason: bad data are found in
worker processes, where raising would end the epoch. ``collate`` leaves them out of the batch and hands them on, and the
training loop gives them to its :class:`BadData`, which reports them and stops the run when there are too many.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from betaclip.model.texts import RaggedTexts

CAPTION, SENTENCE, PHRASE = range(3)  # levels of texts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """What a sampler yields: the example ``index``, with all that is random about it a function of ``seed`` alone, so
    that neither the number of workers nor their order changes an example."""

    index: int
    seed: int


@dataclass(frozen=True)
class Example:
    """image: (3, H, W) float32, normalised. texts: the caption, then sentences, then phrases; tokens: their ids;
    levels: 0, 1 or 2 of each. path: where the image is from, for messages."""

    image: Tensor
    texts: list[str]
    tokens: list[list[int]]
    levels: list[int]
    path: str


@dataclass(frozen=True)
class Bad:
    """An example that cannot be read, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """B images with their texts.

    images: (B, 3, H, W) float32. texts: on the CPU wherever the images are. paths: of the B images. bad: what is
    missing from the batch because it could not be read.
    """

    images: Tensor
    texts: RaggedTexts
    paths: list[str]
    bad: list[Bad]

    def of_images(self, begin: int, end: int) -> "Batch":
        """Images ``begin`` to ``end`` with their texts, as views; ``bad`` stays with the whole."""
        return Batch(self.images[begin:end], self.texts.of_images(begin, end), self.paths[begin:end], [])

    def to(self, device: torch.device | str) -> "Batch":
        """With the images on ``device``; asynchronously if they are pinned."""
        return replace(self, images=self.images.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """With the images in page-locked memory; ``DataLoader(pin_memory=True)`` calls it."""
        return replace(self, images=self.images.pin_memory())


def collate(examples: Sequence[Example | Bad]) -> Batch:
    """The batch of those examples that could be read. If none could, its images are (0, 3, 0, 0)."""
    good = [example for example in examples if isinstance(example, Example)]
    return Batch(
        torch.stack([example.image for example in good]) if good else torch.empty(0, 3, 0, 0),
        RaggedTexts.of(example.tokens for example in good),
        [example.path for example in good],
        [example for example in examples if isinstance(example, Bad)],
    )


class BadDataError(RuntimeError):
    """More data could not be read than the run allows."""


class BadData:
    """Counts what could not be read, logs each path once with its reason, and stops beyond a limit.

    limit: how many different paths may be bad; a path that is drawn again counts once. ``reasons`` maps each to why,
    ``skipped`` is the number of draws that were lost.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reasons: dict[str, str] = {}
        self.skipped = 0

    def add(self, bad: Iterable[Bad]) -> None:
        """Count and log.

        Raises:
            BadDataError: more than ``limit`` paths are bad; the message lists the first of them.
        """
        for one in bad:
            self.skipped += 1
            if one.path not in self.reasons:
                self.reasons[one.path] = one.reason
                _log.warning("skipped %s: %s", one.path, one.reason)
        if len(self.reasons) > self.limit:
            first = "".join(f"\n  {path}: {reason}" for path, reason in list(self.reasons.items())[:5])
            raise BadDataError(f"{len(self.reasons)} could not be read, more than the {self.limit} allowed:{first}")
