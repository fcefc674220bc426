"""The append-only store of results: one JSON object a line, each with a check of its own. A killed writer can tear at
most the line it was writing, and readers leave a torn or changed line out; several writers may append at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mls.errors import UserError
from mls.files import CHECK, changed, checked

MOST_TOLD = 5  # lines of a file that are named
NUMBER = (int, float, type(None))
# What rows that have these fields have in them.
FIELDS = {"cell": (str, type(None)), "metric": (str, type(None)), "value": NUMBER, "duration": NUMBER}

_TOLD: set[tuple[Path, int, str]] = set()  # by this process


@dataclass(frozen=True)
class StoredCell:
    """One measurement: a protocol on weights with a seed, or a pretraining run. Its rows share all fields but the
    metric (DATASET/NAME) and the value; of one that was measured again the newest numbers count."""

    row: Mapping[str, Any]  # the newest of its rows
    values: dict[str, float]  # by metric

    @property
    def whole(self) -> bool:
        """Fewer rows than were to be written: the writer was killed on the way."""
        return len(self.values) == self.row.get("metrics", len(self.values))


def newest(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of each cell's last measurement. Rows of version 0.1 have no check, and those of one measurement may
    have several times.

    >>> [row["value"] for row in newest({"cell": "a", "metric": "voc07/map", "value": v} for v in (0.1, 0.2))]
    [0.2]
    """
    found: dict[Any, dict[str, Mapping[str, Any]]] = {}
    for number, row in enumerate(rows):
        if row.get("metric") is None or row.get("value") is None:
            continue
        cell = found.setdefault(row.get("cell", number), {})
        if CHECK in row and any(other.get("time") != row.get("time") for other in cell.values()):
            cell.clear()
        cell[row["metric"]] = row
    return [row for cell in found.values() for row in cell.values()]


def stored_cells(rows: Iterable[Mapping[str, Any]]) -> list[StoredCell]:
    """Rows of a protocol's numbers, by the cell that they belong to.

    >>> [cell.values for cell in stored_cells({"cell": "a", "metric": "voc07/map", "value": v} for v in (0.1, 0.2))]
    [{'voc07/map': 0.2}]
    """
    found: dict[Any, StoredCell] = {}
    for number, row in enumerate(newest(rows)):
        name = row.get("cell", number)
        values = found[name].values if name in found else {}
        found[name] = StoredCell(row, values | {row["metric"]: float(row["value"])})
    return list(found.values())


class Results:
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def add(self, **row: Any) -> None:
        self.add_all([row])

    def add_all(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that belong together, in one write; each gets a check of its own."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        lines = "".join(json.dumps(checked({**row, "time": now})) + "\n" for row in rows)
        try:
            with open(self.path, "ab", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                before = file.seek(0, os.SEEK_END)
                if before and not self._ends_whole():
                    lines = "\n" + lines  # the last writer was killed half-way
                try:
                    _write(file, lines.encode())
                    os.fsync(file.fileno())
                except OSError:  # half of a measurement is no measurement
                    file.truncate(before)
                    raise
        except OSError as error:
            full = "; free some disk space, and run the same again" * (error.errno in (errno.ENOSPC, errno.EDQUOT))
            raise UserError(f"cannot write the result to {self.path}: {error.strerror}{full}") from error

    def read(self) -> list[dict[str, Any]]:
        """All rows, oldest first. Lines that hold none, or another one than was written, are left out and told once."""
        rows: list[dict[str, Any]] = []
        broken: dict[int, str] = {}
        content = self.path.read_bytes() if self.path.is_file() else b""
        for number, line in enumerate(content.split(b"\n"), start=1):
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                row = line
            if isinstance(row, dict) and changed(row):
                broken[number] = "not as it was written"
            elif isinstance(row, dict) and all(isinstance(row.get(key), kinds) for key, kinds in FIELDS.items()):
                rows.append(row)
            elif line.strip():
                broken[number] = "no row: its writer was killed, or is still writing"
        self._tell(broken)
        return rows

    def _tell(self, broken: Mapping[int, str]) -> None:
        new = {number: what for number, what in broken.items() if (self.path, number, what) not in _TOLD}
        _TOLD.update((self.path, number, what) for number, what in new.items())
        some = ", ".join(f"line {number} ({what})" for number, what in list(new.items())[:MOST_TOLD])
        more = f" and {len(new) - MOST_TOLD} more" if len(new) > MOST_TOLD else ""
        if new:
            print(f"{self.path}: left out {some}{more}", file=sys.stderr, flush=True)

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """All rows whose fields have these values."""
        return [row for row in self.read() if all(row.get(name) == value for name, value in wanted.items())]

    def find(self, **wanted: Any) -> Mapping[str, Any] | None:
        """The newest such row."""
        rows = self.rows(**wanted)
        return rows[-1] if rows else None

    def cell(self, key: str) -> StoredCell | None:
        """The numbers of one cell, if all of them were written."""
        found = stored_cells(self.rows(cell=key))
        return found[0] if found and found[0].whole else None

    def _ends_whole(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _write(file: BinaryIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
