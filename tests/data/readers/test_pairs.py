"""Pictures of your own: the forms of captions, bad rows, and the set for retrieval."""

import json
import pickle
from collections import Counter

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from betaclip.data.batches import Bad, Draw, Example, collate
from betaclip.data.example_maker import ExampleMaker
from betaclip.data.phrases.cache import PhrasesOnTheFly
from betaclip.data.phrases.rules import RuleExtractor
from betaclip.data.readers.annotations import Annotations
from betaclip.data.readers.folder import Folder
from betaclip.data.readers.pairs import PairsDataset, PairsOptions, PairsRetrievalOptions, open_rows
from betaclip.data.readers.table import Table, TableOptions


def caption(i):
    return f"A cat sits on {i} mats. Near the door, a dog sleeps."


@pytest.fixture
def root(tmp_path):
    """Eight pictures; 5 is missing, 6 is broken, and 7 has an empty caption."""
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(8):
        Image.new("RGB", (20, 16), (30 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
        rows.append({"image": f"images/{i}.png", "caption": caption(i)})
    (tmp_path / "images" / "5.png").unlink()
    data = (tmp_path / "images" / "6.png").read_bytes()
    (tmp_path / "images" / "6.png").write_bytes(data[: len(data) // 2])
    rows[7]["caption"] = ""
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def maker():
    return ExampleMaker(8, 77, PhrasesOnTheFly(RuleExtractor()))


def dataset(root, **options):
    return PairsDataset(Annotations(root / "captions.jsonl"), root, maker(), **options)


def test_examples(root):
    data = dataset(root, test_rows=3)
    assert len(data) == 5
    example = data[Draw(0, 1)]
    assert example.path == str(root / "images" / "3.png") and example.image.shape == (3, 8, 8)
    assert example.texts[1:3] == ["A cat sits on 3 mats", "Near the door, a dog sleeps"]
    assert example.texts[3:] == ["A cat", "3 mats", "a dog", "sits on", "Near the door"]
    for index in (5, -1):
        with pytest.raises(IndexError):
            data[Draw(index, 1)]


def test_bad_data(root):
    missing, broken, empty = (dataset(root)[Draw(i, 0)] for i in (5, 6, 7))
    assert missing.path == str(root / "images" / "5.png") and missing.reason.startswith("FileNotFoundError")
    assert broken.path == str(root / "images" / "6.png") and "truncated" in broken.reason
    assert empty == Bad(f"{root / 'captions.jsonl'}, row 8", "empty caption, of image images/7.png")


def test_several_captions(root):
    """Each draw has one of them, each as often as the others, as a function of the seed."""
    row = {"image": "images/0.png", "captions": ["A cat sleeps.", "A dog runs.", "A lamp is lit."]}
    (root / "captions.jsonl").write_text(json.dumps(row))
    texts = [dataset(root)[Draw(0, seed)].texts[0] for seed in range(30)]
    assert Counter(texts) == {"A cat sleeps": 10, "A dog runs": 10, "A lamp is lit": 10}
    assert texts == [dataset(root)[Draw(0, seed)].texts[0] for seed in range(30)]


def test_pictures_elsewhere(root):
    """Pictures outside the folder serve neither training nor evaluation unless they are allowed."""
    inside = root / "images"
    rows = [{"image": name, "caption": "A cat."} for name in ("0.png", "../images/1.png", str(inside / "2.png"))]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for allowed in (False, True):
        rows = Annotations(root / "captions.jsonl")
        data = PairsDataset(rows, inside, maker(), allow_outside_root=allowed)
        found = PairsRetrievalOptions(
            pairs=root / "captions.jsonl", pairs_images=inside, allow_outside_root=allowed
        ).read()
        bad = [example for i in range(3) if isinstance(example := data[Draw(i, 0)], Bad)]
        assert len(bad) == len(found.missing) == (0 if allowed else 2)
        for one in (*bad, *found.missing):
            assert "is outside the folder of the pictures; allow_outside_root would read it" in one.reason


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


def test_forms(root):
    """A folder, JSON lines, JSON, and a table give the same examples."""
    pictures = root / "images"
    for i in range(5):
        (pictures / f"{i}.txt").write_text(caption(i))
    rows = [{"image": f"images/{i}.png", "caption": caption(i)} for i in range(5)]
    (root / "a.json").write_text(json.dumps(rows))
    (root / "a.tsv").write_text("filepath\ttitle\n" + "".join(f"images/{i}.png\t{caption(i)}\n" for i in range(5)))
    (root / "a.csv").write_text("image,caption\n" + "".join(f'images/{i}.png,"{caption(i)}"\n' for i in range(5)))
    forms = {name: PairsOptions(annotations=root / name, phrase_extractor="rules").create(8, 77)
             for name in ("a.json", "a.tsv", "a.csv", "captions.jsonl", "images")}  # fmt: skip
    assert {name: type(data.rows) for name, data in forms.items()} == {
        "a.json": Annotations, "a.tsv": Table, "a.csv": Table, "captions.jsonl": Annotations, "images": Folder,
    }  # fmt: skip
    for index in range(5):
        examples = [data[Draw(index, 3)] for data in forms.values()]
        assert len({(example.path, *example.texts) for example in examples}) == 1


def test_retrieval(root):
    annotations = root / "captions.jsonl"
    assert PairsRetrievalOptions().read() is None
    found = PairsRetrievalOptions(pairs=annotations).read()
    assert found.name == "pairs" and [picture.name for picture, _ in found] == [f"{i}.png" for i in (0, 1, 2, 3, 4, 6)]
    assert [bad.reason for bad in found.missing] == [
        "a caption without a picture",
        "empty caption, of image images/7.png",
    ]
    assert list(PairsRetrievalOptions(pairs=annotations, pairs_rows=2).read()) == list(found)[:2]
    with pytest.raises(ValueError, match="pairs_rows: expected at least 1, got 0"):
        PairsRetrievalOptions(pairs=annotations, pairs_rows=0).read()
    row = {"image": "0.png", "captions": ["a cat", "a dog"]}
    annotations.write_text(json.dumps(row))
    found = PairsRetrievalOptions(pairs=annotations, pairs_images=root / "images").read()
    assert [text for _, text in found] == ["a cat", "a dog"] and len({picture for picture, _ in found}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "annotations: kind 'pairs' needs the file of the captions, or the folder of both"),
        ({"annotations": "nowhere.jsonl"}, "annotations: .*nowhere.jsonl is not a file"),
        ({"annotations": "nowhere.csv"}, "annotations: .*nowhere.csv is not a file"),
        ({"annotations": "captions.jsonl", "csv_separator": ","}, r"csv_separator: expected a table \(.csv, .tsv\)"),
        ({"annotations": "images", "csv_img_key": "a"}, "csv_img_key: expected a table .*images"),
        ({"annotations": "captions.jsonl", "test_rows": 8}, "test_rows: expected fewer than the 8 rows of .*, got 8"),
        ({"annotations": "captions.jsonl", "root": "nowhere"}, "root: .*nowhere is not a folder"),
        ({"annotations": "captions.jsonl", "root": "images"}, "root: none of the first rows of .*captions.jsonl has "
         "its picture; the first: .*images/images/0.png is not a file"),
    ],
)  # fmt: skip
def test_rejects(root, options, message):
    paths = {name: root / value for name, value in options.items() if name in ("annotations", "root")}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PairsOptions(**{"phrase_extractor": "rules", **options, **paths}).create(8, 77)


def test_what_is_no_table_takes_no_options(root):
    assert isinstance(open_rows(root / "captions.jsonl", TableOptions()), Annotations)
