"""The form of FLAIR's annotations."""

import json

import pytest
from support.files import touch

from betaclip.data.readers.annotations import BadRowError
from betaclip.data.readers.flair import flair_rows


def test_rows(tmp_path):
    rows = [{"image_id": 0, "image": "a.jpg", "caption": "A cat."}, {"image": "b.jpg", "caption": ""}, 3]
    file = touch(tmp_path / "a.json", json.dumps({"annotations": rows}).encode())
    first, second, third = flair_rows(file, "x")
    assert first[0] == f"{file}, annotation 1" and first[1]() == ("a.jpg", ["A cat."])
    for row, message in ((second, "empty caption, of image b.jpg"), (third, 'no "image"')):
        with pytest.raises(BadRowError, match=message):
            row[1]()


def test_rejects(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x: .*nowhere is not a file"):
        flair_rows(tmp_path / "nowhere", "x")
    with pytest.raises(ValueError, match=r"x: expected .*a.json to hold an object"):
        flair_rows(touch(tmp_path / "a.json", b"[]"), "x")
