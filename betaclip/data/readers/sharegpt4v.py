"""ShareGPT4V: pictures in files, captions in one JSON file."""

from pathlib import Path
from typing import Literal

from torch.utils.data import Dataset

from betaclip.data.batches import Bad, Draw, Example
from betaclip.data.example_maker import ExampleMaker
from betaclip.data.readers.annotations import Annotations, BadRowError

TEST_ROWS = 1000  # the first rows are the test set SV-1k


class ShareGPT4V(Dataset[Example | Bad]):
    """Row ``draw.index`` of the training or test rows, whose picture is ``root / row["image"]``.

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
    ) -> None:
        self.annotations, self.root, self.make = annotations, Path(root), make
        rows = range(len(annotations))
        self.rows = rows[test_rows:] if split == "train" else rows[:test_rows]
        if not self.rows:
            raise ValueError(
                f"annotations: no rows of {annotations.path} are left to {split}: it has {len(annotations)}, of which "
                f"the first {test_rows} are for testing"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw) -> Example | Bad:
        row = self.rows[draw.index]
        try:
            image, caption = self.annotations[row]
        except BadRowError as error:
            return Bad(self.annotations.where(row), str(error))
        path = self.root / image
        return self.make(path, str(path), caption, draw.seed)
