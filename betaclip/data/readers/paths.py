"""What readers do with paths.

Pictures that annotations name stay in the folder of the pictures unless a setting allows others, and no pipe or endless
file is read.
"""

import os
from pathlib import Path

from betaclip.data.readers.annotations import BadRowError

MAX_FILE = 1 << 28  # bytes of a file of captions that is read whole


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


def read_file(path: Path) -> bytes:
    """The content of a file of captions.

    Raises:
        BadRowError: it is not a regular file, cannot be read, or has more than MAX_FILE bytes.
    """
    if not path.is_file():
        raise BadRowError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise BadRowError(f"{type(error).__name__}: {error}") from error
    if len(content) > MAX_FILE:
        raise BadRowError(f"{path} has more than {MAX_FILE} bytes")
    return content
