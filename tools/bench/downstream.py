"""`mls bench downstream`: is pretraining worth anything to a detector and to a segmenter? The table of the suite
scenes_dense, on embedded data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def downstream(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Of both protocols.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pretraining and training are repeated with each.")] = 3,
    short: Annotated[bool, typer.Option("--short", help="A quick look: a third of the steps.")] = False,
    weights: Annotated[
        list[str] | None, typer.Option(help="Another row: a run, a file or LABEL=WEIGHTS. May be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: $MLS_RUNS/downstream.")] = None,
) -> None:
    """Pretrain on the embedded scenes, then train Mask R-CNN and an FCN on top: box AP, mask AP, mIoU, mean ± std.

    Every backbone is compared with the same network untrained. Needs no data and no GPU; what is finished is not run
    again.

    Examples:

        mls bench downstream

        mls bench downstream --short --seeds 1 --weights mine=runs/mls_scenes_tiny-…
    """
    from mls.eval.comparison import as_text
    from mls.eval.suite import Part, load_suite
    from mls.eval.suite import run as run_suite
    from mls.files import runs_folder
    from mls.tables import terminal_width

    name = "scenes_dense"
    folder = out or runs_folder() / "downstream"
    folder.mkdir(parents=True, exist_ok=True)
    changes = [*(["training.steps=100", "training.falls=[]"] if short else []), *(overrides or [])]
    say = lambda text: typer.echo(text, err=True)
    found = run_suite(load_suite(name), folder, Part(weights or (), seeds=seeds, overrides=changes), say)
    (folder / "downstream.md").write_text(as_text(found))
    print(f"{as_text(found, width=terminal_width())}\n{folder}: runs, table, results.jsonl")
