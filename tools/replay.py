"""`mls replay`: which positives other settings would have chosen from a run's dictionary, and how good they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mls.engine.replay import Replay, Setting

TRUTH = ("precision", "recall", "pushed away", "dominance")  # of images with labels
WITHOUT_TRUTH = ("percentile", "two views", "own", "hub")


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name under $MLS_RUNS.")],
    k: Annotated[str, typer.Option("--k", help="Numbers of positives.")] = "5,10,20,40",
    labels_from: Annotated[
        str | None,
        typer.Option(
            help="Any of backbone, projection, union, intersection, regions (the run's own lists); default: "
            "backbone,projection, and regions where the run has lists."
        ),
    ] = None,
    region: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Neighbour lists of `mls regions`; may be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Score the pseudo-labels that other settings would take from the dictionary in a run's last checkpoint.

    Nothing is trained: these are scores of labels, not of trainings. precision, recall: of the positives by true
    labels, where the images have some. pushed away: share of the negatives that is relevant. dominance: share of the
    positives with the class that most of them have. percentile: of the positives' scores among all rows'. two views:
    positives that both views of an image choose. own: rows of the query's own image, were they not left out. hub:
    queries that choose the row which most of them choose. layout to thumbnail: the percentile of the positives among
    random rows in what is not content (chance 50). RUN/replay.json keeps everything, also by age, and which statistic
    tells the precision; `mls report RUN` shows it.

    Examples:

        mls replay runs/my-run

        mls replay runs/my-run --k 5,20 --labels-from backbone,union --region lists.safetensors
    """
    from dataclasses import asdict
    from json import dumps

    from mls.engine import Run
    from mls.engine.replay import replay as replayed
    from mls.errors import ConfigError
    from mls.files import write_atomically

    opened, (counts, memories) = Run.open(run), _settings(k, labels_from)
    if memories == [] and not region:
        raise ConfigError("there is nothing to replay: give --labels-from or --region")
    found = replayed(opened, counts, memories, region or [], say=lambda text: typer.echo(text, err=True))
    text = dumps(asdict(found), indent=1)
    write_atomically(opened.path / "replay.json", text.encode())
    if json:
        print(text)
    else:
        _show(found)
        print(f"\n{opened.path / 'replay.json'}")


def _settings(k: str, labels_from: str | None) -> tuple[list[int], list[str] | None]:
    from mls.engine.replay import MEMORIES
    from mls.errors import ConfigError, unknown_name

    numbers = [number.strip() for number in k.split(",")]
    if not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ConfigError(f"--k {k} is no list of numbers of positives: write for example --k 5,10,20")
    memories = None if labels_from is None else [name.strip() for name in labels_from.split(",") if name.strip()]
    for name in memories or ():
        if name not in MEMORIES:
            raise unknown_name("--labels-from", name, MEMORIES)
    return sorted({int(number) for number in numbers}), memories


def table_of(found: Replay) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a setting each, and what random rows would have."""
    labelled = [setting.labels for setting in found.settings if setting.labels is not None]
    names = [row.name for row in max((setting.nuisances for setting in found.settings), key=len, default=[])]
    header = ["labels from", "k", "matches", *(TRUTH if labelled else ()), *WITHOUT_TRUTH, *names]
    rows = [_row(setting, len(names), bool(labelled)) for setting in found.settings]
    chance, dominance = ("", "") if not labelled else (
        f"{labelled[-1].chance:.1%}", f"{labelled[-1].dominance_chance[-1]:.1%}")  # fmt: skip
    random = ["random rows", "", "", *([chance, "", chance, dominance] if labelled else ()), "50.0", "", "", ""]
    return header, [*rows, [*random, *["50.0"] * len(names)]]


def _show(found: Replay) -> None:
    import textwrap

    from mls.tables import markdown_table, terminal_width

    words = f"{found.run}, step {found.step:,}: {found.queries} queries, {found.rows:,} rows. {found.note}"
    print(textwrap.fill(words, terminal_width() or 120) + "\n")
    header, rows = table_of(found)
    print(markdown_table(header, rows, terminal_width(), labels=2))
    both = ", ".join(f"{share:.1%} of {k}" for k, share in found.memories.items())
    print(f"\nrows that backbone and projection both choose: {both}")


def _row(setting: Setting, nuisances: int, labelled: bool) -> list[str]:
    share = lambda value: "" if value is None else f"{value:.1%}"
    cells = [setting.labels_from, str(setting.k), f"{setting.matches:.1f}"]
    if (labels := setting.labels) is not None:
        curves = (labels.precision, labels.recall, labels.pushed_away, labels.dominance)
        cells += [share(curve[-1]) for curve in curves]
    elif labelled:
        cells += [""] * len(TRUTH)
    cells += ["" if setting.percentile is None else f"{setting.percentile:.1f}"]
    cells += [share(setting.two_views), share(setting.own), str(setting.hub)]
    return [*cells, *([f"{row.percentile:.1f} ± {row.error:.1f}" for row in setting.nuisances] or [""] * nuisances)]
