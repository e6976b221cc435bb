"""Processes that fork from one which has imported the slow packages: a new interpreter takes ten seconds for them."""

import inspect
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

from support.programs import load_program

CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "torch.distributed.fsdp", "betaclip.train", "matplotlib.pyplot"])
HANG_S = 600  # only a hang lasts so long, however loaded the machine is


class Done(NamedTuple):
    code: int | None
    stdout: str
    stderr: str


def run(folder: Path, function: Callable[..., None], *args: Any) -> Done:
    """Call a top-level function in a process of its own and wait for it."""
    process = start(folder, function, *args)
    process.join(HANG_S)
    return Done(process.exitcode, *((folder / name).read_text() for name in ("stdout", "stderr")))


def start(folder: Path, function: Callable[..., None], *args: Any) -> Any:
    """The same without waiting; its output goes to the files ``stdout`` and ``stderr`` of the folder."""
    process = CONTEXT.Process(target=_enter, args=(folder, inspect.getsourcefile(function), function.__name__, args))
    process.start()
    return process


def _enter(folder: Path, source: str, name: str, args: Any) -> None:
    import torch

    for number, stream in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    torch.set_num_threads(1)
    getattr(load_program(Path(source)), name)(*args)
