"""The settings of ``betaclip train``, and what it composes. Whole runs of the command are in test_cli."""

import json
import math
from dataclasses import fields, is_dataclass, replace
from types import NoneType
from typing import Any, get_args, get_type_hints

import open_clip
import pytest
import torch
from support import colours
from support.paths import ROOT
from support.tiny import IMAGE_SIZE, WORDS, TinyDataset
from torch._subclasses import FakeTensorMode

from betaclip.checkpoint import load_checkpoint
from betaclip.data.registry import DataConfig
from betaclip.errors import ConfigError
from betaclip.model.beta_clip import create_model
from betaclip.model.flair_layout import FLAIR_SETTINGS
from betaclip.process_group import SINGLE_PROCESS
from betaclip.settings import read, to_toml
from betaclip.train import TrainConfig, TrainEvaluationConfig, create_evaluator, write_pictures
from betaclip.training.config import GroupConfig, OptimizerConfig, check
from betaclip.training.log import read_metrics
from betaclip.training.trainer import Trainer

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
    assert config.loss.conditioned_negatives == 0
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


def test_recipe_of_the_large_model():
    """That of the small model, but for the towers and what makes room for them. It builds without memory."""
    small, config = (read(TrainConfig(), CONFIGS / f"vit_{name}_sharegpt4v_ce.toml") for name in ("b16", "l14"))
    model = replace(small.model, name="ViT-L-14", gradient_checkpointing=True)
    assert config == replace(small, model=model) and config.model.pretrained == "openai"
    check(config, ranks=4)
    towers = json.dumps(open_clip.get_model_config(config.model.name))  # open_clip moves by name, which fakes cannot do
    with FakeTensorMode():  # its tensors have no memory, as those of the meta device
        built = create_model(replace(config.model, name=towers, pretrained=None, quick_gelu=True))
    assert (built.embed_dim, built.patch_grid, built.context_length, built.image_size) == (768, (16, 16), 248, 224)
    assert (
        built.clip.transformer.resblocks[0].attn.num_heads == 12 and len(built.clip.visual.transformer.resblocks) == 24
    )
    assert round(sum(parameter.numel() for parameter in built.parameters()) / 1e6) == 435


def test_flair_recipe(tmp_path, monkeypatch):
    """Two updates of the recipe with tiny towers, and its checkpoint."""
    config = read(TrainConfig(), CONFIGS / "flair.toml")
    towers = json.loads(config.model.name)
    assert (towers["init_logit_scale"], towers["init_logit_bias"]) == (pytest.approx(math.log(10)), -10)
    assert {name: getattr(config.model, name) for name in FLAIR_SETTINGS} == FLAIR_SETTINGS
    assert (config.model.pool_heads, config.model.pool_identity, config.data.max_phrases) == (8, False, 0)
    towers["embed_dim"] = 16
    towers["vision_cfg"] |= {"image_size": IMAGE_SIZE, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
    towers["text_cfg"] |= {"vocab_size": WORDS, "width": 16, "heads": 2, "layers": 1}
    optimizer = OptimizerConfig(GroupConfig(1e-3, 0.0, warmup=1), GroupConfig(1e-3, 0.0, warmup=1))
    run = {"folder": tmp_path, "name": "run", "steps": 2, "batch_size": 6, "micro_batch_size": 3, "workers": 0}
    config = replace(
        config, model=replace(config.model, name=json.dumps(towers)), optimizer=optimizer,
        run=replace(config.run, **run, log_every=1, tensorboard=False),
    )  # fmt: skip
    monkeypatch.setattr(DataConfig, "create", lambda *_, **__: TinyDataset(14))
    trainer = Trainer(config, SINGLE_PROCESS, torch.device("cpu"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and {"multi_positive_loss", "text_conditioned_loss"} <= rows[0].keys()
    for row in rows:
        assert row["loss"] == pytest.approx((row["multi_positive_loss"] + row["text_conditioned_loss"]) / 2)
        assert row["norm_pool"] > 0
    after = trainer.model.state_dict()
    unmoved = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert unmoved == {"pool.logit_scale"}  # FLAIR's losses do not read it
    again = load_checkpoint(tmp_path / "run")
    assert again.config == trainer.model.config and again.pool.attn.add_zero_attn
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())


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
