"""The state of jobs from SLURM: squeue for those that wait or run, sacct for those that ended, scontrol where there is
no accounting. And cancelling, whether a job may be queued again, and an environment without a surrounding job."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from mls.errors import LaunchError

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
ENDED += ("PREEMPTED", "REVOKED")
STALE = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
STALE_NAMES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def query(*command: str) -> str | None:
    """What one of SLURM's commands prints; None where it is missing, fails, or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def states(jobs: Sequence[str]) -> dict[str, str]:
    """The state of each job that SLURM knows, such as RUNNING, PENDING (Resources) or FAILED."""
    found = _squeue()
    for job in (job for job in jobs if job not in found):
        ended = _sacct(job) or _scontrol(job)
        if ended:
            found[job] = ended
    return {job: found[job] for job in jobs if job in found}


def _squeue() -> dict[str, str]:
    """Jobs that wait or run. `-r` gives every task of an array a line of its own."""
    lines = (query("squeue", "-h", "-r", f"--user={os.getuid()}", "-o", "%i|%T|%r") or "").splitlines()
    rows = (line.split("|") for line in lines)
    return {job: f"{state} ({reason})" if state == "PENDING" else state for job, state, reason in rows}


def _sacct(job: str) -> str | None:
    lines = (query("sacct", "-X", "-n", "-P", "-o", "State", "-j", job) or "").split("\n")
    return lines[0].split()[0] if lines[0] else None  # "CANCELLED by 0" is CANCELLED


def _scontrol(job: str) -> str | None:
    """A line for each job. Tasks of an array that never started have none: the array's own line gives their state."""
    array, _, index = job.partition("_")
    lines = (query("scontrol", "-o", "show", "job", array) or "").splitlines()
    own = [line for line in lines if index and f" ArrayTaskId={index} " in line]
    named = [line for line in lines if line.startswith(f"JobId={array} ")]
    found = re.search(r"\bJobState=(\S+)", (own or named or [""])[0])
    return found.group(1) if found else None


def wants_requeue() -> bool:
    """Called in a job that got a signal: whether it should be queued again. Not if a person cancelled it, and not if
    SLURM has queued it again already. Outside SLURM: yes."""
    job = os.environ.get("SLURM_JOB_ID")
    return job is None or _scontrol(job) in ("RUNNING", "TIMEOUT", "PREEMPTED", None)


def cancel(jobs: Sequence[str]) -> None:
    done = subprocess.run(["scancel", *jobs], capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"scancel refused: {done.stderr.strip()}")


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Replace the environment of this process and of those that it starts."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def clean_environment() -> dict[str, str]:
    """This environment without the variables of a surrounding job. SLURM_CONF, which names the cluster, stays."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not (name.startswith(STALE) or name in STALE_NAMES)
    }
