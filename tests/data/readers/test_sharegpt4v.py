"""ShareGPT4V: which rows are left out of training, and the sets for retrieval."""

import json

import pytest
from support.files import touch

from betaclip.data.batches import Bad, Draw
from betaclip.data.readers import sharegpt4v
from betaclip.data.readers.annotations import Annotations
from betaclip.data.readers.sharegpt4v import ShareGPT4V1kOptions, ShareGPT4V10kOptions, ShareGPT4VOptions, is_published
from betaclip.data.registry import RetrievalConfig

PUBLISHED = "share-captioner_coco_lcs_sam_1246k_1107.json"


def write(path, rows):
    """Rows whose pictures are missing, except for the last."""
    content = [
        {"image": f"coco/{i}.png", "conversations": [{}, {"value": f"A cat sits on {i} mats."}]} for i in range(rows)
    ]
    touch(path.parent / "coco" / f"{rows - 1}.png")
    return touch(path, json.dumps(content).encode())


def create(annotations, **options):
    return ShareGPT4VOptions(annotations=annotations, phrase_extractor="rules", **options).create(8, 77)


def test_the_test_rows_of_the_published_file_are_left_out(tmp_path, caplog):
    published, own = write(tmp_path / PUBLISHED, 1003), write(tmp_path / "own.json", 40)
    data = create(published)
    assert len(data) == 3 and data[Draw(2, 0)].path == str(tmp_path / "coco" / "1002.png")
    assert "the first 1000 of 1003 rows are the test set SV-1k and are left out" in caplog.text
    caplog.clear()
    assert [len(create(published, test_rows=n)) for n in (0, 5)] == [1003, 998]
    assert [len(create(own)), len(create(own, test_rows=15))] == [40, 25]
    assert not caplog.text


def test_published_by_its_size(tmp_path, monkeypatch):
    rows = Annotations(write(tmp_path / "renamed.json", 12))
    assert not is_published(rows)
    monkeypatch.setattr(sharegpt4v, "_PUBLISHED_ROWS", 12)
    assert is_published(rows)


def test_rejects(tmp_path):
    annotations = write(tmp_path / "own.json", 40)
    with pytest.raises(ValueError, match="annotations: kind 'sharegpt4v' needs the file of the captions"):
        create(None)
    with pytest.raises(ValueError, match=r"test_rows: expected fewer than the 40 rows of .*own.json, .*, got 40"):
        create(annotations, test_rows=40)
    with pytest.raises(ValueError, match="test_rows: expected at least 0, got -1"):
        create(annotations, test_rows=-1)
    with pytest.raises(FileNotFoundError, match=r"root: .*nowhere is not a folder"):
        create(annotations, root=tmp_path / "nowhere")


def test_retrieval(tmp_path, monkeypatch):
    """SV-1k has the first rows, SV-10k ten times as many; here 4 and 40."""
    monkeypatch.setattr(sharegpt4v, "TEST_ROWS", 4)
    path = write(tmp_path / "a.json", 50)
    for i in (0, 2, 3, 39, 40):
        touch(tmp_path / "coco" / f"{i}.png")
    small, large = ShareGPT4V1kOptions(sharegpt4v=path).read(), ShareGPT4V10kOptions(sharegpt4v_10k=path).read()
    assert list(small) == [(tmp_path / "coco" / f"{i}.png", f"A cat sits on {i} mats.") for i in (0, 2, 3)]
    assert small.missing == [Bad(str(tmp_path / "coco" / "1.png"), "a caption without a picture")]
    assert [picture.name for picture, _ in large] == ["0.png", "2.png", "3.png", "39.png"]


def test_options(tmp_path):
    annotations = write(tmp_path / "a.json", 1)
    assert ShareGPT4V1kOptions().read() is None and ShareGPT4V10kOptions().read() is None
    touch(tmp_path / "x" / "coco" / "0.png")
    config = RetrievalConfig(sharegpt4v=annotations, sharegpt4v_10k=annotations, sharegpt4v_images=tmp_path / "x")
    sets = config.read_retrieval_sets()
    assert [found.name for found in sets] == ["sharegpt4v_1k", "sharegpt4v_10k"]
    assert [picture for found in sets for picture, _ in found] == [tmp_path / "x" / "coco" / "0.png"] * 2
