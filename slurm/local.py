"""--cluster local: jobs that are processes of this machine, started by submitit's controller."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from mls.slurm.order import Order


def alive(one: Order) -> bool:
    """Whether its controller still runs; another program may have got its number."""
    try:
        return one.logs.encode() in Path(f"/proc/{one.job}/cmdline").read_bytes()
    except OSError:
        return False


def interrupt(one: Order) -> None:
    """Ctrl-C for the training processes: they save, and are not started again."""
    for pid in descendants(int(one.job or 0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)


def descendants(pid: int) -> list[int]:
    """The processes that this one started, and theirs."""
    children = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == pid]
    return children + [below for child in children for below in descendants(child)]


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0
