"""Settings of data sets: numbers that are too small are refused, whichever class they belong to."""

from dataclasses import dataclass, replace

import pytest

from betaclip.data.dataset_options import DatasetOptions
from betaclip.settings import bounded


@dataclass(frozen=True, kw_only=True)
class Options(DatasetOptions):
    count: int = bounded(5, at_least=2)
    limit: int | None = bounded(None, at_least=0)
    seed: int = 0

    def create(self, image_size, context_length, *, seed=0, rank=0, ranks=1):
        raise NotImplementedError


def test_numbers():
    assert Options() == Options(count=5, limit=None, seed=0)
    assert Options(count=2, limit=0, seed=-1).count == 2
    with pytest.raises(ValueError, match=r"^count: expected at least 2, got 1$"):
        Options(count=1)
    with pytest.raises(ValueError, match=r"^limit: expected at least 0, got -1$"):
        replace(Options(), limit=-1)


def test_must_be_opened_somehow():
    with pytest.raises(TypeError, match="abstract"):
        DatasetOptions()
