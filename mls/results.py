"""The append-only store of results: one JSON object a line, each with a check of its own. A killed writer can tear at
most the line it was writing, and readers leave a torn or changed line out; several writers may append at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mls.errors import UserError
from mls.files import CHECK, changed, checked

MOST_TOLD = 5  # lines of a file that are named
TAIL = 64  # bytes before an index's end; a line's check is among them
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
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for number, row in enumerate(newest(rows)):
        found.setdefault(row.get("cell", number), []).append(row)
    return [StoredCell(cell[-1], {row["metric"]: float(row["value"]) for row in cell}) for cell in found.values()]


@dataclass
class _Index:
    """Where in a store the lines of each cell are. A store only grows: what was read once is not read again."""

    file: tuple[int, int] = (0, 0)  # device and inode
    end: int = 0  # of the last whole line
    tail: bytes = b""  # what stands before the end, by which another file is known
    lines: int = 0
    line: tuple[int, int, int] = (0, 0, 0)  # number, offset and length of the last one that was read
    places: dict[Any, list[tuple[int, int, int]]] = field(default_factory=dict)  # of the lines of each cell

    @classmethod
    def of(cls, file: BinaryIO) -> _Index:
        status = os.fstat(file.fileno())
        return cls((status.st_dev, status.st_ino))

    def fits(self, file: BinaryIO) -> bool:
        before = os.pread(file.fileno(), len(self.tail), self.end - len(self.tail))
        return self.file == self.of(file).file and before == self.tail

    def appended(self, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Lines and their numbers. A last one that is not whole is read again the next time."""
        file.seek(self.end)
        for line in file:
            self.line = (self.lines + 1, self.end, len(line))
            if line.endswith(b"\n"):
                self.lines, self.end, self.tail = self.lines + 1, self.end + len(line), line[-TAIL:]
            yield self.line[0], line


_INDEXES: dict[Path, _Index] = {}  # of this process


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
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as file:
            return list(self._rows(enumerate(file, start=1)))

    def _rows(self, lines: Iterable[tuple[int, bytes]]) -> Iterator[dict[str, Any]]:
        broken: dict[int, str] = {}
        for number, line in lines:
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                row = line
            if isinstance(row, dict) and changed(row):
                broken[number] = "not as it was written"
            elif isinstance(row, dict) and all(isinstance(row.get(key), kinds) for key, kinds in FIELDS.items()):
                yield row
            elif line.strip():
                broken[number] = "no row: its writer was killed, or is still writing"
        self._tell(broken)

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
        """The numbers of one cell, if all of them were written. Of a store that was asked before, only what was
        appended since and the lines of this cell are read."""
        if not self.path.is_file():
            return None
        with open(self.path, "rb") as file:
            index = _INDEXES.get(self.path)
            if index is None or not index.fits(file):
                index = _INDEXES[self.path] = _Index.of(file)
            for row in self._rows(index.appended(file)):
                index.places.setdefault(row.get("cell"), []).append(index.line)
            lines = [(number, os.pread(file.fileno(), size, at)) for number, at, size in index.places.get(key, ())]
        found = stored_cells(row for row in self._rows(lines) if row.get("cell") == key)
        return found[0] if found and found[0].whole else None

    def _ends_whole(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _write(file: BinaryIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
