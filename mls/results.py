"""The append-only store of results: one JSON object a line. A killed writer can tear at most the line it was writing,
and readers leave a torn line out; several writers may append at once."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mls.errors import UserError


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

    def _ends_whole(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
