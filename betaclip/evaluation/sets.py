"""The sets that a model is evaluated on: the settings that name them, and their contents without the pictures."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from betaclip.data.batches import Bad
from betaclip.data.multiple_choice import ChoiceSet
from betaclip.data.readers import fg_ovd
from betaclip.data.readers.class_folders import ClassFolders, class_folders
from betaclip.data.readers.retrieval_set import RetrievalSet
from betaclip.data.registry import RetrievalConfig
from betaclip.errors import ConfigError
from betaclip.evaluation.tasks.zero_shot import TemplatesName
from betaclip.settings import bounded

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(RetrievalConfig):
    """The sets to evaluate on, and how."""

    scenes: int | None = bounded(None, at_least=0)
    """Number of rendered scenes, for retrieval, choices, pointing and the leak. By default none."""
    fg_ovd: Path | None = None
    """Folder with FG-OVD's files, in either form: fine-grained choices, for each subset whose file is there."""
    fg_ovd_images: Path | None = None
    """COCO's folder, with train2017/ and val2017/; by default that of FG-OVD's files."""
    zero_shot: Path | None = None
    """Folder with one folder of pictures for each class: zero-shot classification."""
    zero_shot_names: Path | None = None
    """JSON file that maps the folders' names to the names of the classes; by default a class has its folder's name, or
    for ImageNet open_clip's name."""
    zero_shot_templates: TemplatesName = "openai"
    """open_clip's templates that make texts from a class's name: the 80 of CLIP's paper, or 7 simple ones."""
    conditioned: bool = True
    """Also evaluate text-conditioned retrieval, in which each text pools each picture (much more work than the rest),
    and the leak on retrieval sets. The leak on scenes is always measured."""
    top_k: int | None = None
    """Also evaluate re-ranking: take this many of the pictures that are nearest to a text by CLS, and of the texts that
    are nearest to a picture, and order them by text-conditioned cosines (FLAIR takes 128 and 256). At least 10."""
    own_text: bool = False
    """Also evaluate retrieval where each picture is pooled by its own first text before the search, as in the released
    code. The search is told what to find, so compare such results only with each other."""
    limit: int | None = bounded(None, at_least=1)
    """Take at most this many pictures of each retrieval set and of the classes, and questions of each subset, spread
    evenly. Results are then named SET_limitN, because retrieval among fewer is easier. By default all."""
    long_texts: Literal["keep_end", "published"] = "keep_end"
    """keep_end: texts beyond the context keep their end token. published: they lose it, as in the released code, where
    all such texts have the same embedding."""
    batch_size: int = bounded(64, at_least=1)
    """Number of pictures, texts or questions that a rank encodes at a time."""
    seed: int = 0
    """Seed of the scenes."""


@dataclass(frozen=True)
class Sets:
    """Retrieval sets, choices by subset, and classes; the last two with the names of their results."""

    retrieval: list[RetrievalSet]
    choices: dict[str, ChoiceSet]
    classes: ClassFolders | None
    choices_name: str = "fg_ovd"
    classes_name: str = "zero_shot"

    @property
    def unusable(self) -> list[list[Bad]]:
        """For each set, the samples that cannot be used."""
        return [*(one.missing for one in self.retrieval), *(one.bad for one in self.choices.values())]


def read_sets(config: EvaluationConfig) -> Sets:
    """Read the sets that the settings name.

    Raises:
        ConfigError: a set does not exist, or nothing in it can be used.
    """
    try:
        sets = Sets(
            config.read_retrieval_sets(),
            {} if config.fg_ovd is None else _choices(config, config.fg_ovd),
            None if config.zero_shot is None else class_folders(config.zero_shot, config.zero_shot_names),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    return sets if config.limit is None else _limited(sets, config.limit)


def _limited(sets: Sets, limit: int) -> Sets:
    """At most ``limit`` pictures of each retrieval set and of the classes, and questions of each subset."""

    def named(name: str, cut: bool) -> str:
        return f"{name}_limit{limit}" if cut else name

    retrieval = []
    for one in sets.retrieval:
        pictures = list(dict.fromkeys(picture for picture, _ in one.pairs))
        kept = set(_spread(pictures, limit))
        pairs = [pair for pair in one.pairs if pair[0] in kept]
        retrieval.append(replace(one, name=named(one.name, len(pictures) > limit), pairs=pairs))
    choices = {name: replace(found, choices=_spread(found.choices, limit)) for name, found in sets.choices.items()}
    classes, pictures_of_classes = sets.classes, [] if sets.classes is None else sets.classes.pictures
    if classes is not None:
        classes = replace(classes, pictures=_spread(pictures_of_classes, limit))
    return Sets(
        retrieval,
        choices,
        classes,
        named("fg_ovd", any(len(found) > limit for found in sets.choices.values())),
        named("zero_shot", len(pictures_of_classes) > limit),
    )


def _spread(items: list[Item], limit: int) -> list[Item]:
    """At most ``limit`` items, in their order and at equal distances."""
    return items if len(items) <= limit else [items[i * len(items) // limit] for i in range(limit)]


def _choices(config: EvaluationConfig, folder: Path) -> dict[str, ChoiceSet]:
    found = {}
    for subset in fg_ovd.SUBSETS:
        try:
            file = fg_ovd.fg_ovd_file(folder, subset)
        except FileNotFoundError:
            continue
        found[subset] = fg_ovd.load_fg_ovd(
            file, config.fg_ovd_images or folder, allow_outside_root=config.allow_outside_root
        )
    if not found:
        names = ", ".join(name for names in fg_ovd.SUBSETS.values() for name in names)
        raise FileNotFoundError(f"fg_ovd: {folder} has no file of any subset; their names begin with {names}")
    return found
