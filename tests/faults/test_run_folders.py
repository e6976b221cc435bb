"""Run folders that stop taking files: one message that names the file, and every whole checkpoint stays."""

import io
import os
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from support.forkserver import run
from support.runs import at_step, config, put_tiny, train

from betaclip import checkpoint as checkpoints
from betaclip.cli import main
from betaclip.errors import OutputError
from betaclip.training.step import TrainStep


def with_small_files(limit: int, *arguments: str) -> None:
    """The command where no file may grow beyond a limit in bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:  # files, too, which must not grow
        try:
            main(list(arguments))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            os.write(2, err.getvalue().encode())


def test_removed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_tiny(monkeypatch.setattr)
    monkeypatch.setattr(TrainStep, "__call__", at_step(3, lambda: shutil.rmtree(tmp_path / "run")))
    with pytest.raises(OutputError, match=rf"^{tmp_path}/run/[a-z.]+: cannot be written: No such file or directory$"):
        train(config(tmp_path))


@pytest.mark.parametrize("limit", [0, 100, 40_000])
def test_full_disk(tmp_path: Path, limit: int) -> None:
    """Files that cannot grow: none at all, none as large as a configuration, none as large as a checkpoint."""
    options = ["--model.pool-heads", "4", "--data.scenes", "8", "--run.batch-size", "4", "--run.steps", "2"]
    options += ["--run.workers", "0", "--run.folder", str(tmp_path), "--run.name", "a", "--evaluation.scenes", "4"]
    options += ["--optimizer.backbone.warmup", "1", "--optimizer.pool.warmup", "1"]
    done = run(tmp_path, with_small_files, limit, "train", *options)
    message = done.stderr.splitlines()[-1]
    assert done.code == 1 and "Traceback" not in done.stderr, done.stderr
    assert message.startswith(f"betaclip train: {tmp_path}/a") and message.endswith(
        ": cannot be written: File too large"
    )
    assert checkpoints.kept(tmp_path / "a") == [] and not list((tmp_path / "a").glob(".*.partial"))
