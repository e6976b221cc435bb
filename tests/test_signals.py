import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from support.tiny import START

from betaclip.errors import Stopped
from betaclip.signals import STOP_SIGNALS, ignore_stop_signals, stop_signals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_first_signal_stops_where_the_process_is(number):
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    with pytest.raises(Stopped) as stopped, stop_signals():
        send(number)
        time.sleep(60)
    assert stopped.value.code == 128 + number
    assert stopped.value.message == f"stopped by {signal.Signals(number).name}; nothing that was trained is lost"
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


def test_deferred():
    done = []
    with pytest.raises(Stopped), stop_signals() as signals:
        with signals.deferred():
            with signals.interruptible():
                done.append("waited")
            send(signal.SIGTERM)
            assert signals.number == signal.SIGTERM
            done.append("saved")
            with pytest.raises(Stopped), signals.interruptible():
                done.append("waited once more")
        done.append("went on")
    assert done == ["waited", "saved"]


def test_wait_is_interrupted():
    with pytest.raises(Stopped), stop_signals() as signals, signals.deferred(), signals.interruptible():
        threading.Timer(0.2, send, [signal.SIGUSR1]).start()
        time.sleep(60)


def test_within_another_block_and_in_another_thread():
    found = []
    with stop_signals() as outer:
        with stop_signals() as inner:
            assert inner is outer
        assert signal.getsignal(signal.SIGTERM) == outer.handle

        def other() -> None:
            with stop_signals() as signals:
                found.append(signals)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found[0] is not outer and found[0].number == 0


def twice(first: int, second: int) -> None:
    with stop_signals() as signals, signals.deferred():
        send(first)
        send(second)
        time.sleep(60)


def ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals():
        send(signal.SIGHUP)
    ignore_stop_signals()
    for number in STOP_SIGNALS:
        send(number)
    os._exit(0)


def exit_code(function: Callable[..., None], *arguments: int) -> int | None:
    child = multiprocessing.get_context(START).Process(target=function, args=arguments)
    child.start()
    child.join(30)
    return child.exitcode


def test_second_signal_ends_the_process():
    assert exit_code(twice, signal.SIGTERM, signal.SIGTERM) == -signal.SIGTERM
    assert exit_code(twice, signal.SIGUSR1, signal.SIGINT) == -signal.SIGINT


def test_ignored():
    """SIGHUP under nohup, and all of them in processes that read data."""
    assert exit_code(ignored) == 0


def test_repetition_by_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(Stopped), stop_signals() as signals, signals.deferred():
        send(signal.SIGINT)
        send(signal.SIGINT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_error_ends_the_program_and_its_workers():
    """They ignore the signal by which Python asks them to end when it exits, and it would wait for them for ever."""
    program = """
import multiprocessing, time
from betaclip.signals import end_workers_at_exit, ignore_stop_signals
context = multiprocessing.get_context("fork")
ready = context.Event()
def work():
    ignore_stop_signals()
    ready.set()
    time.sleep(600)
end_workers_at_exit()
context.Process(target=work, daemon=True).start()
ready.wait()
raise RuntimeError("planted")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: planted\n")
