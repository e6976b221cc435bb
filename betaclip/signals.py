"""The signals that ask a run to stop: the first lets it save, a second ends it at once."""

import atexit
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from betaclip.errors import Stopped

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGBREAK")  # Windows lacks SIGHUP and SIGUSR1, others SIGBREAK
STOP_SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)


class StopSignals:
    """The first signal that came, if one has.

    It raises Stopped where the process is, except within :meth:`deferred`. A second one ends the process as it would
    have without us, even within a call that does not return to Python.

    number: the signal's number, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._deferred = False
        self._process = os.getpid()
        # torchrun passes its own signals on to processes that may have got them already, as at Ctrl-C.
        self._repeated_s = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal wait for the end of the block, which raises Stopped."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before
        self._stop_if_due()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within :meth:`deferred`: a block that a signal leaves at once, by Stopped, also one that came before."""
        before, self._deferred = self._deferred, False
        try:
            self._stop_if_due()
            yield
        finally:
            self._deferred = before

    def handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: the run that it works for decides
            return
        if not self.number:
            self.number, self._came = number, time.monotonic()
            if not self._repeated_s:
                for other in STOP_SIGNALS:
                    if signal.getsignal(other) == self.handle:
                        signal.signal(other, signal.SIG_DFL)
            self._stop_if_due()
        elif time.monotonic() - self._came > self._repeated_s:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)

    def _stop_if_due(self) -> None:
        if self.number and not self._deferred:
            raise Stopped(self.number)


_current: StopSignals | None = None


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handle the signals within the block; within another such block, the same object goes on.

    Only the main thread can handle signals; in others none ever comes. SIGHUP stays ignored under nohup.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield StopSignals()
        return
    if _current is not None:
        yield _current
        return
    _current = signals = StopSignals()
    hang_up = getattr(signal, "SIGHUP", None)
    handled = [n for n in STOP_SIGNALS if n != hang_up or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, signals.handle) for number in handled}
    try:
        yield signals
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore_stop_signals() -> None:
    """For processes that work for a run: it ends them by :func:`end_workers`, not a signal to the process group."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """End the processes that read data. Python waits for them when it exits, and they ignore the signal by which it
    asks them to end; one that waits for a file for ever would not see it either."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler takes the end of a worker for a failure
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@functools.cache
def end_workers_at_exit() -> None:
    """Also after an error, whose traceback keeps a loader with its workers."""
    atexit.register(end_workers)
