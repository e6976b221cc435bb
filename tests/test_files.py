import errno
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from support.tiny import START

from betaclip.errors import ConfigError, OutputError
from betaclip.files import LOCK, lock_folder, write_atomically, write_folder_atomically


def write(path: Path, content: bytes) -> None:
    with write_atomically(path) as file:
        file.write(content)


def test_writes(tmp_path):
    write(tmp_path / "a", b"one")
    write(tmp_path / "a", b"two")
    (tmp_path / "link").symlink_to("a")
    write(tmp_path / "link", b"three")
    assert (tmp_path / "a").read_bytes() == b"three" and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]
    write(Path(os.devnull), b"anything")
    assert not Path(os.devnull).is_file()


def test_permissions_are_those_of_any_new_file(tmp_path):
    write(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_failures_leave_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write(path, b"old")
    with pytest.raises(KeyError), write_atomically(path) as file:
        file.write(b"half")
        raise KeyError
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=rf"^{path}: cannot be written: No space left on device$"):
            write(path, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and path.read_bytes() == b"old"
    with pytest.raises(OutputError, match=r"nowhere/a: cannot be written: No such file"):
        write(tmp_path / "nowhere" / "a", b"")
    with pytest.raises(OutputError, match="Is a directory"):
        write(tmp_path, b"")


def test_folder(tmp_path, monkeypatch):
    """It has its name once it is whole, and then holds what was written; no other one is replaced."""
    for name in ("new/a", "b"):
        (tmp_path / "b").mkdir(exist_ok=True)  # an empty one may be there
        with write_folder_atomically(tmp_path / name) as folder:
            (folder / "file").write_text("x")
            assert not (tmp_path / name / "file").exists()
        assert (tmp_path / name / "file").read_text() == "x"
        assert (tmp_path / name).stat().st_mode == (tmp_path / "new").stat().st_mode
    for taken in (tmp_path / "b", tmp_path / "b" / "file"):
        with pytest.raises(ConfigError, match=f"^{taken}: exists already"), write_folder_atomically(taken):
            pass
    with pytest.raises(KeyError), write_folder_atomically(tmp_path / "c") as folder:
        (folder / "half").touch()
        raise KeyError
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="c: cannot be written: No space left"):
        patch.setattr(Path, "replace", full)
        with write_folder_atomically(tmp_path / "c"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "new"]


def test_cause_of_an_error_of_torch_is_named(tmp_path):
    """torch.save says "unexpected pos" where the disk is full."""
    with pytest.raises(OutputError, match="No space left"), write_atomically(tmp_path / "a") as file:
        file.write = full  # type: ignore[method-assign, assignment]
        torch.save(torch.ones(9), file)
    assert list(tmp_path.iterdir()) == []


def test_concurrent_writers(tmp_path):
    """Readers see one writer's whole content at any time, and no writer fails."""
    path, contents = tmp_path / "a", [bytes([65 + i]) * 50_000 for i in range(4)]
    write(path, contents[0])
    done, failed = threading.Event(), []

    def writes(content: bytes) -> None:
        try:
            for _ in range(20):
                write(path, content)
        except Exception as error:
            failed.append(error)

    def reads() -> None:
        while not done.is_set():
            if path.read_bytes() not in contents:
                failed.append(ValueError("torn"))

    reader = threading.Thread(target=reads)
    reader.start()
    writers = [threading.Thread(target=writes, args=(content,)) for content in contents]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not failed and [p.name for p in tmp_path.iterdir()] == ["a"]


def hold(folder: Path, child_outlives: bool) -> None:
    with lock_folder(folder):
        if child_outlives and os.fork() == 0:
            time.sleep(10)
            os._exit(0)
        (folder / "held").touch()
        time.sleep(60)


def refused(folder: Path) -> str | None:
    try:
        with lock_folder(folder):
            return None
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("child_outlives", [False, True])
def test_lock(tmp_path, child_outlives):
    """Another process is refused; the lock goes with its holder, killed as it may be, also if a child lives on."""
    folder = tmp_path / "new" / "folder"
    holder = multiprocessing.get_context(START).Process(target=hold, args=(folder, child_outlives))
    holder.start()
    try:
        while not (folder / "held").exists():
            assert holder.is_alive()
            time.sleep(0.01)
        message = refused(folder)
        assert message is not None and f"{folder} is in use by process {holder.pid}:" in message
    finally:
        assert holder.pid is not None
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    (folder / f".a.{'0' * 32}.partial").touch()
    assert refused(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "held"]


def test_lock_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=rf"^{tmp_path}/file/run: cannot be written: Not a directory"):
        refused(tmp_path / "file" / "run")


@pytest.mark.parametrize("written", [False, True])
def test_unused_folders_go_again(tmp_path, written):
    """If a block fails before it writes; what was there before stays."""
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path / "runs" / "a"):
        if written:
            (tmp_path / "runs" / "a" / "file").touch()
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"] * written
    assert (tmp_path / "runs" / "a" / LOCK).exists() == written
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path):
        1 / 0  # noqa: B018
    assert (tmp_path / LOCK).exists()
