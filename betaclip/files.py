"""Files that others see whole or not at all, and a lock on a folder."""

import contextlib
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO
from uuid import uuid4

from betaclip.errors import ConfigError, OutputError

LOCK = ".lock"

_locked: set[FileIO] = set()


@contextmanager
def write_atomically(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file to write, which gets its name once all of it is on the disk; a failure leaves an older one alone.

    Each writer has a temporary file of its own, beside ``path``. A path that exists and is not a file, such as a pipe,
    is written directly.

    Raises:
        OutputError: the file cannot be written; the message names it.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.exists() and not target.is_file():
        with reporting(path), target.open("wb") as file:
            yield file
        return
    partial = target.with_name(f".{target.name[:100]}.{uuid4().hex}.partial")
    try:
        with reporting(path):
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
            _sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def write_folder_atomically(path: Path | str) -> Iterator[Path]:
    """A folder to write files in, which gets its name once all of it is there; a failure leaves nothing.

    Raises:
        ConfigError: something has the name already, an empty folder excepted.
        OutputError: the folder cannot be written; the message names it.
    """
    target = Path(os.path.abspath(path))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{path}: exists already; name another folder, or remove it")
    with reporting(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    try:
        yield partial
        with reporting(path):
            partial.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner alone
            if target.is_dir():
                target.rmdir()
            partial.replace(target)
            _sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def reporting(path: Path | str) -> Iterator[None]:
    """Raise what the operating system says about writing as OutputError, with the path.

    Libraries that write to a file of ours may raise an error of their own on top of the system's.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or isinstance(error, OutputError):
            raise
        raise OutputError(f"{path}: cannot be written: {cause.strerror or cause}") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can: Windows opens no folders, and some file systems sync
    none."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create the folder and lock it; the system releases the lock when the process ends, however it does.

    A file system without locks is taken as it is. Partial files that a killed process left in the folder are deleted.
    If the block fails before anything is written there, the folders that were created for it are removed again.

    Raises:
        ConfigError: another process holds the lock.
        OutputError: the folder cannot be created or written.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        with reporting(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / LOCK).open("ab+", buffering=0))  # to close it writes nothing
        _lock(file, folder)
        _locked.add(file)
        stack.callback(_locked.discard, file)
        with reporting(folder):
            file.truncate(0)
            file.write(b"%d\n" % os.getpid())
            for partial in folder.glob(".*.partial"):
                partial.unlink(missing_ok=True)
        try:
            yield
        except BaseException:
            _remove_unused(folder, created)
            raise


def _remove_unused(folder: Path, created: list[Path]) -> None:
    """Remove the created folders, from the inmost on, if the lock is all that they hold."""
    with contextlib.suppress(OSError):
        if created and [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            for path in created:
                path.rmdir()


def _lock(file: FileIO, folder: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            # Beyond the end, as Windows lets nobody else read what is locked.
            file.seek(1 << 20)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return  # the file system has no locks
        file.seek(0)
        holder = (file.read(20) or b"").decode(errors="replace").strip() or "unknown"
        raise ConfigError(
            f"{folder} is in use by process {holder}: wait for it, end it, or name another folder"
        ) from error


def _close_in_child() -> None:
    """A forked child shares its parent's lock, and would hold it for as long as it outlives the parent."""
    for file in _locked:
        file.close()
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
