"""Pictures of your own with captions: a folder, JSON, or a table; to train on and for retrieval."""

from dataclasses import dataclass, fields
from pathlib import Path

from torch.utils.data import Dataset

from betaclip.data.batches import Bad, Draw, Example
from betaclip.data.example_maker import CaptionOptions, ExampleMaker, draw_caption
from betaclip.data.readers.annotations import CHECKED_ROWS, Annotations, BadRowError, Rows
from betaclip.data.readers.folder import Folder
from betaclip.data.readers.paths import picture_path
from betaclip.data.readers.retrieval_set import RetrievalOptions, RetrievalSet, pairs_of_rows
from betaclip.data.readers.table import ENDINGS, Table, TableOptions
from betaclip.settings import bounded


def open_rows(path: str | Path, options: TableOptions) -> Rows:
    """The rows of a folder, of a table (.csv, .tsv) or of JSON.

    Raises:
        FileNotFoundError: there is neither such a file nor such a folder.
        ValueError: it holds no pictures with captions, or ``options`` are given for what is no table.
    """
    path = Path(path)
    given = [setting.name for setting in fields(TableOptions) if getattr(options, setting.name) is not None]
    if path.is_file() and path.suffix.lower() in ENDINGS:
        return Table(path, options)
    if given and path.exists():
        raise ValueError(f"{given[0]}: expected a table ({', '.join(ENDINGS)}), got {path}")
    return Folder(path) if path.is_dir() else Annotations(path)


def folder_of(annotations: Path) -> Path:
    """The folder that pictures' paths start from by default."""
    return annotations if annotations.is_dir() else annotations.parent


class PairsDataset(Dataset[Example | Bad]):
    """Pictures ``root / row's path`` with their captions, of which each draw takes one; the first rows are left out.

    Raises:
        ValueError: no rows are left, or none of the first has its picture.
    """

    def __init__(
        self, rows: Rows, root: str | Path, make: ExampleMaker, *, test_rows: int = 0, allow_outside_root: bool = False
    ) -> None:
        self.rows, self.root, self.make = rows, Path(root), make
        self.test_rows, self.allow_outside_root = test_rows, allow_outside_root
        if len(self) < 1:
            raise ValueError(
                f"test_rows: expected fewer than the {len(rows)} rows of {rows.path}, to leave some to train on, "
                f"got {test_rows}"
            )
        self._check_pictures()

    def __len__(self) -> int:
        return len(self.rows) - self.test_rows

    def __getitem__(self, draw: Draw) -> Example | Bad:
        if not 0 <= draw.index < len(self):
            raise IndexError(f"index: expected less than {len(self)}, got {draw.index}")
        row = self.test_rows + draw.index
        try:
            path, captions = self._row(row)
        except BadRowError as error:
            return Bad(self.rows.where(row), str(error))
        return self.make(path, str(path), draw_caption(captions, draw.seed), draw.seed)

    def _row(self, row: int) -> tuple[Path, list[str]]:
        image, captions = self.rows[row]
        return picture_path(self.root, image, self.allow_outside_root), captions

    def _check_pictures(self) -> None:
        """Raise ValueError if none of the first rows has its picture."""
        first = ""
        for row in range(self.test_rows, min(self.test_rows + CHECKED_ROWS, len(self.rows))):
            try:
                path, _ = self._row(row)
            except BadRowError as error:
                fault = f"{self.rows.where(row)}: {error}"
            else:
                if path.is_file():
                    return
                fault = f"{path} is not a file"
            first = first or fault
        raise ValueError(f"root: none of the first rows of {self.rows.path} has its picture; the first: {first}")


@dataclass(frozen=True, kw_only=True)
class FileOptions(CaptionOptions):
    """Settings of pictures in files, whose captions are in one file or beside them."""

    annotations: Path | None = None
    """sharegpt4v, pairs: the captions. pairs: a folder with a text file beside each picture, JSON lines with "image"
    and "caption" (or "captions"), or a table (.csv, .tsv). sharegpt4v: its JSON or JSON lines."""
    root: Path | None = None
    """sharegpt4v, pairs: the folder that the pictures' paths start from; by default that of the annotations."""
    test_rows: int | None = bounded(None, at_least=0)
    """sharegpt4v, pairs: rows at the beginning that are for testing and left out; by default the 1000 of SV-1k in the
    published file of ShareGPT4V, and none in any other."""
    allow_outside_root: bool = False
    """sharegpt4v, pairs: also read pictures whose paths are absolute or leave root."""

    def dataset_of(self, rows: Rows, make: ExampleMaker, test_rows: int) -> PairsDataset:
        """The data set of these rows, whose pictures lie as the settings say.

        test_rows: their number if the settings do not give it.
        """
        root = folder_of(rows.path) if self.root is None else self.root
        if not root.is_dir():
            raise FileNotFoundError(f"root: {root} is not a folder")
        return PairsDataset(
            rows,
            root,
            make,
            test_rows=test_rows if self.test_rows is None else self.test_rows,
            allow_outside_root=self.allow_outside_root,
        )


@dataclass(frozen=True, kw_only=True)
class PairsOptions(TableOptions, FileOptions):
    """Settings of pictures of your own."""

    def create(
        self, image_size: int, context_length: int, *, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> PairsDataset:
        if self.annotations is None:
            raise ValueError("annotations: kind 'pairs' needs the file of the captions, or the folder of both")
        rows = open_rows(self.annotations, self)
        return self.dataset_of(rows, self.example_maker(image_size, context_length), test_rows=0)


@dataclass(frozen=True, kw_only=True)
class PairsRetrievalOptions(TableOptions, RetrievalOptions):
    """Settings of pictures of your own, for retrieval."""

    pairs: Path | None = None
    """Pictures of your own: a folder with a text file beside each, JSON lines, or a table; as data.annotations of a
    training run: retrieval."""
    pairs_images: Path | None = None
    """Folder that the paths of these pictures start from; by default that of their captions."""
    pairs_rows: int | None = None
    """Number of rows at the beginning to take, such as data.test_rows of a training run; by default all."""

    def read(self) -> RetrievalSet | None:
        if self.pairs is None:
            return None
        if self.pairs_rows is not None and self.pairs_rows < 1:
            raise ValueError(f"pairs_rows: expected at least 1, got {self.pairs_rows}")
        rows = open_rows(self.pairs, self)
        root = self.pairs_images or folder_of(self.pairs)
        return pairs_of_rows("pairs", rows, root, self.pairs_rows, allow_outside_root=self.allow_outside_root)
