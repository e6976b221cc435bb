"""DOCCI's test split by descriptions and by FLAIR's sentences, which are never taken for one another."""

import json

import pytest
from support.files import touch

from betaclip.data.readers.docci import DOCCIOptions, docci

SENTENCES = {
    "annotations": [
        {"image_id": 0, "image": "test_00000.jpg", "caption": "A cat."},
        {"image_id": 0, "image": "test_00000.jpg", "caption": "A red mat."},
        {"image_id": 1, "image": "test_00001.jpg", "caption": "A dog."},
        {"image_id": 1, "image": "test_00001.jpg", "caption": "A lamp."},
    ]
}


@pytest.fixture
def folder(tmp_path):
    """One picture of each of four rows is there, and one of the test split is missing."""
    rows = [
        {"split": "train", "image_file": "train_00000.jpg", "description": "No."},
        {"split": "test", "image_file": "test_00000.jpg", "description": "A cat on a red mat."},
        {"split": "qual_test", "image_file": "qual_test_00000.jpg", "description": "No."},
        {"split": "test", "image_file": "test_00001.jpg", "description": "A dog by a lamp."},
        {"split": "test", "description": "Whose?"},
    ]
    lines = [*map(json.dumps, rows), "{", ""]
    touch(tmp_path / "docci_descriptions.jsonlines", "\n".join(lines).encode())
    for name in ("train_00000", "test_00000", "qual_test_00000"):
        touch(tmp_path / "images" / f"{name}.jpg")
    return tmp_path


def test_descriptions(folder):
    found = DOCCIOptions(docci=folder).read()
    assert (found.name, list(found)) == ("docci", [(folder / "images" / "test_00000.jpg", "A cat on a red mat.")])
    where = f"{folder / 'docci_descriptions.jsonlines'}, row"
    assert [(bad.path, bad.reason[:20]) for bad in found.missing] == [
        (str(folder / "images" / "test_00001.jpg"), "a caption without a "),
        (f"{where} 5", 'no "image_file"'),
        (f"{where} 6", "not JSON: Expecting "),
    ]


def test_sentences(folder):
    file = touch(folder / "annotations" / "test_annotations.json", json.dumps(SENTENCES).encode())
    with pytest.raises(ValueError, match=r"docci: .* has docci_descriptions.jsonlines and .*; give the path of one"):
        docci(folder)
    found = docci(file)
    picture = folder / "images" / "test_00000.jpg"
    assert (found.name, list(found)) == ("docci_sentences", [(picture, "A cat."), (picture, "A red mat.")])
    assert len(found.missing) == 1, "a missing picture is named once, whatever the number of its texts"
    assert docci(folder / "docci_descriptions.jsonlines").name == "docci"
    (folder / "docci_descriptions.jsonlines").unlink()
    assert docci(folder).name == "docci_sentences"


def test_rejects(tmp_path):
    assert DOCCIOptions().read() is None
    with pytest.raises(FileNotFoundError, match=r"docci: .* has neither docci_descriptions.jsonlines nor annotations"):
        docci(tmp_path)
    for content in ("[]", '{"annotations": 3}'):
        file = touch(tmp_path / "annotations" / "test_annotations.json", content.encode())
        with pytest.raises(ValueError, match=r'docci: expected .*test_annotations.json to hold .* list "annotations"'):
            docci(file)
