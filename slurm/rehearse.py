"""Rehearsals: a run in a SLURM of its own on this machine, one thing that goes wrong, and whether the run went on.
`mls submit pretrain ... --rehearse preempt`."""

from __future__ import annotations

import contextlib
import os
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
from mls.slurm import box, order, scheduler, submit
from mls.slurm.box import Box, Settings
from mls.slurm.order import Order
from mls.slurm.profile import Profile

PATIENCE = 900  # seconds for each stage, on a busy machine

Say = Callable[[str], None]


@dataclass(frozen=True)
class Scenario:
    """What goes wrong, and what a run can be expected to save before it."""

    happens: str
    act: Callable[[Box, Order, Profile], None]
    warned: bool  # does the run hear of it in time to save?
    spare_nodes: int = 0


@dataclass(frozen=True)
class Outcome:
    survived: bool
    text: str


def _preempt(here: Box, one: Order, profile: Profile) -> None:
    here.ask(
        "sbatch", "--partition=high", f"--nodes={profile.nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )


def _kill_node(here: Box, one: Order, profile: Profile) -> None:
    (start, *_) = one.history.rows(event="started", rank=0)
    here.kill_node(start["node"])


def _requeue(here: Box, one: Order, profile: Profile) -> None:
    here.ask("scontrol", "requeue", str(one.job))


def _time_limit(here: Box, one: Order, profile: Profile) -> None:
    """Nothing to do: it comes by itself."""


SCENARIOS = {
    "preempt": Scenario("a job of a higher partition takes the nodes", _preempt, warned=True),
    "timeout": Scenario("its time limit comes", _time_limit, warned=True),
    "kill-node": Scenario("a node dies", _kill_node, warned=False, spare_nodes=1),
    "requeue": Scenario("somebody calls `scontrol requeue`", _requeue, warned=False),
}


def run(what: str, recipe: str, overrides: Sequence[str], profile: Profile, say: Say) -> Outcome:
    """Rehearse one scenario. What it made is deleted again unless the run did not survive."""
    if what not in SCENARIOS:
        raise unknown_name("rehearsal", what, SCENARIOS, LaunchError)
    scenario, profile = SCENARIOS[what], _in_the_box(profile, what)
    folder = Path(tempfile.mkdtemp(prefix="mls-rehearsal-"))
    cpus = profile.tasks_per_node * profile.cpus_per_task
    memory = round(1024 * (profile.memory_gb or 8)) + 1000
    nodes = profile.nodes + scenario.spare_nodes
    try:
        # Saves early, so that there is something to go on from; the user's own number comes later and wins.
        config = load_config(recipe, ["engine.checkpoint_every=20", *overrides, f"run.root={folder / 'runs'}"])
        with _box(folder / "box", Settings(nodes, cpus, profile.gpus_per_node or 0, memory)) as here:
            say(f"a SLURM of {nodes} nodes runs in {folder}")
            made = Run.create(config)
            one = submit.pretraining(made.path, made.path / "submission", "slurm").write()
            (one,) = submit.submit([one], profile, what)
            outcome = _play(scenario, here, profile, _Watch(one, made, say))
    except BaseException:
        say(f"{folder} is left as it was, to look at")
        raise
    if outcome.survived:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


class _Watch:
    """Waits for a run, with a line every few seconds."""

    def __init__(self, one: Order, made: Run, say: Say) -> None:
        self.one, self.made, self.say = one, made, say

    def step(self) -> int:
        rows = self.made.metrics()
        return rows[-1]["step"] if rows else 0

    def starts(self) -> list[dict[str, Any]]:
        return self.one.history.rows(event="started", rank=0)

    def until(self, condition: Callable[[], bool], complaint: str) -> None:
        give_up, told = time.monotonic() + PATIENCE, time.monotonic()
        while not condition():
            failed = self.one.history.rows(event="failed")
            if failed or time.monotonic() > give_up:
                why = failed[-1]["error"] if failed else f"within {PATIENCE} s, SLURM says {self.word()}"
                raise LaunchError(f"not survived: {complaint}: {why}; its log is in {self.one.logs}")
            if time.monotonic() - told > 5:
                told = time.monotonic()
                self.say(f"  step {self.step()}, SLURM says {self.word()}")
            time.sleep(0.1)

    def word(self) -> str:
        job = self.one.job or ""
        return scheduler.states([job]).get(job, "nothing")


def _play(scenario: Scenario, here: Box, profile: Profile, watch: _Watch) -> Outcome:
    made, reached, saved = watch.made, 0, 0

    def started_again() -> bool:
        nonlocal reached, saved  # how far it came before it was stopped: a restart rewinds its log
        if len(watch.starts()) < 2:
            reached, saved = max(reached, watch.step()), max(saved, order.last_save(made.path))
        return len(watch.starts()) > 1 or made.done

    watch.say(f"job {watch.one.job} is submitted; waiting for its first save")
    watch.until(lambda: order.last_save(made.path) > 0, "the run saves nothing")
    watch.say(f"it trains; now {scenario.happens}")
    scenario.act(here, watch.one, profile)
    watch.until(started_again, "it was not started again")
    if len(watch.starts()) < 2:
        raise LaunchError(f"the run was done before anything could happen ({reached} steps): give it more epochs")
    resumed = watch.starts()[1]["saved"]
    watch.say(f"started again at step {resumed}")
    watch.until(lambda: made.done or watch.step() > max(reached, resumed), "it does not go on")
    return _verdict(scenario, reached, saved, resumed, made)


def _verdict(scenario: Scenario, reached: int, saved: int, resumed: int, made: Run) -> Outcome:
    lost = max(0, reached - resumed)
    survived = resumed >= saved and not (scenario.warned and lost)
    every = made.config.engine.checkpoint_every
    lines = [
        f"{scenario.happens}: {'survived' if survived else 'NOT survived'}",
        f"  reached step {reached}, went on from step {resumed}, now at step {made.metrics()[-1]['step']}",
        f"  lost {lost} steps"
        + ("" if scenario.warned or not lost else f", those since the last save (engine.checkpoint_every={every})"),
    ]
    return Outcome(survived, "\n".join(lines))


def _in_the_box(profile: Profile, what: str) -> Profile:
    """The profile's shape on a cluster that knows none of its accounts and partitions."""
    plain = replace(profile, partition="low", account=None, qos=None, constraint=None, options={})
    if what == "timeout":
        # SLURM may warn up to a minute early, and looks at its clock every 30 s.
        return replace(plain, minutes=2, signal_seconds=60)
    return plain


@contextlib.contextmanager
def _box(folder: Path, has: Settings) -> Iterator[Box]:
    """A box that the commands of this process talk to."""
    before = dict(os.environ)
    here = box.start(folder, has)
    try:
        os.environ.clear()
        os.environ.update(here.environment())
        yield here
    finally:
        os.environ.clear()
        os.environ.update(before)
        box.stop(folder)
