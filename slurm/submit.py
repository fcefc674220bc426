"""Submitting jobs to a scheduler through submitit: one, an array, or one after another."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from mls.errors import LaunchError, unknown_name
from mls.slurm import scheduler, snapshot
from mls.slurm.job import Job
from mls.slurm.job_spec import JobSpec
from mls.slurm.profile import Profile, sbatch_parameters, setup_lines

CLUSTERS = ("slurm", "local", "debug")


def check_cluster(cluster: str, several: bool = False) -> None:
    if cluster not in CLUSTERS:
        raise unknown_name("cluster", cluster, CLUSTERS, LaunchError)
    if cluster != "slurm" and several:
        raise LaunchError(
            f"--cluster {cluster} has no queue for several jobs: use --cluster slurm; `mls slurm box start` gives you "
            "a SLURM on this machine"
        )


def submit(specs: Sequence[JobSpec], profile: Profile, title: str, after: str | None = None) -> list[JobSpec]:
    """Submit them, several as one array; returns them with their job numbers. Their code is copied if it is not there
    yet."""
    first = specs[0]
    code = Path(first.code)
    if not code.is_dir():
        snapshot.take(code)
    Path(first.logs).mkdir(parents=True, exist_ok=True)
    jobs = [Job(spec.folder) for spec in specs]
    # From within a job sbatch would take over the variables that SLURM set for that job.
    with scheduler.environment(scheduler.clean_environment()):
        try:
            executor = _executor(first, profile, title, after)
            submitted = executor.submit_array(jobs)
        except (FailedJobError, FailedSubmissionError) as refused:
            raise LaunchError(f"SLURM refuses the job: {_reason(str(refused))}") from None
        except subprocess.CalledProcessError as refused:
            raise LaunchError(f"SLURM refuses the job: {refused}") from None
    return [spec.submitted_as(job.job_id) for spec, job in zip(specs, submitted, strict=True)]


def run_here(spec: JobSpec) -> None:
    """--cluster debug: run the job in this process, so that a debugger and print work."""
    Job(spec.submitted_as(str(os.getpid())).folder)()


def sbatch_script(spec: JobSpec, profile: Profile, title: str, count: int = 1, after: str | None = None) -> str:
    """The script that would be submitted; needs no SLURM."""
    parameters = sbatch_parameters(profile, title, after) | ({"map_count": count} if count > 1 else {})
    command = f"{_python(spec)} -u -m submitit.core._submit {shlex.quote(spec.logs)}"
    return _make_sbatch_string(command=command, folder=spec.logs, **parameters)


def _executor(spec: JobSpec, profile: Profile, title: str, after: str | None) -> Any:
    if spec.cluster == "local":
        if profile.nodes > 1:
            raise LaunchError(
                f"--cluster local is one machine, the profile asks for {profile.nodes} nodes: set nodes=1"
            )
        # The controller outlives this command and its terminal, also where a caller waits for their output to close.
        log = shlex.quote(f"{spec.logs}/controller.log")
        detach = [f"exec </dev/null >>{log} 2>&1", "trap '' HUP"]
        executor = submitit.LocalExecutor(spec.logs, max_num_timeout=profile.max_timeouts, python=_python(spec))
        executor.update_parameters(
            timeout_min=profile.minutes,
            tasks_per_node=profile.tasks_per_node,
            gpus_per_node=profile.gpus_per_node or 0,
            signal_delay_s=profile.signal_seconds,
            setup=[*detach, *setup_lines(profile)],
        )
        return executor
    try:
        executor = submitit.SlurmExecutor(spec.logs, max_num_timeout=profile.max_timeouts, python=_python(spec))
    except RuntimeError:
        raise LaunchError(
            "there is no SLURM here (srun is missing): submit from the cluster, use --cluster local, or look at the "
            "script with --dry-run"
        ) from None
    executor.update_parameters(**sbatch_parameters(profile, title, after))
    return executor


def _python(spec: JobSpec) -> str:
    """This Python, started in the snapshot: `python -m` imports from its folder first, before an editable install."""
    return f"env -u PYTHONSAFEPATH -C {shlex.quote(spec.code)} {shlex.quote(sys.executable)}"


def _reason(text: str) -> str:
    """sbatch's error lines from the text of submitit's exception."""
    errors = [line.strip() for line in text.splitlines() if "error:" in line]
    return "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in errors) or text.strip()
