"""Paths of pictures that annotations name: they stay in the folder of the pictures unless a setting allows others."""

import os
from pathlib import Path

from betaclip.data.readers.annotations import BadRowError


def picture_path(root: Path, name: str, allow_outside_root: bool = False) -> Path:
    """The path of a picture that annotations name, relative to ``root``.

    ``..`` is resolved before links are followed, so that a link in the folder leads where its owner meant it to.

    Raises:
        BadRowError: the path is absolute or leaves the folder, and ``allow_outside_root`` is not set.
    """
    if allow_outside_root:
        return root / name
    inside = os.path.normpath(name)
    if os.path.isabs(inside) or os.path.splitdrive(inside)[0] or inside.split(os.sep)[0] == os.pardir:
        raise BadRowError(f"image {name!r} is outside the folder of the pictures; allow_outside_root would read it")
    return root / inside
