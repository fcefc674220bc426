"""What a job runs, as files: `FOLDER/submission/` holds job_spec.json (what to call, with which code, from where),
history.jsonl (its starts and ends), code/ and logs/. Nothing is kept in memory or in a pickle."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mls.errors import LaunchError
from mls.files import write_atomically
from mls.results import Results
from mls.slurm import snapshot

SUBMISSION = "submission"
NAME = "job_spec.json"
NAMES = (NAME, "order.json")  # submissions of version 0.1 have the second name


@dataclass(frozen=True)
class JobSpec:
    """One call of a function. `arguments` is plain JSON: no pickle that another version of the code cannot read."""

    folder: str  # the run's, or the evaluation's
    call: str  # module:function
    arguments: Mapping[str, Any]
    directory: str  # the working directory of the submission: relative paths of the configuration start there
    code: str  # the snapshot that is imported
    logs: str  # folder of the log files
    cluster: str = "slurm"
    job: str | None = None  # SLURM's number, NUMBER_INDEX in an array, the process' number on this machine
    submitted: float = 0.0
    plugins: Mapping[str, str] = field(default_factory=dict)  # those of the submission, and what to import for each

    @property
    def submission(self) -> Path:
        return Path(self.folder) / SUBMISSION

    @property
    def done(self) -> bool:
        return (Path(self.folder) / "DONE").is_file()

    @property
    def history(self) -> Results:
        return Results(self.submission / "history.jsonl")

    def log_files(self) -> list[Path]:
        """What the processes printed; rank 0 first."""
        files = Path(self.logs).glob(f"{self.job}_*_log.*") if self.job else []
        return sorted(files, key=lambda path: (path.suffix != ".err", path.name))

    def write(self) -> JobSpec:
        self.submission.mkdir(parents=True, exist_ok=True)
        write_atomically(self.submission / NAME, json.dumps(asdict(self), indent=2).encode())
        return self

    def submitted_as(self, job: str) -> JobSpec:
        return replace(self, job=job, submitted=time.time()).write()

    def record(self, event: str, **fields: Any) -> None:
        """Append a line to the history. `event`: "started", "stopped", "failed" or "done"."""
        restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.history.add(event=event, job=self.job, restart=restart, saved=last_save(self.folder), **fields)


def create(folder: Path, call: str, arguments: Mapping[str, Any], shared: Path, cluster: str) -> JobSpec:
    """The job spec of one folder, not written yet. `shared` holds code/ and logs/, of this job or of a whole array."""
    return JobSpec(
        folder=str(folder.resolve()),
        call=call,
        arguments=arguments,
        directory=os.getcwd(),
        code=str(shared.resolve() / "code"),
        logs=str(shared.resolve() / "logs"),
        cluster=cluster,
        plugins=snapshot.plugin_copies(shared.resolve() / "code"),
    )


def create_pretraining(run: Path, shared: Path, cluster: str) -> JobSpec:
    """Train the run of this folder to its end, from scratch or from its last checkpoint."""
    return create(run, "mls.engine:run", {"folder": str(run.resolve())}, shared, cluster)


def find(folder: str | Path) -> list[Path]:
    """The folders at `folder`, and directly below it, that hold a job spec."""
    files = [file for name in NAMES for file in Path(folder).glob(f"{SUBMISSION}/{name}")]
    files += [file for name in NAMES for file in Path(folder).glob(f"*/{SUBMISSION}/{name}")]
    return list(dict.fromkeys(file.parents[1] for file in files))


def read(folder: str | Path) -> JobSpec:
    for name in NAMES:
        file = Path(folder) / SUBMISSION / name
        if file.is_file():
            return JobSpec(**json.loads(file.read_text()))
    raise LaunchError(f"{folder} was not submitted: `mls submit pretrain` makes runs that can be watched")


def is_submitted(folder: Path) -> bool:
    return any((folder / SUBMISSION / name).is_file() for name in NAMES)


def last_save(folder: str | Path) -> int:
    """The step of the newest checkpoint in a run folder, 0 where there is none."""
    names = (re.search(r"step-(\d+)\.pt$", path.name) for path in Path(folder, "checkpoints").glob("step-*.pt"))
    return max((int(name.group(1)) for name in names if name), default=0)
