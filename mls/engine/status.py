"""How far a run is and whether somebody trains it, from its files alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mls import card, locks
from mls.config import Config
from mls.engine import events
from mls.engine.run import Run
from mls.errors import CheckpointError, ConfigError
from mls.monitor.log import newest_rows

LATEST = 5  # lines of the log whose median is the present speed


@dataclass(frozen=True)
class Status:
    run: Run
    state: str  # done, running, stopped, failed, killed or new
    why: str
    step: int
    total: int | None  # None: nothing has told it yet
    left: float | None  # seconds to go at the present speed, while it runs
    heard: float | None  # Unix seconds of the last line of its log or its events
    rows: Sequence[dict[str, Any]]  # of its log, or of the end of it

    def last(self, names: Sequence[str]) -> tuple[str, float, int] | None:
        """The newest value that has one of these names: its name, the value and its step."""
        for row in reversed(self.rows):
            for name in names:
                if row.get(name) is not None:
                    return name, row[name], row["step"]
        return None


def status_of(run: Run, whole: bool = False) -> Status:
    """`whole`: with all rows of its log; else of a long one only the end is read."""
    happened = events.read(run.path / "events.jsonl")
    rows = run.metrics() if whole else [*newest_rows(run.path / "metrics.jsonl")][::-1]
    state, why = _state(run, happened)
    total = next((event["total"] for event in reversed(happened) if type(event.get("total")) is int), None)
    config = _config(run) if state == "running" or total is None else None  # to resolve one takes a while
    total = _total_of_card(run, config) if total is None else total
    steps = [row["step"] for row in rows] + [event["step"] for event in happened if event["event"] == "save"]
    step = max([*steps, 0]) if state != "done" or total is None else total
    times = [row["time"] for row in rows[-1:] if row.get("time") is not None]
    heard = max([*times, *(events.seconds(event) for event in happened[-1:])], default=None)
    speeds = [row["images_per_second"] for row in rows if (row.get("images_per_second") or 0) > 0][-LATEST:]
    left = None
    if state == "running" and total is not None and config is not None and speeds:
        left = (total - step) * config.data.batch_size / median(speeds)
        left -= time.time() - heard if heard is not None else 0.0
    return Status(run, state, why, step, total, None if left is None else max(0.0, left), heard, rows)


def find(root: Path) -> list[Run]:
    """All runs under a folder, also those of a sweep or a demo, the oldest first."""
    configs = [path for depth in ("*", "*/*") for path in root.glob(f"{depth}/config.yaml")]
    whole = [path for path in configs if ".making" not in path.parts]
    return [Run(path.parent) for path in sorted(whole, key=lambda path: path.stat().st_mtime)]


def _state(run: Run, happened: Sequence[dict[str, Any]]) -> tuple[str, str]:
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


def _config(run: Run) -> Config | None:
    try:
        return run.config
    except ConfigError:
        return None


def _total_of_card(run: Run, config: Config | None) -> int | None:
    """Of a run of version 0.1, whose events do not tell."""
    try:
        facts = card.facts_of(run.path / "backbone.safetensors")
        return round(config.optim.epochs * facts["step"] / facts["epochs"]) if config and facts else None
    except (CheckpointError, KeyError, ZeroDivisionError):
        return None
