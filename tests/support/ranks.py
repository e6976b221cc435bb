"""Functions of a test file, run by several processes on gloo."""

import importlib.util
import inspect
import multiprocessing
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# All fork from one process that has imported these: that takes longer than what most tests do.
START_METHOD = "forkserver"
multiprocessing.set_forkserver_preload(["pytest", "torch.distributed.fsdp", "betaclip"])


needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
TIMEOUT_S = 600.0  # of a collective: only a hang lasts so long, however loaded the machine is


def processes(
    count: int, function: Callable[..., None], folder: Path, *args: Any, timeout_s: float = TIMEOUT_S
) -> None:
    """Call ``function(*args)``, a top-level function of its file, on ``count`` ranks; a failure of any raises here."""
    context = start(count, function, folder, *args, timeout_s=timeout_s)
    while not context.join():
        pass


def start(count: int, function: Callable[..., None], folder: Path, *args: Any, timeout_s: float = TIMEOUT_S) -> Any:
    """The same without waiting: the context of the processes."""
    called = inspect.getsourcefile(function), function.__name__, args
    options = (count, str(folder / "rendezvous"), timeout_s)
    return mp.start_processes(_enter, (*options, *called), count, join=False, start_method=START_METHOD)


def _enter(rank: int, count: int, file: str, timeout_s: float, source: str, name: str, args: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "`torch.distributed")  # a name that is going away
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=count, timeout=timeout)
    torch.manual_seed(0)  # the same batch everywhere, of which each rank takes its part
    getattr(module, name)(*args)
    dist.barrier()  # gloo aborts a process whose peer leaves in the middle of its last call
    dist.destroy_process_group()
