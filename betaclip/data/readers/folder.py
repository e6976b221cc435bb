"""Pictures in a folder, each with its caption in a text file of the same name beside it."""

import logging
import os
from pathlib import Path

from PIL import Image

from betaclip.data.readers.annotations import BadRowError, Rows, checked_caption
from betaclip.data.readers.paths import read_file

_log = logging.getLogger(__name__)


class Folder(Rows):
    """The pictures in a folder and in the folders within it, in the order of their paths; hidden ones are left out.

    A picture without a text file is a bad row. Text files without a picture are logged.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no picture has a text file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"annotations: {self.path} is not a folder")
        Image.init()
        endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
        self.names, texts = [], []
        for folder, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in (Path(folder, name).relative_to(self.path) for name in files if not name.startswith(".")):
                if name.suffix.lower() in endings:
                    self.names.append(name.as_posix())
                elif name.suffix == ".txt":
                    texts.append(name)
        self.names.sort()
        pictured = {os.path.splitext(name)[0] for name in self.names}
        alone = sorted(str(name) for name in texts if name.with_suffix("").as_posix() not in pictured)
        if not self.names or len(alone) == len(texts):
            raise ValueError(f"annotations: {self.path} has no picture with a text file of the same name beside it")
        if alone:
            _log.warning("annotations: %d text files in %s have no picture beside them; the first: %s",
                         len(alone), self.path, alone[0])  # fmt: skip
        self._check()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[str, list[str]]:
        name = self.names[row]
        text = (self.path / name).with_suffix(".txt")
        if not text.exists():
            raise BadRowError(f"a picture without a caption, which would be in {text.name} beside it")
        try:
            return name, [checked_caption(read_file(text).decode("utf-8-sig").strip())]
        except UnicodeDecodeError as error:
            raise BadRowError(f"{text.name} is not UTF-8: {error}") from error
        except BadRowError as error:
            raise BadRowError(f"{error}, in {text.name}") from None

    def where(self, row: int) -> str:
        return str(self.path / self.names[row])

    def identity(self) -> list[str | int]:
        stats = [text.stat() for text in self.path.rglob("*.txt")]
        return [
            str(self.path.resolve()), len(self), len(stats), sum(stat.st_size for stat in stats),
            max(stat.st_mtime_ns for stat in stats),
        ]  # fmt: skip
