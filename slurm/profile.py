"""Cluster profiles (configs/slurm/): the resources of a job, and their defaults."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mls.config import positive, zero_or_more
from mls.errors import ConfigError, LaunchError
from mls.recipes import Kind, build, find, read_yaml, shipped
from mls.slurm import scheduler


@dataclass(frozen=True)
class Profile:
    nodes: int = positive(1)
    tasks_per_node: int = positive(1)  # processes; one for each GPU
    gpus_per_node: int | None = zero_or_more(None)  # None: request none
    cpus_per_task: int = positive(4)
    memory_gb: float | None = positive(None)  # of one node; None: the cluster's own default
    minutes: int = positive(24 * 60)  # time limit of one start of the job; a longer run is queued again and resumes
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal_seconds: int = zero_or_more(120)  # the signal comes so long before the time limit: two steps and a save
    max_timeouts: int = zero_or_more(30)  # how often a run may reach its time limit and be queued again
    concurrency: int = positive(16)  # tasks of an array that run at the same time
    setup: list[str] = field(default_factory=list)  # shell lines before the start, such as `module load cuda`
    environment: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch: {exclude: node7}


def check(profile: Profile) -> None:
    if profile.signal_seconds >= 60 * profile.minutes:
        raise ConfigError(
            f"signal_seconds {profile.signal_seconds} is as long as the time limit of {profile.minutes} minutes: "
            "raise minutes"
        )


PROFILE = Kind(Profile, "slurm", "profile", check, "slurm/profile.py lists the keys")


def profiles() -> list[str]:
    """The names of the profiles that ship with mls."""
    return shipped(PROFILE.folder)


def load_profile(name: str | Path | None, overrides: Sequence[str] = ()) -> Profile:
    """
    >>> load_profile("box", ["nodes=2", "partition=high"]).nodes
    2
    """
    if name is None:
        return build(PROFILE, {}, {}, overrides, "the default profile").config
    path = find(name, PROFILE.folder, PROFILE.word)
    values, origins = read_yaml(path, PROFILE)
    return build(PROFILE, values, origins, overrides, path.name).config


def sbatch_parameters(profile: Profile, title: str, after: str | None = None) -> dict[str, Any]:
    """The parameters of submitit's SlurmExecutor. `after`: the job that must have succeeded before."""
    extra = {"requeue": True, **profile.options}
    if after is not None:
        extra |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    memory = {} if profile.memory_gb is None else {"mem": f"{round(1024 * profile.memory_gb)}MB"}
    return {
        "job_name": title,
        "nodes": profile.nodes,
        "ntasks_per_node": profile.tasks_per_node,
        "gpus_per_node": profile.gpus_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "time": profile.minutes,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "signal_delay_s": profile.signal_seconds,
        "array_parallelism": profile.concurrency,
        "setup": setup_lines(profile),
        # When one process fails, srun ends the others, which would wait for it. srun does not inherit --cpus-per-task.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={profile.cpus_per_task}"],
        "additional_parameters": extra,
        **memory,
    }


def setup_lines(profile: Profile) -> list[str]:
    exports = [f"export {name}={shlex.quote(str(value))}" for name, value in profile.environment.items()]
    return [*exports, *profile.setup]


def guess() -> str:
    """A profile for this cluster, as YAML, from what `sinfo` lists for its default partition."""
    listing = scheduler.query("sinfo", "-h", "-o", "%P|%c|%m|%l|%G")
    rows = [line.split("|") for line in (listing or "").splitlines()]
    if not rows:
        raise LaunchError(
            "sinfo does not answer: run this where jobs are submitted from, or try `mls slurm box start`, a SLURM on "
            "this machine"
        )
    partition, cpus, memory, limit, devices = next((row for row in rows if row[0].endswith("*")), rows[0])
    gpus = sum(int(count) for count in re.findall(r"gpu[^,(]*?:(\d+)", devices))
    tasks = max(1, gpus)
    cores, megabytes = _number(cpus), _number(memory)
    others = sorted({row[0].rstrip("*") for row in rows} - {partition.rstrip("*")})
    lines = [
        "# Guessed from sinfo: one whole node of the default partition. Check it with",
        "#   mls submit pretrain mls_scenes_tiny --profile THIS_FILE --dry-run",
        f"# Partitions: {partition.rstrip('*')} (here){''.join(f', {name}' for name in others)}.",
        "nodes: 1",
        f"tasks_per_node: {tasks} # processes, one for each GPU",
        *([f"gpus_per_node: {gpus}"] if gpus else []),
        f"cpus_per_task: {max(1, cores // tasks)}",
        f"memory_gb: {max(1, int(0.9 * megabytes / 1024))} # a node",
        f"minutes: {min(24 * 60, minutes(limit))}",
        f"partition: {partition.rstrip('*')}",
        "# account: YOURS",
        "# setup: [module load cuda]",
    ]
    return "\n".join(lines) + "\n"


def minutes(limit: str) -> int:
    """SLURM's [DAYS-]HOURS:MINUTES:SECONDS.

    >>> minutes("2-00:00:00"), minutes("30:00"), minutes("infinite")
    (2880, 30, 5256000)
    """
    if not limit[:1].isdigit():
        return 10 * 365 * 24 * 60
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    seconds = sum(value * scale for value, scale in zip(reversed(parts), (1, 60, 3600), strict=False))
    return int(days or 0) * 24 * 60 + seconds // 60


def _number(text: str) -> int:
    """sinfo writes 16+ where nodes differ."""
    return int(re.sub(r"\D", "", text) or 1)
