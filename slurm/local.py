"""--cluster local: jobs that are processes of this machine, started by submitit's controller."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from mls.slurm.order import Order

CONTROLLER = b"submitit.local._local"


def alive(one: Order) -> bool:
    """Whether its controller still runs; another program may have got its number."""
    return one.logs.encode() in _command(one.job)


def interrupt(one: Order) -> None:
    """Ctrl-C for the training processes: they save, and are not started again. Not for submitit's controller, below
    the job's shell: it would pass it on, and a second Ctrl-C saves nothing."""
    for pid in descendants(int(one.job or 0)):
        if CONTROLLER not in _command(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)


def descendants(pid: int) -> list[int]:
    """The processes that this one started, and theirs."""
    children = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == pid]
    return children + [below for child in children for below in descendants(child)]


def _command(pid: int | str | None) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0
