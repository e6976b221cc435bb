"""Urban1K: pictures of cities with one long caption each, for retrieval."""

from dataclasses import dataclass
from pathlib import Path

from betaclip.data.batches import Bad
from betaclip.data.readers.annotations import BadRowError, checked_caption
from betaclip.data.readers.flair import flair_rows
from betaclip.data.readers.paths import read_file
from betaclip.data.readers.retrieval_set import RetrievalOptions, RetrievalSet, check_folder, collect

_FLAIR = Path("annotations", "annotations.json")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, kw_only=True)
class Urban1KOptions(RetrievalOptions):
    """Settings of Urban1K."""

    urban1k: Path | None = None
    """Folder with image/ and caption/, or with images/ and FLAIR's annotations/annotations.json: retrieval."""

    def read(self) -> RetrievalSet | None:
        return None if self.urban1k is None else urban1k(self.urban1k, allow_outside_root=self.allow_outside_root)


def urban1k(root: str | Path, *, allow_outside_root: bool = False) -> RetrievalSet:
    """Urban1K: ``image/1.jpg`` … and ``caption/1.txt`` …, in the order of their numbers; or, in place of the folder
    caption, FLAIR's ``annotations/annotations.json``. The folder of pictures may be called images.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there is no picture with a caption.
    """
    root = Path(root)
    name = "images" if (root / "images").is_dir() and not (root / "image").exists() else "image"
    pictures = check_folder(root / name, "urban1k")
    if not (root / "caption").exists() and (root / _FLAIR).is_file():
        return collect("urban1k", flair_rows(root / _FLAIR, "urban1k"), pictures, allow_outside_root=allow_outside_root)
    return _in_folders(pictures, check_folder(root / "caption", "urban1k"))


def _in_folders(image: Path, caption: Path) -> RetrievalSet:
    pictures = {path.stem: path for path in sorted(image.iterdir()) if path.suffix.lower() in _PICTURES}
    captions = {path.stem: path for path in sorted(caption.glob("*.txt"))}
    pairs, missing = [], []
    for stem in sorted(pictures.keys() | captions.keys(), key=lambda stem: (len(stem), stem)):
        if stem not in pictures:
            missing.append(Bad(str(captions[stem]), "a caption without a picture"))
        elif stem not in captions:
            missing.append(Bad(str(pictures[stem]), "a picture without a caption"))
        else:
            try:
                text = checked_caption(read_file(captions[stem]).decode("utf-8-sig", errors="replace"))
                pairs.append((pictures[stem], text.strip()))
            except BadRowError as error:
                missing.append(Bad(str(captions[stem]), str(error)))
    return RetrievalSet("urban1k", pairs, missing)
