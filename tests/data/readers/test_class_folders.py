"""Folders of classes, and what the classes are called."""

import json

import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from support.files import touch

from betaclip.data.readers.class_folders import class_folders


def test_folders(tmp_path):
    for name in ("tabby_cat/1.jpg", "tabby_cat/2.PNG", "dog/deep/3.jpeg", "dog/notes.txt"):
        touch(tmp_path / name)
    found = class_folders(tmp_path)
    assert found.names == ["dog", "tabby cat"]
    assert [(picture.name, number) for picture, number in found.pictures] == [("3.jpeg", 0), ("1.jpg", 1), ("2.PNG", 1)]


def test_names_from_a_file(tmp_path):
    for name in ("n01/1.jpg", "n02/2.jpg"):
        touch(tmp_path / "pictures" / name)
    file = touch(tmp_path / "names.json", json.dumps({"n02": "dog", "n01": "tabby_cat", "n03": "owl"}).encode())
    assert class_folders(tmp_path / "pictures", file).names == ["tabby_cat", "dog"]
    for content in ('{"n01": "cat"}', '["cat", "dog"]', '{"n01": "cat", "n02": 3}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"zero_shot_names: .*names.json has no name for [12] folders; the first"):
            class_folders(tmp_path / "pictures", file)
    with pytest.raises(FileNotFoundError, match=r"zero_shot_names: .*nowhere is not a file"):
        class_folders(tmp_path / "pictures", tmp_path / "nowhere")


def test_imagenet(tmp_path):
    for i in range(999):
        touch(tmp_path / f"n{i:08}" / "1.jpg")
    with pytest.raises(ValueError, match=r"zero_shot: .* has 999 folders with WordNet's numbers, where ImageNet has"):
        class_folders(tmp_path)
    touch(tmp_path / "n00000999" / "1.jpg")
    found = class_folders(tmp_path)
    assert found.names == list(IMAGENET_CLASSNAMES) and found.names[0] == "tench" and len(found.pictures) == 1000


def test_rejects(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"zero_shot: .*nowhere is not a folder"):
        class_folders(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="zero_shot: Couldn't find any class folder"):
        class_folders(tmp_path)
    touch(tmp_path / "cat" / "1.jpg")
    (tmp_path / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match="zero_shot: Found no valid file for the classes dog"):
        class_folders(tmp_path)
