"""What all streams share: parts of an epoch, and where a worker goes on. Shards and mixtures test it with real data."""

import pytest
import torch

from betaclip.data.batches import Example
from betaclip.data.stream import Stream


class Numbers(Stream):
    def examples(self, epoch, worker, workers, first=0):
        for number in range(first, 1000):
            yield Example(torch.zeros(3, 1, 1), [""], [[1]], [0], f"{epoch} {self.rank} {worker} {number}")


def numbers(epoch_samples=20, rank=0, ranks=1):
    return Numbers(seed=0, epoch_samples=epoch_samples, rank=rank, ranks=ranks)


def test_parts_of_an_epoch():
    assert [example.path for example in numbers(7, 1, 2)] == ["0 1 0 0", "0 1 0 1", "0 1 0 2"]
    assert numbers(100, ranks=3).samples_of_worker(4) == 8
    assert numbers(100, ranks=3).batches_per_epoch(3, 4) == 2 * 4 and numbers(100).batches_per_epoch(7, 0) == 14
    assert len(list(numbers(None))) == 1000
    with pytest.raises(ValueError, match="epoch_samples: expected a number, got None"):
        numbers(None).batches_per_epoch(2, 0)


def test_goes_on():
    data = numbers()
    data.set_epoch(3, 4, 4)
    assert [example.path for example in data] == [f"3 0 0 {i}" for i in range(16, 20)]
    data.set_epoch(3, 9, 4)
    assert list(data) == []


def test_batches_without_end():
    stream = numbers(10).batches(4, 0)
    first = [next(stream).paths for _ in range(5)]
    assert [paths[0] for paths in first] == ["0 0 0 0", "0 0 0 4", "1 0 0 0", "1 0 0 4", "2 0 0 0"]
    stream = numbers(10).batches(4, 0, first=3)
    assert [next(stream).paths for _ in range(2)] == first[3:]
