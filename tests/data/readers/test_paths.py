"""Paths of pictures: those inside the folder are accepted, those outside are refused."""

import os
from pathlib import Path

import pytest

from betaclip.data.readers.annotations import BadRowError
from betaclip.data.readers.paths import picture_path

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
