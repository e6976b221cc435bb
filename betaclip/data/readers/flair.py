"""The form to which FLAIR's authors brought annotations of DOCCI, IIW and Urban1K: one text of one picture a row."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from betaclip.data.readers.annotations import picture_and_captions
from betaclip.data.readers.retrieval_set import Row, load_json


def flair_rows(file: Path, name: str) -> Iterator[Row]:
    """The rows of ``{"annotations": [{"image": path, "caption": text}, …]}``; an image has as many rows as texts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not have this form; the message begins with ``name``.
    """
    content = load_json(file, name)
    rows = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f'{name}: expected {file} to hold an object with a list "annotations"')
    return ((f"{file}, annotation {i}", partial(picture_and_captions, row)) for i, row in enumerate(rows, 1))
