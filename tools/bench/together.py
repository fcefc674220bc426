"""`mls bench all`: every measurement of speed in its quick setting, one after another, each into files of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

JSON = "--out {json}"
# What each is called with here. All together take less than half an hour on two cores.
QUICK = {
    "input": f"--count 64 --rounds 3 --no-step {JSON}",
    "matching": f"--quick {JSON}",
    "probe": f"--quick {JSON}",
    "saving": f"--size 4096 --backbone resnet18 {JSON}",
    "step": f"--backbone resnet18 --rows 4096 --no-compiled {JSON}",
    "scale": f"--quick {JSON}",
}
MINUTES = 10.0  # after which one is given up


def together(
    out: Annotated[Path, typer.Option(help="A folder for NAME.txt, NAME.json and all.json.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this bench. May be repeated.")] = None,
) -> None:
    """Run the benches of speed in their quick settings and keep what they print and their numbers.

    NAME.txt is what `mls bench NAME` prints; NAME.json its numbers, where it keeps any; all.json says how each was
    called, how long it took and whether it ended well. Full sizes: `mls bench NAME` without --quick.

    Examples:

        mls bench all --out bench
    """
    from mls.errors import UserError, unknown_name
    from mls.tables import print_table
    from mls.tools.bench.results import write_results

    for name in only or ():
        if name not in QUICK:
            raise unknown_name("bench", name, QUICK)
    out.mkdir(parents=True, exist_ok=True)
    found = [one(name, out) for name in only or QUICK]
    write_results(out / "all.json", found)
    print_table(["bench", "seconds", "ended"], [[row["bench"], f"{row['seconds']:.0f}", row["ended"]] for row in found])
    if any(row["ended"] != "well" for row in found):
        raise UserError(f"some benches did not end well: their .txt files in {out} say why")


def one(name: str, out: Path) -> dict[str, Any]:
    words = ["bench", name, *(word.format(json=out / f"{name}.json") for word in QUICK[name].split())]
    typer.echo(f"mls {' '.join(words)}", err=True)
    began, ended = time.monotonic(), "well"
    with open(out / f"{name}.txt", "wb") as text:
        try:
            call = [sys.executable, "-m", "mls.tools", *words]
            done = subprocess.run(call, stdout=text, stderr=subprocess.STDOUT, timeout=60 * MINUTES)
            ended = "well" if done.returncode == 0 else f"with exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"not within {MINUTES:g} minutes"
    return {"bench": name, "command": f"mls {' '.join(words)}", "seconds": time.monotonic() - began, "ended": ended}
