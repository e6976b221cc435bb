"""What readers of pictures with captions return for retrieval, and what they share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from betaclip.data.batches import Bad
from betaclip.data.readers.annotations import BadRowError, Rows, parse_json
from betaclip.data.readers.paths import picture_path, read_file

# The name of a row in messages, and what reads the path of its picture and its captions, or raises BadRowError.
Row = tuple[str, Callable[[], tuple[str, Sequence[str]]]]


@dataclass(frozen=True)
class RetrievalSet:
    """Pictures with their captions, and the incomplete pairs.

    A picture with several captions is in several pairs.

    Raises:
        ValueError: there is no pair.
    """

    name: str
    pairs: list[tuple[Path, str]]
    missing: list[Bad]

    def __post_init__(self) -> None:
        if not self.pairs:
            first = f"; the first: {self.missing[0].path}: {self.missing[0].reason}" if self.missing else ""
            raise ValueError(f"{self.name}: no picture with a caption{first}")

    def __iter__(self) -> Iterator[tuple[Path, str]]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(ABC):
    """Where one retrieval set lies. ``betaclip.data.registry`` lists them and makes options of their fields."""

    allow_outside_root: bool = False
    """Also read pictures whose paths are absolute or leave the folder of their set."""

    @abstractmethod
    def read(self) -> RetrievalSet | None:
        """The set, or None if it is not asked for.

        Raises:
            FileNotFoundError: a file or a folder is missing.
            ValueError: there is no picture with a caption.
        """


def collect(name: str, rows: Iterable[Row], root: Path, *, allow_outside_root: bool = False) -> RetrievalSet:
    """The retrieval set of rows whose pictures are ``root / path``; a missing picture is listed once.

    Raises:
        ValueError: there is no picture with a caption.
    """
    pairs: list[tuple[Path, str]] = []
    missing: dict[str, Bad] = {}
    for where, read in rows:
        try:
            image, captions = read()
            path = picture_path(root, image, allow_outside_root)
        except BadRowError as error:
            missing[where] = Bad(where, str(error))
            continue
        if path.is_file():
            pairs += [(path, caption) for caption in captions]
        else:
            missing[str(path)] = Bad(str(path), "a caption without a picture")
    return RetrievalSet(name, pairs, list(missing.values()))


def pairs_of_rows(
    name: str, rows: Rows, root: Path, count: int | None = None, *, allow_outside_root: bool = False
) -> RetrievalSet:
    """The retrieval set of the first ``count`` rows, by default of all.

    Raises:
        ValueError: there is no picture with a caption.
    """
    numbers = range(len(rows) if count is None else min(count, len(rows)))
    read: Iterable[Row] = ((rows.where(number), partial(rows.__getitem__, number)) for number in numbers)
    return collect(name, read, root, allow_outside_root=allow_outside_root)


def load_json(path: Path, name: str) -> Any:
    """The content of a JSON file; the messages of errors begin with ``name``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name}: {path} is not a file")
    try:
        return parse_json(read_file(path))
    except BadRowError as error:
        raise ValueError(f"{name}: {path}: {error}") from error


def check_folder(path: Path, name: str) -> Path:
    """The path, if it is a folder; the message of the FileNotFoundError begins with ``name``."""
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: {path} is not a folder")
    return path
