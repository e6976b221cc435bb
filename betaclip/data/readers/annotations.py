"""Annotations of ShareGPT4V's form, of which only the places of the rows in the file are held: 8 bytes each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

_CHUNK = 1 << 20  # bytes

# Bytes that matter for where a row of a JSON array ends, as small numbers; how each changes the depth.
_QUOTE, _BACKSLASH, _COMMA, _OPEN, _CLOSE = range(1, 6)
_KIND = np.zeros(256, np.uint8)
for _kind, _characters in ((_QUOTE, '"'), (_BACKSLASH, "\\"), (_COMMA, ","), (_OPEN, "[{"), (_CLOSE, "]}")):
    for _character in _characters:
        _KIND[ord(_character)] = _kind
_STEP = np.array([0, 0, 0, 0, 1, -1])


class BadRowError(ValueError):
    """A row without an image and a caption; the message says what it is instead."""


class Annotations:
    """Rows ``{"image": path, "conversations": [_, {"value": caption}]}``, as a JSON array or one a line.

    The file is read once for the places of its rows, and for each row again, so that worker processes share nothing but
    an array. A row that is not of this form is found when it is asked for; with a JSON array, a row whose quotes or
    brackets do not match takes the following rows with it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no row, or none that can be used, or is an array that does not end.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"annotations: {self.path} is not a file")
        with self.path.open("rb") as file:
            if self.path.suffix != ".jsonl" and _first_character(file) == b"[":
                parts = list(_array_boundaries(file, self.path))
            else:
                parts = list(_line_boundaries(file))
        # Row i is what lies between boundaries i and i + 1, which are bytes that belong to no row.
        self.boundaries = np.concatenate(parts)
        if all(self._fault(row) for row in range(len(self))):
            first = f"; the first: {self._fault(0)}" if len(self) else ": it is empty"
            raise ValueError(f"annotations: {self.path} has no row with an image and a caption{first}")

    def __len__(self) -> int:
        return len(self.boundaries) - 1

    def __getitem__(self, row: int) -> tuple[str, str]:
        """Image and caption.

        Raises:
            BadRowError: it has none.
        """
        begin, end = (int(i) for i in self.boundaries[row : row + 2])
        with self.path.open("rb") as file:
            file.seek(begin + 1)
            return _parse(file.read(end - begin - 1))

    def where(self, row: int) -> str:
        """Names a row in messages."""
        return f"{self.path}, row {row + 1}"

    def _fault(self, row: int) -> str:
        try:
            self[row]
        except BadRowError as error:
            return str(error)
        return ""


def parse_json(raw: bytes) -> Any:
    """
    Raises:
        BadRowError: it is none.
    """
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; brackets beyond any use
        raise BadRowError(f"not JSON: {error}") from error


def caption_of(row: Any) -> str:
    """
    Raises:
        BadRowError: the row's conversations have no second value, or an empty one.
    """
    try:
        return checked_caption(row["conversations"][1]["value"])
    except (KeyError, IndexError, TypeError):
        raise BadRowError('no "conversations"[1]["value"]') from None


def checked_caption(caption: object) -> str:
    """With "?" for halves of characters, which JSON can hold and UTF-8 cannot.

    Raises:
        BadRowError: it is empty, or no text.
    """
    if not isinstance(caption, str) or not caption.strip():
        raise BadRowError("empty caption")
    return caption.encode(errors="replace").decode()


def _parse(raw: bytes) -> tuple[str, str]:
    row = parse_json(raw)
    image = row.get("image") if isinstance(row, dict) else None
    if not isinstance(image, str) or not image:
        raise BadRowError('no "image"')
    try:
        return image, caption_of(row)
    except BadRowError as error:
        raise BadRowError(f"{error}, of image {image}") from None


def _first_character(file: IO[bytes]) -> bytes:
    first = file.read(1 << 10).lstrip()[:1]
    file.seek(0)
    return first


def _chunks(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Parts of a file and where they begin. A character and the backslashes before it stay together."""
    begin = 0
    while chunk := file.read(_CHUNK):
        while chunk.endswith(b"\\") and (more := file.read(1)):
            chunk += more
        yield begin, chunk
        begin += len(chunk)


def _line_boundaries(file: IO[bytes]) -> Iterator[npt.NDArray[np.int64]]:
    yield np.array([-1])
    size, last = 0, b"\n"
    for begin, chunk in _chunks(file):
        yield begin + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
        size, last = begin + len(chunk), chunk[-1:]
    if last != b"\n":
        yield np.array([size])


def _array_boundaries(file: IO[bytes], path: Path) -> Iterator[npt.NDArray[np.int64]]:
    """The opening bracket, the commas between rows, the closing bracket."""
    depth = quotes = 0
    for begin, chunk in _chunks(file):
        kinds = _KIND[np.frombuffer(chunk, np.uint8)]
        places = np.flatnonzero(kinds)
        places = places[~np.isin(places, _escaped(places[kinds[places] == _BACKSLASH]))]
        found = kinds[places]
        inside = (np.cumsum(found == _QUOTE) + quotes) % 2 == 1
        quotes += int((found == _QUOTE).sum())
        places, found = places[~inside], found[~inside]
        steps = _STEP[found]
        depths = depth + np.cumsum(steps)
        if closed := np.flatnonzero((depths == 0) & (steps < 0))[:1].tolist():
            places, found, steps, depths = (values[: closed[0] + 1] for values in (places, found, steps, depths))
        yield begin + places[((depths == 1) & ((found == _COMMA) | (steps > 0))) | ((depths == 0) & (steps < 0))]
        if closed:
            return
        depth = int(depths[-1]) if len(depths) else depth
    raise ValueError(f"annotations: {path} is a JSON array that does not end; is it only a part of the file?")


def _escaped(backslashes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The characters after an odd number of backslashes."""
    if not len(backslashes):
        return backslashes
    last = np.flatnonzero(np.append(np.diff(backslashes) != 1, True))
    lengths = np.diff(last, prepend=-1)
    return backslashes[last][lengths % 2 == 1] + 1
