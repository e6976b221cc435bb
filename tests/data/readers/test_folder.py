"""A folder of pictures with text files beside them."""

import os

import pytest
from support.files import touch

from betaclip.data.readers.annotations import BadRowError
from betaclip.data.readers.folder import Folder


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jpg", "a.PNG", "deep/c.v2.webp", "d.tif", ".hidden.jpg", ".cache/e.jpg", "notes.md"):
        touch(tmp_path / name)
    for name in ("a", "b", "deep/c.v2", "d", ".hidden", ".cache/e"):
        touch(tmp_path / f"{name}.txt", f"\ufeffThe caption of {name} é.\n".encode())
    return tmp_path


def test_pictures_with_captions(folder, caplog):
    rows = Folder(folder)
    assert [rows[i] for i in range(len(rows))] == [
        (name, [f"The caption of {stem} é."])
        for name, stem in (("a.PNG", "a"), ("b.jpg", "b"), ("d.tif", "d"), ("deep/c.v2.webp", "deep/c.v2"))
    ]
    assert rows.where(3) == str(folder / "deep" / "c.v2.webp") and not caplog.text


def test_incomplete_pairs(folder, caplog):
    """Pictures without a text are bad rows; texts without a picture are logged."""
    touch(folder / "e.jpg")
    for name, content in (("f", b" \n"), ("g", b"\xff")):
        touch(folder / f"{name}.jpg")
        touch(folder / f"{name}.txt", content)
    touch(folder / "h.jpg")
    os.mkfifo(folder / "h.txt")
    touch(folder / "readme.txt", b"About")
    rows = Folder(folder)
    faults = {}
    for i in range(len(rows)):
        try:
            rows[i]
        except BadRowError as error:
            faults[rows.names[i]] = str(error)
    assert faults["e.jpg"] == "a picture without a caption, which would be in e.txt beside it"
    assert faults["f.jpg"] == "empty caption, in f.txt" and faults["g.jpg"].startswith("g.txt is not UTF-8: ")
    assert "is not a regular file" in faults["h.jpg"] and len(faults) == 4 and len(rows) == 8
    assert f"1 text files in {folder} have no picture beside them; the first: readme.txt" in caplog.text


def test_identity(folder):
    before = Folder(folder).identity()
    assert Folder(folder).identity() == before
    touch(folder / "a.txt", b"Another caption.")
    assert Folder(folder).identity() != before


def test_rejects(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"annotations: .*nowhere is not a folder"):
        Folder(tmp_path / "nowhere")
    touch(tmp_path / "a.jpg")
    touch(tmp_path / "b.txt")
    with pytest.raises(ValueError, match=r"annotations: .* has no picture with a text file of the same name beside it"):
        Folder(tmp_path)
    touch(tmp_path / "a.txt", b" ")
    with pytest.raises(ValueError, match=r"has no row with an image and a caption; the first: empty caption, in a.txt"):
        Folder(tmp_path)
