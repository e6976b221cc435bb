"""95 % confidence intervals of the shares in results: Wilson's score interval, from a share and the number behind it.

They say how far a share may lie from that of endlessly many pictures, texts or questions like these. Captions of one
picture are not independent of each other, so the intervals of text to image are too narrow where pictures have several.
"""

import math
from collections.abc import Mapping

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson(share: float, number: float) -> tuple[float, float]:
    """The bounds for a share of ``number`` independent trials (Wilson 1927).

    Example:
        >>> from betaclip.evaluation.intervals import wilson
        >>> [round(bound, 4) for bound in wilson(81 / 263, 263)]
        [0.2553, 0.3662]
    """
    centre = share + Z**2 / (2 * number)
    half = Z * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
    scale = 1 + Z**2 / number
    # At the ends the bounds are 0 and 1, but for rounding.
    return (centre - half) / scale if share else 0.0, (centre + half) / scale if share < 1 else 1.0


def number_behind(task: str, name: str, values: Mapping[str, float]) -> float | None:
    """The number of texts, pictures or questions of which a value is a share; None if it is no such share.

    Args:
        task, name: as "retrieval" and "t2i_r1".
        values: those of the task on the same set, by name.
    """
    match task:
        case "retrieval" if "t2i_r" in name:
            return values["texts"]
        case "retrieval" if "i2t_r" in name:
            return values["images"]
        case "choices":
            return values.get(f"{name.removesuffix('_conditioned')}_questions")
        case "zero_shot" if name.startswith("top"):
            return values["images"]
        case "leak" if name.endswith("_picture"):
            return values[f"{name}s"]
    return None


def interval(task: str, name: str, values: Mapping[str, float]) -> tuple[float, float] | None:
    """The 95 % interval of a value; None if it is no share of a number of texts, pictures or questions."""
    number = number_behind(task, name, values)
    return None if number is None else wilson(values[name], number)
