"""The state of submitted jobs, from their own files and from SLURM; the reason names which of the two."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mls.engine import Run, status
from mls.errors import LaunchError
from mls.progress import duration
from mls.results import Results, newest
from mls.slurm import job_spec, local, scheduler
from mls.slurm.job_spec import JobSpec


@dataclass(frozen=True)
class JobStatus:
    """One job, as `mls jobs` shows it."""

    name: str
    spec: JobSpec
    state: str  # queued, queued again, running, done, failed, cancelled, stopped or lost
    reason: str  # and whether the run's files or SLURM gave it
    step: str
    eta: str
    restarts: int
    loss: float | None
    results: dict[str, float]  # {metric: value} of the evaluations of this run


def find(root: Path, wanted: str | None = None) -> list[JobSpec]:
    """The submitted jobs under `root`, oldest first: runs, the runs of a sweep, evaluations. `wanted`: a folder, or the
    name of one under `root`."""
    if wanted is None:
        folders = [folder for path in root.glob("*") for folder in job_spec.find(path)]
    else:
        base = next((path for path in (Path(wanted), root / wanted) if path.is_dir()), None)
        if base is None:
            raise LaunchError(f"there is no run {wanted} here or under {root}: `mls jobs` lists what was submitted")
        folders = job_spec.find(base)
        if not folders:
            raise LaunchError(f"{base} was not submitted: `mls submit pretrain` makes runs that can be watched")
    specs = [job_spec.read(folder) for folder in folders]
    return sorted(specs, key=lambda spec: (spec.submitted, spec.folder))


def status_of(specs: list[JobSpec], root: Path) -> list[JobStatus]:
    """The status of each job. SLURM is queried once for all of them."""
    active = [spec.job for spec in specs if spec.cluster == "slurm" and spec.job and not spec.done]
    known = scheduler.states(active) if active else {}
    results: dict[Any, dict[str, float]] = {}  # of each run
    for row in newest(Results(root / "results.jsonl").read()):
        results.setdefault(row.get("weights"), {})[row["metric"]] = row["value"]
    return [_status(spec, known.get(spec.job or ""), root, results.get(spec.folder, {})) for spec in specs]


def state_and_reason(spec: JobSpec, slurm_state: str | None) -> tuple[str, str]:
    """What `mls jobs` shows as state and reason, from the run's files and the job's state in SLURM."""
    events = [row for row in spec.history.rows(job=spec.job) if "event" in row]
    last = next((row for row in reversed(events) if row["event"] in ("failed", "stopped", "done")), None)
    if spec.done:
        return "done", "DONE is there"
    if spec.cluster != "slurm":
        if local.alive(spec):
            return "running", f"process {spec.job}"
        slurm_state = "no such process"
    in_slurm = f"SLURM: {slurm_state}" if slurm_state else "SLURM does not know the job any more"
    if slurm_state and not slurm_state.startswith(scheduler.ENDED) and slurm_state != "no such process":
        waits = slurm_state.startswith("PENDING")
        again = waits and any(row["event"] == "started" for row in events)
        return ("queued again" if again else "queued" if waits else "running"), in_slurm
    failed = [row for row in events if row["event"] == "failed"]
    if failed:
        return "failed", f"{failed[-1]['error']} ({in_slurm})"
    if slurm_state == "CANCELLED":
        saved = f"saved at step {last['saved']}, " if last and last["saved"] else ""
        return "cancelled", f"{saved}{in_slurm}"
    if last is not None and last["event"] == "stopped":
        return "stopped", f"{last['message']} ({in_slurm})"
    return "lost", f"its end was not recorded, {in_slurm}; it resumes from step {job_spec.last_save(spec.folder)}"


def progress(spec: JobSpec) -> tuple[str, str, float | None]:
    """(step/steps, time left while it trains, last loss) of a pretraining run, from the ends of its files."""
    seen = status.status_of(Run(Path(spec.folder)))
    loss = seen.last(["loss"])
    if loss is None:
        return "", "", None
    step = f"{seen.step}/{seen.total}" if seen.total else str(seen.step)
    return step, "" if seen.left is None else duration(seen.left), loss[1]


def log_tail(spec: JobSpec, lines: int = 10) -> list[str]:
    """The last lines of rank 0's output; of its standard error where that is not empty."""
    for file in spec.log_files():
        text = file.read_text(errors="replace").rstrip().splitlines()
        if text:
            return text[-lines:]
    return []


def _status(spec: JobSpec, slurm_state: str | None, root: Path, results: dict[str, float]) -> JobStatus:
    state, reason = state_and_reason(spec, slurm_state)
    step, eta, loss = progress(spec)
    folder = Path(spec.folder)
    name = os.path.relpath(folder, root) if folder.is_relative_to(root.resolve()) else str(folder)
    starts = spec.history.rows(event="started", rank=0)
    return JobStatus(name, spec, state, reason, step, eta, max(0, len(starts) - 1), loss, results)
