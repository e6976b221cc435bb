"""Whole runs of a tiny model on noise. test_trainer_resuming has those that are stopped, and go on."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.published import released_checkpoint
from support.runs import CPU, STEPS, assert_same_run, averaged, config, measured, put_tiny, tiny_runs, train
from support.tiny import TinyDataset, tiny_batch

from betaclip import checkpoint as checkpoints
from betaclip.data.batches import BadDataError
from betaclip.data.registry import DataConfig
from betaclip.errors import ConfigError, NonFiniteError
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model
from betaclip.process_group import SINGLE_PROCESS, ProcessGroup
from betaclip.published import read_training_state, save_published
from betaclip.training import trainer as loop
from betaclip.training.log import read_metrics
from betaclip.training.trainer import Evaluated, Trainer


@pytest.fixture(autouse=True)
def tiny() -> Iterator[None]:
    with tiny_runs():
        yield


@pytest.fixture
def whole(tmp_path: Path) -> Trainer:
    """A run without interruption."""
    return train(config(tmp_path, "whole"))


def test_workers_and_evaluation_change_nothing(tmp_path, whole, capsys):
    seen = []

    def evaluate(model: BetaCLIP, process_group: ProcessGroup) -> Evaluated:
        torch.rand(5)
        seen.append(process_group)
        return Evaluated({"noise/choices/hard": 0.5}, "a table of noise")

    run = train(config(tmp_path, workers=2), evaluate=evaluate, evaluate_every=4)
    assert "step 8/9, evaluated\na table of noise\n" in capsys.readouterr().out
    rows = read_metrics(run.folder / "metrics.jsonl")
    found = [(row["step"], row["noise/choices/hard"]) for row in rows if "noise/choices/hard" in row]
    assert found == [(4, 0.5), (8, 0.5)] and seen == [SINGLE_PROCESS] * 2
    assert_same_run(run, whole)


def test_logs(tmp_path, capsys):
    run = train(config(tmp_path, log_every=4, tensorboard=True))
    rows = read_metrics(run.folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 9]
    assert rows[1]["epoch"] == pytest.approx(2) and rows[1]["skipped"] == 0
    assert rows[2]["lr_backbone"] == 1e-5 and rows[2]["lr_pool"] == 1e-4
    assert min(row[key] for row in rows for key in ("images_per_s", "peak_gib")) > 0
    assert all(0 <= row["data_share"] <= 1 for row in rows)
    out = capsys.readouterr().out
    assert out.startswith(f"run: {run.folder}; config.toml has its settings, log.txt these lines\ndevice: cpu, ")
    assert "data: scenes, 14 samples; 9 updates of 4 images, 2.25 epochs\n" in out
    assert "step 8/9  loss " in out and "images/s" in out
    assert list(run.folder.glob("events.out.tfevents.*"))
    every = read_metrics(train(config(tmp_path, "every")).folder / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(sum(row["loss"] for row in every[:4]) / 4)


def test_stops_at_what_is_not_finite(tmp_path, monkeypatch):
    put_tiny(monkeypatch.setattr, TinyDataset(14, poisoned=(5,)))
    with pytest.raises(NonFiniteError) as stopped:
        train(config(tmp_path, log_every=4))
    message = str(stopped.value)
    step = int(message.split()[1])
    assert "loss nan" in message and "logit_scale 14" in message and "pool_logit_scale" in message
    assert "picture 5" in message and 1 <= step <= 4
    saved = json.loads((tmp_path / "run" / "non_finite_rank0.json").read_text())
    assert saved["step"] == step and "picture 5" in saved["paths"] and len(saved["paths"]) == 4


def test_skips_what_is_not_finite(tmp_path, monkeypatch):
    put_tiny(monkeypatch.setattr, TinyDataset(14, poisoned=(5,)))
    run = train(config(tmp_path, log_every=4, non_finite="skip"))
    rows = read_metrics(run.folder / "metrics.jsonl")
    assert sum(row["skipped"] for row in rows) == 2  # once an epoch
    assert all(torch.isfinite(torch.tensor([row["loss"] for row in rows])))
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_bad_data(tmp_path, monkeypatch):
    put_tiny(monkeypatch.setattr, TinyDataset(14, bad=(3, 8)))
    run = train(config(tmp_path, steps=8))  # two epochs
    assert run.bad.reasons == {"picture 3": "torn", "picture 8": "torn"}
    settings = config(tmp_path, "limited")
    with pytest.raises(BadDataError, match="2 could not be read, but bad_limit is 1"):
        train(replace(settings, data=DataConfig(bad_limit=1)))


def test_all_of_a_batch_is_bad(tmp_path, monkeypatch):
    put_tiny(monkeypatch.setattr, TinyDataset(14, bad=tuple(range(14))))
    run = train(config(tmp_path))
    assert len(read_metrics(run.folder / "metrics.jsonl")) == STEPS


def test_rejects(tmp_path, monkeypatch):
    train(config(tmp_path, steps=3))
    with pytest.raises(ConfigError, match=r"run.name: .*run already holds a run \(config.toml\); give --run.resume"):
        Trainer(config(tmp_path), SINGLE_PROCESS, CPU)
    for change, message in (
        ({"steps": 2}, "the checkpoint is of step 3, beyond the run's 2 steps"),
        ({"batch_size": 5}, "batch_size: 4 -> 5 since the checkpoint"),
        ({"seed": 9}, "seed: 0 -> 9 since the checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            Trainer(config(tmp_path, resume=True, **{"steps": 9, **change}), SINGLE_PROCESS, CPU)
    assert "steps = 3\n" in (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(ConfigError, match=r"optimizer.backbone.warmup: expected 0 to 0, .* of 1 updates, got 1"):
        Trainer(config(tmp_path, "short", steps=1), SINGLE_PROCESS, CPU)

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("nowhere.json: no such file")

    monkeypatch.setattr(DataConfig, "create", missing)
    with pytest.raises(ConfigError, match=r"data: nowhere.json: no such file"):
        Trainer(config(tmp_path, "no data"), SINGLE_PROCESS, CPU)


def test_average_starts_from_a_checkpoint_without_one(tmp_path):
    train(config(tmp_path, steps=2))
    settings = averaged(config(tmp_path, steps=4, resume=True))
    run = Trainer(settings, SINGLE_PROCESS, CPU)
    assert run.average is not None
    for name, value in run.average.state().items():
        assert torch.equal(value, run.model.get_parameter(name)), name
    assert "ema" in checkpoints.read(train(settings).folder / "checkpoint_00000004.pt")


def test_evaluates_the_average_beside_the_weights(tmp_path, capsys):
    """It changes nothing in the run."""
    seen = []

    def evaluate(model: BetaCLIP, process_group: ProcessGroup) -> Evaluated:
        seen.append(model.pool.mlp.c_fc.weight.sum().item())
        return Evaluated({"noise/size": seen[-1]}, f"a table of {seen[-1]}")

    run = train(averaged(config(tmp_path, "averaged", steps=4)), evaluate=evaluate, evaluate_every=2)
    rows = read_metrics(run.folder / "metrics.jsonl")
    found = [row for row in rows if "noise/size" in row]
    assert [(row["step"], row["noise/size"], row["ema/noise/size"]) for row in found] == [(2, *seen)]
    assert seen[0] != seen[1]
    assert f"a table of {seen[0]}\nwith averaged weights (EMA):\na table of {seen[1]}\n" in capsys.readouterr().out
    plain = train(config(tmp_path, "plain", steps=4))
    assert all(torch.equal(a, t) for a, t in zip(run.model.parameters(), plain.model.parameters(), strict=True))


def test_layer_rates_are_said(tmp_path, capsys):
    settings = config(tmp_path, steps=3)
    run = train(replace(settings, optimizer=replace(settings.optimizer, layer_decay=0.5)))
    assert "from embeddings to head: image 0.125 0.25 0.5 1; text 0.125 0.25 0.5 1\n" in capsys.readouterr().out
    assert read_metrics(run.folder / "metrics.jsonl")[2]["lr_backbone"] == 1e-5


def test_compile(monkeypatch, tmp_path):
    """Names of parameters stay as they are, so checkpoints do."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    plain = Trainer(config(tmp_path), SINGLE_PROCESS, CPU).model
    compiled = Trainer(config(tmp_path, compile=True), SINGLE_PROCESS, CPU).model
    marks = [block._compiled_call_impl is not None for block in compiled.clip.visual.transformer.resblocks]
    assert marks == [True, True] and plain.state_dict().keys() == compiled.state_dict().keys()


def test_checkpoint_makes_its_model_again(tmp_path, monkeypatch):
    """The model has QuickGELU, because weights like OpenAI's need it, although the settings do not say so."""
    towers = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1},
    }
    model = ModelConfig(json.dumps(towers), pool_heads=1)
    monkeypatch.setattr(loop, "create_model", lambda config: create_model(replace(config, quick_gelu=True)))
    run = train(replace(config(tmp_path, steps=2), model=model))
    monkeypatch.setattr(loop, "create_model", create_model)
    again = checkpoints.load_checkpoint(run.folder)
    assert_same_model(again, run.model)
    resumed = Trainer(replace(config(tmp_path, resume=True, steps=3), model=model), SINGLE_PROCESS, CPU)
    assert_same_model(resumed.model, run.model)
    file = str(checkpoints.latest(run.folder))
    started = Trainer(
        replace(config(tmp_path, "next", steps=3), model=replace(model, pretrained=file)), SINGLE_PROCESS, CPU
    )
    assert_same_model(started.model, run.model)


def assert_same_model(ours: BetaCLIP, truth: BetaCLIP) -> None:
    batch = tiny_batch(3)
    a, t = (model.eval()(batch.images, batch.texts) for model in (ours, truth))
    for name in t:
        assert torch.equal(a[name], t[name]), name


def released(folder: Path) -> tuple[ModelConfig, BetaCLIP, Path]:
    """A checkpoint of the released training code after 5 epochs, and its model."""
    towers = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1},
    }
    settings = ModelConfig(json.dumps(towers), context_length=248, pool_heads=1)
    model = create_model(replace(settings, quick_gelu=True))
    save_published(model, folder / "x.safetensors")
    torch.save(released_checkpoint(load_file(folder / "x.safetensors")), folder / "checkpoint_5.pt")
    return settings, model, folder / "checkpoint_5.pt"


def test_continue_from_the_released_code(tmp_path, monkeypatch):
    """Weights, moments and epoch are those of the file; a run that is resumed does not start from it again."""
    monkeypatch.setattr(loop, "create_model", create_model)
    model, truth, path = released(tmp_path)
    settings = replace(config(tmp_path, steps=None, epochs=6, continue_from=path), model=model)
    run = Trainer(settings, SINGLE_PROCESS, CPU)
    assert_same_model(run.model, truth)
    assert run.step == 5 * run.data.steps_per_epoch == 20
    moments = read_training_state(path).moments
    for name, parameter in run.model.named_parameters():
        for kind, value in moments[name].items():
            torch.testing.assert_close(run.optimizer.state[parameter][kind], value)
    run.train()
    assert len(measured(run)) == 4 and run.step == 24
    path.unlink()
    resumed = Trainer(replace(settings, run=replace(settings.run, resume=True, epochs=7)), SINGLE_PROCESS, CPU)
    assert resumed.step == 24
    assert_same_model(resumed.model, run.model)


def test_continue_from_rejects(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "create_model", create_model)
    model, _, path = released(tmp_path)
    settings = replace(config(tmp_path, steps=20, continue_from=path), model=model)
    with pytest.raises(ConfigError, match=r"run.continue_from: .*after epoch 5, update 20 .* got 20 updates"):
        Trainer(settings, SINGLE_PROCESS, CPU)
    only_weights = replace(settings.run, continue_from=tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"run.continue_from: .*x.safetensors: epoch: expected"):
        Trainer(replace(settings, run=only_weights), SINGLE_PROCESS, CPU)
