"""Densely Captioned Images, for retrieval."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from betaclip.data.readers.annotations import BadRowError, parse_json
from betaclip.data.readers.paths import read_file
from betaclip.data.readers.retrieval_set import RetrievalOptions, RetrievalSet, check_folder, collect


@dataclass(frozen=True, kw_only=True)
class DCIOptions(RetrievalOptions):
    """Settings of Densely Captioned Images."""

    dci: Path | None = None
    """Folder with annotations/ and photos/: retrieval."""

    def read(self) -> RetrievalSet | None:
        return None if self.dci is None else dci(self.dci, allow_outside_root=self.allow_outside_root)


def dci(root: str | Path, *, allow_outside_root: bool = False) -> RetrievalSet:
    """The folder ``densely_captioned_images``: ``annotations/*.json``, each with "image" (the name of a file in
    ``photos/``), "short_caption" and "extra_caption".

    A picture's caption is the short one and the extra one, as in the authors' ``get_extended_caption`` and in most
    retrieval tables; the captions of masks are left out. All annotations are taken, whatever their split.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there is no picture with a caption.
    """
    annotations, photos = (check_folder(Path(root) / name, "dci") for name in ("annotations", "photos"))
    rows = ((str(file), partial(_row, file)) for file in sorted(annotations.glob("*.json")))
    return collect("dci", rows, photos, allow_outside_root=allow_outside_root)


def _row(file: Path) -> tuple[str, list[str]]:
    row = parse_json(read_file(file))
    fields = ("image", "short_caption", "extra_caption")
    image, short, extra = (row.get(name) if isinstance(row, dict) else None for name in fields)
    caption = "\n".join(text.strip() for text in (short, extra) if isinstance(text, str) and text.strip())
    if not isinstance(image, str) or not caption:
        raise BadRowError('no "image", or neither "short_caption" nor "extra_caption"')
    return image, [caption]
