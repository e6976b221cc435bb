"""Checkpoints: one plain file each, however the model is wrapped, written so that a kill never leaves half a file.

A file is what torch.save writes, a zip archive, with the SHA-256 of that as the archive's comment.
"""

import hashlib
import json
import logging
import os
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from betaclip.errors import ConfigError
from betaclip.exported import REST, is_exported, load_exported
from betaclip.files import reporting, write_atomically
from betaclip.model.beta_clip import BetaCLIP, ModelConfig, create_model, load_state
from betaclip.model.weights import read_file, read_metadata, weights_of
from betaclip.published import load_published
from betaclip.settings import from_dict, to_dict

FORMAT = 2  # version 1 had no digest
WEIGHTS_FILE = "model.safetensors"  # of a finished run

_NAME = re.compile(r"checkpoint_(\d{8})\.pt")
_COMMENT = b"betaclip sha256 "
_COMMENT_BYTES = len(_COMMENT) + hashlib.sha256().digest_size

# The entries that a run needs to resume, with their types.
RUN_KEYS: dict[str, type] = {
    "step": int, "config": dict, "order": dict, "model": dict, "optimizer": dict, "scaler": dict, "columns": list,
    "interval": Tensor, "random": list,
}  # fmt: skip
MODEL_KEYS: dict[str, type] = {"model": dict}

# raw: the weights after the last update; ema: their average (EMA); auto: the average if there is one.
Weights = Literal["auto", "ema", "raw"]
AVERAGED = "with the average of the weights (EMA); --weights raw takes those after the last update"

_log = logging.getLogger(__name__)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint_{step:08}.pt"


def kept(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, by step. They are found by name: a link could point to a missing file."""
    return sorted(path for path in folder.glob("checkpoint_*.pt") if _NAME.fullmatch(path.name))


def latest(folder: Path) -> Path | None:
    """The checkpoint of the last step in a run's folder."""
    return max(kept(folder), default=None)


def read_latest(folder: Path, keys: dict[str, type]) -> tuple[Path, dict[str, Any]] | None:
    """The last whole checkpoint in a run's folder and its content, or None if there are no checkpoints; a warning names
    those that are damaged.

    Raises:
        ValueError: none is whole; the message names the last.
        ConfigError: the last whole one is of a later version.
    """
    first: ValueError | None = None
    for path in reversed(kept(folder)):
        try:
            content = read(path, keys)
        except ConfigError:
            raise
        except ValueError as error:
            first = first or error
            _log.warning("%s; trying the checkpoint before it", error)
        else:
            return path, content
    if first is not None:
        raise ValueError(f"{first}; no checkpoint before it is whole either") from first
    return None


def set_aside_later(folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps, which :func:`read_latest` found damaged: under their names they would be
    the last ones, which are kept."""
    for path in kept(folder):
        if path > checkpoint_path(folder, step):
            with reporting(path):
                path.replace(f"{path}.damaged")


def write(path: Path, content: dict[str, Any], keep: int) -> None:
    """Write atomically, then delete all but the last ``keep`` checkpoints.

    content: tensors and plain values only, because :func:`read` unpickles nothing else.
    """
    with write_atomically(path) as file:
        hashed = _HashedFile(file)
        torch.save(content, cast(IO[bytes], hashed))
        # The archive ends with the length of its comment, 0.
        file.seek(-2, os.SEEK_END)
        file.write(_COMMENT_BYTES.to_bytes(2, "little") + _COMMENT + hashed.digest.digest())
    for old in kept(path.parent)[:-keep]:
        old.unlink(missing_ok=True)


class _HashedFile:
    """Writes through to a file, and takes the digest of all of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()


def _has_digest(path: Path) -> bool:
    """Whether the file has a digest.

    Raises:
        ValueError: it has that of another content.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        end = _COMMENT_BYTES.to_bytes(2, "little") + _COMMENT
        begin = size - 2 - _COMMENT_BYTES
        if begin < 0:
            return False
        file.seek(begin)
        found = file.read()
        if not found.startswith(end):
            return False
        digest = hashlib.sha256()
        file.seek(0)
        while begin > 0:
            part = file.read(min(begin, 1 << 22))
            digest.update(part)
            begin -= len(part)
        digest.update(bytes(2))
    if found.removeprefix(end) != digest.digest():
        raise ValueError(f"{path}: damaged: its content does not have the digest that was written with it")
    return True


def read(path: Path, keys: dict[str, type] | None = None) -> dict[str, Any]:
    """A checkpoint's content.

    Args:
        keys: what the content must have, with its types.

    Raises:
        ValueError: the file is damaged, or no checkpoint of ours; the message names it.
        ConfigError: a later version wrote it.
    """
    digest = _has_digest(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything for a file that is not its own
        raise ValueError(f"{path}: cannot be read as a checkpoint: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a checkpoint of betaclip, got {type(content).__name__}")
    _check_version(path, content, digest)
    for key, kind in (keys or {}).items():
        if not isinstance(content.get(key), kind):
            found = f"of type {type(content[key]).__name__}" if key in content else "missing"
            raise ValueError(f"{path}: expected {key!r} of type {kind.__name__} in a checkpoint, it is {found}")
    name = _NAME.fullmatch(path.name)
    if "step" in content and (type(content["step"]) is not int or (name and content["step"] != int(name[1]))):
        raise ValueError(f"{path}: expected the step that the name says, got {content['step']!r:.80}")
    return content


def _check_version(path: Path, content: dict[str, Any], digest: bool) -> None:
    version = content.get("betaclip", 1)
    if type(version) is not int or version < 1:
        raise ValueError(f"{path}: expected a version of at least 1, got {version!r:.80}")
    if version > FORMAT:
        raise ConfigError(
            f"{path}: a later version of betaclip wrote it (format {version}, expected up to {FORMAT}); update it"
        )
    if version > 1 and not digest:
        raise ValueError(f"{path}: damaged: the digest that was written with it is missing")


def _first_line(error: Exception) -> str:
    """Errors of torch go on with advice that may be harmful, such as to unpickle what the file holds."""
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def model_and_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Their states by parameter name, unsharded and on the CPU. All ranks must call; the first rank's is complete."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Load what :func:`model_and_optimizer` returned, into any wrapper and on any number of ranks. All ranks must call
    with the same content.

    Raises:
        ValueError: the content lacks something; PyTorch's own errors, of any type, where something else does not fit.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = content["optimizer"].get("param_groups", [])
    for place, expected, found in (
        ("model", set(model.state_dict()), set(content["model"])),
        ("optimizer.state", trained, set(content["optimizer"].get("state", {}))),
        ("optimizer.param_groups", trained, {name for group in groups for name in group["params"]}),
    ):
        if expected - found:
            raise ValueError(f"{place}: {len(expected - found)} missing, such as {min(expected - found)}")
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
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    weights: Weights = "auto",
    head_width: int | None = None,
    pool_heads: int | None = None,
) -> BetaCLIP:
    """Load a model, and merge LoRA's adapters into it.

    The model may be in a checkpoint of betaclip's, a run's folder (its latest checkpoint), a file of
    :func:`save_weights`, a file in the published or in FLAIR's layout, or a folder that ``betaclip export`` wrote.

    Args:
        path: the file or folder.
        device: where to put the model.
        weights: ``"ema"``, the average of the weights that a run with ``optimizer.ema_decay`` keeps, ``"raw"``, the
            weights after the last update, or ``"auto"``, the average if there is one. The model's ``averaged`` says
            which it has.
        head_width, pool_heads: as for :func:`betaclip.published.load_published`, for a file in one of those layouts.

    Raises:
        FileNotFoundError: no such file, or a folder with neither checkpoints nor an exported model.
        ValueError: the file has neither layout, is damaged, or has no average; the message is one line that names it.
    """
    path = Path(path)
    if path.is_dir() and is_exported(path):
        _expect_averaged(weights, False, path)
        return load_exported(path).to(device)
    if path.is_dir():
        found = read_latest(path, MODEL_KEYS)
        if found is not None:
            return _model(*found, weights).to(device)
        path /= WEIGHTS_FILE
        if not path.exists() or _metadata(path) is None:  # transformers' files have the same name
            raise FileNotFoundError(
                f"{path.parent}: no checkpoint_*.pt or {WEIGHTS_FILE} in this folder, nor {REST} of an exported model"
            )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if (metadata := _metadata(path)) is not None:
        return _model(path, _weights_only(path, metadata), weights).to(device)
    if _is_ours(path):
        return _model(path, read(path, MODEL_KEYS), weights).to(device)
    _expect_averaged(weights, False, path)
    return load_published(path, head_width=head_width, pool_heads=pool_heads).to(device)


def _expect_averaged(weights: Weights, averaged: bool, path: Path) -> None:
    if weights == "ema" and not averaged:
        expected = "averaged weights, which a run with optimizer.ema_decay has"
        raise ValueError(f"{path}: expected {expected}, got none; take auto or raw")


def save_weights(model: BetaCLIP, path: Path | str) -> None:
    """Write a model's weights, without what only training needs, as a safetensors file that :func:`load_checkpoint`
    reads: the tensors have the names of ``model.state_dict()``, and the file's metadata hold the model's settings.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {
        "betaclip": str(FORMAT),
        "config": json.dumps({"model": to_dict(model.config)}),
        "weights": "ema" if model.averaged else "raw",
    }
    with write_atomically(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def _metadata(path: Path) -> dict[str, str] | None:
    """The metadata of a file of :func:`save_weights`; None for any other file."""
    metadata = read_metadata(path)
    if "betaclip" not in metadata:
        return None
    if not metadata["betaclip"].isdigit() or int(metadata["betaclip"]) > FORMAT:
        raise ConfigError(f"{path}: a later version of betaclip wrote it; update it")
    return metadata


def _weights_only(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The file's content as a checkpoint has it."""
    try:
        config = json.loads(metadata.get("config", ""))
    except ValueError as error:
        raise ValueError(f"{path}: config: {error}") from error
    return {"config": config, "ema" if metadata.get("weights") == "ema" else "model": read_file(path)}


def _model(path: Path, content: dict[str, Any], weights: Weights) -> BetaCLIP:
    _expect_averaged(weights, "ema" in content, path)
    if weights == "raw":
        content = {key: value for key, value in content.items() if key != "ema"}
        if "model" not in content:
            raise ValueError(f"{path}: expected the weights after the last update, got their average alone")
    model = create_model(replace(_model_config(path, content), pretrained=None))
    state = content if "model" in content else {"model": content["ema"]}  # save_weights writes all of it
    load_state(model, weights_of(state, path), path)
    model.averaged = "ema" in content
    return model


def _is_ours(path: Path) -> bool:
    if _has_digest(path):
        return True
    try:
        return "betaclip" in read_file(path, mmap=True)
    except ValueError:  # which whoever reads its weights will say
        return False


def model_config(path: Path) -> ModelConfig | None:
    """The model's settings in one of our checkpoints; None for any other file.

    Raises:
        ValueError: the checkpoint is damaged, or has no readable configuration of a model.
    """
    if (metadata := _metadata(path)) is not None:
        return _model_config(path, _weights_only(path, metadata))
    return _model_config(path, read(path, MODEL_KEYS)) if _is_ours(path) else None


def _model_config(path: Path, content: dict[str, Any]) -> ModelConfig:
    config = content.get("config")
    values = config.get("model") if isinstance(config, dict) else None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: config.model: expected the configuration of a model, got {type(values).__name__}")
    try:
        return from_dict(ModelConfig(), values)
    except ValueError as error:
        raise ValueError(f"{path}: config.model: {error}") from error
