"""The settings of ``betaclip train``, and what it composes. Whole runs of the command are in test_cli."""

from dataclasses import fields, is_dataclass, replace
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from support import colours
from support.paths import ROOT

from betaclip.data.registry import DataConfig
from betaclip.errors import ConfigError
from betaclip.settings import read, to_toml
from betaclip.train import TrainConfig, TrainEvaluationConfig, create_evaluator, write_pictures
from betaclip.training.config import GroupConfig, OptimizerConfig

CONFIGS = ROOT / "configs"
DATA_OF_THE_RELEASED_CODE = {
    "phrase_style": "published", "long_phrases": "published", "sentence_order": "random", "interpolation": "bilinear",
}  # fmt: skip


def test_scenes_are_the_defaults():
    assert read(TrainConfig(), CONFIGS / "scenes.toml") == TrainConfig()


@pytest.mark.parametrize("form", ["ce", "bce"])
def test_published_recipes(form, tmp_path):
    config = read(TrainConfig(), CONFIGS / f"vit_b16_sharegpt4v_{form}.toml")
    assert (config.model.name, config.model.pretrained, config.model.context_length) == ("ViT-B-16", "openai", 248)
    assert (config.model.pool_heads, config.model.pool_norm_inputs, config.model.pool_identity) == (8, False, False)
    assert (config.loss.form, config.loss.beta, config.loss.alpha) == (form, 0.5, 1.0)
    assert config.data.kind == "sharegpt4v" and (config.data.sentences, config.data.max_phrases) == (5, 30)
    assert config.optimizer == OptimizerConfig(
        backbone=GroupConfig(1e-5, 1e-7, initial_lr=1e-9, warmup=6),
        pool=GroupConfig(1e-3, 1e-4, warmup=0),
        schedule="published",
    )
    chosen = (config.loss, ("padding", "gather_global", "gather")), (config.data, DATA_OF_THE_RELEASED_CODE)
    assert [[getattr(part, name) for name in names] for part, names in chosen] == [
        ["published", "published", "local"],
        list(DATA_OF_THE_RELEASED_CODE.values()),
    ]
    assert (config.run.batch_size, config.run.micro_batch_size, config.run.epochs) == (2048, 64, 10)
    assert config.run.accumulation == "mean"
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert read(TrainConfig(), tmp_path / "config.toml") == config


def test_recorded_run_loads():
    file = ROOT / "benchmarks" / "results" / "cpu-2x-amd-epyc-scenes" / "config.toml"
    assert read(TrainConfig(), file).run.accumulation == "grad_cache"


@pytest.mark.parametrize(
    "old, new", [("chunk = 3", "run.micro_batch_size"), ('chunks = "accumulate"', "run.accumulation")]
)
def test_renamed_settings_are_named(tmp_path, old, new):
    (tmp_path / "config.toml").write_text(f"[run]\n{old}\n")
    with pytest.raises(ConfigError, match=f"'run.{old.split()[0]}' has been renamed to '{new}'"):
        read(TrainConfig(), tmp_path / "config.toml")


def test_renamed_value_is_taken(tmp_path):
    """Configurations of earlier runs say "false"."""
    (tmp_path / "config.toml").write_text('[loss]\ngather = "false"\n')
    assert read(TrainConfig(), tmp_path / "config.toml").loss.gather == "local"


def optional_defaults(cls: Any) -> list[tuple[str, object]]:
    """Names and defaults of all fields that may be None."""
    hints, found = get_type_hints(cls), []
    for f in fields(cls):
        if is_dataclass(hints[f.name]):
            found += optional_defaults(hints[f.name])
        elif NoneType in get_args(hints[f.name]):
            found.append((f.name, f.default))
    return found


def test_what_may_be_none_is_none_by_default():
    """TOML cannot say None: a saved run would otherwise come back with something else."""
    found = optional_defaults(TrainConfig)
    assert len(found) > 10 and {default for _, default in found} == {None}


def test_evaluator():
    assert create_evaluator(TrainConfig()).scenes == 200
    files = TrainConfig(data=DataConfig(kind="sharegpt4v"))
    assert create_evaluator(files).is_empty
    assert create_evaluator(replace(files, evaluation=TrainEvaluationConfig(scenes=3))).scenes == 3
    with pytest.raises(ConfigError, match=r"evaluation: .*nowhere"):
        create_evaluator(TrainConfig(evaluation=TrainEvaluationConfig(urban1k=ROOT / "nowhere")))


def test_pictures_of_own_data(tmp_path):
    """The attention over the first pictures of the first retrieval set, of the sentences of their captions."""
    rows = [("a", "A cat. A dog sits."), ("b", ""), ("c", "A mug.")]
    for name, caption in rows:
        colours.save(tmp_path / f"{name}.png", colours.picture({(0, 1): "red"}))
        (tmp_path / f"{name}.txt").write_text(caption)
    data = DataConfig(kind="pairs")
    config = TrainConfig(data=data, evaluation=TrainEvaluationConfig(pairs=tmp_path, pictures=5))
    files = write_pictures(config, create_evaluator(config), colours.ColourModel(), tmp_path / "attention")
    assert [file.name for file in files] == ["picture_0.png", "picture_1.png"]
    none = replace(config, evaluation=TrainEvaluationConfig())
    assert write_pictures(none, create_evaluator(none), colours.ColourModel(), tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
