"""A real SLURM for these tests, started once. Where none can be installed they are skipped, and say so."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mls.engine import Run
from mls.slurm import box, job_spec
from mls.slurm.box import Box

Command = Callable[..., subprocess.CompletedProcess[str]]
LIMIT = 300  # seconds until a condition must hold on a busy machine

# 160 steps, two seconds of training on an idle core: time enough to be interrupted once.
SMALL = """data.scenes.count=256 data.scenes.test_count=64 data.batch_size=16 dictionary.size=64 objective.k=5
optim.epochs=10 engine.checkpoint_every=1000 monitor.log_every=2 monitor.health_every=16 monitor.knn_every_epochs=0
model.projection=16 objective.warmup_epochs=0 engine.threads=1""".split()


class Cluster:
    """A box, and the `mls` command of a user who submits to it."""

    def __init__(self, started: Box, folder: Path, command: Command) -> None:
        self.box, self.folder, self.runs, self.command = started, folder, folder / "runs", command
        self.environment = {**started.environment(), "OMP_NUM_THREADS": "1", "MLS_RUNS": str(self.runs)}

    @staticmethod
    def wait_for(condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
        """What `condition` gives once it is true."""
        until = time.monotonic() + limit
        while time.monotonic() < until:
            found = condition()
            if found:
                return found
            time.sleep(0.1)
        raise AssertionError(f"{what}: not within {limit} s")

    def mls(self, *arguments: str, fails: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        done = self.command(*arguments, folder=self.folder, **{**self.environment, **environment})
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done

    def pretrain(self, name: str, *more: str, **environment: str) -> Run:
        self.mls(
            "submit", "pretrain", "mls_scenes_tiny", *SMALL, "--profile", "box", "--name", name, *more, **environment
        )
        return Run(self.runs / name)

    def alone(self, name: str, *more: str, processes: int = 1) -> Run:
        """The same run without SLURM, never stopped."""
        command = ["pretrain", "mls_scenes_tiny", *SMALL, "--name", name, "--quiet", *more]
        done = self.command(*command, processes=processes, folder=self.folder, **self.environment)
        assert done.returncode == 0, done.stderr
        return Run(self.runs / name)

    def state(self, folder: Path | str) -> str:
        """As SLURM has it now."""
        listing = self.box.run_command("scontrol", "-o", "show", "job", str(job_spec.read(folder).job))
        return listing.partition("JobState=")[2].split()[0] if "JobState=" in listing else ""

    def jobs(self, name: str) -> str:
        return self.mls("jobs", name).stdout

    def wait_until_it_trains(self, run: Run, step: int = 20) -> None:
        reached = lambda: any(row["step"] >= step for row in run.metrics())
        self.wait_for(lambda: reached() or self._ended(run.path), f"{run.name} trains to step {step}")
        assert reached(), self.logs(run.path)

    def wait_until_done(self, folder: Path) -> None:
        self.wait_for(lambda: (folder / "DONE").is_file() or self._ended(folder), f"{folder.name} is done")
        assert (folder / "DONE").is_file(), self.logs(folder)

    def wait_until_failed(self, folder: Path) -> None:
        self.wait_for(lambda: self.state(folder) == "FAILED", f"{folder.name} fails")

    def signal(self, run: Run, *how: str) -> None:
        self.box.run_command("scancel", *how, str(job_spec.read(run.path).job))

    def history(self, folder: Path, event: str) -> list[dict[str, Any]]:
        return job_spec.read(folder).history.rows(event=event)

    def logs(self, folder: Path) -> str:
        """What all processes printed, and what became of the job: for a failing test."""
        one = job_spec.read(folder)
        return "\n".join([json.dumps(one.history.rows()), *(file.read_text() for file in one.log_files())])

    def _ended(self, folder: Path) -> bool:
        return self.state(folder) in ("FAILED", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, mls_command: Command) -> Iterator[Cluster]:
    if box.missing():
        pytest.skip(f"no SLURM here ({', '.join(box.missing())} not found): {box.INSTALL}")
    folder = tmp_path_factory.mktemp("slurm")
    started = box.start(folder / "box")
    try:
        yield Cluster(started, folder, mls_command)
    finally:
        box.stop(started.folder)
