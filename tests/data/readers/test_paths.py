"""Paths of pictures, inside the folder and outside of it, and caption files that are not regular files."""

import os
from pathlib import Path

import pytest

from betaclip.data.readers.annotations import BadRowError
from betaclip.data.readers.paths import MAX_FILE, picture_path, read_file

ROOT = Path("pictures")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a.jpg", "a.jpg"), ("coco/a.jpg", "coco/a.jpg"), ("./a.jpg", "a.jpg"), ("coco/../a.jpg", "a.jpg"),
        ("coco//a.jpg", "coco/a.jpg"), ("..a/b..c.jpg", "..a/b..c.jpg"), ("...", "..."),
    ],
)  # fmt: skip
def test_inside(name, path):
    assert picture_path(ROOT, name) == ROOT / path


@pytest.mark.parametrize(
    "name",
    [
        "../a.jpg",
        "..",
        "coco/../../a.jpg",
        "./../a.jpg",
        "coco/../..",
        "/a.jpg",
        "//a.jpg",
        "/../a.jpg",
        "../pictures/a.jpg",
    ],
)
def test_outside(name):
    with pytest.raises(BadRowError, match="is outside the folder of the pictures; allow_outside_root would read it"):
        picture_path(ROOT, name)
    assert picture_path(ROOT, name, allow_outside_root=True) == ROOT / name


def test_links_of_the_folder_are_followed_but_not_by_way_of_dots(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "secret.jpg").touch()
    (tmp_path / "elsewhere" / "deep" / "a.jpg").touch()
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path / "elsewhere" / "deep", tmp_path / "root" / "link")
    assert picture_path(tmp_path / "root", "link/a.jpg").is_file()
    assert not picture_path(tmp_path / "root", "link/../secret.jpg").exists()


def test_read_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"A cat")
    assert read_file(tmp_path / "a.txt") == b"A cat"
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "gone", "."):
        with pytest.raises(BadRowError, match="is not a regular file"):
            read_file(tmp_path / name)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_FILE + 1)  # zeros, which take no room on the disk
    with pytest.raises(BadRowError, match=f"huge has more than {MAX_FILE} bytes"):
        read_file(tmp_path / "huge")
