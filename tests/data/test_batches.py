"""Collation into ragged batches, their parts, and bad data."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from betaclip.data.batches import Bad, BadData, BadDataError, Draw, Example, collate

SEED = 7


def _example(index: int, texts: int) -> Example:
    tokens = [[1, *range(10 * index, 10 * index + k + 1), 9] for k in range(texts)]
    return Example(torch.full((3, 4, 4), float(index)), ["a"] * texts, tokens, list(range(texts)), f"{index}.png")


class _Pictures(Dataset):
    """A data set of which every third picture cannot be read."""

    def __getitem__(self, draw: Draw) -> Example | Bad:
        assert draw.seed == SEED
        return Bad(f"{draw.index}.png", "broken") if draw.index % 3 == 2 else _example(draw.index, 1 + draw.index)


def test_collate():
    batch = collate([_example(0, 2), Bad("1.png", "broken"), _example(2, 1)])
    assert batch.images.shape == (2, 3, 4, 4) and batch.images[:, 0, 0, 0].tolist() == [0, 2]
    assert batch.texts.tokens.tolist() == [1, 0, 9, 1, 0, 1, 9, 1, 20, 9]
    assert batch.texts.lengths.tolist() == [3, 4, 3]
    assert batch.texts.image_index.tolist() == [0, 0, 1] and batch.texts.num_images == 2
    assert batch.texts.levels.tolist() == [0, 1, 0]
    assert batch.paths == ["0.png", "2.png"] and batch.bad == [Bad("1.png", "broken")]


@pytest.mark.parametrize("examples", [[], [Bad("1.png", "broken")]])
def test_collate_nothing(examples):
    batch = collate(examples)
    assert len(batch.images) == batch.texts.num_images == len(batch.texts.tokens) == 0
    assert (batch.paths, batch.bad) == ([], examples)


def test_parts():
    examples = [_example(i, i) for i in (1, 2, 3, 4)]
    part, truth = collate([*examples, Bad("x", "broken")]).of_images(1, 3), collate(examples[1:3])
    assert torch.equal(part.images, truth.images) and part.paths == truth.paths and part.bad == []
    for name in ("tokens", "lengths", "image_index", "levels"):
        assert torch.equal(getattr(part.texts, name), getattr(truth.texts, name)), name


def test_only_images_move():
    moved = collate([_example(1, 2), Bad("x", "broken")]).to("meta")
    assert moved.images.device.type == "meta" and moved.texts.tokens.device.type == "cpu"
    assert moved.paths == ["1.png"] and len(moved.bad) == 1


def test_pins_only_images(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = collate([_example(1, 2)])
    copy = batch.pin_memory()
    assert [id(p) for p in pinned] == [id(batch.images)] and copy.images is not batch.images
    assert copy.texts is batch.texts and copy.paths == batch.paths


@pytest.mark.gpu
def test_pinned():
    loader = DataLoader(_Pictures(), 2, sampler=[Draw(i, SEED) for i in range(2)], collate_fn=collate, pin_memory=True)
    (batch,) = loader
    assert batch.images.is_pinned() and batch.to("cuda").images.device.type == "cuda"


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(workers):
    draws = [Draw(i, SEED) for i in range(6)]
    batches = list(DataLoader(_Pictures(), 3, sampler=draws, num_workers=workers, collate_fn=collate))
    assert [batch.paths for batch in batches] == [["0.png", "1.png"], ["3.png", "4.png"]]
    assert [batch.bad for batch in batches] == [[Bad("2.png", "broken")], [Bad("5.png", "broken")]]
    assert batches[1].texts.counts.tolist() == [4, 5]


def test_bad_data(caplog):
    bad = BadData(limit=2)
    with caplog.at_level(logging.WARNING):
        bad.add([Bad("a", "missing"), Bad("b", "truncated")])
        bad.add([Bad("a", "missing")])
    assert [record.message for record in caplog.records] == ["skipped a: missing", "skipped b: truncated"]
    assert bad.reasons == {"a": "missing", "b": "truncated"}
    with pytest.raises(
        BadDataError, match=r"3 could not be read, but bad_limit is 2:\n  a: missing\n  b: trun.*\n  c: "
    ):
        bad.add([Bad("c", "empty caption")])


def test_the_same_data_are_bad_again_and_again():
    """As where the few shards of a run have been removed."""
    gone, bad = [Bad(f"{i}.tar", "gone") for i in range(2)], BadData(limit=2, in_a_row=6)
    for _ in range(9):
        bad.add(gone, good=1)
    for _ in range(3):
        bad.add(gone)
    with pytest.raises(BadDataError, match=r"8 samples in a row could not be read:\n  0.tar: gone\n  1.tar: gone"):
        bad.add(gone)


def test_no_bad_data_allowed():
    BadData(limit=0).add([])
    with pytest.raises(BadDataError, match="1 could not be read, but bad_limit is 0"):
        BadData(limit=0).add([Bad("a", "missing")])
