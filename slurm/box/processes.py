"""Ending the processes that a box started, and no others: each is identified before it gets a signal."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

DAEMONS = ("munged", "slurmd", "slurmctld")


def alive(pid: int) -> bool:
    """Whether this pid is one of SLURM's daemons: a zombie has no program, and another process may have the number."""
    try:
        program = Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return False
    return program.startswith(DAEMONS)


def end(pids: Iterable[int]) -> None:
    """SIGTERM, then after 3 s SIGKILL for those that still run."""
    pids = list(pids)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in filter(alive, pids):
            _send(pid, number)
        until = time.monotonic() + 3
        while any(map(alive, pids)):
            if time.monotonic() > until:
                break
            time.sleep(0.05)


def kill_left_over(folder: Path, conf: Path) -> None:
    """Jobs' supervisors, known by a log file of this box that they hold open, and tasks, known by their environment."""
    for pid in _all_pids():
        if _is_task(pid, f"SLURM_CONF={conf}") or (_name(pid) == "slurmstepd" and _holds_open(pid, f"{folder}/")):
            _send(pid, signal.SIGKILL)


def kill_node(node: str, slurmd: int, folder: Path, conf: Path) -> None:
    """As if this node lost its power: the daemon, its jobs' supervisors and their tasks, at once."""
    _send(slurmd, signal.SIGKILL)
    for pid in _all_pids():
        supervises = _name(pid) == "slurmstepd" and _holds_open(pid, f"{folder}/log/slurmd.{node}.log")
        if supervises or _is_task(pid, f"SLURM_CONF={conf}", f"SLURMD_NODENAME={node}"):
            _send(pid, signal.SIGKILL)


def _all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _is_task(pid: int, *variables: str) -> bool:
    """Whether a process runs in a job, with these variables in its environment."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return False
    in_a_job = any(item.startswith("SLURM_JOB_ID=") for item in environment)
    return in_a_job and all(variable in environment for variable in variables)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _holds_open(pid: int, beginning: str) -> bool:
    """Whether one of its open files begins with this path."""
    try:
        return any(os.readlink(file).startswith(beginning) for file in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
