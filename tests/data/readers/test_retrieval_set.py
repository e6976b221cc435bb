"""Retrieval sets, whatever they were read from."""

from pathlib import Path

import pytest
from support.files import touch

from betaclip.data.batches import Bad
from betaclip.data.readers.annotations import BadRowError
from betaclip.data.readers.retrieval_set import RetrievalSet, check_folder, collect, load_json


def test_pairs():
    found = RetrievalSet("x", [(Path("a.jpg"), "a cat")], [Bad("b.jpg", "a picture without a caption")])
    assert list(found) == [(Path("a.jpg"), "a cat")] and len(found) == 1


def test_rejects_a_set_without_pairs():
    with pytest.raises(ValueError, match=r"^x: no picture with a caption$"):
        RetrievalSet("x", [], [])
    with pytest.raises(ValueError, match=r"^x: no picture with a caption; the first: b\.jpg: empty caption$"):
        RetrievalSet("x", [], [Bad("b.jpg", "empty caption"), Bad("c.jpg", "broken")])


def test_check_folder(tmp_path):
    assert check_folder(tmp_path, "x") == tmp_path
    with pytest.raises(FileNotFoundError, match=r"x: .*nothing is not a folder"):
        check_folder(tmp_path / "nothing", "x")


def test_collect(tmp_path):
    """Each caption is a pair; a picture that is missing is named once, and what cannot be read by its row."""

    def bad():
        raise BadRowError("broken")

    touch(tmp_path / "a.jpg")
    rows = [("1", lambda: ("a.jpg", ["x", "y"])), ("2", bad), *[("3", lambda: ("b.jpg", ["z"]))] * 2]
    found = collect("x", rows, tmp_path)
    assert found.pairs == [(tmp_path / "a.jpg", "x"), (tmp_path / "a.jpg", "y")]
    assert found.missing == [Bad("2", "broken"), Bad(str(tmp_path / "b.jpg"), "a caption without a picture")]
    outside = [("4", lambda: ("../a.jpg", ["x"]))]
    (tmp_path / "deep").mkdir()
    with pytest.raises(ValueError, match=r"x: no picture with a caption; the first: 4: image '../a.jpg' is outside"):
        collect("x", outside, tmp_path / "deep")
    assert len(collect("x", outside, tmp_path / "deep", allow_outside_root=True)) == 1


def test_load_json(tmp_path):
    assert load_json(touch(tmp_path / "a.json", b"[1]"), "x") == [1]
    with pytest.raises(ValueError, match=r"x: .*b.json: not JSON"):
        load_json(touch(tmp_path / "b.json", b"["), "x")
    with pytest.raises(FileNotFoundError, match=r"x: .*c.json is not a file"):
        load_json(tmp_path / "c.json", "x")
