"""Titles of pictures in any script: a text's lines, and fonts that have its letters."""

import re
import textwrap
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

FIRST_FONT = "DejaVu Sans"  # comes with matplotlib
_UNFIT = ("Last Resort", "Color Emoji")  # the one has a frame for every letter, the other no outlines
_FILLER = "\0"  # the second column of a wide letter; no title holds it, because no font does


def fonts_for(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """Find fonts among those of matplotlib and of the system.

    Returns:
        The families to draw the texts in: matplotlib takes each letter from the first that has it. And the letters that
        none has.
    """
    missing = {letter for text in texts for letter in text if not letter.isspace()}
    families = [FIRST_FONT]
    missing -= _letters(font_manager.findfont(FIRST_FONT))
    fonts = {} if not missing else {
        font.name: font.fname for font in font_manager.fontManager.ttflist
        if font.style == "normal" and font.weight in (400, "normal", "regular") and not font.name.startswith(_UNFIT)
    }  # fmt: skip
    for name in sorted(fonts, key=lambda name: ("Sans" not in name, name)):
        if found := missing & _letters(fonts[name]):
            families.append(name)
            missing -= found
    return families, missing


def spelled_out(text: str, letters: set[str]) -> str:
    """The text with the code points of some letters in their place, such as \\u4e2d."""
    return "".join(letter.encode("unicode_escape").decode() if letter in letters else letter for letter in text)


def wrapped(text: str, columns: int, lines: int) -> str:
    """The text in at most ``lines`` lines of at most ``columns`` columns; the rest is cut off. A wide letter, as of
    Chinese, takes two columns."""
    wide = "".join(letter + _FILLER * (unicodedata.east_asian_width(letter) in "WF") for letter in text)
    return "\n".join(_Wrapper(columns, max_lines=lines, placeholder=" …").wrap(wide)).replace(_FILLER, "")


class _Wrapper(textwrap.TextWrapper):
    """Also breaks lines before and after wide letters, between which there are no spaces."""

    def _split(self, text: str) -> list[str]:
        return [part for chunk in super()._split(text) for part in re.split(f"(.{_FILLER})", chunk) if part]


@lru_cache(maxsize=256)
def _letters(file: str) -> frozenset[str]:
    """The letters for which a font has an outline; none if the font cannot be read."""
    try:
        font = FT2Font(file)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
