"""`betaclip train`: a run, and what comes after it."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from betaclip.checkpoint import load_checkpoint
from betaclip.process_group import ProcessGroup, initialized
from betaclip.training.artifacts import write_curves, write_pictures, write_results
from betaclip.training.config import TrainConfig, check
from betaclip.training.evaluation import Evaluation
from betaclip.training.trainer import Trainer

__all__ = ["TrainConfig", "main"]

OURS, GLOBAL = "β-CLIP", "global loss only"


def main(config: TrainConfig) -> None:
    """Train, evaluate, and draw; and once more with the global loss alone, to compare with.

    Raises:
        ConfigError: a setting that cannot be.
        NonFiniteError: a loss or gradient that is not finite, unless the run skips those.
        BadDataError: more bad data than the run allows.
        Stopped: SIGTERM.
    """
    with initialized(config.run.device) as (process_group, device):
        check(config, process_group.size)
        if config.run.name is None:
            name = process_group.gather_objects(time.strftime("%Y-%m-%d_%H-%M-%S"))[0]
            config = replace(config, run=replace(config.run, name=name))
        runs = {OURS: train(config, process_group, device)}
        compare = config.data.kind == "scenes" if config.run.compare_global is None else config.run.compare_global
        if compare and config.loss.beta_cal_weight:
            loss = replace(config.loss, global_weight=1.0, beta_cal_weight=0.0)
            run = replace(config.run, folder=runs[OURS], name="global_only")
            runs[GLOBAL] = train(replace(config, loss=loss, run=run), process_group, device)
        finish(config, runs, process_group, device)


def train(config: TrainConfig, process_group: ProcessGroup, device: torch.device) -> Path:
    """To the end, from the start or from the latest checkpoint; the run's folder."""
    run = Trainer(config, process_group, device)
    run.train()
    return run.folder


def finish(config: TrainConfig, runs: dict[str, Path], process_group: ProcessGroup, device: torch.device) -> None:
    """Evaluate each run's last checkpoint, on all ranks; the first of them prints, and writes what there is to see."""
    models = {name: load_checkpoint(folder, device=device) for name, folder in runs.items()}
    results = {}
    evaluation = Evaluation(config)
    for name, model in models.items():
        for of, values in evaluation(model, process_group).items():
            results[name if of == "scenes" else f"{of}, {name}"] = values
    if not process_group.is_first:
        return
    folder = runs[OURS]
    write_curves(runs, folder / "curves.png")
    if results:
        print(write_results(folder, results))
    if config.data.kind == "scenes":
        for name, model in models.items():
            write_pictures(model, runs[name] / "attention", config.data.scenes_seed)
    print(f"{folder} has checkpoints, curves.png" + (", results.json" if results else ""))
