"""Urban1K: pictures of cities with one long caption each, for retrieval."""

from dataclasses import dataclass
from pathlib import Path

from betaclip.data.batches import Bad
from betaclip.data.readers.annotations import BadRowError, checked_caption
from betaclip.data.readers.paths import read_file
from betaclip.data.readers.retrieval_set import RetrievalOptions, RetrievalSet, check_folder

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, kw_only=True)
class Urban1KOptions(RetrievalOptions):
    """Settings of Urban1K."""

    urban1k: Path | None = None
    """Folder with image/ and caption/: retrieval."""

    def read(self) -> RetrievalSet | None:
        return None if self.urban1k is None else urban1k(self.urban1k)


def urban1k(root: str | Path) -> RetrievalSet:
    """Urban1K: ``image/1.jpg`` … and ``caption/1.txt`` …, in the order of their numbers.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: there is no picture with a caption.
    """
    folders = [check_folder(Path(root) / name, "urban1k") for name in ("image", "caption")]
    pictures = {path.stem: path for path in sorted(folders[0].iterdir()) if path.suffix.lower() in _PICTURES}
    captions = {path.stem: path for path in sorted(folders[1].glob("*.txt"))}
    pairs, missing = [], []
    for stem in sorted(pictures.keys() | captions.keys(), key=lambda stem: (len(stem), stem)):
        if stem not in pictures:
            missing.append(Bad(str(captions[stem]), "a caption without a picture"))
        elif stem not in captions:
            missing.append(Bad(str(pictures[stem]), "a picture without a caption"))
        else:
            try:
                caption = checked_caption(read_file(captions[stem]).decode("utf-8-sig", errors="replace"))
                pairs.append((pictures[stem], caption.strip()))
            except BadRowError as error:
                missing.append(Bad(str(captions[stem]), str(error)))
    return RetrievalSet("urban1k", pairs, missing)
