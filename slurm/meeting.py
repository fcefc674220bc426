"""How the processes of a job find one another: ranks from the scheduler, the address from rank 0 by a file beside the
run. What the submitting shell had in MASTER_* or RANK does not count; CUDA_VISIBLE_DEVICES is left as SLURM gave it."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from mls.errors import LaunchError
from mls.files import write_atomically

PORTS = range(20000, 32000)  # below the range from which Linux takes ports for outgoing connections
PATIENCE = 600  # seconds that the others wait for rank 0, whose node may still be starting


@dataclass(frozen=True)
class Task:
    """One process of a job, as the scheduler numbers it."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    job: str


def tell_torch(task: Task, folder: Path) -> None:
    """Set what torch.distributed reads (mls/distributed.py), whatever stood there before."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    if task.world == 1:
        return
    names, port = _announce(task, folder) if task.rank == 0 else _listen(task, folder)
    # Each node resolves for itself: a name that one node knows may mean nothing on the next.
    os.environ["MASTER_ADDR"] = next(filter(_resolves, names), names[-1])
    os.environ["MASTER_PORT"] = str(port)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(task.rank), str(task.world)
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(_gpu(task)), str(task.local_world)


def _gpu(task: Task) -> int:
    """Which of the GPUs that this process sees is its own: the only one where SLURM gave one to each task."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return 0 if visible and "," not in visible else task.local_rank


def _meeting_point(task: Task, folder: Path) -> Path:
    return folder / f"meeting-{task.job}-{os.environ.get('SLURM_RESTART_COUNT', 0)}.json"


def _announce(task: Task, folder: Path) -> tuple[list[str], int]:
    names = [os.environ.get("SLURMD_NODENAME", ""), socket.gethostname(), _own_address()]
    if "SLURM_JOB_ID" not in os.environ:
        names = ["127.0.0.1"]
    port = free_port(task.job)
    for old in folder.glob("meeting-*.json"):
        old.unlink(missing_ok=True)
    write_atomically(_meeting_point(task, folder), json.dumps([[n for n in names if n], port]).encode())
    return names, port


def _listen(task: Task, folder: Path) -> tuple[list[str], int]:
    point, until = _meeting_point(task, folder), time.monotonic() + PATIENCE
    while time.monotonic() < until:
        os.scandir(folder).close()  # makes a network file system look again
        try:
            names, port = json.loads(point.read_text())
            return names, port
        except FileNotFoundError:
            time.sleep(0.1)
    raise LaunchError(
        f"rank 0 did not write {point} within {PATIENCE} s: see its log, and whether {folder} is on a file system that "
        "all nodes share"
    )


def free_port(job: str) -> int:
    """A port that follows from the job's number, so that two jobs on a node differ; the next free one if it is taken.

    >>> free_port("4711") in PORTS
    True
    """
    first = int(hashlib.sha256(job.encode()).hexdigest(), 16) % len(PORTS)
    for offset in range(len(PORTS)):
        port = PORTS[(first + offset) % len(PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise LaunchError("no port between 20000 and 32000 is free on this node")


def _own_address() -> str:
    """The address that other nodes would see. Nothing is sent: connecting a datagram socket only chooses a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _resolves(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True
