"""Where a run's batches come from, starting at any step."""

import sys
from collections.abc import Iterator
from itertools import islice
from types import TracebackType
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from betaclip.data.batches import Batch, collate
from betaclip.errors import ConfigError
from betaclip.process_group import ProcessGroup
from betaclip.signals import end_workers_at_exit, ignore_stop_signals
from betaclip.training.config import TrainingConfig
from betaclip.training.sampler import BatchSampler


class Sizes(Protocol):
    """What the data must know of a model: pixels of a side of its pictures, and tokens of its texts."""

    @property
    def image_size(self) -> int: ...

    @property
    def context_length(self) -> int: ...


class DataSource(Protocol):
    """The training data, as the trainer sees them.

    samples: their number in an epoch. steps_per_epoch: number of updates. order: everything that determines which
    samples a step takes; a resumed run must have the same.
    """

    samples: int
    steps_per_epoch: int
    order: dict[str, int]

    def images(self, step: int) -> int:
        """The number of images of a step's batch over all ranks, bad ones included."""
        ...

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """This rank's share of the batches of steps ``first`` to ``last`` (excluded)."""
        ...


def create_data_source(
    config: TrainingConfig, sizes: Sizes, process_group: ProcessGroup, device: torch.device
) -> DataSource:
    """The batches of the data that the settings name, for a model of these sizes.

    Raises:
        ConfigError: the data are not there, or settings do not fit each other.
    """
    try:
        dataset: Any = config.data.create(
            sizes.image_size, sizes.context_length,
            seed=config.run.seed, rank=process_group.rank, ranks=process_group.size,
        )  # fmt: skip
        kind = ShardSource if isinstance(dataset, IterableDataset) else ExampleSource
        return kind(dataset, config, process_group, device)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data: {error}") from error


class ExampleSource:
    """Batches of a dataset that returns each example by its number."""

    def __init__(self, dataset: Any, config: TrainingConfig, process_group: ProcessGroup, device: torch.device) -> None:
        self._dataset, self._workers, self._device = dataset, config.run.workers_with(device), device
        self._process_group, self.samples = process_group, len(dataset)
        self._permutation = {"length": len(dataset), "batch_size": config.run.batch_size, "seed": config.run.seed}
        self.order = self._permutation | _order_of(dataset)
        self.steps_per_epoch = self._sampler(0, 0).steps_per_epoch

    def images(self, step: int) -> int:
        return self._sampler(step, step).images(step)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        options = loader_options(self._device) | {"collate_fn": collate, "num_workers": self._workers}
        return iter(DataLoader(self._dataset, batch_sampler=self._sampler(first, last), **options))

    def _sampler(self, first: int, last: int) -> BatchSampler:
        ranks = self._process_group
        return BatchSampler(**self._permutation, first=first, last=last, rank=ranks.rank, ranks=ranks.size)


class ShardSource:
    """Batches of shards, which are read in sequence. To resume exactly takes the same numbers of ranks and workers."""

    def __init__(self, dataset: Any, config: TrainingConfig, process_group: ProcessGroup, device: torch.device) -> None:
        size, ranks = config.run.batch_size, process_group.size
        workers = config.run.workers_with(device)
        if dataset.epoch_samples is None:
            raise ValueError("epoch_samples: shards need it, so that all ranks have the same number of batches")
        if size % ranks:
            raise ConfigError(f"run.batch_size: expected a multiple of {ranks} ranks for shards, got {size}")
        self._dataset, self._share, self._workers = dataset, size // ranks, workers
        self._ranks, self._device, self.samples = ranks, device, dataset.epoch_samples
        self.steps_per_epoch = dataset.batches_per_epoch(self._share, workers)
        if self.steps_per_epoch < 1:
            each = f"{ranks} ranks with {max(workers, 1)} workers"
            raise ValueError(f"epoch_samples: {dataset.epoch_samples} are fewer than a batch of {size} on {each}")
        self.order = {
            "epoch_samples": dataset.epoch_samples, "batch_size": size, "seed": config.run.seed,
            "ranks": ranks, "workers": workers,
        } | _order_of(dataset)  # fmt: skip

    def images(self, step: int) -> int:
        return self._share * self._ranks

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        options = loader_options(self._device)
        return islice(self._dataset.batches(self._share, self._workers, first, **options), last - first)


def _order_of(dataset: Any) -> dict[str, int]:
    """What besides the settings of the run determines which samples a step takes; a mixture says so."""
    return getattr(dataset, "order", {})


def loader_options(device: torch.device) -> dict[str, Any]:
    end_workers_at_exit()
    return {
        "pin_memory": device.type == "cuda",
        "generator": torch.Generator(),  # its own, so that seeding workers takes none of the run's random numbers
        "worker_init_fn": _initialize_worker,
    }


def _initialize_worker(worker: int) -> None:
    ignore_stop_signals()
    sys.excepthook = _worker_excepthook


def _worker_excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print nothing when the run, which was stopped, no longer takes what a thread of this process hands it."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, traceback)
