"""Sets of pictures with one long caption each, for retrieval."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from betaclip.data.batches import Bad
from betaclip.data.readers.annotations import Annotations, BadRowError, parse_json
from betaclip.data.readers.sharegpt4v import TEST_ROWS

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class RetrievalSet:
    """Pictures with their captions, and the pairs of which one half is missing."""

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


def urban1k(root: str | Path) -> RetrievalSet:
    """Urban1K: ``image/1.jpg`` … and ``caption/1.txt`` …, in the order of their numbers.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: no pair, as for all sets.
    """
    folders = [_folder(Path(root) / name, "urban1k") for name in ("image", "caption")]
    pictures = {path.stem: path for path in sorted(folders[0].iterdir()) if path.suffix.lower() in _PICTURES}
    captions = {path.stem: path for path in sorted(folders[1].glob("*.txt"))}
    pairs, missing = [], []
    for stem in sorted(pictures.keys() | captions.keys(), key=lambda stem: (len(stem), stem)):
        if stem not in pictures:
            missing.append(Bad(str(captions[stem]), "a caption without a picture"))
        elif stem not in captions:
            missing.append(Bad(str(pictures[stem]), "a picture without a caption"))
        elif caption := captions[stem].read_text(encoding="utf-8", errors="replace").strip():
            pairs.append((pictures[stem], caption))
        else:
            missing.append(Bad(str(captions[stem]), "empty caption"))
    return RetrievalSet("urban1k", pairs, missing)


def sharegpt4v_1k(annotations: str | Path, root: str | Path, rows: int = TEST_ROWS) -> RetrievalSet:
    """ShareGPT4V-1k: the first rows of the published annotations, whose pictures are ``root / row["image"]``."""
    source = Annotations(annotations)
    pairs, missing = [], []
    for row in range(min(rows, len(source))):
        try:
            image, caption = source[row]
        except BadRowError as error:
            missing.append(Bad(source.where(row), str(error)))
            continue
        path = Path(root) / image
        if path.is_file():
            pairs.append((path, caption))
        else:
            missing.append(Bad(str(path), "a caption without a picture"))
    return RetrievalSet("sharegpt4v_1k", pairs, missing)


def dci(root: str | Path) -> RetrievalSet:
    """Densely Captioned Images, the folder ``densely_captioned_images``: ``annotations/*.json``, each with "image" (the
    name of a file in ``photos/``), "short_caption" and "extra_caption".

    The caption is the short and the extra one, as its authors' ``get_extended_caption`` and most retrieval tables
    have it; the captions of masks are left out. All annotations are taken, of whatever split.
    """
    annotations, photos = (_folder(Path(root) / name, "dci") for name in ("annotations", "photos"))
    pairs, missing = [], []
    for file in sorted(annotations.glob("*.json")):
        try:
            row = parse_json(file.read_bytes())
        except BadRowError as error:
            missing.append(Bad(str(file), str(error)))
            continue
        fields = ("image", "short_caption", "extra_caption")
        image, short, extra = (row.get(name) if isinstance(row, dict) else None for name in fields)
        caption = "\n".join(text.strip() for text in (short, extra) if isinstance(text, str) and text.strip())
        if not isinstance(image, str) or not caption:
            missing.append(Bad(str(file), 'no "image", or neither "short_caption" nor "extra_caption"'))
        elif not (photos / image).is_file():
            missing.append(Bad(str(photos / image), "a caption without a picture"))
        else:
            pairs.append((photos / image, caption))
    return RetrievalSet("dci", pairs, missing)


def _folder(path: Path, name: str) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"{name}: {path} is not a folder")
    return path
