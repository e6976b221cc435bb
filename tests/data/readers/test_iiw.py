"""ImageInWords in its published folders, one subset alone, and FLAIR's sentences."""

import json

import pytest
from support.files import touch

from betaclip.data.batches import Bad
from betaclip.data.readers.iiw import IIWOptions, iiw


@pytest.fixture
def folder(tmp_path):
    rows = {
        "IIW-400": [{"image/key": "aar_test_04600", "IIW": "A flower.", "IIW-P5B": "A bee."}, {"IIW": "Whose?"}],
        "DOCCI_Test": [{"image": "000e7abe", "IIW": "A towel.", "DOCCI": "No."}],
        "DCI_Test": [{"image": "sa_1.jpg", "ex_id": "1", "IIW": "A balcony."}, {"image": "sa_2.jpg", "IIW": "Gone."}],
    }
    for subset, content in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        touch(tmp_path / subset / "data.jsonl", lines.encode())
    for name in ("docci_aar/aar_test_04600", "docci/000e7abe", "dci/sa_1"):
        touch(tmp_path / f"{name}.jpg")
    return tmp_path


def test_all_subsets(folder):
    found = IIWOptions(iiw=folder).read()
    assert found.name == "iiw" and list(found) == [
        (folder / "docci_aar" / "aar_test_04600.jpg", "A flower."),
        (folder / "docci" / "000e7abe.jpg", "A towel."),
        (folder / "dci" / "sa_1.jpg", "A balcony."),
    ]
    assert found.missing == [
        Bad(f"{folder / 'IIW-400' / 'data.jsonl'}, row 2", 'no "image" or "image/key"'),
        Bad(str(folder / "dci" / "sa_2.jpg"), "a caption without a picture"),
    ]


def test_a_subset_has_its_own_name(folder):
    for subset, name in (("IIW-400", "iiw_400"), ("DOCCI_Test", "iiw_docci_test"), ("DCI_Test", "iiw_dci_test")):
        found = iiw(folder / subset / "data.jsonl")
        assert (found.name, len(found)) == (name, 1)
    rows = [{"image": "docci/000e7abe.jpg", "caption": text} for text in ("A towel.", "A mirror.")]
    file = touch(folder / "finegrained_annotations.json", json.dumps({"annotations": rows}).encode())
    found = iiw(file)
    assert (found.name, [text for _, text in found]) == ("iiw_sentences", ["A towel.", "A mirror."])


def test_rejects(folder):
    assert IIWOptions().read() is None
    (folder / "DCI_Test" / "data.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"iiw: .*DCI_Test/data.jsonl is not a file; give the path of one data"):
        iiw(folder)
    touch(folder / "other" / "data.jsonl")
    with pytest.raises(
        ValueError, match=r"iiw: expected .*other/data.jsonl in a folder called IIW-400 or DOCCI_Test or DCI_Test"
    ):
        iiw(folder / "other" / "data.jsonl")
