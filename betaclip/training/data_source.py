"""The batches of a run, from any step on."""

import signal
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from betaclip.data.batches import Batch, collate
from betaclip.errors import ConfigError
from betaclip.model.beta_clip import BetaCLIP
from betaclip.process_group import ProcessGroup
from betaclip.training.config import TrainingConfig
from betaclip.training.sampler import BatchSampler


class DataSource(Protocol):
    """What a run's data are to it.

    steps_per_epoch: updates. order: what a step's place in the data depends on; a run that goes on must have the same.
    """

    steps_per_epoch: int
    order: dict[str, int]

    def images(self, step: int) -> int:
        """Of a step's batch over all ranks, bad ones included."""
        ...

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        """This rank's part of the batches of steps ``first`` to ``last``."""
        ...


def create_data_source(
    config: TrainingConfig, model: BetaCLIP, process_group: ProcessGroup, device: torch.device
) -> DataSource:
    """
    Raises:
        ConfigError: data that are not there, or settings that do not go together.
    """
    try:
        dataset: Any = config.data.create(
            model.image_size, model.context_length,
            seed=config.run.seed, rank=process_group.rank, ranks=process_group.size,
        )  # fmt: skip
        kind = ShardSource if isinstance(dataset, IterableDataset) else ExampleSource
        return kind(dataset, config, process_group, device)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data: {error}") from error


class ExampleSource:
    """Of a dataset that has each example by its number."""

    def __init__(self, dataset: Any, config: TrainingConfig, process_group: ProcessGroup, device: torch.device) -> None:
        self._dataset, self._workers, self._device = dataset, config.run.workers, device
        self._process_group = process_group
        self.order = {"length": len(dataset), "batch_size": config.run.batch_size, "seed": config.run.seed}
        self.steps_per_epoch = self._sampler(0, 0).steps_per_epoch

    def images(self, step: int) -> int:
        return self._sampler(step, step).images(step)

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        options = loader_options(self._device) | {"collate_fn": collate, "num_workers": self._workers}
        return iter(DataLoader(self._dataset, batch_sampler=self._sampler(first, last), **options))

    def _sampler(self, first: int, last: int) -> BatchSampler:
        ranks = self._process_group
        return BatchSampler(**self.order, first=first, last=last, rank=ranks.rank, ranks=ranks.size)


class ShardSource:
    """Of shards that are read in sequence: exact from any step on with the same numbers of ranks and of workers."""

    def __init__(self, dataset: Any, config: TrainingConfig, process_group: ProcessGroup, device: torch.device) -> None:
        size, workers, ranks = config.run.batch_size, config.run.workers, process_group.size
        if dataset.epoch_samples is None:
            raise ValueError("epoch_samples: shards need it, so that all ranks have as many batches")
        if size % ranks:
            raise ConfigError(f"run.batch_size: expected a multiple of {ranks} ranks for shards, got {size}")
        self._dataset, self._part, self._workers = dataset, size // ranks, workers
        self._ranks, self._device = ranks, device
        self.steps_per_epoch = dataset.batches_per_epoch(self._part, workers)
        if self.steps_per_epoch < 1:
            each = f"{ranks} ranks with {max(workers, 1)} workers"
            raise ValueError(f"epoch_samples: {dataset.epoch_samples} are less than a batch of {size} of {each}")
        self.order = {
            "epoch_samples": dataset.epoch_samples, "batch_size": size, "seed": config.run.seed,
            "ranks": ranks, "workers": workers,
        }  # fmt: skip

    def images(self, step: int) -> int:
        return self._part * self._ranks

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        options = loader_options(self._device)
        return islice(self._dataset.batches(self._part, self._workers, first, **options), last - first)


def loader_options(device: torch.device) -> dict[str, Any]:
    return {
        "pin_memory": device.type == "cuda",
        "generator": torch.Generator(),  # its own: the run's random numbers are not for seeding workers
        "worker_init_fn": _ignore_termination,
    }


def _ignore_termination(worker: int) -> None:
    """A SIGTERM to the whole group of processes must not take the workers from a run that is about to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
