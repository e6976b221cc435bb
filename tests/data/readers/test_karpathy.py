"""COCO and Flickr30k in Karpathy's form, in COCO's own and as rows, with several captions of a picture."""

import json

import pytest
from support.files import touch

from betaclip.data.readers.karpathy import COCOOptions, Flickr30kOptions


def karpathy(images):
    """Images of (folder, name, split, captions)."""
    rows = []
    for folder, name, split, captions in images:
        row = {"filename": name, "split": split, "sentences": [{"raw": text, "tokens": []} for text in captions]}
        rows.append({**row, "filepath": folder} if folder else row)
    return {"images": rows, "dataset": "coco"}


def write(path, content):
    return touch(path, json.dumps(content).encode())


def test_karpathy_takes_the_test_split(tmp_path):
    five, six = [f"text {i}" for i in range(5)], [f"words {i}" for i in range(6)]
    images = [
        ("val2014", "1.jpg", "test", five),
        ("train2014", "2.jpg", "restval", ["no"]),
        ("val2014", "3.jpg", "val", ["no"]),
        ("val2014", "4.jpg", "test", six),
        ("val2014", "5.jpg", "test", ["gone", "too"]),
        ("val2014", "6.jpg", "test", ["a", " "]),
        ("..", "1.jpg", "test", ["outside"]),
    ]
    content = karpathy(images)
    content["images"].append({"split": "test", "filename": "7.jpg"})
    file = write(tmp_path / "dataset_coco.json", content)
    for i in (1, 2, 3, 4, 6):
        touch(tmp_path / "pictures" / "val2014" / f"{i}.jpg")
    found = COCOOptions(coco=file, coco_images=tmp_path / "pictures").read()
    folder = tmp_path / "pictures" / "val2014"
    assert found.name == "coco"
    assert list(found) == [(folder / "1.jpg", text) for text in five] + [(folder / "4.jpg", text) for text in six]
    assert [(bad.path, bad.reason[:30]) for bad in found.missing] == [
        (str(folder / "5.jpg"), "a caption without a picture"),
        (f"{file}, image 6", "empty caption (number 2 of 2)"),
        (f"{file}, image 7", "image '../1.jpg' is outside th"),
        (f"{file}, image 8", "expected filename and sentence"),
    ]


def test_flickr30k(tmp_path):
    file = write(tmp_path / "dataset_flickr30k.json", karpathy([("", "1.jpg", "test", ["a", "b"])]))
    touch(tmp_path / "1.jpg")
    found = Flickr30kOptions(flickr30k=file).read()
    assert (found.name, list(found)) == ("flickr30k", [(tmp_path / "1.jpg", "a"), (tmp_path / "1.jpg", "b")])
    rows = [{"image": "flickr30k-images/1.jpg", "caption": ["a", "b"]}, {"caption": "c"}]
    file = write(tmp_path / "flickr30k_test.json", rows)
    picture = touch(tmp_path / "x" / "flickr30k-images" / "1.jpg")
    found = Flickr30kOptions(flickr30k=file, flickr30k_images=tmp_path / "x").read()
    assert list(found) == [(picture, "a"), (picture, "b")]
    assert [(bad.path, bad.reason) for bad in found.missing] == [(f"{file}, row 2", 'no "image"')]


def test_the_form_of_coco(tmp_path):
    content = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}, {"id": 9}],
        "annotations": [
            {"image_id": 7, "id": 1, "caption": "a"},
            {"image_id": 9, "id": 2, "caption": "b"},
            {"image_id": 7, "id": 3, "caption": "c"},
        ],
    }
    file = write(tmp_path / "captions_val2017.json", content)
    touch(tmp_path / "7.jpg")
    touch(tmp_path / "8.jpg")
    found = COCOOptions(coco=file).read()
    assert list(found) == [(tmp_path / "7.jpg", "a"), (tmp_path / "7.jpg", "c")]
    assert [bad.reason for bad in found.missing] == [
        "a picture without a caption",
        "expected id and file_name: KeyError: 'file_name'",
    ]


def test_not_asked_for():
    assert COCOOptions().read() is None and Flickr30kOptions().read() is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"coco: .*a.json: not JSON"),
        ("3", r'coco: expected .*a.json to hold "images" with "sentences"'),
        ('{"images": [{"filename": "a.jpg"}]}', r'coco: expected .*a.json to hold "images" with "sentences"'),
        ('{"images": [{"split": "train", "sentences": []}]}', r"coco: no picture with a caption"),
        ("[]", r"coco: no picture with a caption"),
    ],
)
def test_rejects(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        COCOOptions(coco=touch(tmp_path / "a.json", content.encode())).read()
    with pytest.raises(FileNotFoundError, match=r"flickr30k: .*nowhere is not a file"):
        Flickr30kOptions(flickr30k=tmp_path / "nowhere").read()
