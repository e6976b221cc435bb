"""Mixtures: exact shares, each example before any again, the same after an interruption, and bad weights."""

from collections import Counter
from itertools import islice

import pytest
import torch
from support.shards import sample, write_shard
from torch.utils.data import DataLoader

from betaclip.data.batches import Bad, Draw, Example, collate
from betaclip.data.example_maker import ExampleMaker
from betaclip.data.mixture import MixtureDataset, MixtureStream, Permutations, _counts, _turns, mix
from betaclip.data.phrases.cache import PhrasesOnTheFly
from betaclip.data.phrases.rules import RuleExtractor
from betaclip.data.readers.shards import ShardDataset


class Named:
    """Examples whose path says set and number, and whose picture says the seed of the draw."""

    def __init__(self, name, length):
        self.name, self.length = name, length

    def __len__(self):
        return self.length

    def __getitem__(self, draw):
        if draw.index == 5:
            return Bad(f"{self.name}/5", "torn")
        return Example(torch.full((3, 2, 2), float(draw.seed % 1000)), [""], [[1]], [0], f"{self.name}/{draw.index}")


def draws(data, epoch, seed=0):
    """All examples of an epoch, by place."""
    return [data[Draw(place, 7 * place + epoch, epoch)].path for place in range(len(data))]


def of(paths, name):
    return [int(path.partition("/")[2]) for path in paths if path.startswith(f"{name}/")]


def test_shares_are_exact():
    """40 examples an epoch, of which three quarters are of the smaller set."""
    data = mix({"large": (Named("large", 30), 1.0), "small": (Named("small", 10), 3)})
    assert isinstance(data, MixtureDataset) and len(data) == 40
    for epoch in range(3):
        paths = draws(data, epoch)
        assert (len(of(paths, "large")), Counter(of(paths, "small"))) == (10, dict.fromkeys(range(10), 3))
    assert data.order == {
        "mixture.large.length": 30, "mixture.large.count": 10, "mixture.small.length": 10, "mixture.small.count": 30,
    }  # fmt: skip


def test_each_example_comes_before_any_again():
    """Also where an epoch ends within a permutation: 14 of 23 examples, and 21 of 12."""
    data = mix({"a": (Named("a", 23), 2), "b": (Named("b", 12), 3)})
    epochs = [draws(data, epoch) for epoch in range(23 * 12)]
    for name, length in (("a", 23), ("b", 12)):
        drawn = [number for paths in epochs[: 2 * length] for number in of(paths, name)]
        assert len(drawn) == {"a": 46 * 14, "b": 24 * 21}[name]
        turns = [drawn[i : i + length] for i in range(0, len(drawn) - length + 1, length)]
        assert all(sorted(turn) == list(range(length)) for turn in turns)
        assert len({tuple(turn) for turn in turns}) == len(turns)


def test_an_example_is_a_function_of_its_draw():
    """In any order, in a new mixture, whatever the order of the sets; other seeds draw others."""
    sets = {"a": (Named("a", 23), 2), "b": (Named("b", 12), 3)}
    data, again = mix(sets, seed=3), mix(dict(reversed(sets.items())), seed=3)
    later, first = draws(data, 9), draws(data, 0)
    assert draws(again, 0) == first and draws(again, 9) == later and draws(data, 0) == first
    assert draws(mix(sets, seed=4), 0) != first
    good = next(example for i in range(35) if isinstance(example := data[Draw(i, 123)], Example))
    assert torch.equal(good.image, torch.full((3, 2, 2), 123.0))
    for index in (35, 36):
        with pytest.raises(IndexError):
            data[Draw(index, 0)]


def test_permutations_are_forgotten():
    some = Permutations(4, 0, "a")
    numbers = [some[i] for i in range(40)]
    assert len(some._orders) == 10
    some.forget(22)
    assert len(some._orders) == 5 and [some[i] for i in range(20, 40)] == numbers[20:]


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        files = [f for key in range(4 * number, 4 * number + 4) for f in sample(key, f"A cat on {key} mats.", "txt")]
        write_shard(tmp_path / f"{number}.tar", files)
    return [str(tmp_path / f"{number}.tar") for number in range(3)]


def stream(shards, rank=0, ranks=1, seed=0):
    """An epoch of 36 examples has 9 from shards and 27 from the set of 14, or one more or less."""
    make = ExampleMaker(2, 77, PhrasesOnTheFly(RuleExtractor()))
    data = ShardDataset(shards, make, shuffle=3, epoch_samples=22, seed=seed, rank=rank, ranks=ranks)
    sets = {"shards": (data, 0.5), "own": (Named("own", 14), 1.5)}
    return mix(sets, seed=seed, rank=rank, ranks=ranks)


def paths(loader):
    return [batch.paths + [bad.path for bad in batch.bad] for batch in loader]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 2), (3, 2)])
def test_streams(shards, ranks, workers):
    """Each example of the set without shards comes once over ranks and workers before any again."""
    own, lanes = [], ranks * max(workers, 1)
    for rank in range(ranks):
        data = stream(shards, rank, ranks)
        assert isinstance(data, MixtureStream) and data.epoch_samples == 36
        for epoch in range(4):
            data.set_epoch(epoch)
            seen = [path for batch in paths(DataLoader(data, 1, num_workers=workers, collate_fn=collate))
                    for path in batch]  # fmt: skip
            assert len(seen) == 36 // lanes * max(workers, 1)
            mine = of(seen, "own")
            assert abs(len(mine) - 0.75 * len(seen)) <= max(workers, 1)
            own += mine
    counts = Counter(own)
    assert len(counts) == 14 and max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_go_on(shards, workers):
    def batches(first, number):
        some = stream(shards, seed=2).batches(2, workers, first)
        found = [(batch.paths, [bad.path for bad in batch.bad], batch.images) for batch in islice(some, number)]
        some.close()
        return found

    whole = batches(0, 40)  # more than two epochs of 18
    for first in (1, 7, 18, 29):
        rest = batches(first, 40 - first)
        assert [one[:2] for one in rest] == [one[:2] for one in whole[first:]]
        assert all(torch.equal(one[2], other[2]) for one, other in zip(rest, whole[first:], strict=True))
    assert whole[0][0] != whole[18][0]


def test_turns():
    """After any number of turns each has had its share, to one."""
    shares = [0.1, 0.62, 0.28]
    had = [0, 0, 0]
    for number, turn in enumerate(islice(_turns(shares), 1000), 1):
        had[turn] += 1
        assert all(abs(had[i] - number * shares[i]) < 1 for i in range(3))
    assert had == [100, 620, 280]


def test_counts():
    assert _counts([0.5, 0.25, 0.25], 7) == [3, 2, 2] and _counts([1.0], 3) == [3]
    assert sum(_counts([1 / 3] * 3, 100)) == 100


def test_rejects(shards):
    make = ExampleMaker(2, 77, PhrasesOnTheFly(RuleExtractor()))
    some = Named("a", 20)
    for sets, message in (
        ({}, r"mixture: expected one set or more, each in a table \[data.mixture.NAME\]"),
        ({"a": (some, 0.0)}, r"mixture.a.weight: expected a number above 0, got 0.0"),
        ({"a": (some, -1.0)}, r"mixture.a.weight: expected a number above 0, got -1.0"),
        ({"a": (some, float("nan"))}, r"mixture.a.weight: expected a number above 0, got nan"),
        ({"a": (some, float("inf"))}, r"mixture.a.weight: expected a number above 0, got inf"),
        ({"a": (some, 0.001), "b": (some, 1.0)}, r"mixture.a.weight: 0.001 gives the set none of the 40 examples"),
        ({"a": (some, 1.0), "b": (ShardDataset(shards, make), 1.0)}, r"mixture.b: epoch_samples: shards need it"),
    ):
        with pytest.raises(ValueError, match=message):
            mix(sets)
