"""ShareGPT4V: pictures in files and captions in one JSON file, to train on and, its first rows, for retrieval."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch.utils.data import Dataset

from betaclip.data.batches import Bad, Draw, Example
from betaclip.data.example_maker import CaptionOptions, ExampleMaker
from betaclip.data.readers.annotations import Annotations, BadRowError
from betaclip.data.readers.paths import picture_path
from betaclip.data.readers.retrieval_set import RetrievalOptions, RetrievalSet

TEST_ROWS = 1000  # the first rows are the test set SV-1k


class ShareGPT4V(Dataset[Example | Bad]):
    """The training or the test rows of annotations, whose pictures are ``root / row["image"]``.

    Raises:
        ValueError: the split has no rows.
    """

    def __init__(
        self,
        annotations: Annotations,
        root: str | Path,
        make: ExampleMaker,
        *,
        split: Literal["train", "test"] = "train",
        test_rows: int = TEST_ROWS,
        allow_outside_root: bool = False,
    ) -> None:
        self.annotations, self.root, self.make = annotations, Path(root), make
        self.allow_outside_root = allow_outside_root
        rows = range(len(annotations))
        self.rows = rows[test_rows:] if split == "train" else rows[:test_rows]
        if not self.rows:
            raise ValueError(
                f"annotations: {annotations.path} has no rows to {split} on: it has {len(annotations)} rows, and the "
                f"first {test_rows} are for testing"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> Example | Bad:
        row = self.rows[draw.index]
        try:
            image, caption = self.annotations[row]
            path = picture_path(self.root, image, self.allow_outside_root)
        except BadRowError as error:
            return Bad(self.annotations.where(row), str(error))
        return self.make(path, str(path), caption, draw.seed)


@dataclass(frozen=True, kw_only=True)
class ShareGPT4VOptions(CaptionOptions):
    """Settings of ShareGPT4V's training rows."""

    root: Path | None = None
    """sharegpt4v: the folder that the annotations' image paths start from."""
    annotations: Path | None = None
    """sharegpt4v: the JSON or JSON lines; the first 1000 rows are for testing and left out."""
    allow_outside_root: bool = False
    """sharegpt4v: also read pictures whose paths are absolute or leave root."""

    def create(
        self, image_size: int, context_length: int, *, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> ShareGPT4V:
        if self.root is None:
            raise ValueError("root: kind 'sharegpt4v' needs the folder of the pictures")
        if self.annotations is None:
            raise ValueError("annotations: kind 'sharegpt4v' needs the file of the captions")
        if not self.root.is_dir():
            raise FileNotFoundError(f"root: {self.root} is not a folder")
        make = self.example_maker(image_size, context_length)
        return ShareGPT4V(Annotations(self.annotations), self.root, make, allow_outside_root=self.allow_outside_root)


@dataclass(frozen=True, kw_only=True)
class ShareGPT4V1kOptions(RetrievalOptions):
    """Settings of ShareGPT4V-1k."""

    sharegpt4v: Path | None = None
    """Annotations of ShareGPT4V, of which the first 1000 rows are taken: retrieval."""
    sharegpt4v_images: Path | None = None
    """Folder in which they name pictures; by default that of the annotations."""

    def read(self) -> RetrievalSet | None:
        if self.sharegpt4v is None:
            return None
        return sharegpt4v_1k(
            self.sharegpt4v,
            self.sharegpt4v_images or self.sharegpt4v.parent,
            allow_outside_root=self.allow_outside_root,
        )


def sharegpt4v_1k(
    annotations: str | Path, root: str | Path, rows: int = TEST_ROWS, *, allow_outside_root: bool = False
) -> RetrievalSet:
    """ShareGPT4V-1k: the first rows of the published annotations, whose pictures are ``root / row["image"]``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no row has a caption and a picture.
    """
    source = Annotations(annotations)
    pairs, missing = [], []
    for row in range(min(rows, len(source))):
        try:
            image, caption = source[row]
            path = picture_path(Path(root), image, allow_outside_root)
        except BadRowError as error:
            missing.append(Bad(source.where(row), str(error)))
            continue
        if path.is_file():
            pairs.append((path, caption))
        else:
            missing.append(Bad(str(path), "a caption without a picture"))
    return RetrievalSet("sharegpt4v_1k", pairs, missing)
