"""Pictures with texts that one can point at to see their attention: rendered test scenes, or pictures of the user's."""

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from betaclip.data.batches import PHRASE, SENTENCE, Bad, Draw, Example
from betaclip.data.readers.pairs import PairsDataset
from betaclip.data.readers.retrieval_set import RetrievalSet
from betaclip.data.registry import DataConfig
from betaclip.data.scenes import dataset as scenes
from betaclip.data.transforms import denormalize, read_image
from betaclip.evaluation.encode import Squash
from betaclip.evaluation.regions import Box, on_grid
from betaclip.evaluation.tasks.pointing import mass_in_boxes
from betaclip.evaluation.tasks.retrieval import texts_of_pictures
from betaclip.inference import attention
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.tokenizer import Tokenizer
from betaclip.page.images import Drawing, Place, drawing, overlay, place

PICTURES, SENTENCES, PHRASES = 6, 2, 7  # how many to show; the last two of a picture
TRIED = 60  # examples, of which the first that can be read are shown
MAX_SIDE = 360  # pixels of a picture on the page


class Shown(NamedTuple):
    """A picture: as it is shown, as the model sees it, (3, S, S), and its texts.

    boxes: for each text the box of what it names, as shares of the picture; or None.
    """

    picture: Image.Image | npt.NDArray[np.uint8]
    pixels: Tensor
    about: str
    texts: list[str]
    boxes: list[Box] | None


@dataclass(frozen=True)
class Text:
    """A text, the URI of its attention, the place of what it names if that is known, a figure, and a sentence on it."""

    text: str
    overlay: str
    place: Place | None
    figure: str
    words: str


@dataclass(frozen=True)
class Picture:
    """A picture, what it shows, its texts, and the end of their scale of colours in multiples of even attention."""

    drawing: Drawing
    about: str
    texts: list[Text]
    top: float


def shown_pictures(model: BetaCLIP, config: DataConfig, sets: Sequence[RetrievalSet]) -> tuple[str, list[Picture]]:
    """Pictures with the attention of their texts, and a sentence about where they are from.

    Pictures that the model was not trained on go first: test scenes, rows that were left out, pictures of a set of the
    evaluation. Those that it was trained on are the last resort.

    Raises:
        OSError, ValueError: the data cannot be read.
    """
    tokenizer = Tokenizer(model.context_length)
    for origin, found in _sources(model, config, sets):
        pictures = [_with_attention(model, tokenizer, shown) for shown in islice(found, PICTURES)]
        if pictures:
            return origin, pictures
    return "", []


def _sources(
    model: BetaCLIP, config: DataConfig, sets: Sequence[RetrievalSet]
) -> Iterator[tuple[str, Iterator[Shown]]]:
    """Yield the sources of pictures, the best first: a sentence on where they are from, and those that can be read."""
    size, length = model.image_size, model.context_length
    if config.kind == "scenes":
        yield "Test scenes, which no training run sees.", _scenes(config.scenes_seed, size)
        return
    data: Any = config.create(size, length)
    # The file of betaclip prepare may lack the sentences of pictures that are not trained on.
    extracting: Any = replace(cast(Any, config), phrases=None)
    if isinstance(data, PairsDataset) and data.test_rows:
        whole = copy(data)
        whole.make, whole.test_rows = extracting.example_maker(size, length), 0
        held_out = map(whole.__getitem__, _draws(data.test_rows))
        yield "Pictures that were left out of the training.", _read(held_out, size)
    for one in sets:
        make = extracting.example_maker(size, length)
        of_set = (make(path, str(path), texts[0], 0) for path, texts in texts_of_pictures(one))
        yield f"Pictures of {one.name}, a set of the evaluation.", _read(of_set, size)
    trained_on = data if isinstance(data, IterableDataset) else map(data.__getitem__, _draws(len(data)))
    yield "Pictures that the model was trained on; --data.test-rows N leaves some out.", _read(trained_on, size)


def _draws(length: int) -> Iterator[Draw]:
    """The first numbers of equal parts of the data, so that every set of a mixture may be shown, then the second ones,
    and so on."""
    first = [length * part // PICTURES for part in range(PICTURES)]
    numbers = dict.fromkeys(one + i for i in range(TRIED // PICTURES) for one in first if one + i < length)
    return (Draw(number, seed=number) for number in numbers)


def _read(examples: Iterable[Example | Bad], size: int) -> Iterator[Shown]:
    return (_shown(one, size) for one in islice(examples, TRIED) if isinstance(one, Example))


def _scenes(seed: int, size: int) -> Iterator[Shown]:
    """Test scenes, drawn larger than the model sees them."""
    for index in range(PICTURES):
        seen, drawn = (scenes.scene(seed, index, side, scenes.TEST) for side in (size, MAX_SIDE))
        boxes = [(x0 / size, y0 / size, x1 / size, y1 / size) for x0, y0, x1, y1 in seen.boxes[:PHRASES]]
        pixels = Squash(size)(Image.fromarray(seen.image))
        yield Shown(drawn.image, pixels, seen.caption, seen.phrases[:PHRASES], boxes)


def _shown(example: Example, size: int) -> Shown:
    """The whole picture where it has a file, as ``betaclip visualize`` shows it; else the part that was read of it."""
    by_level = {level: [t for t, own in zip(example.texts, example.levels, strict=True) if own == level]
                for level in (SENTENCE, PHRASE)}  # fmt: skip
    texts = dict.fromkeys([*by_level[SENTENCE][:SENTENCES], *by_level[PHRASE][:PHRASES]])
    path, about = Path(example.path), example.texts[0]
    if not path.is_file():
        return Shown(Image.fromarray(denormalize(example.image)), example.image, about, list(texts), None)
    picture = read_image(path)
    return Shown(picture, Squash(size)(picture), about, list(texts), None)


def _with_attention(model: BetaCLIP, tokenizer: Tokenizer, shown: Shown) -> Picture:
    shares = attention(model, tokenizer, shown.pixels, shown.texts).cpu()
    maps = shares * shares[0].numel()
    top = max(2.0, float(maps.max()))  # a text without a preference should look like one
    said = _pointing(shares, shown.boxes) if shown.boxes else _peaks(maps)
    places = [place(box, (1, 1)) for box in shown.boxes] if shown.boxes else [None] * len(shown.texts)
    texts = [
        Text(text, overlay(one, top), where, *words)
        for text, one, where, words in zip(shown.texts, maps, places, said, strict=True)
    ]
    return Picture(drawing(shown.picture, MAX_SIDE), shown.about, texts, top)


def _pointing(shares: Tensor, boxes: Sequence[Box]) -> Iterator[tuple[str, str]]:
    """Describe each text in a figure and in a sentence."""
    rows, columns = shares.shape[1:]
    grid = on_grid(boxes, [(1, 1)] * len(boxes), (rows, columns))
    for mass, area in zip(*mass_in_boxes(shares.flatten(1), grid, (rows, columns)), strict=True):
        percent = f"{100 * mass:.0f} %"
        yield percent, f"{percent} of the attention is in the box, which is {100 * area:.0f} % of the picture."


def _peaks(maps: Tensor) -> Iterator[tuple[str, str]]:
    for peak in maps.amax((1, 2)).tolist():
        yield f"{peak:.1f} ×", f"{peak:.1f} times even attention where it is highest."
