"""Pictures in one folder for each class, as torchvision's ImageFolder reads them, for zero-shot classification."""

import re
from dataclasses import dataclass
from pathlib import Path

from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from torchvision.datasets import ImageFolder

from betaclip.data.readers.retrieval_set import check_folder, load_json

_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class ClassFolders:
    """names: what the classes are called in texts. pictures: files, each with the number of its class."""

    names: list[str]
    pictures: list[tuple[Path, int]]


def class_folders(root: str | Path, names: str | Path | None = None) -> ClassFolders:
    """The classes of ``root``, in the order of their folders' names, and their pictures.

    A class is called as its folder, with blanks for underscores; the 1000 folders of ImageNet, which have WordNet's
    numbers, as in open_clip.

    Args:
        names: a JSON file with other names, ``{folder: name}``.

    Raises:
        FileNotFoundError: there is no such folder, or a class has no pictures.
        ValueError: ``names`` lacks a folder, or the folders are some of ImageNet's and ``names`` is not given.
    """
    check_folder(Path(root), "zero_shot")
    try:
        found = ImageFolder(root)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"zero_shot: {error}") from error
    pictures = [(Path(path), number) for path, number in found.samples]
    return ClassFolders(_names(found.classes, Path(root), names), pictures)


def _names(folders: list[str], root: Path, file: str | Path | None) -> list[str]:
    if file is not None:
        names = load_json(Path(file), "zero_shot_names")
        names = names if isinstance(names, dict) else {}
        unnamed = [folder for folder in folders if not isinstance(names.get(folder), str)]
        if unnamed:
            raise ValueError(f"zero_shot_names: {file} has no name for {len(unnamed)} folders; the first: {unnamed[0]}")
        return [names[folder] for folder in folders]
    if not all(map(_WORDNET_ID.fullmatch, folders)):
        return [folder.replace("_", " ") for folder in folders]
    if len(folders) != len(IMAGENET_CLASSNAMES):
        raise ValueError(
            f"zero_shot: {root} has {len(folders)} folders with WordNet's numbers, where ImageNet has "
            f"{len(IMAGENET_CLASSNAMES)}; give their names by zero_shot_names"
        )
    return list(IMAGENET_CLASSNAMES)
