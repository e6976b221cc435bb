"""Rendered scenes: pictures of several things, with texts that are true of them and the boxes of the things they name.

A scene depends only on its split, seed and number, and is the same in every process and on every machine. Nothing needs
to be downloaded, and there are so many scenes that none is seen twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, combinations, islice, product, zip_longest
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from betaclip.data.batches import CAPTION, PHRASE, SENTENCE, Draw, Example
from betaclip.data.dataset_options import DatasetOptions
from betaclip.data.scenes.drawing import Box, draw
from betaclip.data.scenes.layout import ATTRIBUTES, Kind, Layout, random_layout
from betaclip.data.scenes.texts import describe, indefinite, noun
from betaclip.data.transforms import normalize
from betaclip.model.tokenizer import Tokenizer
from betaclip.settings import bounded

TRAIN, TEST = "train", "test"
DIFFICULTIES = ("hard", "medium", "easy", "trivial")  # 1, 2, 3, 4 attributes are wrong
MAX_NEGATIVES = 10


@dataclass(frozen=True)
class Scene:
    """A picture with its texts and boxes.

    image: (size, size, 3) uint8. caption: the sentences, joined. phrases: each names one thing, or two for a relation
    ("a red star above a ring"). boxes: the box (x0, y0, x1, y1) in pixels around all that a phrase names.
    thing_boxes: the box of each thing of the layout.
    """

    image: npt.NDArray[np.uint8]
    caption: str
    sentences: list[str]
    phrases: list[str]
    boxes: list[Box]
    layout: Layout
    thing_boxes: list[Box]


def scene(seed: int, index: int, size: int = 72, split: str = TRAIN) -> Scene:
    """Scene ``index`` of a split; the two splits are independent, whatever the seeds."""
    rng = Random(f"{split}/{seed}/{index}")
    layout = random_layout(rng)
    sentences, phrases = describe(layout, rng)
    image, boxes = draw(layout, size)
    return Scene(
        image,
        " ".join(sentences),
        sentences,
        [phrase.text for phrase in phrases],
        [_around([boxes[i] for i in phrase.things]) for phrase in phrases],
        layout,
        boxes,
    )


def _around(boxes: list[Box]) -> Box:
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


class SceneChoice(NamedTuple):
    """The box of a thing in a scene, the text that is true of it and, by difficulty, texts that are false."""

    scene: Scene
    box: Box
    positive: str
    negatives: dict[str, list[str]]


def choices(seed: int, count: int, size: int = 72) -> Iterator[SceneChoice]:
    """One thing of each of ``count`` test scenes, with 10 negatives per difficulty, as in FG-OVD.

    A negative has other values of one (hard), two (medium), three (easy) or all four attributes (trivial); all
    combinations of attributes take turns.
    """
    for index in range(count):
        rng = Random(f"choices/{seed}/{index}")
        shown = scene(seed, index, size, TEST)
        number = rng.randrange(len(shown.thing_boxes))
        kind = shown.layout.things[number].kind
        negatives = {
            difficulty: [indefinite(noun(other)) for other in islice(_others(kind, wrong, rng), MAX_NEGATIVES)]
            for wrong, difficulty in enumerate(DIFFICULTIES, start=1)
        }
        yield SceneChoice(shown, shown.thing_boxes[number], indefinite(noun(kind)), negatives)


def _others(kind: Kind, wrong: int, rng: Random) -> Iterator[Kind]:
    """All kinds that differ in ``wrong`` attributes, in random order; the sets of attributes take turns."""
    groups = []
    for fields in combinations(range(4), wrong):
        values = ([v for v in ATTRIBUTES[f] if v != kind[f]] if f in fields else [kind[f]] for f in range(4))
        groups.append([Kind(*one) for one in product(*values)])
        rng.shuffle(groups[-1])
    rng.shuffle(groups)
    return (other for other in chain.from_iterable(zip_longest(*groups)) if other is not None)


class ScenesDataset(Dataset[Example]):
    """``count`` scenes, not cropped so that their texts stay true; they do not depend on a draw's seed."""

    def __init__(self, count: int, seed: int, size: int, tokenizer: Tokenizer, split: str = TRAIN) -> None:
        self.count, self.seed, self.size, self.tokenizer, self.split = count, seed, size, tokenizer, split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, draw: Draw) -> Example:
        shown = scene(self.seed, draw.index, self.size, self.split)
        parts = [*shown.sentences, *shown.phrases]
        return Example(
            normalize(shown.image),
            [shown.caption, *parts],
            [self.tokenizer(shown.caption), *(list(_ids(self.tokenizer, text)) for text in parts)],
            [CAPTION] + [SENTENCE] * len(shown.sentences) + [PHRASE] * len(shown.phrases),
            f"scenes/{self.split}/{self.seed}/{draw.index}",
        )


@lru_cache(maxsize=1 << 16)
def _ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids of a sentence or a phrase, cached because many scenes have the same."""
    return tuple(tokenizer(text))


@dataclass(frozen=True, kw_only=True)
class SceneOptions(DatasetOptions):
    """Settings of rendered scenes."""

    scenes: int = bounded(32_000, at_least=1)
    """scenes: their number in an epoch."""
    scenes_seed: int = 0
    """scenes: the seed that they are made from."""

    def create(
        self, image_size: int, context_length: int, *, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> ScenesDataset:
        return ScenesDataset(self.scenes, self.scenes_seed, image_size, Tokenizer(context_length))
