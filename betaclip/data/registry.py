"""The data sets by name: one line for each to train on, and one for each to evaluate retrieval on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from torch.utils.data import Dataset

from betaclip.data.batches import Bad, Example
from betaclip.data.dataset_options import DatasetOptions
from betaclip.data.mixture import mix
from betaclip.data.readers.dci import DCIOptions
from betaclip.data.readers.docci import DOCCIOptions
from betaclip.data.readers.iiw import IIWOptions
from betaclip.data.readers.karpathy import COCOOptions, Flickr30kOptions
from betaclip.data.readers.pairs import PairsOptions, PairsRetrievalOptions
from betaclip.data.readers.retrieval_set import RetrievalOptions, RetrievalSet
from betaclip.data.readers.shards import ShardOptions
from betaclip.data.readers.sharegpt4v import ShareGPT4V1kOptions, ShareGPT4V10kOptions, ShareGPT4VOptions
from betaclip.data.readers.urban1k import Urban1KOptions
from betaclip.data.scenes.dataset import SceneOptions
from betaclip.settings import bounded

T = TypeVar("T")

# Training data. A name is a value of --data.kind, the fields of the class are options --data.FIELD.
DATASETS: dict[str, type[DatasetOptions]] = {
    "scenes": SceneOptions,
    "sharegpt4v": ShareGPT4VOptions,
    "pairs": PairsOptions,
    "shards": ShardOptions,
}

# Sets for retrieval. A name is an option of betaclip evaluate, as are the fields of the class.
RETRIEVAL_SETS: dict[str, type[RetrievalOptions]] = {
    "coco": COCOOptions,
    "flickr30k": Flickr30kOptions,
    "docci": DOCCIOptions,
    "iiw": IIWOptions,
    "urban1k": Urban1KOptions,
    "sharegpt4v": ShareGPT4V1kOptions,
    "sharegpt4v_10k": ShareGPT4V10kOptions,
    "dci": DCIOptions,
    "pairs": PairsRetrievalOptions,
}

MIXTURE = "mixture"

if TYPE_CHECKING:
    Kind = str
    KindOrMixture = str
else:
    Kind, KindOrMixture = Literal[tuple(DATASETS)], Literal[(*DATASETS, MIXTURE)]


@dataclass(frozen=True, kw_only=True)
class _AnyKind:
    kind: Kind = "scenes"
    """Rendered scenes, ShareGPT4V, pictures of your own with captions in files, or tar shards of both."""


# The bases are reversed because a dataclass lists the fields of its last base first.
@dataclass(frozen=True, kw_only=True)
class SetConfig(*reversed(DATASETS.values()), _AnyKind):  # type: ignore[misc]
    """One data set to train on: ``kind`` names it, and the settings are those of all kinds."""

    def create(
        self, image_size: int, context_length: int, *, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> Dataset[Example | Bad]:
        """The data set of this kind.

        Raises:
            ValueError: a setting is missing, or belongs to another kind of data.
            FileNotFoundError: a setting names a file that does not exist.
        """
        options = DATASETS[self.kind]
        own = {setting.name for setting in fields(options)}
        for setting in fields(SetConfig):
            # Only settings without a default are checked: a settings file gives all others too, whatever its kind.
            given = setting.default is None and getattr(self, setting.name) is not None
            if given and setting.name not in own:
                users = [kind for kind, other in DATASETS.items() if setting.name in {f.name for f in fields(other)}]
                listed = " and ".join(filter(None, (", ".join(users[:-1]), users[-1])))
                raise ValueError(f"{setting.name}: kind {self.kind!r} does not use it, only {listed}")
        return _part(self, options).create(image_size, context_length, seed=seed, rank=rank, ranks=ranks)


@dataclass(frozen=True, kw_only=True)
class MixtureSet(SetConfig):
    """One data set of a mixture."""

    weight: float = 1.0
    """The set's part of the mixture's examples, beside the weights of the other sets."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(SetConfig):
    """The data to train on: kind names the data set, and the settings are those of all kinds."""

    kind: KindOrMixture = "scenes"
    """Rendered scenes, ShareGPT4V, pictures of your own with captions in files, tar shards of both, or a mixture."""
    bad_limit: int = bounded(100, at_least=0)
    """Number of images or captions that may be unusable, each counted once; the run stops at more."""
    mixture: Mapping[str, MixtureSet] = field(default_factory=dict)
    """mixture: its sets by names of your own, each with its settings and a weight. A settings file lists them in tables
    [data.mixture.NAME]; options change what it gives."""

    def create(
        self, image_size: int, context_length: int, *, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> Dataset[Example | Bad]:
        options: Any = {"seed": seed, "rank": rank, "ranks": ranks}
        if self.kind != MIXTURE:
            if self.mixture:
                raise ValueError(f"mixture: kind {self.kind!r} does not use it, only {MIXTURE}")
            return super().create(image_size, context_length, **options)
        for setting in fields(SetConfig):
            if setting.name != "kind" and getattr(self, setting.name) != setting.default:
                raise ValueError(f"{setting.name}: kind {MIXTURE!r} does not use it; give it to its sets")
        sets = {}
        for name, one in self.mixture.items():
            try:
                sets[name] = one.create(image_size, context_length, **options), one.weight
            except FileNotFoundError as error:
                raise FileNotFoundError(f"mixture.{name}: {error}") from error
            except ValueError as error:
                raise ValueError(f"mixture.{name}: {error}") from error
        return mix(sets, **options)


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(*reversed(RETRIEVAL_SETS.values())):  # type: ignore[misc]
    """The paths of the sets for retrieval; sets without a path are left out."""

    def read_retrieval_sets(self) -> list[RetrievalSet]:
        """Read the sets that have a path, in the order of RETRIEVAL_SETS.

        Raises:
            FileNotFoundError, ValueError: see :meth:`RetrievalOptions.read`.
        """
        read = (_part(self, options).read() for options in RETRIEVAL_SETS.values())
        return [found for found in read if found is not None]


def _part(config: Any, options: type[T]) -> T:
    """The settings of one of the classes that a configuration inherits from."""
    return options(**{setting.name: getattr(config, setting.name) for setting in fields(cast(Any, options))})
