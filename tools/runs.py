"""`mls runs`: all runs at a glance, one of them as it trains, and in what two of them differ."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mls.errors import ConfigError
from mls.files import runs_folder

if TYPE_CHECKING:
    from mls.engine import Run
    from mls.engine.status import Status

PROBES = ("linear/map", "linear/top1", "knn/map", "knn/top1", "dense/miou")
EVERY = 2.0  # seconds between two looks at the files


def runs(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN | diff RUN RUN]", help="Default: all under $MLS_RUNS.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Show a run as it is now, and do not follow it.")] = False,
) -> None:
    """List runs with state, step, time left, last sign of life and last probe; watch one; compare two.

    Everything is read from the runs' files, and of submitted runs from SLURM, too: no run is disturbed. `diff` names
    only the keys that change what is computed. Logs, restarts and evaluations of submitted work: `mls jobs`.

    Examples:

        mls runs

        mls runs my-run

        mls runs diff first second
    """
    from mls.engine import Run

    words = list(words or [])
    if words[:1] == ["diff"]:
        if len(words) != 3:
            raise ConfigError("diff compares exactly two runs: `mls runs diff A B`")
        return _print_differences(Run.open(words[1]), Run.open(words[2]))
    if len(words) > 1:
        raise ConfigError(f"name one run, or compare two: `mls runs diff {words[0]} {words[1]}`")
    if words:
        return _watch(Run.open(words[0]), once)
    _print_all(runs_folder())


def _print_all(root: Path) -> None:
    from mls.engine.status import find, status_of
    from mls.progress import NAMES, duration
    from mls.slurm import job_spec, watch
    from mls.tables import print_table

    found = find(root)
    if not found:
        print(f"there are no runs under {root}: `mls pretrain mls_scenes_tiny` makes one")
        return
    specs = [spec for path in root.glob("*") for spec in map(job_spec.read, job_spec.find(path))]
    submitted = {Path(one.spec.folder).resolve(): one for one in watch.status_of(specs, root)}
    lines = []
    for status in map(status_of, found):
        job = submitted.get(status.run.path.resolve())
        state = status.state if job is None or status.state == "running" else job.state
        why = status.why if job is None else job.reason
        step = f"{status.step}/{status.total}" if status.total else str(status.step)
        left = "" if status.left is None else duration(status.left)
        heard = "" if status.heard is None else f"{duration(max(0.0, time.time() - status.heard))} ago"
        probe = status.last(PROBES)
        shown = "" if probe is None else f"{NAMES[probe[0]]} {100 * probe[1]:.1f}"
        name = str(status.run.path.relative_to(root))
        lines.append([name, state, step, left, heard, shown, "" if state in ("done", "running") else why])
    print_table(["run", "state", "step", "left", "heard", "last probe", "because"], lines)


def _watch(run: Run, once: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from mls.engine.status import status_of

    console = Console(highlight=False)
    status = status_of(run)
    if once or not console.is_terminal or status.state != "running":
        console.print(_view(status))
        return
    with Live(_view(status), console=console, auto_refresh=False) as live:
        while status.state == "running":
            time.sleep(EVERY)
            status = status_of(run)
            live.update(_view(status), refresh=True)


def _view(status: Status) -> Any:
    """The two lines that the run's own terminal shows, its state and its numbers so far."""
    from rich.console import Group
    from rich.text import Text

    from mls.monitor.log import rows_at_the_ends
    from mls.progress import TrainingProgress, duration, for_people, summary
    from mls.tables import markdown_table

    progress = TrainingProgress(status.total or status.step, status.step, status.run.name, show=False)
    rows, last = rows_at_the_ends(status.run.path / "metrics.jsonl"), {}
    for row in rows:
        last |= {name: value for name, value in row.items() if value is not None}
    if rows:
        progress.update(last["step"], last["epoch"], for_people(last))
    progress.step(status.step)
    progress.left = status.left
    heard = "" if status.heard is None else f", last heard {duration(max(0.0, time.time() - status.heard))} ago"
    words = f"{status.state}{heard}{f': {status.why}' if status.why else ''}"
    table = markdown_table(["", "first", "last", "by chance"], summary(rows)) if rows else ""
    return Group(progress, Text(words), Text(f"\n{table}"))


def _print_differences(first: Run, second: Run) -> None:
    from mls.engine.run import compared
    from mls.progress import summary
    from mls.tables import print_table
    from mls.tools.config import text

    names = [first.name, second.name] if first.name != second.name else [str(first.path), str(second.path)]
    found = compared(first.config, second.config)
    if found:
        print_table(["key", *names], [[key, text(before), text(after)] for key, before, after in found])
    else:
        print("no key differs that changes what is computed")
    last: list[dict[str, str]] = [{line[0]: line[2] for line in summary(run.metrics())} for run in (first, second)]
    values: Sequence[str] = list(dict.fromkeys([*last[0], *last[1]]))
    if values:
        print()
        print_table(["last value", *names], [[name, *(one.get(name, "") for one in last)] for name in values])
