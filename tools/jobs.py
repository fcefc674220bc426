"""`mls jobs` and `mls cancel`: what became of submitted work, and ending it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mls.errors import LaunchError, command
from mls.files import runs_folder

if TYPE_CHECKING:
    from mls.slurm.job_spec import JobSpec
    from mls.slurm.watch import JobStatus

OVER = ("done", "failed", "cancelled", "stopped", "lost")
Name = Annotated[str | None, typer.Argument(metavar="RUN", help="A run, a sweep or an evaluation; default: all.")]


def jobs(
    name: Name = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print the log as it grows, until the end.")] = False,
    lines: Annotated[int, typer.Option(min=0, help="Lines of the log under a single run.")] = 10,
) -> None:
    """List submitted runs under $MLS_RUNS: state and who says so, step, time left, restarts, last loss, results.

    A job's end is judged by its own files and by SLURM's word (squeue, sacct, scontrol where there is no accounting).

    Examples:

        mls jobs

        mls jobs runs/mls_scenes_tiny-20260101-120000-1a2b --follow
    """
    from mls.slurm import watch

    root = _root(name)
    found = watch.find(root, name)
    if not found:
        print(f"nothing was submitted under {root}: `mls submit pretrain CONFIG`")
        return
    if follow:
        if len(found) > 1:
            raise LaunchError(f"--follow takes one run, {name or root} holds {len(found)}: name one of them")
        return _follow(found[0], root)
    seen = watch.status_of(found, root)
    print(table(seen))
    if len(seen) == 1 and name is not None:
        print("\n".join(["", *watch.log_tail(found[0], lines)]))


def cancel(name: Annotated[str, typer.Argument(metavar="RUN", help="A run, a sweep or an evaluation.")]) -> None:
    """End submitted work. A run that trains saves first; `mls submit pretrain --resume RUN` goes on.

    Examples:

        mls cancel runs/mls_scenes_tiny-20260101-120000-1a2b
    """
    from mls.slurm import local, scheduler, watch

    root = _root(name)
    seen = [one for one in watch.status_of(watch.find(root, name), root) if one.state not in OVER]
    if not seen:
        print(f"nothing of {name} waits or runs")
        return
    for one in seen:
        if one.spec.cluster == "local":
            local.interrupt(one.spec)
    numbers = [one.spec.job for one in seen if one.spec.cluster == "slurm" and one.spec.job]
    if numbers:
        scheduler.cancel(numbers)
    print(f"asked {', '.join(str(one.spec.job) for one in seen)} to end; {command('mls jobs', name)} says when")


def table(seen: Sequence[JobStatus]) -> str:
    from mls.tables import markdown_table, terminal_width

    metrics = sorted({metric for one in seen for metric in one.results})
    header = ["run", "job", "state", "step", "left", "restarts", "loss", *metrics, "because"]
    rows = []
    for one in seen:
        loss = "" if one.loss is None else f"{one.loss:.4f}"
        values = [f"{100 * one.results[metric]:.2f}" if metric in one.results else "" for metric in metrics]
        status = [one.name, one.spec.job or "", one.state, one.step, one.eta, str(one.restarts)]
        cells = [*status, loss, *values, one.reason]
        rows.append(cells)
    return markdown_table(header, rows, terminal_width())


def _follow(one: JobSpec, root: Path) -> None:
    """The log of rank 0 as it grows. A requeued job goes on in the same file."""
    from mls.slurm import watch

    read: dict[Path, int] = {}
    while True:
        (seen,) = watch.status_of([one], root)
        for file in [file for file in one.log_files() if "_0_log" in file.name]:
            with open(file, errors="replace") as text:
                text.seek(read.get(file, 0))
                print(text.read(), end="", flush=True)
                read[file] = text.tell()
        if seen.state in OVER:
            print(table([seen]))
            return
        time.sleep(2)


def _root(name: str | None) -> Path:
    """Where runs lie; the folder around a run that was named by its path."""
    path = Path(name).expanduser() if name else None
    if path is not None and path.is_dir():
        return path.resolve().parent
    return runs_folder().resolve()
