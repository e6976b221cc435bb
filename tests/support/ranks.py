"""Functions of a test file, run by several processes on gloo."""

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.forkserver import CONTEXT, HANG_S

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


def processes(
    count: int, function: Callable[..., None], folder: Path, *args: Any, start_method: str = CONTEXT.get_start_method()
) -> None:
    """Call ``function(*args)``, a top-level function of its file, on ``count`` ranks; a failure of any raises here."""
    context = start(count, function, folder, *args, start_method=start_method)
    while not context.join():
        pass


def start(
    count: int, function: Callable[..., None], folder: Path, *args: Any, start_method: str = CONTEXT.get_start_method()
) -> Any:
    """The same without waiting: the context of the processes."""
    called = inspect.getsourcefile(function), function.__name__, args
    options = count, str(folder / "rendezvous"), *called
    return mp.start_processes(_enter, options, count, join=False, start_method=start_method)


def _enter(rank: int, count: int, file: str, source: str, name: str, args: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "`torch.distributed")  # a name that is going away
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    timeout = timedelta(seconds=HANG_S)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=count, timeout=timeout)
    torch.manual_seed(0)  # the same batch everywhere, of which each rank takes its part
    getattr(module, name)(*args)
    dist.barrier()  # gloo aborts a process whose peer leaves in the middle of its last call
    dist.destroy_process_group()
