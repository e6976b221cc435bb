"""ImageInWords: its three subsets of pictures with a description by people, for retrieval."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from betaclip.data.readers.annotations import BadRowError, checked_caption, parse_json
from betaclip.data.readers.flair import flair_rows
from betaclip.data.readers.paths import read_file
from betaclip.data.readers.retrieval_set import RetrievalOptions, RetrievalSet, Row, collect

# The published folder of a subset, and the folder of its pictures.
_PICTURES = {"IIW-400": "docci_aar", "DOCCI_Test": "docci", "DCI_Test": "dci"}


@dataclass(frozen=True, kw_only=True)
class IIWOptions(RetrievalOptions):
    """Settings of ImageInWords."""

    iiw: Path | None = None
    """Folder with IIW-400/, DOCCI_Test/ and DCI_Test/, each with its data.jsonl, beside the pictures in docci_aar/,
    docci/ and dci/; or the path of one data.jsonl, or of FLAIR's JSON of single sentences: retrieval."""

    def read(self) -> RetrievalSet | None:
        return None if self.iiw is None else iiw(self.iiw, allow_outside_root=self.allow_outside_root)


def iiw(path: str | Path, *, allow_outside_root: bool = False) -> RetrievalSet:
    """The 612 pictures of a folder ("iiw"), one subset ("iiw_400", "iiw_docci_test" or "iiw_dci_test"), or FLAIR's
    sentences ("iiw_sentences"); they are not comparable.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is no picture with a caption, or a data.jsonl lies in another folder.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        rows, folder, name = flair_rows(path, "iiw"), path.parent, "iiw_sentences"
    elif path.is_file():
        subset = path.parent.name
        if subset not in _PICTURES:
            folders = " or ".join(_PICTURES)
            raise ValueError(f"iiw: expected {path} in a folder called {folders}, which says where its pictures are")
        rows, folder = _rows(path, _PICTURES[subset]), path.parent.parent
        name = f"iiw_{subset.lower().removeprefix('iiw-')}"
    else:
        files = {path / subset / "data.jsonl": pictures for subset, pictures in _PICTURES.items()}
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"iiw: {missing[0]} is not a file; give the path of one data.jsonl for its subset")
        rows = chain.from_iterable(_rows(file, pictures) for file, pictures in files.items())
        folder, name = path, "iiw"
    return collect(name, rows, folder, allow_outside_root=allow_outside_root)


def _rows(file: Path, pictures: str) -> Iterator[Row]:
    for number, line in enumerate(read_file(file).splitlines(), 1):
        if line.strip():
            yield f"{file}, row {number}", partial(_row, line, pictures)


def _row(line: bytes, pictures: str) -> tuple[str, list[str]]:
    row = parse_json(line)
    image = row.get("image", row.get("image/key")) if isinstance(row, dict) else None
    if not isinstance(image, str) or not image:
        raise BadRowError('no "image" or "image/key"')
    name = image if image.endswith(".jpg") else f"{image}.jpg"
    return f"{pictures}/{name}", [checked_caption(row.get("IIW"))]
