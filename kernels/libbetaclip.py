"""The ctypes binding of libbetaclip, the CUDA C++ library of csrc/.

The library is optional: where it is missing or does not load, importing this does not fail, and the backend "cuda"
gives the reason why it cannot run.
"""

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(str(files("betaclip"))) / "lib"  # not beside this file: kernels/ may lie outside the package
VERSION = 2  # BETACLIP_VERSION of csrc/betaclip.h, whose structures and functions are repeated below
DTYPES = {torch.bfloat16: 0, torch.float16: 1}


class Operands(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "y", "x_group", "y_group", "x_text", "y_text", "scale")),
        *((name, c_int64) for name in ("x_stride", "y_stride", "n", "m", "d")),
        ("dtype", c_int32),
    ]


class Chunk(ctypes.Structure):
    _fields_ = [
        ("ds", c_void_p),
        *((name, c_int64) for name in ("ds_stride", "row_begin", "row_end", "col_begin", "col_end")),
    ]


class LogsumexpGradient(ctypes.Structure):
    _fields_ = [
        (name, c_void_p) for name in ("stat_x", "stat_y", "weight_x", "weight_y", "factor_x", "factor_y", "narrow")
    ]


_WORKSPACE = (c_void_p, c_size_t)
_STREAM = (c_void_p,)
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "betaclip_version": (c_int, ()),
    "betaclip_architectures": (c_char_p, ()),
    "betaclip_error_string": (c_char_p, (c_int,)),
    "betaclip_logsumexp_workspace_bytes": (c_size_t, (c_int64, c_int64, c_int32)),
    "betaclip_softplus_workspace_bytes": (c_size_t, (c_int64, c_int64, c_int32)),
    "betaclip_logsumexp_forward": (c_int, (POINTER(Operands), c_void_p, c_void_p, *_WORKSPACE, *_STREAM)),
    "betaclip_logsumexp_ds": (c_int, (POINTER(Operands), POINTER(LogsumexpGradient), POINTER(Chunk), *_STREAM)),
    "betaclip_softplus_forward": (c_int, (POINTER(Operands), c_void_p, c_void_p, *_WORKSPACE, *_STREAM)),
    "betaclip_softplus_ds": (
        c_int,
        (POINTER(Operands), c_void_p, c_void_p, POINTER(Chunk), c_void_p, c_void_p, *_WORKSPACE, *_STREAM),
    ),
}


def load(path: Path) -> ctypes.CDLL:
    """The library at ``path`` with its signatures.

    Raises:
        OSError: it does not load, or has another version of the interface.
    """
    library = ctypes.CDLL(str(path))
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise OSError(f"{path}: {error}") from error
    if (version := library.betaclip_version()) != VERSION:
        raise OSError(f"{path}: expected version {VERSION} of the interface, got {version}; install betaclip again")
    return library


def find(folder: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library in ``folder``, or None and why there is none."""
    try:
        missing = json.loads((folder / "build.json").read_text(encoding="utf-8")).get("missing")
    except (OSError, ValueError):
        return None, "the CUDA library was not built; pip install builds it where it finds nvcc"
    if missing:
        return None, f"betaclip was installed without its CUDA library: {missing}"
    try:
        return load(folder / "libbetaclip.so"), ""
    except OSError as error:
        return None, f"the CUDA library does not load: {error}"


_library: Any
_library, _missing = find(FOLDER)


def status() -> str:
    """One line for a report: the architectures that the library holds code for, or why there is none."""
    if _library is None:
        return f"none ({_missing})"
    return f"{_library.betaclip_architectures().decode()} ({FOLDER / 'libbetaclip.so'})"


def not_supported_reasons(device: torch.device) -> list[str]:
    """Why the library cannot run on ``device``."""
    reasons = [_missing] if _missing else []
    if device.type != "cuda" or torch.version.hip:
        reasons.append(f"needs an NVIDIA GPU, the tensors are on {device}")
    else:
        gpu = torch.cuda.get_device_properties(device)
        if (gpu.major, gpu.minor) != (9, 0):
            reasons.append(f"needs compute capability 9.0 (Hopper), {device} has {gpu.major}.{gpu.minor}")
    return reasons


def pointer(t: Tensor | None) -> int | None:
    """The address of a vector or scalar without gaps; None for None."""
    if t is None:
        return None
    if not t.is_contiguous():
        raise ValueError(f"expected a contiguous tensor, got strides {t.stride()} of shape {tuple(t.shape)}")
    return t.data_ptr()


@contextmanager
def current(device: torch.device) -> Iterator[int]:
    """The current stream of ``device``, made the current device: kernels start there, wherever their tensors are."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def workspace(function: str, rows: int, cols: int, device: torch.device) -> Tensor:
    """A workspace of the size that the library's ``function`` returns, in bytes.

    PyTorch's allocator reuses them per device and stream, and knows which belong to a CUDA graph.
    """
    size = getattr(_library, function)(rows, cols, multiprocessors(device))
    return torch.empty(size, dtype=torch.uint8, device=device)


def launch(function: str, device: torch.device, *arguments: Any) -> None:
    """Queue the work of ``function`` on the current stream of ``device``.

    Raises:
        RuntimeError: the library or CUDA returned an error; the message is theirs.
    """
    with current(device) as stream:
        error = getattr(_library, function)(*arguments, stream)
    if error:
        raise RuntimeError(f"{function}: {_library.betaclip_error_string(error).decode()} (error {error})")
