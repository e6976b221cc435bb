"""Densely Captioned Images, for retrieval."""

from dataclasses import dataclass
from pathlib import Path

from betaclip.data.batches import Bad
from betaclip.data.readers.annotations import BadRowError, parse_json
from betaclip.data.readers.paths import picture_path, read_file
from betaclip.data.readers.retrieval_set import RetrievalOptions, RetrievalSet, check_folder


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
    pairs, missing = [], []
    for file in sorted(annotations.glob("*.json")):
        try:
            row = parse_json(read_file(file))
        except BadRowError as error:
            missing.append(Bad(str(file), str(error)))
            continue
        fields = ("image", "short_caption", "extra_caption")
        image, short, extra = (row.get(name) if isinstance(row, dict) else None for name in fields)
        caption = "\n".join(text.strip() for text in (short, extra) if isinstance(text, str) and text.strip())
        if not isinstance(image, str) or not caption:
            missing.append(Bad(str(file), 'no "image", or neither "short_caption" nor "extra_caption"'))
            continue
        try:
            path = picture_path(photos, image, allow_outside_root)
        except BadRowError as error:
            missing.append(Bad(str(file), str(error)))
            continue
        if path.is_file():
            pairs.append((path, caption))
        else:
            missing.append(Bad(str(path), "a caption without a picture"))
    return RetrievalSet("dci", pairs, missing)
