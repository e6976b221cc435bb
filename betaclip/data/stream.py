"""Examples that are read in sequence, each rank and each of its workers its own, epoch after epoch."""

from abc import abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from betaclip.data.batches import Bad, Batch, Example, collate


class Stream(IterableDataset[Example | Bad]):
    """Examples of this rank, in an order that the seed and the epoch decide, split over its workers.

    Args:
        epoch_samples: samples of an epoch, over all ranks, of which every worker has its part; None for a pass.
        rank, ranks: this process among those of the run.
    """

    def __init__(self, *, seed: int, epoch_samples: int | None, rank: int, ranks: int) -> None:
        self.seed, self.epoch_samples, self.rank, self.ranks = seed, epoch_samples, rank, ranks
        # The epoch, and how many batches of which size this rank has had of it; shared with persistent workers.
        self.position = torch.zeros(3, dtype=torch.int64, device="cpu").share_memory_()

    @abstractmethod
    def examples(self, epoch: int, worker: int, workers: int, first: int = 0) -> Iterator[Example | Bad]:
        """A worker's examples of an epoch from number ``first`` on; without end if there are ``epoch_samples``."""

    def set_epoch(self, epoch: int, batches: int = 0, batch_size: int = 0) -> None:
        """Start an epoch at the next iteration; with ``batches``, continue after that many batches of ``batch_size``.

        Their samples are read again, but not decoded. The rest is the same as without the interruption if the numbers
        of ranks and workers and the batch size are, and if no worker had come to its end.
        """
        self.position.copy_(self.position.new_tensor((epoch, batches, batch_size)))

    def batches_per_epoch(self, batch_size: int, workers: int) -> int:
        """How many whole batches a rank has in an epoch of ``epoch_samples``."""
        workers = max(workers, 1)
        return self.samples_of_worker(workers) // batch_size * workers

    def samples_of_worker(self, workers: int) -> int:
        """How many samples each of a rank's workers has in an epoch of ``epoch_samples``."""
        if self.epoch_samples is None:
            raise ValueError(
                "epoch_samples: expected a number, got None; the samples of a pass are not counted beforehand"
            )
        return self.epoch_samples // (self.ranks * workers)

    def batches(self, batch_size: int, workers: int, first: int = 0, **options: Any) -> Iterator[Batch]:
        """This rank's batches, epoch after epoch without end, from number ``first`` on; needs ``epoch_samples``.

        options: more arguments of the DataLoader.
        """
        epoch, had = divmod(first, self.batches_per_epoch(batch_size, workers))
        loader = DataLoader(
            self, batch_size, num_workers=workers, collate_fn=collate, drop_last=True,
            persistent_workers=workers > 0, **options,
        )  # fmt: skip
        while True:
            self.set_epoch(epoch, had, batch_size)
            yield from loader
            epoch, had = epoch + 1, 0

    def __iter__(self) -> Iterator[Example | Bad]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, batches, batch_size = self.position.tolist()
        # The loader asks its first worker first, so that one takes the place of the worker whose turn it was.
        worker = (worker + batches) % workers
        had = (batches - worker + workers - 1) // workers * batch_size
        left = None if self.epoch_samples is None else max(0, self.samples_of_worker(workers) - had)
        return islice(self.examples(epoch, worker, workers, had), left)
