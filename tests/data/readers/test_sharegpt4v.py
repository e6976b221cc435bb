"""ShareGPT4V: rows of the splits, bad rows, and the set for retrieval."""

import json
import pickle

import pytest
import torch
from PIL import Image
from support.files import touch
from torch.utils.data import DataLoader

from betaclip.data.batches import Bad, Draw, Example, collate
from betaclip.data.example_maker import ExampleMaker
from betaclip.data.phrases.cache import PhrasesOnTheFly
from betaclip.data.phrases.rules import RuleExtractor
from betaclip.data.readers.annotations import Annotations
from betaclip.data.readers.sharegpt4v import ShareGPT4V, ShareGPT4V1kOptions, sharegpt4v_1k


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(8):
        Image.new("RGB", (20, 16), (30 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
        caption = f"A cat sits on {i} mats. Near the door, a dog sleeps."
        rows.append({"image": f"images/{i}.png", "conversations": [{"value": "?"}, {"value": caption}]})
    (tmp_path / "images" / "5.png").unlink()
    data = (tmp_path / "images" / "6.png").read_bytes()
    (tmp_path / "images" / "6.png").write_bytes(data[: len(data) // 2])
    rows[7]["conversations"][1]["value"] = ""
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    return tmp_path


def dataset(root, **options):
    maker = ExampleMaker(8, 77, PhrasesOnTheFly(RuleExtractor()))
    return ShareGPT4V(Annotations(root / "captions.json"), root, maker, **options)


def test_splits(root):
    train, test = dataset(root, test_rows=3), dataset(root, test_rows=3, split="test")
    assert (len(train), len(test)) == (5, 3)
    assert train[Draw(0, 1)].path == str(root / "images" / "3.png")
    assert [test[Draw(i, 1)].path for i in range(3)] == [str(root / "images" / f"{i}.png") for i in range(3)]
    assert test[Draw(1, 1)].texts[1:3] == ["A cat sits on 1 mats", "Near the door, a dog sleeps"]
    assert test[Draw(1, 1)].texts[3:] == ["A cat", "1 mats", "a dog", "sits on", "Near the door"]
    assert test[Draw(2, 1)].image.shape == (3, 8, 8)
    with pytest.raises(IndexError):
        train[Draw(5, 1)]


def test_published_split(root):
    with pytest.raises(ValueError, match=r"has no rows to train on: it has 8 rows, and the first 1000 are for testing"):
        dataset(root)
    assert len(dataset(root, split="test")) == 8


def test_bad_data(root):
    data = dataset(root, test_rows=0)
    missing, broken, empty = (data[Draw(i, 0)] for i in (5, 6, 7))
    assert missing.path == str(root / "images" / "5.png") and missing.reason.startswith("FileNotFoundError")
    assert broken.path == str(root / "images" / "6.png") and "truncated" in broken.reason
    assert empty == Bad(f"{root / 'captions.json'}, row 8", "empty caption, of image images/7.png")


def test_pictures_elsewhere(root):
    """Pictures outside the folder serve neither training nor evaluation unless they are allowed."""
    inside = root / "images"
    rows = [
        {"image": name, "conversations": [{}, {"value": "A cat sits on a mat."}]}
        for name in ("0.png", "../images/1.png", str(inside / "2.png"))
    ]
    (root / "captions.json").write_text(json.dumps(rows))
    for allowed in (False, True):
        maker = ExampleMaker(8, 77, PhrasesOnTheFly(RuleExtractor()))
        data = ShareGPT4V(Annotations(root / "captions.json"), inside, maker, test_rows=0, allow_outside_root=allowed)
        found = sharegpt4v_1k(root / "captions.json", inside, allow_outside_root=allowed)
        bad = [data[Draw(i, 0)] for i in range(3) if isinstance(data[Draw(i, 0)], Bad)]
        assert len(bad) == len(found.missing) == (0 if allowed else 2)
        for one in (*bad, *found.missing):
            assert "is outside the folder of the pictures" in one.reason


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(root, workers):
    data = dataset(root, test_rows=1)
    draws = [Draw(i, 10 + i) for i in range(len(data))]
    loader = DataLoader(
        data, batch_sampler=[draws[:4], draws[4:]], collate_fn=collate, num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    first, second = loader
    assert first.paths == [str(root / "images" / f"{i}.png") for i in range(1, 5)] and not first.bad
    assert len(second.paths) == 0 and len(second.bad) == 3
    truth = [data[draw] for draw in draws[:4]]
    assert torch.equal(first.images, torch.stack([example.image for example in truth]))


def test_pickles(root):
    data = pickle.loads(pickle.dumps(dataset(root, test_rows=1)))
    assert isinstance(data[Draw(0, 0)], Example)


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


def test_options(tmp_path):
    rows = [{"image": "a.jpg", "conversations": [{}, {"value": "a cat"}]}]
    annotations = touch(tmp_path / "captions.json", json.dumps(rows).encode())
    assert ShareGPT4V1kOptions().read() is None
    for folder, options in ((tmp_path, {}), (tmp_path / "x", {"sharegpt4v_images": tmp_path / "x"})):
        touch(folder / "a.jpg")
        assert list(ShareGPT4V1kOptions(sharegpt4v=annotations, **options).read()) == [(folder / "a.jpg", "a cat")]
