"""Rehearsals: a run in a SLURM of its own on this machine, one failure, and whether the run resumed.
`mls submit pretrain ... --rehearse preempt`."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mls.engine import Run
from mls.errors import LaunchError, unknown_name
from mls.recipes import load_config
from mls.slurm import box, job_spec, scheduler, submit
from mls.slurm.box import Box, Settings
from mls.slurm.job_spec import JobSpec
from mls.slurm.profile import Profile

TIMEOUT = 900  # seconds for each stage, on a busy machine

Report = Callable[[str], None]


@dataclass(frozen=True)
class Scenario:
    """A failure, and whether a run gets a signal in time to save before it."""

    description: str
    trigger: Callable[[Box, JobSpec, Profile], None]
    signalled: bool  # a signal comes early enough to save
    spare_nodes: int = 0


@dataclass(frozen=True)
class Outcome:
    survived: bool
    text: str


def _preempt(cluster: Box, spec: JobSpec, profile: Profile) -> None:
    cluster.run_command(
        "sbatch", "--partition=high", f"--nodes={profile.nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )


def _kill_node(cluster: Box, spec: JobSpec, profile: Profile) -> None:
    (start, *_) = spec.history.rows(event="started", rank=0)
    cluster.kill_node(start["node"])


def _requeue(cluster: Box, spec: JobSpec, profile: Profile) -> None:
    cluster.run_command("scontrol", "requeue", str(spec.job))


def _time_limit(cluster: Box, spec: JobSpec, profile: Profile) -> None:
    """Nothing to trigger: the time limit comes by itself."""


SCENARIOS = {
    "preempt": Scenario("a job of a higher partition takes the nodes", _preempt, signalled=True),
    "timeout": Scenario("its time limit comes", _time_limit, signalled=True),
    "kill-node": Scenario("a node dies", _kill_node, signalled=False, spare_nodes=1),
    "requeue": Scenario("somebody calls `scontrol requeue`", _requeue, signalled=False),
}


def run(what: str, recipe: str, overrides: Sequence[str], profile: Profile, report: Report) -> Outcome:
    """Rehearse one scenario. Its folder is deleted afterwards if the run survived."""
    if what not in SCENARIOS:
        raise unknown_name("rehearsal", what, SCENARIOS, LaunchError)
    scenario, profile = SCENARIOS[what], _in_the_box(profile, what)
    folder = Path(tempfile.mkdtemp(prefix="mls-rehearsal-"))
    cpus = profile.tasks_per_node * profile.cpus_per_task
    memory = round(1024 * (profile.memory_gb or 8)) + 1000
    nodes = profile.nodes + scenario.spare_nodes
    try:
        # Saves early, so that there is a checkpoint to resume from; the user's own overrides come later and win.
        config = load_config(recipe, ["engine.checkpoint_every=20", *overrides, f"run.root={folder / 'runs'}"])
        with _box(folder / "box", Settings(nodes, cpus, profile.gpus_per_node or 0, memory)) as cluster:
            report(f"a SLURM of {nodes} nodes runs in {folder}")
            made = Run.create(config)
            spec = job_spec.create_pretraining(made.path, made.path / "submission", "slurm").write()
            (spec,) = submit.submit([spec], profile, what)
            outcome = _run_scenario(scenario, cluster, profile, _RunMonitor(spec, made, report))
    except BaseException:
        report(f"{folder} is left as it was, to look at")
        raise
    if outcome.survived:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


class _RunMonitor:
    """Waits for conditions of a run and reports its step every few seconds."""

    def __init__(self, spec: JobSpec, run: Run, report: Report) -> None:
        self.spec, self.run, self.report = spec, run, report

    def step(self) -> int:
        rows = self.run.metrics()
        return rows[-1]["step"] if rows else 0

    def starts(self) -> list[dict[str, Any]]:
        return self.spec.history.rows(event="started", rank=0)

    def until(self, condition: Callable[[], bool], complaint: str) -> None:
        until, reported = time.monotonic() + TIMEOUT, time.monotonic()
        while not condition():
            failed = self.spec.history.rows(event="failed")
            if failed or time.monotonic() > until:
                why = failed[-1]["error"] if failed else f"within {TIMEOUT} s, SLURM says {self.slurm_state()}"
                raise LaunchError(f"not survived: {complaint}: {why}; its log is in {self.spec.logs}")
            if time.monotonic() - reported > 5:
                reported = time.monotonic()
                self.report(f"  step {self.step()}, SLURM says {self.slurm_state()}")
            time.sleep(0.1)

    def slurm_state(self) -> str:
        job = self.spec.job or ""
        return scheduler.states([job]).get(job, "nothing")


def _run_scenario(scenario: Scenario, cluster: Box, profile: Profile, monitor: _RunMonitor) -> Outcome:
    made, reached, saved = monitor.run, 0, 0

    def started_again() -> bool:
        nonlocal reached, saved  # before the restart, which truncates the log of metrics
        if len(monitor.starts()) < 2:
            reached, saved = max(reached, monitor.step()), max(saved, job_spec.last_save(made.path))
        return len(monitor.starts()) > 1 or made.done

    monitor.report(f"job {monitor.spec.job} is submitted; waiting for its first save")
    monitor.until(lambda: job_spec.last_save(made.path) > 0, "the run saves nothing")
    monitor.report(f"it trains; now {scenario.description}")
    scenario.trigger(cluster, monitor.spec, profile)
    monitor.until(started_again, "it was not started again")
    if len(monitor.starts()) < 2:
        raise LaunchError(f"the run was done before anything could happen ({reached} steps): give it more epochs")
    resumed = monitor.starts()[1]["saved"]
    monitor.report(f"started again at step {resumed}")
    monitor.until(lambda: made.done or monitor.step() > max(reached, resumed), "it does not go on")
    return _verdict(scenario, reached, saved, resumed, made)


def _verdict(scenario: Scenario, reached: int, saved: int, resumed: int, made: Run) -> Outcome:
    lost = max(0, reached - resumed)
    survived = resumed >= saved and not (scenario.signalled and lost)
    every = made.config.engine.checkpoint_every
    lines = [
        f"{scenario.description}: {'survived' if survived else 'NOT survived'}",
        f"  reached step {reached}, went on from step {resumed}, now at step {made.metrics()[-1]['step']}",
        f"  lost {lost} steps"
        + ("" if scenario.signalled or not lost else f", those since the last save (engine.checkpoint_every={every})"),
    ]
    return Outcome(survived, "\n".join(lines))


def _in_the_box(profile: Profile, what: str) -> Profile:
    """The profile without accounts and partitions, which the private SLURM does not have."""
    plain = replace(profile, partition="low", account=None, qos=None, constraint=None, options={})
    if what == "timeout":
        # SLURM may send the signal up to a minute early, and checks time limits every 30 s.
        return replace(plain, minutes=2, signal_seconds=60)
    return plain


@contextlib.contextmanager
def _box(folder: Path, settings: Settings) -> Iterator[Box]:
    """A private SLURM, used by the commands of this process."""
    cluster = box.start(folder, settings)
    try:
        with scheduler.environment(cluster.environment()):
            yield cluster
    finally:
        box.stop(folder)
