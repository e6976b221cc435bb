"""Reads files of weights safely, and unwraps what training code puts around them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Keys under which checkpoints hold the weights, and prefixes that wrappers of modules put before every name.
_HOLDERS = ("model", "state_dict", "model_state_dict", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def read_weights(path: Path | str, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read weights from a safetensors file or a file of ``torch.save``.

    The weights may lie in a dictionary with other training state (under "model", "state_dict", "model_state_dict" or
    "module"), and all names may carry a wrapper's prefix ("module.", "_orig_mod." or "model.").

    Args:
        path: the file.
        allow_pickle: also unpickle arbitrary objects, which runs whatever code the file holds. Set it only for files
            that you trust as you would trust a program.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ValueError: the file cannot be read, holds no weights, or holds objects beyond tensors and plain values and
            ``allow_pickle`` is not set.
    """
    state: Any = _read(Path(path), allow_pickle)
    while (inner := next((state[h] for h in _HOLDERS if isinstance(state.get(h), Mapping)), None)) is not None:
        state = inner
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = ", ".join(sorted(map(str, state))[:8])
        raise ValueError(f"{path}: expected tensors by name, or a dictionary that holds them under one of "
                         f"{', '.join(_HOLDERS)}; got the keys {found or '(none)'}")  # fmt: skip
    while (prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None)) is not None:
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _read(path: Path, allow_pickle: bool) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        reason = "expected a file of torch.save with nothing but tensors and plain values"
        advice = "If you trust it like a program, read it with allow_pickle=True: that runs whatever code it holds"
        raise ValueError(f"{path}: {reason}. {advice} ({str(error).splitlines()[0]})") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if isinstance(content, torch.nn.Module):
        return content.state_dict()
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content
