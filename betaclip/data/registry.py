"""Settings of the data, and the dataset that they mean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

# The readers are imported when they are needed: settings are plain values, and shown without loading any of them.
if TYPE_CHECKING:
    from betaclip.data.readers.shards import ShardDataset
    from betaclip.data.readers.sharegpt4v import ShareGPT4V
    from betaclip.data.scenes.dataset import ScenesDataset

# The settings that name data, by the kind of data that has them.
_SOURCES = {"scenes": (), "sharegpt4v": ("root", "annotations", "phrases"), "shards": ("shards", "phrases")}
_NEEDED = {"scenes": (), "sharegpt4v": ("root", "annotations"), "shards": ("shards",)}


@dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    kind: Literal["scenes", "sharegpt4v", "shards"] = "scenes"
    """Rendered scenes, pictures in files with ShareGPT4V's annotations, or pictures and captions in tar shards."""
    root: Path | None = None
    """sharegpt4v: the folder that the annotations' image paths start from."""
    annotations: Path | None = None
    """sharegpt4v: the JSON or JSON lines; the first 1000 rows are for testing and left out."""
    shards: str | None = None
    """shards: a pattern such as "shards-{0000..0099}.tar"."""
    phrases: Path | None = None
    """sharegpt4v, shards: what `betaclip prepare` wrote; without it, phrases are extracted anew in every epoch."""
    sentences: int = 5
    """sharegpt4v, shards: sentences sampled from a caption."""
    max_phrases: int = 30
    """sharegpt4v, shards: phrases of an image at most."""
    max_phrase_tokens: int = 30
    """sharegpt4v, shards: longer phrases are left out."""
    epoch_samples: int | None = None
    """shards: samples of an epoch, over all ranks; training needs it."""
    shuffle: int = 500
    """shards: samples in the buffer of each worker from which the next is drawn."""
    scenes: int = 32_000
    """scenes: their number in an epoch."""
    scenes_seed: int = 0
    """scenes: which ones."""
    bad_limit: int = 100
    """Images or captions that may be unusable, each counted once; beyond, the run stops."""

    def __post_init__(self) -> None:
        least = {
            "sentences": 1, "max_phrases": 0, "max_phrase_tokens": 1, "epoch_samples": 1, "shuffle": 0, "scenes": 1,
            "bad_limit": 0,
        }  # fmt: skip
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ValueError(f"{name}: expected at least {limit}, got {value}")


def create_dataset(
    config: DataConfig, image_size: int, context_length: int, *, seed: int = 0, rank: int = 0, ranks: int = 1
) -> ScenesDataset | ShareGPT4V | ShardDataset:
    """The training data: examples by draw, or of shards, which are read in sequence, this rank's part.

    seed: of the order of shards and of all that is random about their samples.

    Raises:
        ValueError: a setting is missing, or is one of another kind of data.
        FileNotFoundError: a setting names a file that is not there.
    """
    for names in _SOURCES.values():
        for name in names:
            given = getattr(config, name) is not None
            if given and name not in _SOURCES[config.kind]:
                raise ValueError(f"{name}: kind {config.kind!r} has no such thing; set the kind too?")
            if not given and name in _NEEDED[config.kind]:
                raise ValueError(f"{name}: kind {config.kind!r} needs it")
    if config.kind == "scenes":
        from betaclip.data.scenes.dataset import ScenesDataset
        from betaclip.model.tokenizer import Tokenizer

        return ScenesDataset(config.scenes, config.scenes_seed, image_size, Tokenizer(context_length))

    from betaclip.data.example_maker import ExampleMaker
    from betaclip.data.phrases.cache import open_phrases

    make = ExampleMaker(
        image_size,
        context_length,
        open_phrases(config.phrases),
        sentences=config.sentences,
        max_phrases=config.max_phrases,
        max_phrase_tokens=config.max_phrase_tokens,
    )
    if config.kind == "sharegpt4v":
        from betaclip.data.readers.annotations import Annotations
        from betaclip.data.readers.sharegpt4v import ShareGPT4V

        assert config.root is not None and config.annotations is not None
        if not config.root.is_dir():
            raise FileNotFoundError(f"root: {config.root} is not a folder")
        return ShareGPT4V(Annotations(config.annotations), config.root, make)

    from betaclip.data.readers.shards import ShardDataset, expand_shards

    assert config.shards is not None
    return ShardDataset(
        expand_shards(config.shards),
        make,
        seed=seed,
        shuffle=config.shuffle,
        epoch_samples=config.epoch_samples,
        rank=rank,
        ranks=ranks,
    )
