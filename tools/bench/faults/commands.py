"""`mls` commands, and functions, in processes that can be killed: forked from one that has imported what commands
import, so that a start costs a tenth of a second and not five."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mls.tools.bench.faults.points import Points

PRELOADED = ["mls.engine", "mls.eval.cells", "mls.tools.cli", "mls.data.sources", "mls.core.methods.mls"]


class Command:
    """A started command, or a function called with these arguments; what it prints goes to `log`. `environment` is
    added to ours. With `dies_at`=n it kills itself after its n-th change of the file system, with 0 it counts them."""

    def __init__(
        self,
        folder: Path,
        *arguments: Any,
        call: Callable[..., object] | None = None,
        environment: Mapping[str, str] | None = None,
        dies_at: int | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.log = folder / f"command-{time.monotonic_ns()}.log"
        variables = {"OMP_NUM_THREADS": "1", "MLS_RUNS": str(folder / "runs"), **(environment or {})}
        target = _call_cli if call is None else call
        self.process: BaseProcess = context.Process(
            target=_run, args=(folder, self.log, target, arguments, variables, dies_at)
        )
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

    @property
    def changes(self) -> int:
        """Of the file system, where they were counted."""
        return int(self.words.rpartition("changes: ")[2])


def run(folder: Path, *arguments: Any, **how: Any) -> tuple[int | None, str]:
    """How a command ended and what it printed."""
    command = Command(folder, *arguments, **how)
    return command.code(), command.words


def _call_cli(*arguments: str) -> None:
    from mls.tools import cli

    sys.argv = ["mls", *arguments]
    cli.main()


def _run(
    folder: Path,
    log: Path,
    call: Callable[..., object],
    arguments: tuple[Any, ...],
    variables: dict[str, str],
    dies_at: int | None,
) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    os.environ.update(variables)
    points = None if dies_at is None else Points(dies_at)
    try:
        call(*arguments)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    finally:
        if points is not None:
            print(f"changes: {points.passed}", flush=True)
