"""A signal sets a flag; a session reads it once a step, saves and stops. Nothing else happens in a handler."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from mls.errors import EXIT_INTERRUPTED, EXIT_SAVED

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR2", "SIGINT") if hasattr(signal, name))

PR_SET_PDEATHSIG = 1  # of Linux


class StopFlag:
    """`exit_code` is 0 until SIGTERM, SIGUSR2 or Ctrl-C arrives; `name` is the signal's. A second Ctrl-C stops at
    once."""

    def __init__(self) -> None:
        self.exit_code = 0
        self.name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._set) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.exit_code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        self.exit_code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_SAVED


def end_data_workers() -> None:
    """Those of this process, which waits for them when it ends: one that hangs, or waits for a lock that another held
    when it was killed, heeds no other signal. Torch raises an error for it in the main thread."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def end_with_data_workers() -> None:
    """The same where this process ends too: without torch's error."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_data_workers()


def leave_signals_to_the_parent(worker: int) -> None:
    """Data workers share the terminal's Ctrl-C and a job's SIGTERM; the training process stops them itself. Where it is
    killed, they end too: one that hands over more than a pipe holds would wait for ever, for the other workers keep the
    pipe open."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
