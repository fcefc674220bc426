"""`mls report`: one offline page (page.py) about one or more runs, and what a judgement of its pairs comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MOST_RUNS = 8


def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN...", help="Run folders, or their names under $MLS_RUNS.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page (default: report.html in the first run).")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="True labels of some of the images: a table, .csv or .parquet.")
    ] = None,
    judged: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Print what the answers saved by a page come to.")
    ] = None,
) -> None:
    """Make one HTML page that says whether a run worked: a verdict, curves, what was matched with what, and how good
    that is. To look at offline, to keep or to send.

    --labels judges the matches of images whose labels the run does not know, by a table as `data.name=table` takes it:
    names relative to data.root, any number of images. It changes no training.

    Up to eight runs are compared. The page asks for no network. Its section "Judge 100 pairs" saves judged.json, of
    which --judged prints the precision of matches beside that of pairs alike in pixels and of random ones.

    Examples:

        mls report runs/my-run

        mls report runs/mls runs/moco_v2 --out comparison.html

        mls report runs/my-run --labels some.csv

        mls report --judged judged.json
    """
    from mls.tools.report.labels import judged_table

    print(judged_table(judged) if judged is not None else _write(runs or [], out, labels))


def _write(runs: list[str], out: Path | None, labels: Path | None) -> Path:
    from mls.engine import Run
    from mls.errors import ConfigError
    from mls.files import write_atomically
    from mls.tools.report.facts import Card
    from mls.tools.report.page import render

    opened = list({run.path.resolve(): run for run in map(Run.open, runs)}.values())  # named twice is one run
    if not 0 < len(opened) <= MOST_RUNS:
        raise ConfigError(f"{len(opened)} runs were named: name one to {MOST_RUNS}, or --judged FILE")
    names = [run.name for run in opened]
    named = [run.name if names.count(run.name) == 1 else str(run.path) for run in opened]
    page = render([Card.of(run, label, labels) for run, label in zip(opened, named, strict=True)])
    target = opened[0].path if out is None else out.expanduser()
    if target.is_dir():
        target = target / "report.html"
    write_atomically(target, page.encode(errors="backslashreplace"))
    return target
