"""The project's pages, and what they are made of: blocks of code, links, headings."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from support.paths import ROOT

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n\Z")
_LINK = re.compile(r"\]\(([^)\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")


class Block(NamedTuple):
    """A fenced block of code. run: it has no comment ``<!-- not run: REASON -->`` above it."""

    language: str
    code: str
    line: int
    run: bool


def pages() -> list[str]:
    """Paths from the root."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "csrc").glob("*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> Iterator[Block]:
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        yield Block(fence[1], fence[2], before.count("\n") + 2, not _NOT_RUN.search(before))


def links(text: str) -> list[str]:
    """Targets of links and pictures, but those inside of blocks of code."""
    return [match[1] or match[2] for match in _LINK.finditer(_FENCE.sub("", text))]


def anchors(text: str) -> set[str]:
    """What can follow ``#`` in a link to the page, as code hosts make it of headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
