"""`mls` commands, scripts and functions in processes that can be killed: forked from one that has imported what nearly
every command imports, so that a start costs a tenth of a second and not five. After the fork all is as in a process
that a user starts: standard streams, environment, folder and arguments; only the interpreter is not torn down at the
end."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mls.tools.bench.faults.points import Points

PRELOADED = ["mls.engine", "mls.eval.cells", "mls.tools.cli", "mls.data.sources", "mls.core.methods.mls"]
Environment = Mapping[str, "str | None"]  # added to ours; what is None is taken away
# Of Linux' unshare and mount.
NEW_MOUNTS, NEW_USERS, READ_ONLY, REMOUNT, BIND = 0x20000, 0x10000000, 1, 32, 4096
RECURSIVE, PRIVATE = 16384, 1 << 18


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
    """A started command, or a function called with these arguments, in a folder. What it prints goes to files; `words`
    is all of it. With `dies_at`=n it kills itself after its n-th change of the file system, with 0 it counts them."""

    def __init__(
        self,
        folder: Path,
        *arguments: Any,
        call: Callable[..., object] | None = None,
        environment: Environment | None = None,
        mount: Mount | None = None,
        dies_at: int | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        place = tempfile.mkdtemp(prefix="mls-command-")
        weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
        self.out, self.err = Path(place, "out"), Path(place, "err")
        for file in (self.out, self.err):
            file.touch()
        wanted = {**os.environ, "OMP_NUM_THREADS": "1", "MLS_RUNS": str(folder / "runs"), **(environment or {})}
        variables = {name: value for name, value in wanted.items() if value is not None}
        start = _Start(str(folder), (self.out, self.err), variables, mount, dies_at)
        self.process = context.Process(target=_run, args=(start, call or _command, arguments))
        self.process.start()

    def send(self, number: int = signal.SIGKILL) -> None:
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
    def running(self) -> bool:
        return self.process.is_alive()

    @property
    def words(self) -> str:
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    @property
    def changes(self) -> int:
        """Of the file system, where they were counted."""
        return int(self.out.read_text().rpartition("changes: ")[2])


def run(folder: Path, *arguments: Any, **how: Any) -> tuple[int | None, str]:
    """How a command ended and what it printed."""
    command = Command(folder, *arguments, **how)
    return command.code(), command.words


def start(folder: Path, *arguments: Any, processes: int = 1, **how: Any) -> list[Command]:
    """Several processes get the environment that torchrun gives, without its supervision."""
    if processes == 1:
        return [Command(folder, *arguments, **how)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "WORLD_SIZE": str(processes)}
    shared = {**(how.pop("environment", None) or {}), **shared}
    places = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return [Command(folder, *arguments, environment=place, **how) for place in places]


def completed(commands: Sequence[Command]) -> subprocess.CompletedProcess[str]:
    """What they printed and the first exit code that is not 0; the others do not outlive a process that fails."""
    while running := [command for command in commands if command.running]:
        if any(command.process.exitcode for command in commands):
            for command in running:
                command.send(signal.SIGTERM)
            break
        multiprocessing.connection.wait([command.process.sentinel for command in running])
    codes = [command.code() for command in commands]
    out, err = ("".join(getattr(one, name).read_text() for one in commands) for name in ("out", "err"))
    return subprocess.CompletedProcess([], next((code for code in codes if code), 0), out, err)


def call_script(path: str, *arguments: str) -> None:
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


@dataclass(frozen=True)
class _Start:
    folder: str
    files: tuple[Path, Path]
    variables: dict[str, str]
    mount: Mount | None
    dies_at: int | None


def _command(*arguments: str) -> None:
    from mls.tools import cli

    sys.argv = ["mls", *arguments]
    cli.main()


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _run(start: _Start, call: Callable[..., object], arguments: Sequence[Any]) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type] (its own processes as everywhere)
    for number, file in enumerate(start.files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.variables)
    if start.mount is not None:
        start.mount()
    points = None if start.dies_at is None else Points(start.dies_at)
    code = _called(call, arguments)
    atexit._run_exitfuncs()  # here no exception holds what a command had opened
    if points is not None:
        print(f"changes: {points.passed}", flush=True)
    sys.exit(code)


def _called(call: Callable[..., object], arguments: Sequence[Any]) -> str | int | None:
    try:
        call(*arguments)
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
