"""How far a run is and whether somebody trains it, from its files alone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mls import locks, yaml_files
from mls.engine import events
from mls.engine.run import Run
from mls.errors import ConfigError
from mls.monitor.log import TAIL, newest_rows

LATEST = 5  # lines of the log whose median is the present speed


@dataclass(frozen=True)
class Status:
    run: Run
    state: str  # done, running, stopped, failed, killed or new
    why: str
    step: int
    total: int | None  # None: nothing has told it, as in a run of version 0.1
    left: float | None  # seconds to go at the present speed, while it runs
    heard: float | None  # Unix seconds of the last line of its log or its events

    def last(self, names: Sequence[str]) -> tuple[str, float, int] | None:
        """Of the newest line at the end of the log that has one of these names: the name, its value and the step."""
        log = self.run.path / "metrics.jsonl"
        for most in (TAIL, 16 * TAIL):  # the very end of the log has it, as a rule
            for row in newest_rows(log, most):
                for name in names:
                    if row.get(name) is not None:
                        return name, row[name], row["step"]
        return None


def status_of(run: Run) -> Status:
    """From the ends of its files: however long it trains, a few kilobytes are read."""
    happened, rows = events.read(run.path / "events.jsonl", TAIL), list(newest_rows(run.path / "metrics.jsonl"))
    state, why = state_of(run, happened)
    total = next((event["total"] for event in reversed(happened) if type(event.get("total")) is int), None)
    saved = [event.get("step", 0) for event in happened if event["event"] in ("save", "stop")]
    step = max([*(row["step"] for row in rows[:1]), *saved[-1:], 0])
    times = [row["time"] for row in rows[:1] if row.get("time") is not None]
    heard = max([*times, *(events.seconds(event) for event in happened[-1:])], default=None)
    speeds = [row["images_per_second"] for row in rows if (row.get("images_per_second") or 0) > 0][:LATEST]
    left = None
    if state == "running" and total is not None and heard is not None and speeds:
        left = max(0.0, (total - step) * _batch_size(run) / median(speeds) - (time.time() - heard))
    return Status(run, state, why, step, total, left, heard)


def find(root: Path) -> list[Run]:
    """All runs under a folder, also those of a sweep or a demo, the oldest first."""
    configs = [path for depth in ("*", "*/*") for path in root.glob(f"{depth}/config.yaml")]
    whole = [path for path in configs if ".making" not in path.parts]
    return [Run(path.parent) for path in sorted(whole, key=lambda path: path.stat().st_mtime)]


def state_of(run: Run, happened: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """In one word, and why."""
    if run.done:
        return "done", ""
    if holder := locks.holder(run.path / ".lock"):
        return "running", f"process {holder.pid} on {holder.host}"
    last = next((event for event in reversed(happened) if event["event"] in ("start", "resume", "stop")), None)
    if last is None:
        return "new", "not trained yet"
    if last["event"] != "stop":
        return "killed", f"its process {last.get('pid')} on {last.get('host')} ended without a word"
    reason = str(last.get("reason"))
    return ("failed" if "Error" in reason.partition(":")[0] else "stopped"), reason


def _batch_size(run: Run) -> int:
    """0 where the run's configuration is broken, which ends no list of runs."""
    with contextlib.suppress(ConfigError, KeyError, TypeError):
        return int(yaml_files.read(run.path / "config.yaml")[0]["data"]["batch_size"])
    return 0
