"""What a run says before its first step: where it runs, and how large the model, the data and a step are."""

from pathlib import Path

import torch
from torch import nn

from betaclip.data.batches import Batch
from betaclip.model.beta_clip import BetaCLIP
from betaclip.process_group import ProcessGroup
from betaclip.training.config import TrainingConfig
from betaclip.training.data_source import DataSource


def header(
    folder: Path,
    config: TrainingConfig,
    model: BetaCLIP,
    data: DataSource,
    steps: int,
    process_group: ProcessGroup,
    device: torch.device,
) -> str:
    """The device, the parameters of each part, the samples and the updates, in a line each."""
    run = config.run
    ranks = f", {process_group.size} ranks by {run.parallel}" if process_group.size > 1 else ""
    parts = {"vision tower": model.clip.visual, "text tower": model.clip, "pooling block": model.pool}
    sizes = {name: _parameters(part) for name, part in parts.items()}
    sizes["text tower"] -= sizes["vision tower"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    listed = ", ".join(f"{name} {_millions(size)}" for name, size in sizes.items())
    name = "from JSON" if config.model.name.startswith("{") else config.model.name
    epochs = steps / data.steps_per_epoch
    return "\n".join(
        [
            f"run: {folder}; config.toml has its settings, log.txt these lines",
            f"device: {_device(device)}, {run.precision}{ranks}",
            f"model: {name}, parameters: {listed}; {_millions(trained)} of {_millions(_parameters(model))} are trained",
            f"data: {config.data.kind}, {data.samples:,} samples; {steps:,} updates of {run.batch_size:,} images, "
            f"{epochs:.3g} epochs",
        ]
    )


def first_batch(batch: Batch, process_group: ProcessGroup) -> str:
    """How large the steps are, by the first one's share of this rank."""
    texts = batch.texts
    share = " on the first rank" if process_group.size > 1 else ""
    return (
        f"first step: {len(batch.images):,} images, {len(texts.lengths):,} texts, {len(texts.tokens):,} tokens per step"
        f"{share}"
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} M"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads"
