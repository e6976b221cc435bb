"""Checkpoints as the released training code writes them, with more than tensors in them."""

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

POOL = "text_conditioned_patches_block."
# Parameters of the model that have no gradient.
FROZEN = ("positional_embedding",)


def released_checkpoint(state: Mapping[str, Tensor], seed: int = 0) -> dict[str, Any]:
    """The content of a file: weights under names of DistributedDataParallel, and what lies beside them.

    Both optimisers are of AdamW, with groups of the parameters that decay and of those that do not, after one update
    with gradients of noise and with a learning rate of NumPy.
    """
    noise, optimizers = gradients(state, seed), []
    for of_pool in (False, True):
        parameters = {
            name: nn.Parameter(value.clone())
            for name, value in state.items()
            if name.startswith(POOL) is of_pool and name not in FROZEN
        }
        decays, others = ([p for p in parameters.values() if (p.dim() > 1) is many] for many in (True, False))
        optimizer = torch.optim.AdamW([{"params": decays}, {"params": others, "weight_decay": 0.0}], lr=1e-5)
        for name, parameter in parameters.items():
            parameter.grad = noise[name]
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, np.linspace(1e-9, 1e-5, 2), strict=True):
            group["lr"] = rate
        optimizers.append(optimizer.state_dict())
    arguments = argparse.Namespace(
        output_dir=Path("/runs/x"),
        data=PurePosixPath("images"),
        lr=1e-5,
        distributed=True,
        gpu=None,
        dtype=np.dtype("f4"),
    )
    return {
        "epoch": 5,
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "optimizer": optimizers[0],
        "optimizer_pool": optimizers[1],
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000},
        "best_acc1": np.float64(0.5),
        "args": arguments,
    }


def gradients(state: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The noise of the checkpoint's one update."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in state.items()}


def rename_global(path: Path, old: str, new: str) -> None:
    """Rename a module in a file of ``torch.save``, as another version of Python or NumPy would have written it."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    pickled = next(name for name in records if name.endswith("/data.pkl"))
    assert f"c{old}\n".encode() in records[pickled]
    records[pickled] = records[pickled].replace(f"c{old}\n".encode(), f"c{new}\n".encode())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
