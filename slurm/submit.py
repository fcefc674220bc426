"""Handing jobs to a scheduler through submitit: one, an array, or one after another."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from mls.errors import LaunchError, unknown_name
from mls.slurm import scheduler, snapshot
from mls.slurm.job import Job
from mls.slurm.order import Order
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


def order(folder: Path, call: str, arguments: Mapping[str, Any], shared: Path, cluster: str) -> Order:
    """The order of one folder, not written yet. `shared` holds code/ and logs/, for it alone or for a whole array."""
    folder = folder.resolve()
    return Order(
        folder=str(folder),
        call=call,
        arguments=arguments,
        directory=os.getcwd(),
        code=str(shared.resolve() / "code"),
        logs=str(shared.resolve() / "logs"),
        cluster=cluster,
    )


def submit(orders: Sequence[Order], profile: Profile, title: str, after: str | None = None) -> list[Order]:
    """Hand the orders over, several as one array; gives them back with their job numbers. Their code is copied if it is
    not there yet."""
    first = orders[0]
    code = Path(first.code)
    if not code.is_dir():
        snapshot.take(code)
    Path(first.logs).mkdir(parents=True, exist_ok=True)
    jobs = [Job(one.folder) for one in orders]
    with _clean_environment():
        try:
            executor = _executor(first, profile, title, after)
            submitted = executor.submit_array(jobs)
        except (FailedJobError, FailedSubmissionError) as refused:
            raise LaunchError(f"SLURM refuses the job: {_reason(str(refused))}") from None
        except subprocess.CalledProcessError as refused:
            raise LaunchError(f"SLURM refuses the job: {refused}") from None
    return [one.submitted_as(job.job_id) for one, job in zip(orders, submitted, strict=True)]


def run_here(one: Order) -> None:
    """--cluster debug: the same call in this process, so that a debugger and print work."""
    Job(one.submitted_as(str(os.getpid())).folder)()


def sbatch_script(one: Order, profile: Profile, title: str, count: int = 1, after: str | None = None) -> str:
    """What would be handed to sbatch; needs no SLURM."""
    parameters = sbatch_parameters(profile, title, after) | ({"map_count": count} if count > 1 else {})
    command = f"{_python(one)} -u -m submitit.core._submit {shlex.quote(one.logs)}"
    return _make_sbatch_string(command=command, folder=one.logs, **parameters)


def _executor(one: Order, profile: Profile, title: str, after: str | None) -> Any:
    if one.cluster == "local":
        if profile.nodes > 1:
            raise LaunchError(
                f"--cluster local is one machine, the profile asks for {profile.nodes} nodes: set nodes=1"
            )
        # It outlives this command and its terminal, whoever waits for what they print.
        log = shlex.quote(f"{one.logs}/controller.log")
        detach = [f"exec </dev/null >>{log} 2>&1", "trap '' HUP"]
        executor = submitit.LocalExecutor(one.logs, max_num_timeout=profile.max_timeouts, python=_python(one))
        executor.update_parameters(
            timeout_min=profile.minutes,
            tasks_per_node=profile.tasks_per_node,
            gpus_per_node=profile.gpus_per_node or 0,
            signal_delay_s=profile.signal_seconds,
            setup=[*detach, *setup_lines(profile)],
        )
        return executor
    try:
        executor = submitit.SlurmExecutor(one.logs, max_num_timeout=profile.max_timeouts, python=_python(one))
    except RuntimeError:
        raise LaunchError(
            "there is no SLURM here (srun is missing): submit from the cluster, use --cluster local, or look at the "
            "script with --dry-run"
        ) from None
    executor.update_parameters(**sbatch_parameters(profile, title, after))
    return executor


def _python(one: Order) -> str:
    """This Python, started in the snapshot: `python -m` imports from its folder first, before an editable install."""
    return f"env -u PYTHONSAFEPATH -C {shlex.quote(one.code)} {shlex.quote(sys.executable)}"


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Submitting from within a job: what SLURM told that job would bind the new one."""
    before = dict(os.environ)
    clean = scheduler.clean_environment()
    os.environ.clear()
    os.environ.update(clean)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _reason(text: str) -> str:
    """sbatch's own words out of submitit's account of them."""
    words = [line.strip() for line in text.splitlines() if "error:" in line]
    return "; ".join(word.removeprefix("sbatch: ").removeprefix("error: ") for word in words) or text.strip()


def pretraining(run: Path, shared: Path, cluster: str) -> Order:
    """The order of a run folder: train it to its end, from scratch or from its last checkpoint."""
    return order(run, "mls.engine:run", {"folder": str(run.resolve())}, shared, cluster)
