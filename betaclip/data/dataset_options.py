"""What each kind of training data offers: its settings, and how to open it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any

from torch.utils.data import Dataset

from betaclip.data.batches import Bad, Example


def at_least(least: int, default: int | None) -> Any:
    """A dataclass field for a number; :class:`DatasetOptions` refuses smaller ones."""
    return field(default=default, metadata={"at_least": least})


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(ABC):
    """The settings of one kind of training data, each with a default, and None for those that must be given.

    ``betaclip.data.registry`` lists the kinds and makes command line options of the fields of all of them.
    """

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, least = getattr(self, setting.name), setting.metadata.get("at_least")
            if value is not None and least is not None and value < least:
                raise ValueError(f"{setting.name}: expected at least {least}, got {value}")

    @abstractmethod
    def create(
        self, image_size: int, context_length: int, *, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> Dataset[Example | Bad]:
        """The data set: examples by ``Draw``, or an ``IterableDataset`` of this rank's examples.

        seed: of all that is random and not a function of a draw.

        Raises:
            ValueError: a setting is missing.
            FileNotFoundError: a setting names a file that is not there.
        """
