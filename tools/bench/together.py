"""`mls bench all`: every measurement of speed, one after another, each into files of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

# How each is called: with the sizes of docs/performance.md, where they take minutes.
BENCHES = {
    "input": "input --count 256 --no-step",
    "step-8": "step --backbone resnet18 --batch 8 --size 64 --rows 4096 --rounds 15 --no-compiled",
    "step-32": "step --backbone resnet18 --batch 32 --size 64 --rows 4096 --rounds 15 --no-compiled",
    "matching": "matching --quick",
    "probe": "probe --images 2000 --penalties 2",
    "saving": "saving --size 65536",
    "scale": "scale",
}
MINUTES = 10.0  # after which one is given up
REST = 60  # seconds in which one that is given up removes what it made


def together(
    out: Annotated[Path, typer.Option(help="A folder for NAME.txt, NAME.json and all.json.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this bench. May be repeated.")] = None,
) -> None:
    """Run the benches of speed and keep what they print and their numbers.

    NAME.txt is what `mls bench NAME` prints; NAME.json its numbers with its command and machine; all.json says how each
    was called, how long it took, at which load, and whether it ended well. What ended well is not measured again: after
    Ctrl-C or a failure the same command goes on, and another folder begins anew.

    Examples:

        mls bench all --out bench

        mls bench all --out bench --only step-8
    """
    from mls.errors import UserError, unknown_name
    from mls.files import telling_disk_errors, write_atomically
    from mls.tables import print_table
    from mls.tools.bench.results import as_json

    for name in only or ():
        if name not in BENCHES:
            raise unknown_name("bench", name, BENCHES)
    with telling_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    found = _earlier(out / "all.json")
    for name in only or BENCHES:
        if name in found and (found[name]["ended"], found[name]["command"]) == ("well", _command(name, out)):
            typer.echo(f"{name}: was measured before", err=True)
            continue
        found[name] = _measured(name, out)
        found = {known: found[known] for known in BENCHES if known in found}
        write_atomically(out / "all.json", as_json(list(found.values())))
    header = ["bench", "minutes", "load before", "ended"]
    lines = [[r["bench"], f"{r['seconds'] / 60:.1f}", f"{r['load'][0]:.1f}", r["ended"]] for r in found.values()]
    print_table(header, lines)
    print(out / "all.json")
    if any(row["ended"] != "well" for row in found.values()):
        raise UserError(f"some benches did not end well: their .txt files in {out} say why")


def _earlier(file: Path) -> dict[str, dict[str, Any]]:
    from mls.errors import DataError

    try:
        rows = json.loads(file.read_bytes())["rows"]
        return {row["bench"]: row for row in rows if {"command", "seconds", "load", "ended"} <= row.keys()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{file} holds no results of this command: give --out another folder") from None


def _words(name: str, out: Path) -> list[str]:
    return ["bench", *BENCHES[name].split(), "--out", str(out / f"{name}.json")]


def _command(name: str, out: Path) -> str:
    import shlex

    return shlex.join(["mls", *_words(name, out)])


def _measured(name: str, out: Path) -> dict[str, Any]:
    """`load`: how many processes wanted to run in the last minute, before it and at its end, its own among them."""
    typer.echo(_command(name, out), err=True)
    began, before = time.monotonic(), os.getloadavg()[0]
    with open(out / f"{name}.txt", "wb") as text:
        process = subprocess.Popen(
            [sys.executable, "-m", "mls.tools", *_words(name, out)], stdout=text, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(60 * MINUTES)
            ended = f"with exit code {code}" if code else "well"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            ended = f"not within {MINUTES:g} minutes"
        finally:  # Ctrl-C has reached it as well
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(REST)
            process.kill()
    spent, load = time.monotonic() - began, [round(one, 1) for one in (before, os.getloadavg()[0])]
    return {"bench": name, "command": _command(name, out), "seconds": spent, "load": load, "ended": ended}
