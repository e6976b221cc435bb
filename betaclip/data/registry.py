"""The data sets by name: one line for each to train on, and one for each to evaluate retrieval on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import Dataset

from betaclip.data.batches import Bad, Example
from betaclip.data.dataset_options import DatasetOptions, at_least
from betaclip.data.readers.shards import ShardOptions
from betaclip.data.readers.sharegpt4v import ShareGPT4VOptions
from betaclip.data.scenes.dataset import SceneOptions

# Training data: the name is a value of --data.kind, the fields of the class are further options --data.FIELD.
DATASETS: dict[str, type[DatasetOptions]] = {
    "scenes": SceneOptions,
    "sharegpt4v": ShareGPT4VOptions,
    "shards": ShardOptions,
}

if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(DATASETS)]


@dataclass(frozen=True, kw_only=True)
class _AnyKind:
    kind: Kind = "scenes"
    """Rendered scenes, pictures in files with ShareGPT4V's annotations, or pictures and captions in tar shards."""
    bad_limit: int = at_least(0, 100)
    """Images or captions that may be unusable, each counted once; beyond, the run stops."""


# The bases are reversed because a dataclass lists the fields of its last base first.
@dataclass(frozen=True, kw_only=True)
class DataConfig(*reversed(DATASETS.values()), _AnyKind):  # type: ignore[misc]
    """What to train on: the settings of all kinds of data, of which ``kind`` names one."""

    def create(
        self, image_size: int, context_length: int, *, seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> Dataset[Example | Bad]:
        """The data set of this kind.

        Raises:
            ValueError: a setting is missing, or belongs to another kind of data.
            FileNotFoundError: a setting names a file that is not there.
        """
        options = DATASETS[self.kind]
        own = {setting.name for setting in fields(options)}
        for setting in fields(self):
            # Others have defaults that suit their kind, and do no harm where a file of settings gives them.
            given = setting.default is None and getattr(self, setting.name) is not None
            if given and setting.name not in own:
                users = [kind for kind, other in DATASETS.items() if setting.name in {f.name for f in fields(other)}]
                raise ValueError(f"{setting.name}: kind {self.kind!r} does not use it, only {' and '.join(users)}")
        settings: dict[str, Any] = {name: getattr(self, name) for name in own}
        return options(**settings).create(image_size, context_length, seed=seed, rank=rank, ranks=ranks)
