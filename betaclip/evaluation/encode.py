"""Encodes pictures and texts with a model, a batch at a time. Pictures that cannot be read are left out and logged."""

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
from betaclip.model.plain_clip import PlainClip
from betaclip.model.texts import RaggedTexts

Source = Path | npt.NDArray[np.uint8]  # a file, or (H, W, 3)
Picture = tuple[Tensor, tuple[int, int]]  # (3, S, S), normalised; the width and height that the source had
Transform = Callable[[Image.Image], Tensor]
Encoder = BetaCLIP | PlainClip
Tokenize = Callable[[str], list[int]]
Item = TypeVar("Item")
Result = TypeVar("Result")

READER_THREADS = 4  # decoding and resizing release the interpreter's lock
MAX_LOGGED = 20  # unusable samples of a list

_log = logging.getLogger(__name__)


class NoPicturesError(ValueError):
    """None of the pictures can be read."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients; afterwards every module has its previous mode again.

    This is not torch.inference_mode, because later training steps use the buffers that kernels keep between calls.
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
    """Yield the picture of each source, or None if it cannot be read, which is logged. Threads read up to ``depth``
    pictures ahead.

    upright: turn pictures as their EXIF orientation says. Boxes that count pixels as they are stored need False.
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
    """Log the first samples, each with its reason, and the number of the others."""
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


def encode_images(model: Encoder, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Encode B pictures (3, S, S) into (B, D) CLS embeddings and (B, P, D) patch embeddings."""
    return model.encode_image(torch.stack(list(images)).to(model.logit_scale.device))


def encode_texts(model: Encoder, tokenizer: Tokenize, texts: Sequence[str], batch_size: int) -> Tensor:
    """Encode N texts into (N, D) embeddings, ``batch_size`` texts at a time."""
    parts = [model.encode_text(RaggedTexts.of([tokenizer(t)] for t in some)) for some in batches(texts, batch_size)]
    return torch.cat(parts) if parts else torch.empty(0, model.embed_dim, device=model.logit_scale.device)


def encode_slots(model: Encoder, tokenizer: Tokenize, texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Encode the texts of B images or questions into (B, K, D) embeddings; also return (B, K) bool, True for a text."""
    ragged = RaggedTexts.of([tokenizer(text) for text in some] for some in texts)
    slots, valid = (t.to(model.logit_scale.device) for t in ragged.slots())
    return model.encode_text(ragged)[slots], valid
