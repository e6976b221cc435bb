"""What each kind of training data offers: its settings, and how to open it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch.utils.data import Dataset

from betaclip.data.batches import Bad, Example
from betaclip.settings import check_numbers


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(ABC):
    """The settings of one kind of training data, each with a default, and None for those that must be given.

    ``betaclip.data.registry`` lists the kinds and makes command line options of the fields of all of them.
    """

    def __post_init__(self) -> None:
        check_numbers(self)

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
