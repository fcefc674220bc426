"""`mls` commands, scripts and functions in processes that can be killed: forked from one that has imported what
nearly every command imports, so that a start costs a tenth of a second and not five. After the fork all is as in a
process that a user starts: standard streams, environment, folder and arguments; only the interpreter is not torn down
at the end."""

from __future__ import annotations

import atexit
import contextlib
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mls.tools.bench.faults.points import Points

PRELOADED = ["mls.engine", "mls.eval.cells", "mls.tools.cli", "mls.data.sources", "mls.core.methods.mls"]
Environment = Mapping[str, "str | None"]  # added to ours; what is None is taken away


class Command:
    """A started command, or a script, or a function called with these arguments, in a folder. What it prints goes to
    files; `words` is all of it. With `dies_at`=n it kills itself after its n-th change of the file system, with 0 it
    counts them."""

    def __init__(
        self,
        folder: Path,
        *arguments: Any,
        environment: Environment | None = None,
        script: Path | None = None,
        call: Callable[..., object] | None = None,
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
        self.process = context.Process(
            target=_run, args=(str(folder), (self.out, self.err), call or script, arguments, variables, dies_at)
        )
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


def start(
    folder: Path,
    *arguments: str,
    environment: Environment | None = None,
    script: Path | None = None,
    processes: int = 1,
) -> list[Command]:
    """Several processes get the environment that torchrun gives, without its supervision."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "WORLD_SIZE": str(processes)}
    places = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    own = environment or {}
    places = [{**own, **place} for place in places] if processes > 1 else [own]
    return [Command(folder, *arguments, environment=place, script=script) for place in places]


def completed(commands: list[Command]) -> subprocess.CompletedProcess[str]:
    """What they printed and the first exit code that is not 0; the others do not outlive a process that fails."""
    while any(command.running for command in commands):
        if any(command.process.exitcode for command in commands):
            for command in commands:
                if command.running:
                    command.send(signal.SIGTERM)
            break
        multiprocessing.connection.wait([command.process.sentinel for command in commands if command.running])
    codes = [command.code() for command in commands]
    code = next((code for code in codes if code), 0)
    out, err = ("".join(getattr(one, name).read_text() for one in commands) for name in ("out", "err"))
    return subprocess.CompletedProcess([], code, out, err)


def run(folder: Path, *arguments: Any, **how: Any) -> tuple[int | None, str]:
    """How a command ended and what it printed."""
    command = Command(folder, *arguments, **how)
    return command.code(), command.words


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _run(
    folder: str,
    files: tuple[Path, Path],
    target: Callable[..., object] | Path | None,
    arguments: tuple[Any, ...],
    variables: dict[str, str],
    dies_at: int | None,
) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type] (its own processes as everywhere)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [str(target or "mls"), *map(str, arguments)]
    points = None if dies_at is None else Points(dies_at)
    code = _called(target, arguments)
    if points is not None:
        print(f"changes: {points.passed}", flush=True)
    atexit._run_exitfuncs()  # here no exception holds what a command had opened
    sys.exit(code)


def _called(target: Callable[..., object] | Path | None, arguments: tuple[Any, ...]) -> str | int | None:
    try:
        if isinstance(target, Path):
            runpy.run_path(str(target), run_name="__main__")
        elif target is not None:
            target(*arguments)
        else:
            from mls.tools import cli

            cli.main()
    except SystemExit as end:
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
