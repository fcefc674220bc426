"""What a job is to do, as files: `FOLDER/submission/` holds order.json (what to call, with which code, from where),
history.jsonl (what became of it), code/ and logs/. Nothing is kept in memory or in a pickle."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mls.errors import LaunchError
from mls.files import write_atomically
from mls.results import Results


@dataclass(frozen=True)
class Order:
    """One call. `arguments` is plain JSON, so that the code it meets may be read by anyone and needs no pickle."""

    folder: str  # the run's, or the evaluation's
    call: str  # module:function
    arguments: Mapping[str, Any]
    directory: str  # where the user stood: relative paths of the configuration count from there
    code: str  # the snapshot that is imported
    logs: str  # folder of the log files
    cluster: str = "slurm"
    job: str | None = None  # SLURM's number, NUMBER_INDEX in an array, the process' number on this machine
    submitted: float = 0.0

    @property
    def place(self) -> Path:
        return submission(self.folder)

    @property
    def done(self) -> bool:
        return (Path(self.folder) / "DONE").is_file()

    @property
    def history(self) -> Results:
        return Results(self.place / "history.jsonl")

    def log_files(self) -> list[Path]:
        """What the processes printed; rank 0 first."""
        found = Path(self.logs).glob(f"{self.job}_*_log.*") if self.job else []
        return sorted(found, key=lambda path: (path.suffix != ".err", path.name))

    def write(self) -> Order:
        self.place.mkdir(parents=True, exist_ok=True)
        write_atomically(self.place / "order.json", json.dumps(asdict(self), indent=2).encode())
        return self

    def submitted_as(self, job: str) -> Order:
        return replace(self, job=job, submitted=time.time()).write()

    def note(self, event: str, **more: Any) -> None:
        """A line of the history: "started", "stopped", "failed" or "done"."""
        restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.history.add(event=event, job=self.job, restart=restart, saved=last_save(self.folder), **more)


def submission(folder: str | Path) -> Path:
    return Path(folder) / "submission"


def read(folder: str | Path) -> Order:
    try:
        values = json.loads((submission(folder) / "order.json").read_text())
    except FileNotFoundError:
        raise LaunchError(f"{folder} was not submitted: `mls submit pretrain` makes runs that can be watched") from None
    return Order(**values)


def is_submitted(folder: Path) -> bool:
    return (submission(folder) / "order.json").is_file()


def last_save(folder: str | Path) -> int:
    """The step of the newest checkpoint in a run folder, 0 where there is none."""
    names = (re.search(r"step-(\d+)\.json$", path.name) for path in Path(folder, "checkpoints").glob("step-*.json"))
    return max((int(name.group(1)) for name in names if name), default=0)
