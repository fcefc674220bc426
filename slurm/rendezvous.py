"""The rendezvous of a job's processes: ranks come from the scheduler, rank 0 writes its address to a file beside the
run. MASTER_* and RANK of the submitting shell are ignored; CUDA_VISIBLE_DEVICES stays as SLURM set it."""

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
TIMEOUT = 600  # seconds that the other ranks wait for rank 0, whose node may still be starting


@dataclass(frozen=True)
class Task:
    """One process of a job, as the scheduler numbers it."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    job: str


def set_torch_environment(task: Task, folder: Path) -> None:
    """Set the variables that torch.distributed reads (mls/distributed.py); earlier values are removed."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    if task.world == 1:
        return
    names, port = _write_address(task, folder) if task.rank == 0 else _read_address(task, folder)
    # Each node tries the names itself: a name that one node can resolve may be unknown on another.
    os.environ["MASTER_ADDR"] = next(filter(_resolves, names), names[-1])
    os.environ["MASTER_PORT"] = str(port)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(task.rank), str(task.world)
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(_local_gpu(task)), str(task.local_world)


def _local_gpu(task: Task) -> int:
    """Index of this process's GPU among those that it sees: 0 where SLURM gave each task one GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return 0 if visible and "," not in visible else task.local_rank


def _rendezvous_file(task: Task, folder: Path) -> Path:
    return folder / f"rendezvous-{task.job}-{os.environ.get('SLURM_RESTART_COUNT', 0)}.json"


def _write_address(task: Task, folder: Path) -> tuple[list[str], int]:
    names = [os.environ.get("SLURMD_NODENAME", ""), socket.gethostname(), _own_address()]
    if "SLURM_JOB_ID" not in os.environ:
        names = ["127.0.0.1"]
    port = free_port(task.job)
    for old in folder.glob("rendezvous-*.json"):
        old.unlink(missing_ok=True)
    write_atomically(_rendezvous_file(task, folder), json.dumps([[n for n in names if n], port]).encode())
    return names, port


def _read_address(task: Task, folder: Path) -> tuple[list[str], int]:
    file, until = _rendezvous_file(task, folder), time.monotonic() + TIMEOUT
    while time.monotonic() < until:
        os.scandir(folder).close()  # a network file system refreshes its cached listing
        try:
            names, port = json.loads(file.read_text())
            return names, port
        except FileNotFoundError:
            time.sleep(0.1)
    raise LaunchError(
        f"rank 0 did not write {file} within {TIMEOUT} s: see its log, and whether {folder} is on a file system that "
        "all nodes share"
    )


def free_port(job: str) -> int:
    """A port derived from the job's number, so that two jobs on a node differ; the next free one if it is taken.

    >>> free_port("4711") in PORTS
    True
    """
    first = int(hashlib.sha256(job.encode()).hexdigest(), 16) % len(PORTS)
    for offset in range(len(PORTS)):
        port = PORTS[(first + offset) % len(PORTS)]
        if is_free(port):
            return port
    raise LaunchError("no port between 20000 and 32000 is free on this node")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


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
