"""Checkpoints: one plain file each, however the model is wrapped, written so that a kill never leaves half a file."""

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from betaclip.files import write_atomically
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model, load_state
from betaclip.model.weights import read_file, read_weights
from betaclip.published import load_published
from betaclip.settings import from_dict

_NAME = re.compile(r"checkpoint_(\d{8})\.pt")


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint_{step:08}.pt"


def latest(folder: Path) -> Path | None:
    """The checkpoint of the last step in a run's folder, found by name: a link could point to a missing file."""
    found = [path for path in folder.glob("checkpoint_*.pt") if _NAME.fullmatch(path.name)]
    return max(found, default=None)


def write(path: Path, content: dict[str, Any], keep: int) -> None:
    """Write atomically, then delete all but the last ``keep`` checkpoints.

    content: tensors and plain values only, because :func:`read` unpickles nothing else.
    """
    with write_atomically(path) as file:
        torch.save(content, file)
    for old in sorted(p for p in path.parent.glob("checkpoint_*.pt") if _NAME.fullmatch(p.name))[:-keep]:
        old.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def model_and_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Their states by parameter name, unsharded and on the CPU. All ranks must call; the first rank's is complete."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Load what :func:`model_and_optimizer` returned, into any wrapper and on any number of ranks. All ranks must call
    with the same content."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, content["model"], options=options)
    set_optimizer_state_dict(model, optimizer, content["optimizer"], options=options)


def set_moments(model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, dict[str, Tensor]]) -> None:
    """Give AdamW the moments and numbers of steps of all parameters, by their names. All ranks must call with the same.

    Raises:
        ValueError: a parameter in training has no moments.
    """
    options = StateDictOptions(full_state_dict=True)  # offloaded, it would be the first rank's alone
    content = get_optimizer_state_dict(model, optimizer, options=options)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    missing = [name for name in trained if name not in moments]
    if missing:
        raise ValueError(f"{missing[0]}: expected AdamW's moments for it, got none")
    content["state"] = cast(dict[str, Any], {name: moments[name] for name in trained})
    set_optimizer_state_dict(model, optimizer, content, options=options)


def random_states() -> dict[str, Any]:
    """This process's random states, as plain values: PyTorch's (CPU and current GPU), NumPy's and Python's."""
    kind, key, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(key).astype(np.int64)), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    kind, key, *rest = states["numpy"]
    np.random.set_state((kind, key.numpy().astype(np.uint32), *rest))
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def load_checkpoint(
    path: Path | str, *, device: torch.device | str = "cpu", head_width: int = 64, pool_heads: int = 8
) -> BetaCLIP:
    """The model of a checkpoint: one of ours, the latest in a run's folder, or a file in the published layout.

    Args:
        path: the file or folder.
        device: where to put the model.
        head_width, pool_heads: of a file in the published layout, as :func:`betaclip.published.load_published` takes
            them.

    Raises:
        FileNotFoundError: no such file, or a folder without checkpoints.
        ValueError: the file has neither layout or is damaged; the message is one line that names it.
    """
    path = Path(path)
    if path.is_dir():
        found = latest(path)
        if found is None:
            raise FileNotFoundError(f"{path}: no checkpoint_*.pt in this folder")
        path = found
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    config = model_config(path)
    if config is None:
        return load_published(path, head_width=head_width, pool_heads=pool_heads).to(device)
    model = create_model(replace(config, pretrained=None))
    load_state(model, read_weights(path), path)
    return model.to(device)


def model_config(path: Path) -> ModelConfig | None:
    """The model's settings in one of our checkpoints; None for any other file.

    Raises:
        ValueError: the checkpoint has no readable configuration of a model.
    """
    try:
        content = read_file(path, mmap=True)
    except ValueError:  # which whoever reads its weights will say
        return None
    if "betaclip" not in content:
        return None
    config = content.get("config")
    values = config.get("model") if isinstance(config, dict) else None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: config.model: expected the configuration of a model, got {type(values).__name__}")
    try:
        return from_dict(ModelConfig(), values)
    except ValueError as error:
        raise ValueError(f"{path}: config.model: {error}") from error
