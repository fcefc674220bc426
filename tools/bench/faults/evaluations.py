"""Evaluations, packs, exports and reports that are killed, started twice or without space: started again they give what
they give undisturbed, and nothing half is left."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mls.tools.bench.faults import fault
from mls.tools.bench.faults.commands import Command, run
from mls.tools.bench.faults.stores import made_run, on_a_full_disk

FEW = ("data.scenes.count=80", "data.scenes.test_count=32")
CELLS = (("knn_scenes", *FEW), ("linear_scenes", "probe.l2=[0.01]", *FEW), ("spml_scenes", "training.epochs=1", *FEW))


@fault("four processes on one cell", tries=60)
def one_cell(folder: Path, number: int) -> str:
    started = [Command(folder, folder, call=measure) for _ in range(4)]
    if number % 2:  # the one that measures may be killed
        time.sleep(random.Random(number).uniform(0, 0.4))
        started.pop(0).send()
    codes = [one.code() for one in started]
    measured = (folder / "measured").read_text().split()
    rows = len(rows_of(folder))
    if codes != [0] * len(started) or rows != 1 or len(measured) > 1 + number % 2:
        return f"ended {codes}, measured {len(measured)} times, {rows} rows"
    return left_behind(folder / "runs")


@fault("kill -9 after each single change that a pack makes, then again", tries=200, quick=3)
def killed_pack(folder: Path, number: int) -> str:
    run(folder, folder, call=pack_images, dies_at=1 + number * 61 % changes_of(pack_images))  # spread over all
    return unless_packed(folder)


@fault("two packs into one folder at once", tries=40)
def two_packs(folder: Path, number: int) -> str:
    both = [Command(folder, folder, call=pack_images) for _ in range(2)]
    codes = [one.code() for one in both]
    told = [one.words for one, code in zip(both, codes, strict=True) if code]
    if 0 not in codes or any(" is being packed by process " not in words for words in told):
        return f"ended {codes}: {told}"
    return unless_packed(folder)


@fault("a full disk while images are packed", tries=60, quick=2)
def full_pack(folder: Path, number: int) -> str:
    told = on_a_full_disk(lambda: pack_images(folder), random.Random(number).randrange(10_000), number)
    wrong = not told or "keep_last" in told
    return f"told {told!r}" if wrong else unless_packed(folder)


@fault("kill -9 after each single change of mls export, then again", tries=60)
def killed_export(folder: Path, number: int) -> str:
    run(folder, folder, call=export_weights, dies_at=1 + number * 61 % changes_of(export_weights))
    return unless_exported(folder)


@fault("a full disk while weights are exported", tries=20)
def full_export(folder: Path, number: int) -> str:
    told = on_a_full_disk(lambda: export_weights(folder), random.Random(number).randrange(40_000), 0)
    if "free some" not in told and "File too large" not in told:
        return f"told {told!r}"
    left = [path.name for path in folder.glob("exported/*")]
    return f"left {left}" if left else unless_exported(folder)


@fault("kill -9 after each single change that writing a report makes, then again", tries=20)
def killed_report(folder: Path, number: int) -> str:
    made_run(folder)
    run(folder, folder, call=write_report, dies_at=1 + number % 4)
    page = folder / "runs" / "run" / "report.html"
    if page.exists() and not page.read_text().rstrip().endswith("</html>"):
        return "half a page"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        write_report(folder)
    return "" if page.read_text().rstrip().endswith("</html>") else "no page"


@fault(
    "kill -9 after a write, fsync, rename or deletion of mls eval run (knn, linear, a training), then again", tries=30
)
def cell(folder: Path, number: int) -> str:
    arguments, share = CELLS[number % len(CELLS)], number * 0.618034 % 1
    rows, changes = evaluated(arguments)
    run(folder, "eval", "run", *arguments, environment=caches(folder), dies_at=1 + int(share * changes))
    code, words = run(folder, "eval", "run", *arguments, environment=caches(folder))
    if code != 0:
        return f"it did not go on: {words.strip().splitlines()[-1]}"
    if rows_of(folder) != rows:
        return f"other rows than those of a run undisturbed: {rows_of(folder)}"
    return left_behind(folder / "runs", folder / "features")


# ------------------------------------------------------------------------------------------------------------- helpers


def caches(folder: Path) -> dict[str, str]:
    return {"MLS_CACHE": str(folder)}


def rows_of(folder: Path) -> list[tuple[Any, ...]]:
    """The numbers that are stored, each once and with the cell that they belong to."""
    lines = (folder / "runs" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return sorted((row["cell"], row["metric"], row["value"], row["selection"]) for row in rows)


def left_behind(*folders: Path) -> str:
    left = [str(path) for folder in folders for path in folder.rglob(".*")]
    return f"left behind: {left}" if left else ""


@cache
def evaluated(arguments: tuple[str, ...]) -> tuple[list[tuple[Any, ...]], int]:
    folder = Path(mkdtemp(prefix="mls-fault-"))
    command = Command(folder, "eval", "run", *arguments, environment=caches(folder), dies_at=0)
    assert command.code() == 0, command.words
    return rows_of(folder), command.changes


def measure(folder: Path) -> None:
    from mls.eval.cells import Cell
    from mls.eval.outcome import Outcome

    @dataclass(frozen=True)
    class Slow(Cell):
        seed = 0
        key = name = "slow"  # type: ignore[assignment]
        dataset = "none"  # type: ignore[assignment]

        def facts(self) -> dict[str, Any]:
            return {}

        def measure(self, folder: Path, quiet: bool) -> Outcome:
            with open(folder.parents[2] / "measured", "a") as file:
                file.write("once\n")
            time.sleep(0.2)
            return Outcome({"map": 0.5}, "", None, 0.2)

    assert Slow().finish(folder / "runs").values == {"map": 0.5}


def pack_images(folder: Path) -> None:
    from mls.data.pack import Packing, pack
    from mls.errors import UserError

    try:
        pack(scenes(), folder / "packed", Packing(per_shard=5))
    except UserError as error:
        if (folder / "packed" / ".lock").exists():
            raise SystemExit(f"{error}") from None
        raise


def scenes() -> Any:
    from mls.config import DataConfig, ScenesConfig
    from mls.data.sources import build_source

    return build_source(DataConfig(source="scenes", scenes=ScenesConfig(count=16, test_count=8)))


def export_weights(folder: Path) -> None:
    import torch

    from mls.exporting import export

    torch.manual_seed(0)
    torch.set_num_threads(1)
    export("random:resnet_tiny", ["safetensors"], folder / "exported")


def write_report(folder: Path) -> None:
    from mls.tools.report import report

    report([str(folder / "runs" / "run")])


def contents(folder: Path) -> dict[str, bytes]:
    """All files, without the time in a certificate."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".mls-index")}
    return {name: re.sub(rb'"time": "[^"]*"', b"", content) for name, content in files.items()}


def unless_packed(folder: Path) -> str:
    pack_images(folder)
    wanted, _ = undisturbed(pack_images)
    return "" if contents(folder / "packed") == wanted["packed"] else "another pack than that of a run undisturbed"


def unless_exported(folder: Path) -> str:
    export_weights(folder)
    wanted, _ = undisturbed(export_weights)
    return "" if contents(folder / "exported") == wanted["exported"] else "another export than that undisturbed"


@cache
def undisturbed(call: Callable[[Path], object]) -> tuple[dict[str, dict[str, bytes]], int]:
    """What a call makes, and how often it changes the file system."""
    folder = Path(mkdtemp(prefix="mls-fault-"))
    command = Command(folder, folder, call=call, dies_at=0)
    assert command.code() == 0, command.words
    return {path.name: contents(path) for path in folder.iterdir() if path.is_dir()}, command.changes


def changes_of(call: Callable[[Path], object]) -> int:
    return undisturbed(call)[1]
