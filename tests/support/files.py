"""Files for tests of readers."""

from pathlib import Path


def touch(path: Path, content: bytes = b"picture") -> Path:
    """Write a file, and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
