"""Tar shards of small pictures with captions."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(color: int = 0) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(color).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def write_shard(path: Path, files: Iterable[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as shard:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return str(path)


def sample(key: int, caption: str, form: str) -> list[tuple[str, bytes]]:
    """The two files of a sample, the caption in one of the forms txt, json, share.json."""
    conversations = {"conversations": [{"value": "?"}, {"value": caption}]}
    text = {
        "txt": caption.encode(),
        "json": json.dumps({"caption": caption}).encode(),
        "share.json": json.dumps(conversations).encode(),
    }[form]
    return [(f"{key}.jpg", picture(key)), (f"{key}.{form.removeprefix('share.')}", text)]
