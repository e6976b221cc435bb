"""The sets that a model is evaluated on: the settings that name them, and their contents without the pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from betaclip.data.batches import Bad
from betaclip.data.multiple_choice import ChoiceSet
from betaclip.data.readers import fg_ovd
from betaclip.data.readers.class_folders import ClassFolders, class_folders
from betaclip.data.readers.retrieval_set import RetrievalSet
from betaclip.data.registry import RetrievalConfig
from betaclip.errors import ConfigError
from betaclip.evaluation.tasks.zero_shot import TemplatesName
from betaclip.settings import bounded


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(RetrievalConfig):
    """The sets to evaluate on, and how."""

    scenes: int | None = bounded(None, at_least=0)
    """Number of rendered scenes, for retrieval, choices, pointing and the leak. By default none."""
    fg_ovd: Path | None = None
    """Folder of FG-OVD's files, in either form, for choices of each subset whose file is there."""
    fg_ovd_images: Path | None = None
    """COCO's folder, with train2017/ and val2017/; by default that of FG-OVD's files."""
    zero_shot: Path | None = None
    """Folder with one folder of pictures for each class: zero-shot classification."""
    zero_shot_names: Path | None = None
    """JSON file with the names of the classes by the names of their folders; by default the folders' own, and
    open_clip's for ImageNet."""
    zero_shot_templates: TemplatesName = "openai"
    """open_clip's templates that make texts of a class's name: the 80 of CLIP's paper, or 7 simple ones."""
    conditioned: bool = True
    """Also evaluate text-conditioned retrieval, for which each text pools each picture, much more work than the rest,
    and the leak on retrieval sets; that on scenes is always measured."""
    long_texts: Literal["keep_end", "published"] = "keep_end"
    """Texts beyond the context keep their end token; or they lose it as in the released code, where all such texts have
    the same embedding."""
    batch_size: int = bounded(64, at_least=1)
    """Number of pictures, texts or questions that a rank encodes at a time."""
    seed: int = 0
    """Seed of the scenes."""


@dataclass(frozen=True)
class Sets:
    """Retrieval sets, choices by subset, and classes."""

    retrieval: list[RetrievalSet]
    choices: dict[str, ChoiceSet]
    classes: ClassFolders | None

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
        return Sets(
            config.read_retrieval_sets(),
            {} if config.fg_ovd is None else _choices(config, config.fg_ovd),
            None if config.zero_shot is None else class_folders(config.zero_shot, config.zero_shot_names),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error


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
