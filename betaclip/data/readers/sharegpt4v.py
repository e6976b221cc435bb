"""ShareGPT4V: pictures in files and captions in one JSON file, to train on and, its first rows, for retrieval."""

import logging
from dataclasses import dataclass
from pathlib import Path

from betaclip.data.readers.annotations import Annotations
from betaclip.data.readers.pairs import FileOptions, PairsDataset
from betaclip.data.readers.retrieval_set import RetrievalOptions, RetrievalSet, pairs_of_rows

TEST_ROWS = 1000  # the first rows are the test set SV-1k
_PUBLISHED_NAME = "share-captioner"  # share-captioner_coco_lcs_sam_1246k_1107.json, and parts of it
_PUBLISHED_ROWS = 1_200_000  # filtered, the file still has 1 242 828

_log = logging.getLogger(__name__)


def is_published(annotations: Annotations) -> bool:
    """Whether a file is the published one, by its name or its number of rows."""
    return _PUBLISHED_NAME in annotations.path.name or len(annotations) >= _PUBLISHED_ROWS


@dataclass(frozen=True, kw_only=True)
class ShareGPT4VOptions(FileOptions):
    """Settings of ShareGPT4V's training rows."""

    def create(
        self, image_size: int, context_length: int, *, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> PairsDataset:
        if self.annotations is None:
            raise ValueError("annotations: kind 'sharegpt4v' needs the file of the captions")
        annotations = Annotations(self.annotations)
        test_rows = TEST_ROWS if is_published(annotations) else 0
        if self.test_rows is None and test_rows and rank == 0:
            _log.warning(
                "annotations: the first %d of %d rows are the test set SV-1k and are left out; test_rows changes that",
                test_rows, len(annotations),
            )  # fmt: skip
        return self.dataset_of(annotations, self.example_maker(image_size, context_length), test_rows)


@dataclass(frozen=True, kw_only=True)
class _ShareGPT4VRetrievalOptions(RetrievalOptions):
    sharegpt4v_images: Path | None = None
    """Folder in which ShareGPT4V's annotations name pictures; by default that of the annotations."""

    def rows(self, annotations: Path | None, count: int) -> RetrievalSet | None:
        """The first rows, or None without annotations."""
        if annotations is None:
            return None
        return pairs_of_rows(
            f"sharegpt4v_{count // 1000}k",
            Annotations(annotations),
            self.sharegpt4v_images or annotations.parent,
            count,
            allow_outside_root=self.allow_outside_root,
        )


@dataclass(frozen=True, kw_only=True)
class ShareGPT4V1kOptions(_ShareGPT4VRetrievalOptions):
    """Settings of ShareGPT4V-1k."""

    sharegpt4v: Path | None = None
    """Annotations of ShareGPT4V, of which the first 1000 rows are taken (SV-1k): retrieval."""

    def read(self) -> RetrievalSet | None:
        return self.rows(self.sharegpt4v, TEST_ROWS)


@dataclass(frozen=True, kw_only=True)
class ShareGPT4V10kOptions(_ShareGPT4VRetrievalOptions):
    """Settings of ShareGPT4V-10k."""

    sharegpt4v_10k: Path | None = None
    """The same file, of which the first 10000 rows are taken (SV-10k): retrieval. By default nine in ten of them are
    training rows; data.test_rows 10000 leaves them out."""

    def read(self) -> RetrievalSet | None:
        return self.rows(self.sharegpt4v_10k, 10 * TEST_ROWS)
