"""Urban1K, ShareGPT4V-1k and DCI in their published layouts, and what is missing from them."""

import json

import pytest

from betaclip.data.batches import Bad
from betaclip.data.readers.retrieval_sets import dci, sharegpt4v_1k, urban1k


def touch(path, content=b"picture"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


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


def test_sharegpt4v_1k(tmp_path):
    rows = [{"image": f"coco/{i}.jpg", "conversations": [{}, {"value": f"caption {i}"}]} for i in range(5)]
    rows[1]["conversations"] = []
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(rows))
    for i in (0, 1, 3, 4):
        touch(tmp_path / "coco" / f"{i}.jpg")
    found = sharegpt4v_1k(path, tmp_path, rows=4)
    assert list(found) == [(tmp_path / "coco" / f"{i}.jpg", f"caption {i}") for i in (0, 3)]
    assert [bad.path for bad in found.missing] == [f"{path}, row 2", str(tmp_path / "coco" / "2.jpg")]
    assert len(sharegpt4v_1k(path, tmp_path)) == 3


def test_dci(tmp_path):
    photos = tmp_path / "photos"
    rows = {
        "a": {"image": "sa_1.jpg", "short_caption": "A pump.", "extra_caption": "It is\nred. ", "mask_data": {}},
        "b": {"image": "sa_2.jpg", "short_caption": "A house.", "extra_caption": ""},
        "c": {"image": "sa_3.jpg", "short_caption": "Gone.", "extra_caption": ""},
        "d": {"image": "sa_1.jpg", "short_caption": "", "extra_caption": None},
        "e": ["sa_1.jpg"],
    }
    for name, row in rows.items():
        touch(tmp_path / "annotations" / f"{name}.json", json.dumps(row).encode())
    touch(tmp_path / "annotations" / "f.json", b"{")
    touch(photos / "sa_1.jpg")
    touch(photos / "sa_2.jpg")
    found = dci(tmp_path)
    assert list(found) == [(photos / "sa_1.jpg", "A pump.\nIt is\nred."), (photos / "sa_2.jpg", "A house.")]
    assert [(bad.path.rpartition("/")[2], bad.reason[:20]) for bad in found.missing] == [
        ("sa_3.jpg", "a caption without a "),
        ("d.json", 'no "image", or neith'),
        ("e.json", 'no "image", or neith'),
        ("f.json", "not JSON: Expecting "),
    ]


def test_rejects(urban, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"urban1k: .*nowhere/image is not a folder"):
        urban1k(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"dci: .*annotations is not a folder"):
        dci(urban)
    for path in (urban / "caption").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"urban1k: no picture with a caption; the first: .*1.jpg: a picture without"):
        urban1k(urban)
