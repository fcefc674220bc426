"""slurm.conf of the box, with the reason for each line. Starting and stopping is in the package's __init__."""

from __future__ import annotations

import getpass
import os
import random
import socket
from dataclasses import dataclass
from pathlib import Path

from mls.slurm.rendezvous import PORTS, is_free


@dataclass(frozen=True)
class Settings:
    """The resources of the pretended cluster. Nodes are processes of this machine; only memory is limited."""

    nodes: int = 2
    cpus: int = 4  # of each node
    gpus: int = 2  # of each node; pretended: CUDA_VISIBLE_DEVICES is set, there is no GPU
    memory_mb: int = 8000  # of each node
    kill_wait: int = 5  # seconds between SIGTERM and SIGKILL
    grace: int = 20  # seconds that a preempted job gets


def node_names(count: int) -> list[str]:
    """Names that every resolver reads as 127.0.0.1, 127.0.0.2 and so on, so that /etc/hosts stays as it is.

    >>> node_names(2)
    ['0x7f000001', '0x7f000002']
    """
    return [f"0x7f{number:06x}" for number in range(1, count + 1)]


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row. Should another program take one, the daemon says so and ends."""
    draw = random.Random(os.urandom(8))
    while True:
        first = draw.randrange(PORTS.start, PORTS.stop - count)
        if all(is_free(port) for port in range(first, first + count)):
            return first


def write(folder: Path, settings: Settings) -> None:
    """slurm.conf and gres.conf in `folder`."""
    port = free_ports(settings.nodes + 1)
    user, host = getpass.getuser(), socket.gethostname().split(".")[0]
    lines = [
        f"ClusterName=box{port}",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={port}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        # A requeued job waits until its credential expires: 120 s by default.
        f"AuthInfo=socket={folder}/run/munge.sock,cred_expire=5",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/run/slurmctld.pid",
        f"SlurmdPidFile={folder}/run/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/slurmd.%n.log",
        # Rendezvous ports follow from job ids: two boxes on one machine must not give the same ids.
        f"FirstJobId={random.Random(os.urandom(8)).randrange(1000, 60_000_000)}",
        f"KillWait={settings.kill_wait}",
        *FIXED,
    ]
    for number, name in enumerate(node_names(settings.nodes), start=1):
        lines.append(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + number} CPUs={settings.cpus} "
            f"Sockets=1 CoresPerSocket={settings.cpus} ThreadsPerCore=1 RealMemory={settings.memory_mb} "
            f"State=UNKNOWN{f' Gres=gpu:fake:{settings.gpus}' if settings.gpus else ''}"
        )
    shared = "Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO"
    lines += [
        f"PartitionName=low {shared} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={settings.grace}",
        f"PartitionName=high {shared} PriorityTier=10 PreemptMode=OFF",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    gpus = f"Name=gpu Type=fake File={folder}/dev/gpu[0-{settings.gpus - 1}]\n" if settings.gpus else ""
    (folder / "gres.conf").write_text(gpus)


FIXED = """
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=200
GresTypes=gpu
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobRequeue=1
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
InactiveLimit=0
CompleteWait=0
SlurmdTimeout=10
SlurmctldTimeout=30
UnkillableStepTimeout=20
MessageTimeout=20
TCPTimeout=5
TreeWidth=65533
""".split()
FIXED += [
    # A memory limit without cgroups.
    "JobAcctGatherType=jobacct_gather/linux",
    "JobAcctGatherFrequency=task=1",
    "JobAcctGatherParams=OverMemoryKill",
    # Schedule at once, not every 30 s.
    "SchedulerType=sched/backfill",
    "SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000,bf_interval=2",
    # Without it a preempted job gets SIGTERM alone, never the signal that it asked for.
    "SlurmctldParameters=preempt_send_user_signal",
    # More CPUs than this machine has, and nothing that can be reached from another one.
    "SlurmdParameters=config_overrides",
    "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny",
    # There is no accounting: finished jobs must stay visible to scontrol.
    "MinJobAge=86400",
]
