"""Encode pictures and texts with a model, a batch at a time. Pictures that cannot be read are left out and named."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from betaclip.data.batches import Bad
from betaclip.data.transforms import UnreadableImageError, normalize, read_image
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.texts import RaggedTexts
from betaclip.model.tokenizer import Tokenizer

Source = Path | npt.NDArray[np.uint8]  # a file, or (H, W, 3)
Picture = tuple[Tensor, tuple[int, int]]  # (3, S, S), normalised; the width and height that the source had
Transform = Callable[[Image.Image], Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")

READER_THREADS = 4  # decoding and resizing release the interpreter's lock
MAX_LOGGED = 20  # of a list of unusable samples

_log = logging.getLogger(__name__)


class NoPicturesError(ValueError):
    """None of the pictures can be read."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every part of the model has the mode that it had.

    Not torch.inference_mode: buffers that the kernels keep between calls must serve a training step again.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class Squash:
    """Resize the whole picture, whatever its shape, to a square, bicubic: (3, size, size), normalised."""

    def __init__(self, size: int) -> None:
        self.size = (size, size)

    def __call__(self, image: Image.Image) -> Tensor:
        return normalize(image.resize(self.size, Image.Resampling.BICUBIC))


def read_pictures(
    sources: Iterable[Source], transform: Transform, depth: int, *, upright: bool = True
) -> Iterator[Picture | None]:
    """The picture of each source, or None and a line in the log if it cannot be read. Threads read up to ``depth``
    pictures ahead.

    upright: turn pictures as their EXIF orientation says; not where boxes count pixels as they are stored.
    """

    def read(source: Source) -> Picture | Bad:
        try:
            image = read_image(source, upright=upright) if isinstance(source, Path) else Image.fromarray(source)
        except UnreadableImageError as error:
            return Bad(str(source), str(error))
        return transform(image), image.size

    for picture in _ahead(read, sources, depth):
        if isinstance(picture, Bad):
            log_unusable([picture])
            yield None
        else:
            yield picture


def log_unusable(bad: Sequence[Bad]) -> None:
    """Log the first samples, each with its reason, and how many more there are."""
    for one in bad[:MAX_LOGGED]:
        _log.warning("left out %s: %s", one.path, one.reason)
    if len(bad) > MAX_LOGGED:
        _log.warning("left out %d more", len(bad) - MAX_LOGGED)


def _ahead(function: Callable[[Item], Result], items: Iterable[Item], depth: int) -> Iterator[Result]:
    """``map(function, items)`` in threads, up to ``depth`` results ahead of the caller."""
    pool, iterator = ThreadPoolExecutor(READER_THREADS), iter(items)
    try:
        pending = deque(pool.submit(function, item) for item in islice(iterator, depth))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(function, item) for item in islice(iterator, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive items, ``size`` at a time; the last batch may be smaller."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def encode_images(model: BetaCLIP, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, D) CLS embeddings and (B, P, D) patch embeddings of B pictures (3, S, S)."""
    return model.encode_image(torch.stack(list(images)).to(model.logit_scale.device))


def encode_texts(model: BetaCLIP, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int) -> Tensor:
    """(N, D) text embeddings, computed ``batch_size`` texts at a time."""
    parts = [model.encode_text(RaggedTexts.of([tokenizer(t)] for t in some)) for some in batches(texts, batch_size)]
    return torch.cat(parts) if parts else torch.empty(0, model.embed_dim, device=model.logit_scale.device)


def encode_slots(model: BetaCLIP, tokenizer: Tokenizer, texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """(B, K, D) embeddings of the texts of B images or questions, and (B, K) bool: True where there is a text."""
    ragged = RaggedTexts.of([tokenizer(text) for text in some] for some in texts)
    slots, valid = (t.to(model.logit_scale.device) for t in ragged.slots())
    return model.encode_text(ragged)[slots], valid
