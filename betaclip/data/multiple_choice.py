"""Questions of a multiple-choice benchmark: which of these texts describes this part of the image?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from betaclip.data.batches import Bad


@dataclass(frozen=True)
class Choice:
    """One question; the right answer is ``positive``.

    image: a file, or (H, W, 3) uint8. box: (x0, y0, x1, y1) in pixels of the image.
    """

    image: Path | npt.NDArray[np.uint8]
    box: tuple[float, float, float, float]
    positive: str
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceSet:
    """The questions read from a source, and the rows that cannot be used.

    Raises:
        ValueError: there are no questions.
    """

    source: str
    choices: list[Choice]
    bad: list[Bad]

    def __post_init__(self) -> None:
        if not self.choices:
            first = f"; the first: {self.bad[0].path}: {self.bad[0].reason}" if self.bad else ""
            raise ValueError(f"{self.source} has no usable row{first}")

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __len__(self) -> int:
        return len(self.choices)
