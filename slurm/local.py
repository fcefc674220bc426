"""--cluster local: jobs that are processes of this machine, started by submitit's controller."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from mls.slurm.job_spec import JobSpec

CONTROLLER = b"submitit.local._local"


def alive(spec: JobSpec) -> bool:
    """Whether its controller still runs. Process numbers are reused, so the command line is compared."""
    return spec.logs.encode() in _command(spec.job)


def interrupt(spec: JobSpec) -> None:
    """Send SIGINT to the training processes: they save, and are not started again. submitit's controller gets none: it
    would pass it on, and at a second SIGINT training ends without saving."""
    for pid in descendants(int(spec.job or 0)):
        if CONTROLLER not in _command(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)


def descendants(pid: int) -> list[int]:
    """The child processes of `pid`, and their children."""
    children = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == pid]
    return children + [pid for child in children for pid in descendants(child)]


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
