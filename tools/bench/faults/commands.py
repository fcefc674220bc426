"""`mls` commands in processes that can be killed: forked from one that has imported what commands import, so that a
start costs a tenth of a second and not five."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = ["mls.engine", "mls.eval.cells", "mls.tools.cli", "mls.data.sources", "mls.core.methods.mls"]


class Command:
    """A started command; what it prints goes to `log`. `environment` is added to ours."""

    def __init__(self, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.log = folder / f"command-{time.monotonic_ns()}.log"
        variables = {"OMP_NUM_THREADS": "1", "MLS_RUNS": str(folder / "runs"), **(environment or {})}
        self.process: BaseProcess = context.Process(target=_run, args=(folder, self.log, arguments, variables))
        self.process.start()

    def send(self, number: signal.Signals = signal.SIGKILL) -> None:
        """To the command and all that it has started."""
        pid = self.process.pid
        assert pid is not None
        for send in (os.killpg, os.kill):  # a command that has only begun has no group of its own yet
            with contextlib.suppress(ProcessLookupError):
                return send(pid, number)

    def code(self, seconds: float = 300) -> int | None:
        """How it ended; None, and it is killed, where it has not after so many seconds."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.send()
            self.process.join()
            return None
        return self.process.exitcode

    @property
    def words(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def run(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int | None, str]:
    """How a command ended and what it printed."""
    command = Command(folder, *arguments, environment=environment)
    return command.code(), command.words


def _run(folder: Path, log: Path, arguments: tuple[str, ...], variables: dict[str, str]) -> None:
    from mls.tools import cli

    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of its own processes, as where a user starts it
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    os.environ.update(variables)
    sys.argv = ["mls", *arguments]
    try:
        cli.main()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
