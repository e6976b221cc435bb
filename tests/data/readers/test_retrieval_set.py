"""Retrieval sets, whatever they were read from."""

from pathlib import Path

import pytest

from betaclip.data.batches import Bad
from betaclip.data.readers.retrieval_set import RetrievalSet, check_folder


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
