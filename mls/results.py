"""The append-only store of results: one JSON object a line. A killed writer can tear at most the line it was writing,
and readers leave a torn line out; several writers may append at once."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mls.errors import UserError


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


def stored_cells(rows: Iterable[Mapping[str, Any]]) -> list[StoredCell]:
    """Rows of a protocol's numbers, by the cell that they belong to.

    >>> [cell.values for cell in stored_cells({"cell": "a", "metric": "voc07/map", "value": v} for v in (0.1, 0.2))]
    [{'voc07/map': 0.2}]
    """
    found: dict[Any, StoredCell] = {}
    for number, row in enumerate(rows):
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
        """Rows that belong together, in one write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y-%m-%dT%H:%M:%S")
        line = "".join(json.dumps({**row, "time": now}) + "\n" for row in rows)
        try:
            with open(self.path, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if file.tell() and not self._ends_whole():
                    line = "\n" + line  # the last writer was killed half-way
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write the result to {self.path}: {error.strerror}") from error

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """All rows, oldest first, and how many lines are torn."""
        if not self.path.is_file():
            return [], 0
        rows, torn = [], 0
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                torn += 1
        return rows, torn

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """All rows whose fields have these values."""
        return [row for row in self.read()[0] if all(row.get(name) == value for name, value in wanted.items())]

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
