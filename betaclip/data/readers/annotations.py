"""Rows of a picture and its captions in a file, of which only the places in the file are held: 8 bytes each.

Libraries that read JSON step by step (ijson) give values, not their places in the file, so that one would have to hold
all rows or write them once more; the standard library's decoder says where each value ends.
"""

import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

_CHUNK = 1 << 20  # bytes read at a time
MAX_ROW = 1 << 26  # bytes; so that a file that is not JSON is not taken for one endless row
CHECKED_ROWS = 1000  # at the beginning, one of which must have an image and a caption
_BOM = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder(strict=False)  # a row with a bare line feed in a string is only a bad row


class BadRowError(ValueError):
    """A row without an image and a caption; the message says what it is instead."""


class Rows(ABC):
    """Pictures with their captions by number, each read when it is asked for, so that worker processes share little."""

    path: Path

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, row: int) -> tuple[str, list[str]]:
        """The picture's path from the folder of the pictures, and its captions, one at least.

        Raises:
            BadRowError: the row lacks one of them, or the file is no longer there.
        """

    @abstractmethod
    def identity(self) -> list[str | int]:
        """What differs if the captions have changed."""

    def where(self, row: int) -> str:
        """The name of a row in messages."""
        return f"{self.path}, row {row + 1}"

    def _check(self) -> None:
        """Raise ValueError if none of the first rows has an image and a caption."""
        checked = min(len(self), CHECKED_ROWS)
        if all(self._fault(row) for row in range(checked)):
            where = "" if checked == len(self) else f" among the first {checked}"
            first = f"; the first: {self._fault(0)}" if checked else ": it is empty"
            raise ValueError(f"annotations: {self.path} has no row with an image and a caption{where}{first}")

    def _fault(self, row: int) -> str:
        try:
            self[row]
        except BadRowError as error:
            return str(error)
        return ""


class FileRows(Rows):
    """Rows of one file in UTF-8.

    The file is read once for the places of its rows, and for each row again.

    Args:
        max_row: how many bytes a row has at most, about.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty or in another encoding, cannot be divided into rows, or none of its first 1000
            rows has an image and a caption.
    """

    def __init__(self, path: str | Path, *, max_row: int = MAX_ROW) -> None:
        self.path, self.max_row = Path(path), max_row
        if not self.path.is_file():
            raise FileNotFoundError(f"annotations: {self.path} is not a file")
        with self.path.open("rb") as file:
            start = file.read(_CHUNK)
            if not (encoding := json.detect_encoding(start)).startswith("utf-8"):
                raise ValueError(f"annotations: {self.path} is in {encoding.upper()}; expected UTF-8")
            file.seek(len(_BOM) * start.startswith(_BOM))
            try:
                separators = array("q", self._separators(file))
            except ValueError as error:
                raise ValueError(f"annotations: {self.path} {error}") from error
        # Row i is what lies between separators i and i + 1, which are bytes that belong to no row.
        self.separators = np.frombuffer(separators, np.int64)
        self._check()

    def __len__(self) -> int:
        return len(self.separators) - 1

    def __getitem__(self, row: int) -> tuple[str, list[str]]:
        begin, end = (int(i) for i in self.separators[row : row + 2])
        try:
            with self.path.open("rb") as file:
                file.seek(begin + 1)
                content = file.read(end - begin - 1)
        except OSError as error:
            raise BadRowError(f"{type(error).__name__}: {error}") from error
        return self._parse(content)

    def identity(self) -> list[str | int]:
        stat = self.path.stat()
        return [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns]

    @abstractmethod
    def _separators(self, file: IO[bytes]) -> Iterator[int]:
        """The places before, between and after the rows of a file that stands at its beginning.

        Raises:
            ValueError: the file cannot be divided into rows.
        """

    @abstractmethod
    def _parse(self, content: bytes) -> tuple[str, list[str]]: ...


class Annotations(FileRows):
    """Rows ``{"image": path, "caption": text}``, as a JSON array or one a line, in UTF-8.

    In place of "caption" a row may have "captions", a list of texts, or ShareGPT4V's "conversations", ``[_, {"value":
    text}]``. A line that is not such a row is found when it is asked for; an array must be JSON throughout.

    Args:
        chunk: how many bytes of an array to read at a time.
        max_row: how many bytes a row has at most, about.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty or in another encoding, is an array with a fault or without an end, has a longer
            row, or none of its first 1000 rows has an image and a caption.
    """

    def __init__(self, path: str | Path, *, chunk: int = _CHUNK, max_row: int = MAX_ROW) -> None:
        self.chunk = chunk
        super().__init__(path, max_row=max_row)

    def _separators(self, file: IO[bytes]) -> Iterator[int]:
        begin = file.tell()
        start = file.read(_CHUNK)
        content = start.lstrip()
        if content.startswith(b"["):
            file.seek(begin + len(start) - len(content))
            return _array_separators(file, self.chunk, self.max_row)
        file.seek(begin)
        return _line_separators(file, self.max_row)

    def _parse(self, content: bytes) -> tuple[str, list[str]]:
        return picture_and_captions(parse_json(content))


def parse_json(raw: bytes) -> Any:
    """``json.loads``.

    Raises:
        BadRowError: the bytes are not JSON.
    """
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deeply
        raise BadRowError(f"not JSON: {error}") from error


def picture_and_captions(row: Any) -> tuple[str, list[str]]:
    """The "image" of a row and its captions, as :func:`captions_of` finds them.

    Raises:
        BadRowError: the row lacks one of them.
    """
    image = row.get("image") if isinstance(row, dict) else None
    if not isinstance(image, str) or not image:
        raise BadRowError('no "image"')
    try:
        return image, captions_of(row)
    except BadRowError as error:
        raise BadRowError(f"{error}, of image {image}") from None


def captions_of(row: Any) -> list[str]:
    """The captions of a row: its "caption" or "captions", each a text or a list of texts, or else the answer in the
    first turn of its "conversations".

    Raises:
        BadRowError: the row has none of them, or one of its captions is empty.
    """
    row = row if isinstance(row, dict) else {}
    for key in ("caption", "captions"):
        if isinstance(row.get(key), list):
            return checked_captions(row[key])
        if row.get(key) is not None:
            return [checked_caption(row[key])]
    if "conversations" not in row:
        raise BadRowError('no "caption", "captions" or "conversations"')
    try:
        return [checked_caption(row["conversations"][1]["value"])]
    except (KeyError, IndexError, TypeError):
        raise BadRowError('no "conversations"[1]["value"]') from None


def checked_captions(captions: list[Any]) -> list[str]:
    """The captions of one picture, each as :func:`checked_caption` returns it.

    Raises:
        BadRowError: there are none, or one of them is empty or not a string.
    """
    if not captions:
        raise BadRowError("empty list of captions")
    checked = []
    for number, caption in enumerate(captions, 1):
        try:
            checked.append(checked_caption(caption))
        except BadRowError as error:
            raise BadRowError(f"{error} (number {number} of {len(captions)})") from None
    return checked


def checked_caption(caption: object) -> str:
    """The caption with "?" for halves of characters, which JSON can hold and UTF-8 cannot.

    Raises:
        BadRowError: the caption is empty, or not a string.
    """
    if not isinstance(caption, str) or not caption.strip():
        raise BadRowError("empty caption")
    return caption.encode(errors="replace").decode()


def _line_separators(file: IO[bytes], max_row: int) -> Iterator[int]:
    """The byte before the first line, and the end of each line.

    Raises:
        ValueError: a line is longer than ``max_row``.
    """
    position = file.tell()
    yield position - 1
    while line := file.readline(max_row):
        if len(line) == max_row and not line.endswith(b"\n"):
            raise ValueError(f"has a row of more than {max_row} bytes, at byte {position}")
        position += len(line)
        yield position - line.endswith(b"\n")


def _array_separators(file: IO[bytes], chunk: int, max_row: int) -> Iterator[int]:
    """The opening bracket, at which the file stands, the commas between rows and the closing bracket.

    Raises:
        ValueError: the array is not JSON, or does not end.
    """
    begin = file.tell()
    yield begin
    begin += len(file.read(1))
    # In Latin-1 a byte is a character, so that places in the text are places in the file. UTF-8 has the same bytes for
    # all that delimits values; the strings between are decoded when a row is asked for.
    text, fault = "", ""
    while len(text) < max_row and (more := file.read(chunk)):
        text += more.decode("latin-1")
        row = 0
        try:
            while (end := _end_of_row(text, row)) is not None:
                if text[row:end].strip() or text[end] == ",":
                    yield begin + end
                if text[end] == "]":
                    return
                row = end + 1
            fault = "no comma or closing bracket follows"
        except (ValueError, RecursionError) as error:  # what was read may end within the row
            fault = str(error)
        begin, text = begin + row, text[row:]
    raise ValueError(f"has a fault in the row at byte {begin}, or is only a part of a file: {fault}")


def _end_of_row(text: str, begin: int) -> int | None:
    """The place of the comma or bracket after the row, or None if the text ends before it.

    Raises:
        ValueError, RecursionError: the text is not JSON, or ends within the row.
    """
    end = _end_of_space(text, begin)
    if text[end : end + 1] != "]":
        end = _end_of_space(text, _DECODER.raw_decode(text, end)[1])
    if end == len(text):
        return None
    if text[end] not in ",]":
        raise ValueError(f"expected a comma or a closing bracket, got {text[end]!r}")
    return end


def _end_of_space(text: str, begin: int) -> int:
    while text[begin : begin + 1] in (" ", "\t", "\n", "\r"):
        begin += 1
    return begin
