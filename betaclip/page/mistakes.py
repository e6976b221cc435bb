"""The choices that a model got wrong, with what it chose instead."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from betaclip.data.multiple_choice import Choice
from betaclip.data.scenes import dataset as scenes
from betaclip.data.transforms import read_image
from betaclip.evaluation.run import Evaluator
from betaclip.evaluation.tasks.multiple_choice import wrong_answers
from betaclip.model.beta_clip import BetaCLIP
from betaclip.model.tokenizer import Tokenizer
from betaclip.page.images import Drawing, Place, drawing, place

ASKED, SHOWN = 64, 3  # choices of each kind
MAX_SIDE = 240  # pixels of a picture on the page

# The picture of the question with a number, to be shown.
Show = Callable[[int], Image.Image | npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Mistake:
    """A picture, the place in it that the question is about, the true text, and the chosen one in parts, each with
    whether the true text lacks it."""

    drawing: Drawing
    place: Place
    right: str
    chosen: list[tuple[str, bool]]


@dataclass(frozen=True)
class Mistakes:
    """Choices of one kind: how many of the ``asked`` ones are wrong, and the first of these."""

    kind: str
    asked: int
    wrong: int
    first: list[Mistake]


def mistakes(model: BetaCLIP, evaluator: Evaluator) -> list[Mistakes]:
    """For each kind of choices that the evaluation has, what the model answers wrong by region features."""
    tokenizer = Tokenizer(model.context_length, keep_end=evaluator.config.long_texts == "keep_end")
    return [_of_kind(model, tokenizer, *kind) for kind in _kinds(evaluator, model.image_size)]


def _kinds(evaluator: Evaluator, size: int) -> Iterator[tuple[str, Sequence[Choice], Show]]:
    """The name of each kind, its choices, and what shows their pictures."""
    seed = evaluator.config.seed
    asked = list(scenes.choices(seed, min(evaluator.scenes, ASKED), size))
    for false, difficulty in enumerate(scenes.DIFFICULTIES if asked else (), start=1):
        choices = [Choice(one.scene.image, one.box, one.positive, tuple(one.negatives[difficulty])) for one in asked]
        yield f"{difficulty}: {false} of 4 attributes false", choices, partial(_scene, seed)
    for subset, found in evaluator.sets.choices.items():
        yield f"FG-OVD, {subset}", found.choices[:ASKED], partial(_file, found.choices)


def _scene(seed: int, number: int) -> npt.NDArray[np.uint8]:
    return scenes.scene(seed, number, MAX_SIDE, scenes.TEST).image


def _file(choices: Sequence[Choice], number: int) -> Image.Image:
    """The picture as its box counts pixels."""
    return read_image(cast(Path, choices[number].image), upright=False)


def _of_kind(model: BetaCLIP, tokenizer: Tokenizer, kind: str, choices: Sequence[Choice], show: Show) -> Mistakes:
    wrong = list(wrong_answers(model, tokenizer, choices, batch_size=ASKED))
    first = [_mistake(choices[number], chosen, show(number)) for number, chosen in wrong[:SHOWN]]
    return Mistakes(kind, len(choices), len(wrong), first)


def _mistake(choice: Choice, chosen: str, picture: Image.Image | npt.NDArray[np.uint8]) -> Mistake:
    if isinstance(picture, Image.Image):
        size = picture.size
    else:  # a scene is shown larger than the picture that its box is of
        height, width, _ = np.shape(cast(Any, choice.image))
        size = (width, height)
    where = place(choice.box, size)
    return Mistake(drawing(picture, MAX_SIDE), where, choice.positive, differing(choice.positive, chosen))


def differing(right: str, chosen: str) -> list[tuple[str, bool]]:
    """The words of ``chosen`` in runs, each with whether ``right`` lacks it there; joined by spaces they are all."""
    words = chosen.split()
    matcher = difflib.SequenceMatcher(None, right.split(), words, autojunk=False)
    return [(" ".join(words[a:b]), tag != "equal") for tag, _, _, a, b in matcher.get_opcodes() if a < b]
