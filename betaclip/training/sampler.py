"""Which examples a step takes: a function of the run's seed and the step alone."""

import hashlib
import struct
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from betaclip.data.batches import Draw


class BatchSampler(Sampler[list[Draw]]):
    """This rank's part of the batches of steps ``first`` to ``last``.

    Every epoch is one permutation of the data, the same on all ranks; a batch is the next ``batch_size`` of it, of
    which each rank takes its own part. So an epoch draws every example exactly once over all ranks; its last batch is
    smaller if ``batch_size`` does not divide the data, and a rank's part of it may be empty. Parts of one batch differ
    by one example at most.

    The only state is the step: a run that goes on from step n draws what it would have drawn, whatever the number of
    workers and however far ahead they had read, and on any number of ranks.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, first: int, last: int, rank: int = 0, ranks: int = 1
    ) -> None:
        if min(length, batch_size) < 1:
            raise ValueError(f"length, batch_size: expected at least 1, got {length} and {batch_size}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first, self.last = first, last
        self.rank, self.ranks = rank, ranks
        self.steps_per_epoch = -(-length // batch_size)

    def __len__(self) -> int:
        return self.last - self.first

    def images(self, step: int) -> int:
        """Of the whole batch of a step, over all ranks."""
        begin = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.length - begin)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.first, self.last):
            if epoch != step // self.steps_per_epoch:
                epoch = step // self.steps_per_epoch
                order = torch.randperm(self.length, generator=torch.Generator().manual_seed(mix(self.seed, epoch)))
            begin = step % self.steps_per_epoch * self.batch_size
            size = self.images(step)
            part = order[begin + size * self.rank // self.ranks : begin + size * (self.rank + 1) // self.ranks]
            yield [Draw(index, mix(self.seed, epoch, index)) for index in part.tolist()]


def mix(*numbers: int) -> int:
    """A seed below 2⁶³ from several numbers: the same everywhere, unrelated for any that differ."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
