"""Mixtures of data sets, of which each gives its share of the examples."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from betaclip.data.batches import Bad, Draw, Example
from betaclip.data.stream import Stream


@dataclass(frozen=True)
class Part:
    """A data set of a mixture.

    dataset: with a length and an example for each Draw, or a Stream, whose ``epoch_samples`` count as its length.
    share: of the mixture's examples, above 0; the shares of a mixture sum to 1. count: the examples of an epoch.
    """

    name: str
    dataset: Any
    share: float
    count: int

    def __len__(self) -> int:
        return _length(self.dataset)


def _length(dataset: Any) -> int:
    if not isinstance(dataset, Stream):
        return len(dataset)
    assert dataset.epoch_samples is not None  # mix has checked it
    return dataset.epoch_samples


def mix(datasets: Mapping[str, tuple[Any, float]], *, seed: int = 0, rank: int = 0, ranks: int = 1) -> Dataset[Any]:
    """The mixture of data sets, each with its weight: a :class:`MixtureDataset` or, if one of them is a stream, a
    :class:`MixtureStream`. An epoch has as many examples as all data sets together.

    Raises:
        ValueError: there are no data sets, shards have no ``epoch_samples``, or a weight is not above 0 or so small
            that an epoch would have none of its examples.
    """
    if not datasets:
        raise ValueError("mixture: expected one set or more, each in a table [data.mixture.NAME] of a settings file")
    datasets = dict(sorted(datasets.items()))  # so that a settings file may list them in any order
    for name, (dataset, weight) in datasets.items():
        if not 0 < weight < float("inf"):
            raise ValueError(f"mixture.{name}.weight: expected a number above 0, got {weight}")
        if isinstance(dataset, Stream) and dataset.epoch_samples is None:
            raise ValueError(f"mixture.{name}: epoch_samples: shards need it, as their number of samples")
    whole = sum(weight for _, weight in datasets.values())
    shares = [weight / whole for _, weight in datasets.values()]
    counts = _counts(shares, sum(_length(dataset) for dataset, _ in datasets.values()))
    parts = []
    for (name, (dataset, weight)), share, number in zip(datasets.items(), shares, counts, strict=True):
        if number < 1:
            raise ValueError(
                f"mixture.{name}.weight: {weight} gives the set none of the {sum(counts)} examples of an epoch"
            )
        parts.append(Part(name, dataset, share, number))
    if any(isinstance(part.dataset, Stream) for part in parts):
        return MixtureStream(parts, seed=seed, rank=rank, ranks=ranks)
    return MixtureDataset(parts, seed=seed)


class Permutations:
    """The examples of a data set in one random order after another: each comes once before any comes again.

    seed, name: they decide the orders, together with the number of each.
    """

    def __init__(self, length: int, seed: int, name: str) -> None:
        self.length, self.seed, self.name = length, seed, name
        self._orders: dict[int, Tensor] = {}

    def __getitem__(self, number: int) -> int:
        """The example that comes at a place in the endless sequence."""
        turn, place = divmod(number, self.length)
        if turn not in self._orders:
            generator = torch.Generator("cpu").manual_seed(digest(self.seed, self.name, turn))
            self._orders[turn] = torch.randperm(self.length, generator=generator, device="cpu").to(torch.int32)
        return int(self._orders[turn][place])

    def forget(self, number: int) -> None:
        """Drop the orders that end before a place."""
        for turn in [turn for turn in self._orders if (turn + 1) * self.length <= number]:
            del self._orders[turn]


class MixtureDataset(Dataset[Example | Bad]):
    """Data sets that return each example by its number.

    In every epoch each has the same number of examples, as its share says. Over the epochs, each of its examples comes
    once before any comes again.
    """

    def __init__(self, parts: list[Part], *, seed: int = 0) -> None:
        self.parts = parts
        self.permutations = [Permutations(len(part), seed, part.name) for part in parts]

    @property
    def order(self) -> dict[str, int]:
        """What determines which example a draw takes, besides the seed."""
        return _lengths(self.parts) | {f"mixture.{part.name}.count": part.count for part in self.parts}

    def __len__(self) -> int:
        return sum(part.count for part in self.parts)

    def __getitem__(self, draw: Draw) -> Example | Bad:
        place = draw.index
        for part, permutations in zip(self.parts, self.permutations, strict=True):
            if place < part.count:
                permutations.forget(draw.epoch * part.count)
                index = permutations[draw.epoch * part.count + place]
                return part.dataset[Draw(index, draw.seed, draw.epoch)]
            place -= part.count
        raise IndexError(f"index: expected less than {len(self)}, got {draw.index}")


class MixtureStream(Stream):
    """Data sets of which some are streams, read in sequence.

    The data sets take turns, so that after any number of examples a worker has had of each what its share says, to
    one. Shards are drawn with replacement. Of the others, over all ranks and workers, no example comes again before
    each had its turn; it is passed over where it falls to a batch that an epoch no longer fills.
    """

    def __init__(self, parts: list[Part], *, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(seed=seed, epoch_samples=sum(map(len, parts)), rank=rank, ranks=ranks)
        self.parts = parts

    @property
    def order(self) -> dict[str, int]:
        """What determines which examples a step takes, besides the weights, the seed, ranks and workers."""
        return _lengths(self.parts)

    def examples(self, epoch: int, worker: int, workers: int, first: int = 0) -> Iterator[Example | Bad]:
        turns = _turns([part.share for part in self.parts])
        had = [0] * len(self.parts)
        for _ in range(first):
            had[next(turns)] += 1
        streams = [self._examples(part, epoch, worker, workers, had[i]) for i, part in enumerate(self.parts)]
        return (next(streams[i]) for i in turns)

    def _examples(self, part: Part, epoch: int, worker: int, workers: int, first: int) -> Iterator[Example | Bad]:
        if isinstance(part.dataset, Stream):
            yield from part.dataset.examples(epoch, worker, workers, first)
            return
        permutations = Permutations(len(part), self.seed, part.name)
        lane, lanes = self.rank * workers + worker, self.ranks * workers
        turns = _turns([other.share for other in self.parts])
        own = self.parts.index(part)
        in_epoch = sum(next(turns) == own for _ in range(self.samples_of_worker(workers)))
        for number in count(first):
            place = (epoch * in_epoch + number) * lanes + lane
            permutations.forget(place)
            seed = digest(self.seed, part.name, f"example {place}")
            yield part.dataset[Draw(permutations[place], seed, epoch)]


def digest(seed: int, name: str, what: object) -> int:
    """A seed below 2⁶³: the same on every machine, and unrelated for different arguments."""
    return int.from_bytes(blake2b(f"{seed} {name} {what}".encode(), digest_size=8).digest(), "little") >> 1


def _lengths(parts: list[Part]) -> dict[str, int]:
    return {f"mixture.{part.name}.length": len(part) for part in parts}


def _counts(shares: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to the shares that sum to ``total``: each rounded down, then the largest rests up."""
    counts = [int(share * total) for share in shares]
    rests = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * total)
    for i in rests[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _turns(shares: list[float]) -> Iterator[int]:
    """Whose turn it is, without end: always that of the one that has had least of its share."""
    had = [0] * len(shares)
    for number in count(1):
        turn = max(range(len(shares)), key=lambda i: number * shares[i] - had[i])
        had[turn] += 1
        yield turn
