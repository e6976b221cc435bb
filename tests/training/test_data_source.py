import sys
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.shards import sample, write_shard
from support.tiny import TinyDataset

from betaclip.data.registry import DataConfig, MixtureSet, SetConfig
from betaclip.errors import ConfigError
from betaclip.process_group import ProcessGroup
from betaclip.training import data_source
from betaclip.training.config import RunConfig, TrainingConfig
from betaclip.training.data_source import DataSource, _worker_excepthook, create_data_source, loader_options

MODEL: Any = SimpleNamespace(image_size=8, context_length=77)
SCENES: Any = SimpleNamespace(image_size=40, context_length=77)


def alone(rank: int = 0, ranks: int = 1) -> tuple[ProcessGroup, torch.device]:
    return ProcessGroup(rank, ranks), torch.device("cpu")


def paths(some: DataSource, first: int, last: int) -> list[list[str]]:
    return [batch.paths for batch in some.batches(first, last)]


@pytest.mark.parametrize("workers", [0, 2])
def test_examples(monkeypatch, workers):
    monkeypatch.setattr(DataConfig, "create", lambda *_, **__: TinyDataset(11))
    config = TrainingConfig(run=RunConfig(batch_size=4, workers=workers))
    some = create_data_source(config, MODEL, *alone())
    assert some.steps_per_epoch == 3 and [some.images(step) for step in range(4)] == [4, 4, 3, 4]
    whole = paths(some, 0, 7)
    assert sorted(path for batch in whole[:3] for path in batch) == sorted(f"picture {i}" for i in range(11))
    assert paths(some, 5, 7) == whole[5:]
    parts = [paths(create_data_source(config, MODEL, *alone(rank, 3)), 0, 7) for rank in range(3)]
    assert [[path for part in parts for path in part[step]] for step in range(7)] == whole


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        files = [f for key in range(4 * number, 4 * number + 4) for f in sample(key, f"A cat on {key} mats.", "txt")]
        write_shard(tmp_path / f"{number}.tar", files)
    data = DataConfig(
        kind="shards", shards=str(tmp_path / "{0..2}.tar"), epoch_samples=16, shuffle=3, phrase_extractor="rules"
    )
    return TrainingConfig(data=data, run=RunConfig(batch_size=4, workers=0))


def test_shards(shards):
    some = create_data_source(shards, MODEL, *alone())
    assert some.steps_per_epoch == 4 and some.images(3) == 4
    whole = paths(some, 0, 6)
    assert [len(batch) for batch in whole] == [4] * 6
    assert paths(create_data_source(shards, MODEL, *alone()), 5, 6) == whole[5:]
    other = create_data_source(shards, MODEL, *alone(1, 2))
    assert other.steps_per_epoch == 4 and other.images(0) == 4 and len(paths(other, 0, 1)[0]) == 2
    assert other.order == some.order | {"ranks": 2}


@pytest.fixture
def mixture():
    sets = {"a": MixtureSet(scenes=7, weight=2), "b": MixtureSet(scenes=4, scenes_seed=1)}
    return TrainingConfig(data=DataConfig(kind="mixture", mixture=sets), run=RunConfig(batch_size=4, workers=0))


def test_mixture(mixture):
    """An epoch of 11 has 7 and 4; the same examples from any step and on any number of ranks."""
    some = create_data_source(mixture, SCENES, *alone())
    assert some.steps_per_epoch == 3 and some.order["mixture.a.count"] == 7
    whole = paths(some, 0, 9)
    epochs = [[path for batch in whole[i : i + 3] for path in batch] for i in (0, 3, 6)]
    assert [sum(path.startswith("scenes/train/0") for path in epoch) for epoch in epochs] == [7, 7, 7]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert paths(create_data_source(mixture, SCENES, *alone()), 5, 9) == whole[5:]
    parts = [paths(create_data_source(mixture, SCENES, *alone(rank, 3)), 0, 9) for rank in range(3)]
    assert [[path for part in parts for path in part[step]] for step in range(9)] == whole


def test_mixture_with_shards(mixture, shards):
    sets = mixture.data.mixture | {"c": MixtureSet(**{f.name: getattr(shards.data, f.name) for f in fields(SetConfig)})}
    mixture = replace(mixture, data=replace(mixture.data, mixture=sets))
    some = create_data_source(mixture, SCENES, *alone())
    assert some.steps_per_epoch == (7 + 4 + 16) // 4 and some.order["mixture.c.length"] == 16
    whole = paths(some, 0, 9)
    assert sum(path.startswith("scenes/") for batch in whole for path in batch) == 27
    assert paths(create_data_source(mixture, SCENES, *alone()), 7, 9) == whole[7:]


def test_rejects(shards):
    for change, ranks, message in (
        ({"epoch_samples": None}, 1, "data: epoch_samples: shards need it"),
        ({"epoch_samples": 3}, 1, "data: epoch_samples: 3 are fewer than a batch of 4"),
        ({}, 3, "run.batch_size: expected a multiple of 3 ranks for shards, got 4"),
        ({"shards": "nowhere.tar"}, 1, r"data: .*nowhere\.tar"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_data_source(replace(shards, data=replace(shards.data, **change)), MODEL, *alone(0, ranks))


def test_workers_are_quiet_about_a_run_that_left(capsys):
    """A run may be stopped between asking a worker for a tensor and taking it; other errors of its threads show."""
    for error in (EOFError(), ConnectionResetError("gone"), BrokenPipeError()):
        _worker_excepthook(type(error), error, None)
    assert capsys.readouterr().err == ""
    _worker_excepthook(ValueError, ValueError("torn"), None)
    assert capsys.readouterr().err == "ValueError: torn\n"


def test_workers_ignore_stop_signals_and_are_ended_at_exit(monkeypatch):
    arranged = []
    for name in ("end_workers_at_exit", "ignore_stop_signals"):
        monkeypatch.setattr(data_source, name, lambda name=name: arranged.append(name))
    monkeypatch.setattr(sys, "excepthook", None)  # a worker has another
    loader_options(torch.device("cpu"))["worker_init_fn"](0)
    assert arranged == ["end_workers_at_exit", "ignore_stop_signals"]
