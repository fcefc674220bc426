"""`mls bench faults`: attacks on what mls keeps, each tried many times, and what was lost; a module is a chapter."""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mls.errors import UserError

CHAPTERS = ("kills", "checkpoints", "weights", "shards", "truth", "stores", "evaluations", "configs", "ranks")


@dataclass(frozen=True)
class Fault:
    """An attack: in an empty folder, by its number, it gives "" where nothing was lost, else what was."""

    chapter: str
    words: str
    attack: Callable[[Path, int], str]
    tries: int
    quick: int  # tries of the tests, and of a quick look, which has one at least
    reason: str  # why some tries may lose something; "" where none may


FAULTS: list[Fault] = []


def fault(words: str, tries: int, quick: int = 1, reason: str = "") -> Callable[..., Callable[[Path, int], str]]:
    def register(attack: Callable[[Path, int], str]) -> Callable[[Path, int], str]:
        FAULTS.append(Fault(attack.__module__.rpartition(".")[2], words, attack, tries, quick, reason))
        return attack

    return register


def faults_of(chapters: Iterable[str] = CHAPTERS) -> list[Fault]:
    for chapter in CHAPTERS:
        importlib.import_module(f"{__name__}.{chapter}")
    return [fault for fault in FAULTS if fault.chapter in chapters]


def lost(fault: Fault, tries: Iterable[int]) -> dict[int, str]:
    """The tries that lost something, with what."""
    losses = {}
    for number in tries:
        with tempfile.TemporaryDirectory(prefix="mls-fault-") as folder:
            try:
                what = fault.attack(Path(folder), number)
            except UserError as error:  # a command that should have gone on refused to
                what = str(error).replace(folder, "…")
        if what:
            losses[number] = what
    return losses


def bench(
    chapters: Annotated[list[str] | None, typer.Argument(metavar="CHAPTER", help=f"Of: {', '.join(CHAPTERS)}.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few tries of each.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the rows as JSON.")] = None,
) -> None:
    """Attack what mls writes and reads, and print fault, tries, survived and what was lost.

    Everything happens in temporary folders of this machine. An exit code of 1 means that something was lost for which
    no reason is stated.

    Examples:

        mls bench faults kills --quick

        mls bench faults --out faults.json
    """
    from mls.files import write_atomically

    unknown = set(chapters or ()) - set(CHAPTERS)
    if unknown:
        raise UserError(f"no chapter {', '.join(sorted(unknown))}: there are {', '.join(CHAPTERS)}")
    rows, unexplained = [], 0
    for fault in faults_of(chapters or CHAPTERS):
        began, tries = time.perf_counter(), max(1, fault.quick) if quick else fault.tries
        losses = lost(fault, range(tries))
        unexplained += bool(losses) and not fault.reason
        rows.append({"chapter": fault.chapter, "fault": fault.words, "tried": tries, "survived": tries - len(losses)})
        rows[-1] |= {"lost": sorted(set(losses.values())), "reason": fault.reason}
        typer.echo(f"{fault.chapter}: {fault.words}: {tries - len(losses)} of {tries} survived", nl=False)
        typer.echo(f" ({time.perf_counter() - began:.0f} s)")
        for number, what in losses.items():
            typer.echo(f"    try {number}: {what}")
        if losses and fault.reason:
            typer.echo(f"    reason: {fault.reason}")
        if out is not None:
            write_atomically(out, json.dumps(rows, indent=1).encode())
    raise typer.Exit(1 if unexplained else 0)
