"""Reads files of weights without running what they hold, unwraps the weights, and checks them against a model."""

import math
import pickle
import re
import threading
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from betaclip.model.adapters import has_adapters, merge_adapters

# Keys under which checkpoints hold the weights.
_HOLDERS = ("model", "state_dict", "model_state_dict", "module")
# Modules that wrappers put around others, anywhere in a name, and a prefix that trainers put before all names.
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_WRAPPED = re.compile(rf"(^|(?<=\.))({'|'.join(map(re.escape, _WRAPPERS))})+")
_PREFIX = "model."
# Integers that some wrappers and OpenAI's models store beside their weights.
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
_COUNTS = ("n_averaged", *OPENAI_SIZES)
_BATCH_NORM = ".num_batches_tracked"  # an integer, too, in open_clip's ResNets
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TORCH_SAVE_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # begins files of torch.save before version 1.6


def read_weights(path: Path | str, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read weights from a safetensors file or a file of ``torch.save``.

    The weights may lie in a dictionary with other training state (under "model", "state_dict", "model_state_dict" or
    "module"). The modules that wrappers add to names ("module", "_orig_mod", those of FSDP and activation
    checkpointing) are left out wherever they stand, and so is "model." before all names. In betaclip's checkpoints, the
    average of the weights (EMA) takes their place if there is one, and LoRA's adapters are merged.

    Args:
        path: the file.
        allow_pickle: also unpickle arbitrary objects, which runs whatever code the file holds. Set it only for files
            that you trust as you would trust a program.

    Returns:
        Tensors by name, on the CPU, all finite; integers only under the names in ``OPENAI_SIZES`` and as the counts of
        batch normalisation.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: the file cannot be read, holds no weights or unusable ones, or holds objects beyond tensors and
            plain values and ``allow_pickle`` is not set. The message is one line.
    """
    return weights_of(read_file(path, allow_pickle=allow_pickle), path)


def weights_of(content: Mapping[str, Any], path: Path | str) -> dict[str, Tensor]:
    """The weights in what :func:`read_file` returned; :func:`read_weights` says more."""
    state: Any = content
    for _ in range(4):  # a damaged file may hold a dictionary that holds itself
        state = next((state[holder] for holder in _HOLDERS if isinstance(state.get(holder), Mapping)), state)
    if "betaclip" in content and "ema" in content:
        if not isinstance(content["ema"], Mapping):
            raise ValueError(f"{path}: ema: expected tensors by name, got {type(content['ema']).__name__}")
        state = {**state, **content["ema"]}
    others = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if not state or others:
        keys = ", ".join(map(_name, list(state)[:8])) or "(none)"
        found = f"; {_name(others[0])} is no name of a tensor" if others else ""
        raise ValueError(f"{path}: expected tensors by name, or a dictionary that holds them under one of "
                         f"{', '.join(_HOLDERS)}; got the keys {keys}{found}")  # fmt: skip
    weights = {}
    for name, tensor in state.items():
        if (bare := _WRAPPED.sub("", name)) in weights:
            raise ValueError(f"{path}: {_name(bare)}: is there twice, the second time as {_name(name)}")
        weights[bare] = tensor
    weights.pop("n_averaged", None)
    if all(name.startswith(_PREFIX) for name in weights):
        weights = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
    for name, tensor in weights.items():
        if name not in _COUNTS and not name.endswith(_BATCH_NORM) and (reason := unusable(tensor)):
            raise ValueError(f"{path}: {_name(name)}: {reason}")
    return _without_adapters(weights, content, path) if has_adapters(weights) else weights


def _without_adapters(weights: dict[str, Tensor], content: Mapping[str, Any], path: Path | str) -> dict[str, Tensor]:
    config = content.get("config")
    lora = config.get("lora") if isinstance(config, Mapping) else None
    alpha = lora.get("alpha") if isinstance(lora, Mapping) else None
    if not isinstance(alpha, int | float):
        raise ValueError(f"{path}: expected config.lora.alpha beside the weights of adapters, got {alpha!r:.80}")
    try:
        return merge_adapters(weights, alpha)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_file(path: Path | str, *, allow_pickle: bool = False, mmap: bool = False) -> Mapping[str, Any]:
    """The dictionary that a safetensors file or a file of ``torch.save`` holds; tensors are on the CPU.

    What training code often leaves beside the weights (``argparse.Namespace``, paths, NumPy's scalars and arrays) is
    replaced by empty stand-ins, so that nothing of the file is run.

    Args:
        path, allow_pickle: as in :func:`read_weights`.
        mmap: read tensors only where they are used, if the file's format can do that.

    Raises:
        OSError, ValueError: as :func:`read_weights`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a file, got {'a folder' if path.is_dir() else 'a pipe or device'}")
    with path.open("rb") as file:
        head = file.read(len(_TORCH_SAVE_MAGIC))
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        try:
            return load_file(path)
        except Exception as error:  # damage shows as almost any exception
            raise ValueError(f"{path}: cannot be read as safetensors: {_line(error)}") from error
    if head[:1] == b"\x80" and head != _TORCH_SAVE_MAGIC:
        command = f'import pickle, torch; torch.save(pickle.load(open("{path}", "rb")), "weights.pt")'
        raise ValueError(f"{path}: is a pickle that torch.save did not write. {_advice(command)}")
    if _is_torchscript(path):
        command = f'import torch; torch.save(torch.jit.load("{path}", "cpu").state_dict(), "weights.pt")'
        raise ValueError(f"{path}: is a TorchScript archive, which is a program. {_advice(command)}")
    content = _trusted(path) if allow_pickle else _untrusted(path, mmap)
    if isinstance(content, torch.nn.Module):
        return content.state_dict()
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def read_metadata(path: Path | str) -> dict[str, str]:
    """The metadata of a safetensors file; empty for files of other formats."""
    path = Path(path)
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            return {}
    try:
        with safe_open(path, framework="pt") as content:
            return content.metadata() or {}
    except SafetensorError:  # damaged, which reading its tensors will say
        return {}


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: Path | str) -> None:
    """Check that names and shapes are those of a model.

    Args:
        weights: what a file holds.
        expected: a state dict of the model in the same layout.
        source: how the message begins.

    Raises:
        ValueError: they are not; the message names the first tensor that differs.
    """
    missing, extra = (
        [name for name in a if name not in b] for a, b in ((expected, weights), (weights, expected))
    )  # in the order of the model
    if missing or extra:
        parts = [f"{what} {_some(names)}" for what, names in (("it lacks", missing), ("it also has", extra)) if names]
        foreign = any(name.startswith(("text_model.", "vision_model.")) for name in extra)
        hint = ". The names are those of transformers; open_clip's are expected" if foreign else ""
        raise ValueError(f"{source}: {', and '.join(parts)}{hint}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            shapes = f"expected shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}"
            raise ValueError(f"{source}: {name}: {shapes}")


class _StandIn:
    """Takes the place of an object that is not needed, and drops whatever the file says of it."""

    def __new__(cls, *args: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Python 3.13 knows paths as pathlib._local, NumPy 2 its core as numpy._core.
_REPLACED = (
    "argparse.Namespace",
    "builtins.bytes",  # an empty one, as of an empty array
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local")
      for kind in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")),
    *(f"{module}.multiarray.{function}" for module in ("numpy.core", "numpy._core")
      for function in ("scalar", "_reconstruct")),
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Float16", "Float32", "Float64", "Int32", "Int64", "UInt32")),
)  # fmt: skip
# PyTorch's list of safe globals belongs to the process: two calls at once would end each other's additions.
_SAFE_GLOBALS = threading.Lock()


def _untrusted(path: Path, mmap: bool) -> Any:
    """Read a file of ``torch.save`` that holds nothing but tensors, plain values and objects that stand-ins replace."""
    try:
        with _SAFE_GLOBALS, torch.serialization.safe_globals([(_StandIn, name) for name in _REPLACED]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:  # damage shows as almost any exception
        found = re.search(r"GLOBAL (\S+)", str(error))
        if not (isinstance(error, pickle.UnpicklingError) and found):
            raise ValueError(f"{path}: cannot be read: {_line(error)}") from error
        command = (
            "import torch; from betaclip.model.weights import read_weights; "
            f'torch.save(read_weights("{path}", allow_pickle=True), "weights.pt")'
        )
        raise ValueError(f"{path}: expected a file of torch.save with nothing but tensors and plain values, got one "
                         f"that also holds {found[1]}. {_advice(command)}. "
                         "Mind allow_pickle=True: that runs whatever code it holds") from error  # fmt: skip


def _trusted(path: Path) -> Any:
    """Whatever a file of ``torch.save`` holds; its own code may raise anything."""
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: cannot be read: {_line(error)}") from error


def _is_torchscript(path: Path) -> bool:
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == "constants.pkl" for name in archive.namelist())
    except Exception:  # damaged, which reading it will say
        return False


def unusable(tensor: Tensor) -> str | None:
    """Why a tensor cannot be a weight."""
    if tensor.dtype not in _DTYPES:
        return f"expected numbers of floating point, got {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return f"expected a dense tensor with its values, got {tensor.layout} on {tensor.device}"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"expected all values of shape {tuple(tensor.shape)}, got fewer"
    finite = tensor.isfinite()
    if not finite.all():
        return f"expected finite numbers, got {math.prod(tensor.shape) - int(finite.sum())} that are not"
    return None


def _advice(command: str) -> str:
    return f"If you trust it like a program, convert it: python -c '{command}'"


def _some(names: Sequence[str]) -> str:
    return _name(names[0]) if len(names) == 1 else f"{_name(names[0])} and {len(names) - 1} more"


def _name(key: Any) -> str:
    """A key of a file as a part of one line."""
    return key[:200] if isinstance(key, str) and key.isprintable() else repr(key)[:200]


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
