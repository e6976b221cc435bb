"""The examples of each step, as a function of the run's seed and the step alone."""

import hashlib
import struct
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from betaclip.data.batches import Draw


class BatchSampler(Sampler[list[Draw]]):
    """This rank's share of the batches of steps ``first`` to ``last`` (excluded).

    Every epoch is one permutation of the data, the same on all ranks; a batch is the next ``batch_size`` examples, of
    which each rank takes its share. So an epoch draws every example exactly once over all ranks; its last batch is
    smaller if ``batch_size`` does not divide the data, and a rank's share of it may be empty. The shares of a batch
    differ by one example at most.

    The only state is the step: a run resumed at step n draws the same examples as one that was never interrupted,
    whatever the number of ranks and workers, and however far ahead workers had read.
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
        """The number of images of a step's batch over all ranks."""
        begin = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.length - begin)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, order = -1, torch.empty(0, device="cpu")
        for step in range(self.first, self.last):
            if epoch != step // self.steps_per_epoch:
                epoch = step // self.steps_per_epoch
                generator = torch.Generator("cpu").manual_seed(mix(self.seed, epoch))
                order = torch.randperm(self.length, generator=generator, device="cpu")
            begin = step % self.steps_per_epoch * self.batch_size
            size = self.images(step)
            share = order[begin + size * self.rank // self.ranks : begin + size * (self.rank + 1) // self.ranks]
            yield [Draw(index, mix(self.seed, epoch, index), epoch) for index in share.tolist()]


def mix(*numbers: int) -> int:
    """A seed below 2⁶³ from several numbers: the same on every machine, and unrelated for different numbers."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
