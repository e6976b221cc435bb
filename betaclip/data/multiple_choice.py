"""Questions of a multiple-choice benchmark: which of these texts describes this part of the image?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Choice:
    """One question; the right answer is ``positive``.

    image: a file, or (H, W, 3) uint8. box: (x0, y0, x1, y1) in pixels of the image.
    """

    image: Path | npt.NDArray[np.uint8]
    box: tuple[float, float, float, float]
    positive: str
    negatives: tuple[str, ...]
