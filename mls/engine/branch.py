"""A new run that goes on from a step of another one with another configuration, such as after a divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mls.config import Config, differences, to_dict
from mls.engine.checkpoint import Checkpoints, non_finite, read
from mls.engine.events import EventLog
from mls.engine.run import Run
from mls.errors import CheckpointError
from mls.files import write_atomically
from mls.monitor import moments
from mls.recipes import load_config


def create_branch(parent: Run, step: int, overrides: Sequence[str] = (), sized: Config | None = None) -> Run:
    """The new run, not trained yet: beside its parent and named after it, unless the overrides say else. It begins with
    the parent's state, metrics and moments up to this step; `parent.yaml` is the parent's configuration. `sized`: the
    configuration with numbers for what the overrides leave `auto`."""
    config = sized or load_config(parent.path / "config.yaml", overrides)
    set_here = {override.partition("=")[0] for override in overrides}
    own = {"name": f"{parent.name}-from-{step}", "root": str(parent.path.parent)}
    config = replace(config, run=replace(config.run, **{key: own[key] for key in own if f"run.{key}" not in set_here}))
    return Run.create(config, lambda folder: _fill(folder, parent, step, config))


def _fill(folder: Path, parent: Run, step: int, config: Config) -> None:
    steps = Checkpoints(parent.checkpoints, 1).steps()
    if step not in steps:
        kept = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{parent.checkpoints} has no checkpoint of step {step}: give one that is kept ({kept})")
    state = read(Checkpoints(parent.checkpoints, 1).path(step))
    if broken := next(non_finite({key: state[key] for key in ("method", "optimizer")}), ""):
        raise CheckpointError(f"the checkpoint of step {step} is not finite itself ({broken}): give an earlier step")
    if parent.config.optim.name != config.optim.name:
        raise CheckpointError(
            f"optim.name={config.optim.name} cannot go on from another optimizer's state: leave it out"
        )
    Checkpoints(folder / "checkpoints", 1).save(step, {**state, "config": to_dict(config)})
    if (parent.path / "metrics.jsonl").is_file():
        with open(parent.path / "metrics.jsonl", "rb") as file:
            write_atomically(folder / "metrics.jsonl", file.read(state["log_offset"]))
    for moment in moments.read(parent.path):
        if moment.step <= step:
            moments.write(folder, moment)
    origin = f"# The configuration of {parent.path.resolve()}, of whose step {step} this run goes on\n"
    write_atomically(folder / "parent.yaml", origin.encode() + (parent.path / "config.yaml").read_bytes())
    changes = {key: [before, after] for key, before, after in differences(parent.config, config)}
    EventLog(folder / "events.jsonl").write("branch", run=str(parent.path.resolve()), step=step, changes=changes)
