"""DOCCI: the 5000 pictures of the test split, for retrieval by one long description or by single sentences."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from betaclip.data.readers.annotations import BadRowError, checked_caption, parse_json
from betaclip.data.readers.flair import flair_rows
from betaclip.data.readers.paths import read_file
from betaclip.data.readers.retrieval_set import RetrievalOptions, RetrievalSet, Row, collect

_DESCRIPTIONS, _SENTENCES = "docci_descriptions.jsonlines", "annotations/test_annotations.json"


@dataclass(frozen=True, kw_only=True)
class DOCCIOptions(RetrievalOptions):
    """Settings of DOCCI."""

    docci: Path | None = None
    """Folder with images/ and docci_descriptions.jsonlines, or with FLAIR's annotations/test_annotations.json, whose
    texts are single sentences; or the path of one of these files: retrieval."""

    def read(self) -> RetrievalSet | None:
        return None if self.docci is None else docci(self.docci, allow_outside_root=self.allow_outside_root)


def docci(path: str | Path, *, allow_outside_root: bool = False) -> RetrievalSet:
    """DOCCI's test split, named "docci" or, with FLAIR's sentences, "docci_sentences": they are not comparable.

    Raises:
        FileNotFoundError: there is neither file.
        ValueError: a folder holds both files, or there is no picture with a caption.
    """
    path = Path(path)
    folder, file = _file(path)
    sentences = file.suffix == ".json"
    rows: Iterable[Row] = flair_rows(file, "docci") if sentences else _descriptions(file)
    name = "docci_sentences" if sentences else "docci"
    return collect(name, rows, folder / "images", allow_outside_root=allow_outside_root)


def _file(path: Path) -> tuple[Path, Path]:
    """The folder that has images/, and the file of the texts."""
    if path.is_file():
        return path.parent.parent if path.parent.name == "annotations" else path.parent, path
    found = [path / name for name in (_DESCRIPTIONS, _SENTENCES) if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"docci: {path} has neither {_DESCRIPTIONS} nor {_SENTENCES}")
    if len(found) > 1:
        raise ValueError(f"docci: {path} has {_DESCRIPTIONS} and {_SENTENCES}; give the path of one of them")
    return path, found[0]


def _descriptions(file: Path) -> Iterator[Row]:
    """The rows of the test split, and those that cannot be read."""
    for number, line in enumerate(read_file(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except BadRowError as error:
            row = error
        if not isinstance(row, dict) or row.get("split") == "test":
            yield f"{file}, row {number}", partial(_description, row)


def _description(row: Any) -> tuple[str, list[str]]:
    if isinstance(row, BadRowError):
        raise row
    image = row.get("image_file") if isinstance(row, dict) else None
    if not isinstance(image, str) or not image:
        raise BadRowError('no "image_file"')
    return image, [checked_caption(row.get("description"))]
