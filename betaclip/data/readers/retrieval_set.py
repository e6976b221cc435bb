"""What readers of pictures with one long caption each return, for retrieval."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from betaclip.data.batches import Bad


@dataclass(frozen=True)
class RetrievalSet:
    """Pictures with their captions, and the incomplete pairs.

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


def check_folder(path: Path, name: str) -> Path:
    """The path, if it is a folder; the message of the FileNotFoundError begins with ``name``."""
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: {path} is not a folder")
    return path
