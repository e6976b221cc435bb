"""DCI in its published layout, and with parts missing."""

import json

import pytest
from support.files import touch

from betaclip.data.readers.dci import DCIOptions, dci


def test_dci(tmp_path):
    photos = tmp_path / "photos"
    rows = {
        "a": {"image": "sa_1.jpg", "short_caption": "A pump.", "extra_caption": "It is\nred. ", "mask_data": {}},
        "b": {"image": "sa_2.jpg", "short_caption": "A house.", "extra_caption": ""},
        "c": {"image": "sa_3.jpg", "short_caption": "Gone.", "extra_caption": ""},
        "d": {"image": "sa_1.jpg", "short_caption": "", "extra_caption": None},
        "e": ["sa_1.jpg"],
        "g": {"image": "../photos/sa_1.jpg", "short_caption": "A pump."},
    }
    for name, row in rows.items():
        touch(tmp_path / "annotations" / f"{name}.json", json.dumps(row).encode())
    touch(tmp_path / "annotations" / "f.json", b"{")
    touch(photos / "sa_1.jpg")
    touch(photos / "sa_2.jpg")
    found = DCIOptions(dci=tmp_path).read()
    assert list(found) == [(photos / "sa_1.jpg", "A pump.\nIt is\nred."), (photos / "sa_2.jpg", "A house.")]
    assert [(bad.path.rpartition("/")[2], bad.reason[:20]) for bad in found.missing] == [
        ("sa_3.jpg", "a caption without a "),
        ("d.json", 'no "image", or neith'),
        ("e.json", 'no "image", or neith'),
        ("f.json", "not JSON: Expecting "),
        ("g.json", "image '../photos/sa_"),
    ]


def test_not_asked_for():
    assert DCIOptions().read() is None


def test_rejects(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"dci: .*annotations is not a folder"):
        dci(tmp_path)
