"""Urban1K in its published layout, and with parts missing."""

import json
import os

import pytest
from support.files import touch

from betaclip.data.batches import Bad
from betaclip.data.readers.urban1k import Urban1KOptions, urban1k


@pytest.fixture
def urban(tmp_path):
    for number in (1, 2, 10, 11):
        touch(tmp_path / "image" / f"{number}.jpg")
    for number in (1, 2, 10, 12):
        touch(tmp_path / "caption" / f"{number}.txt", f"A street, number {number} é.\n".encode())
    touch(tmp_path / "caption" / "2.txt", b" \n")
    touch(tmp_path / "image" / "notes.md")
    return tmp_path


def test_urban1k(urban):
    found = urban1k(urban)
    pictures = urban / "image"
    assert list(found) == [
        (pictures / "1.jpg", "A street, number 1 é."),
        (pictures / "10.jpg", "A street, number 10 é."),
    ]
    assert (found.name, len(found)) == ("urban1k", 2)
    assert found.missing == [
        Bad(str(urban / "caption" / "2.txt"), "empty caption"),
        Bad(str(pictures / "11.jpg"), "a picture without a caption"),
        Bad(str(urban / "caption" / "12.txt"), "a caption without a picture"),
    ]


def test_a_caption_that_is_no_file(urban):
    (urban / "caption" / "2.txt").unlink()
    os.mkfifo(urban / "caption" / "2.txt")
    path = urban / "caption" / "2.txt"
    assert Bad(str(path), f"{path} is not a regular file") in urban1k(urban).missing


def test_the_form_of_flair(urban):
    """images/ and annotations.json in place of image/ and caption/; where caption/ is there, it counts."""
    rows = [{"image": f"{n}.jpg", "caption": f"From JSON, {n}."} for n in (10, 1, 3)]
    touch(urban / "annotations" / "annotations.json", json.dumps({"annotations": rows}).encode())
    assert [text for _, text in urban1k(urban)] == ["A street, number 1 é.", "A street, number 10 é."]
    (urban / "image").rename(urban / "images")
    assert [text for _, text in urban1k(urban)] == ["A street, number 1 é.", "A street, number 10 é."]
    (urban / "caption").rename(urban / "elsewhere")
    found = urban1k(urban)
    pictures = urban / "images"
    assert list(found) == [(pictures / "10.jpg", "From JSON, 10."), (pictures / "1.jpg", "From JSON, 1.")]
    assert found.missing == [Bad(str(pictures / "3.jpg"), "a caption without a picture")]


def test_options(urban):
    assert list(Urban1KOptions(urban1k=urban).read()) == list(urban1k(urban))
    assert Urban1KOptions().read() is None


def test_rejects(urban, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"urban1k: .*nowhere/image is not a folder"):
        urban1k(tmp_path / "nowhere")
    for path in (urban / "caption").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"urban1k: no picture with a caption; the first: .*1.jpg: a picture without"):
        urban1k(urban)
