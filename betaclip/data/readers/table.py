"""Tables of pictures and captions: CSV and TSV, as open_clip's trainer reads them."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from betaclip.data.readers.annotations import MAX_ROW, BadRowError, FileRows, checked_caption

ENDINGS = (".csv", ".tsv")
_SEPARATORS = ("\t", ",", ";")  # that are tried
_IMAGE_KEYS, _CAPTION_KEYS = ("filepath", "image"), ("title", "caption")  # open_clip's, then those of JSON rows


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How a table is laid out; each setting is found in the first line if it is not given."""

    csv_separator: str | None = None
    """pairs: what separates the columns of a table; by default the tab, comma or semicolon of its first line."""
    csv_img_key: str | None = None
    """pairs: the name of a table's column of pictures; by default filepath or image."""
    csv_caption_key: str | None = None
    """pairs: the name of a table's column of captions; by default title or caption."""


class Table(FileRows):
    """Rows of a table whose first line names its columns. Fields may stand in double quotes.

    A row that has another number of fields than the first line is found when it is asked for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the first line lacks a column, a row of several lines has a fault in its quotes, or as
            :class:`FileRows`.
    """

    def __init__(self, path: str | Path, options: TableOptions, *, max_row: int = MAX_ROW) -> None:
        self.options = options
        self.separators_tried = _SEPARATORS if options.csv_separator is None else (_separator(options.csv_separator),)
        super().__init__(path, max_row=max_row)

    def _separators(self, file: IO[bytes]) -> Iterator[int]:
        self._read_header(file.readline(self.max_row))
        position = file.tell()
        end = position - 1
        yield end

        def lines() -> Iterator[str]:
            """In Latin-1 a byte is a character; UTF-8 has the same bytes for all that delimits fields."""
            nonlocal position, end
            while line := file.readline(self.max_row):
                if len(line) == self.max_row and not line.endswith(b"\n"):
                    raise ValueError(f"has a row of more than {self.max_row} bytes, at byte {position}")
                position += len(line)
                end = position - line.endswith(b"\n")
                yield line.decode("latin-1")

        rows = csv.reader(lines(), delimiter=self.separator, strict=True)
        while True:
            before = rows.line_num
            try:
                is_row = bool(next(rows))
            except StopIteration:
                return
            except csv.Error as error:
                if rows.line_num > before + 1:
                    raise ValueError(f"has a fault in the quotes that begin in line {before + 2}: {error}") from error
                is_row = True  # a fault within a line is one bad row
            if is_row:
                yield end

    def _read_header(self, line: bytes) -> None:
        """Find the separator, the names of the columns, and those of pictures and captions."""
        try:
            text = line.decode()
            tried = {separator: _fields(text, separator) for separator in self.separators_tried}
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"has a fault in its first line: {error}") from error
        self.separator = max(tried, key=lambda separator: len(tried[separator]))
        self.columns = tried[self.separator]
        self.image = self._column("csv_img_key", self.options.csv_img_key, _IMAGE_KEYS)
        self.caption = self._column("csv_caption_key", self.options.csv_caption_key, _CAPTION_KEYS)

    def _column(self, setting: str, given: str | None, names: tuple[str, ...]) -> int:
        """The number of the column that ``given`` names or, without it, of the one that has one of ``names``."""
        found = [name for name in ((given,) if given is not None else names) if name in self.columns]
        if len(found) != 1 or self.columns.count(found[0]) != 1:
            expected = repr(given) if given is not None else " or ".join(map(repr, names))
            raise ValueError(
                f"has the columns {', '.join(map(repr, self.columns))}; expected one of them to be {expected} "
                f"({setting}, csv_separator)"
            )
        return self.columns.index(found[0])

    def _parse(self, content: bytes) -> tuple[str, list[str]]:
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise BadRowError(f"not UTF-8: {error}") from error
        try:
            fields = _fields(text, self.separator)
        except csv.Error as error:
            raise BadRowError(str(error)) from error
        if len(fields) != len(self.columns):
            raise BadRowError(
                f"{len(fields)} fields in {len(self.columns)} columns; a field with {self.separator!r} needs quotes"
            )
        if not fields[self.image]:
            raise BadRowError(f"no {self.columns[self.image]!r}")
        try:
            return fields[self.image], [checked_caption(fields[self.caption])]
        except BadRowError as error:
            raise BadRowError(f"{error}, of image {fields[self.image]}") from None


def _separator(given: str) -> str:
    separator = "\t" if given == "\\t" else given  # as shells hand it over
    if len(separator) != 1 or not separator.isascii() or separator in '"\r\n':
        raise ValueError(f"csv_separator: expected one character, or \\t for a tab, got {given!r}")
    return separator


def _fields(text: str, separator: str) -> list[str]:
    """The fields of the first row that is not blank."""
    rows = csv.reader(io.StringIO(text, newline="\n"), delimiter=separator, strict=True)
    return next((row for row in rows if row), [])
