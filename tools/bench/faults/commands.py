"""`mls` commands in processes that can be killed: forked from one that has imported what commands import, so that a
start costs a tenth of a second and not five."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Of Linux' unshare and mount.
NEW_MOUNTS, NEW_USERS, READ_ONLY, REMOUNT, BIND = 0x20000, 0x10000000, 1, 32, 4096
RECURSIVE, PRIVATE = 16384, 1 << 18
PRELOADED = ["mls.engine", "mls.eval.cells", "mls.tools.cli", "mls.data.sources", "mls.core.methods.mls"]


@dataclass(frozen=True)
class Mount:
    """What a command finds at a folder: a disk with so much space, or without `size` the folder itself, read-only."""

    folder: Path
    size: str = ""

    def __call__(self) -> None:
        """In a process of its own, which alone sees it."""
        libc, path = ctypes.CDLL(None, use_errno=True), os.fsencode(self.folder)
        tasks: list[tuple[Any, ...]] = [(libc.unshare, NEW_MOUNTS | (NEW_USERS if os.geteuid() else 0))]
        tasks.append((libc.mount, None, b"/", None, RECURSIVE | PRIVATE, None))
        if self.size:
            tasks.append((libc.mount, b"tmpfs", path, b"tmpfs", 0, f"size={self.size}".encode()))
        else:
            tasks += [(libc.mount, path, path, None, BIND, None)]
            tasks += [(libc.mount, None, path, None, BIND | REMOUNT | READ_ONLY, None)]
        for call, *arguments in tasks:
            if call(*arguments):
                raise OSError(ctypes.get_errno(), f"this system lets nobody mount at {self.folder}")


class Command:
    """A started command; what it prints goes to `log`. `environment` is added to ours."""

    def __init__(
        self, folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, mount: Mount | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.log = folder / f"command-{time.monotonic_ns()}.log"
        variables = {"OMP_NUM_THREADS": "1", "MLS_RUNS": str(folder / "runs"), **(environment or {})}
        self.process: BaseProcess = context.Process(target=_run, args=(folder, self.log, arguments, variables, mount))
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


def run(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None, mount: Mount | None = None
) -> tuple[int | None, str]:
    """How a command ended and what it printed."""
    command = Command(folder, *arguments, environment=environment, mount=mount)
    return command.code(), command.words


def _run(folder: Path, log: Path, arguments: tuple[str, ...], variables: dict[str, str], mount: Mount | None) -> None:
    from mls.tools import cli

    os.setsid()
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    os.environ.update(variables)
    sys.argv = ["mls", *arguments]
    try:
        if mount is not None:
            mount()
        cli.main()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
