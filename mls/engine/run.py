"""A run is a folder: its layout, how one is made and found, and which settings may change between its parts."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mls.config import NOT_A_KEY, Config, ScenesConfig, differences, runs_root, to_yaml
from mls.engine.events import EventLog
from mls.errors import CheckpointError, UserError, command
from mls.files import file_name, runs_folder, sync_folder, write_atomically
from mls.locks import locked
from mls.monitor.log import read_metrics
from mls.recipes import load_config, override


@dataclass(frozen=True)
class Run:
    """A folder with `config.yaml`, `metrics.jsonl`, `checkpoints/`, `backbone.safetensors`, `DONE`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Config:
        return load_config(self.path / "config.yaml")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def done(self) -> bool:
        return (self.path / "DONE").is_file()

    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.path / "metrics.jsonl")

    def last(self, name: str) -> float | None:
        """The last value of a metric."""
        values = [row[name] for row in self.metrics() if row.get(name) is not None]
        return values[-1] if values else None

    def branch_command(self, step: int, changes: Iterable[tuple[str, Any]]) -> str:
        """What trains a new run from this step of this one."""
        words = [
            override(key, value) if isinstance(value, str) else f"{key}={json.dumps(value)}"
            for key, value in changes
            if value != NOT_A_KEY
        ]
        return command("mls pretrain --resume", self.path, "--from-step", step, *words)

    @property
    def last_saved(self) -> int:
        """The step of the last checkpoint that was written, by the events; 0: none."""
        return EventLog(self.path / "events.jsonl").last_saved

    def refuse_lost_checkpoints(self) -> None:
        """Refuse to train from the first step what was saved before: its files would be written over."""
        if any(self.checkpoints.glob("step-*.pt")):
            return
        reached = max((row.get("step", 0) for row in self.metrics()), default=0)
        every, signs = self.config.engine.checkpoint_every, []
        if self.last_saved:
            signs.append(f"events.jsonl says that step {self.last_saved} was saved")
        if (self.path / "backbone.safetensors").exists():
            signs.append("backbone.safetensors holds trained weights")
        if reached > 3 * every:  # the third save begins when the second is written
            signs.append(f"metrics.jsonl goes up to step {reached}, and the run saves every {every}")
        if signs:
            anew = command("mls pretrain", self.path / "config.yaml", "--name", f"{self.name}-again")
            raise CheckpointError(
                f"{self.checkpoints} holds no checkpoint though {' and '.join(signs)}: put the checkpoints back, or "
                f"train anew under another name ({anew})"
            )

    @classmethod
    def create(cls, config: Config, fill: Callable[[Path], None] = lambda folder: None) -> Run:
        """A new run folder, into which `fill` may write more. It is made under another name and then renamed: a kill
        leaves no name that is taken and holds no run."""
        path = run_folder(config)
        root = path.parent
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not os.access(root, os.W_OK):
                raise PermissionError(errno.EACCES, f"{root} cannot be written")
            with _making(root) as making:
                if path.exists() and not (path.is_dir() and not any(path.iterdir())):
                    raise _exists_already(path)
                making.mkdir()
                write_atomically(making / "config.yaml", to_yaml(config).encode())
                fill(making)
                making.rename(path)
                sync_folder(root)
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {error.strerror}; set run.root or $MLS_RUNS") from None
        return cls(path)

    def remove(self) -> None:
        """Of a run in which nothing was trained."""
        with _making(self.path.parent) as making:
            self.path.rename(making)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at this path, or of this name under $MLS_RUNS. A run may be called like a folder that is here."""
        path = Path(path).expanduser()
        path = path if path.name not in ("", "..") else path.resolve()  # "." has no name
        places = (path, runs_folder() / path)
        for place in places:
            if (place / "config.yaml").is_file():
                return cls(place)
        tried = next((place for place in places if place.is_dir()), path)
        raise UserError(f"{tried} is not a run folder (it has no config.yaml): give the folder that a run printed")


def run_folder(config: Config, fresh: str = "") -> Path:
    """Where the run of a configuration lies, or will; without a name of its own under a `fresh` one."""
    name = config.run.name if config.run.name is not None else fresh or _fresh_name(config)
    return runs_root(config) / file_name(name, "run.name")


@contextlib.contextmanager
def _making(root: Path) -> Iterator[Path]:
    """A name in this folder for a run that is not whole. One process at a time uses it: what is there was left by one
    that is dead."""
    making = root / ".making"
    with locked(root / ".making.lock", f"a run is being made in {root}", wait=True):
        shutil.rmtree(making, ignore_errors=True)
        try:
            yield making
        finally:
            shutil.rmtree(making, ignore_errors=True)


def _exists_already(path: Path) -> UserError:
    if (path / "config.yaml").is_file():
        resume = command("mls pretrain --resume", path)
        return UserError(f"{path} exists already: choose another run.name, or go on with {resume}")
    return UserError(f"{path} exists already and is no run: choose another run.name, or remove it")


def _fresh_name(config: Config) -> str:
    salt = f"{time.time_ns()}{os.getpid()}{to_yaml(config)}"
    return f"{config.run.recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{hashlib.sha256(salt.encode()).hexdigest()[:4]}"


# What may change between a checkpoint and its resume, because it changes nothing that is computed.
FREE = ("run.name", "run.root", "run.recipe", "data.root", "data.annotations", "data.workers", "data.max_unreadable")
FREE += ("engine.device", "engine.threads", "engine.checkpoint_every", "engine.checkpoint_minutes")
FREE += ("engine.keep_last", "engine.milestone_epochs", "engine.max_steps", "engine.max_bad_steps", "engine.compile")
FREE += ("engine.checkpointing",)
FREE += ("dictionary.sharded", "run.plugins", "engine.timeout_minutes", "engine.deterministic")


def computes(key: str) -> bool:
    """Whether a key changes what is computed."""
    return key not in FREE and not key.startswith("monitor.")


def computed_differently(first: Config, second: Config) -> list[tuple[str, Any, Any]]:
    """The keys, with both values, in which two configurations differ and which change what is computed."""
    return [row for row in differences(first, second) if computes(row[0])]


def compared(first: Config, second: Config) -> list[tuple[str, Any, Any]]:
    """The same for two runs, where another folder may hold other images: a resume compares their names instead."""
    roots = first.data.root, second.data.root
    return computed_differently(first, second) + ([("data.root", *roots)] if roots[0] != roots[1] else [])


def probe_of(config: Config) -> list[str]:
    """The words of `mls eval run` that probe such a run: on the scenes that it knows, else on labelled images.

    >>> probe_of(Config())
    ['linear', 'data.name=folder', 'data.root=/path/to/labelled/images']
    """
    if config.data.source != "scenes":
        return ["linear", "data.name=folder", "data.root=/path/to/labelled/images"]
    made, usual, keys = vars(config.data.scenes), vars(ScenesConfig()), ("size", "seed", "style", "objects")
    return ["linear_scenes", *(f"data.scenes.{key}={made[key]}" for key in keys if made[key] != usual[key])]


def refuse_another_configuration(stored: Config, now: Config, run: Run, step: int) -> None:
    if changed := computed_differently(stored, now):
        named = ", ".join(f"{key} ({before} there, {after} now)" for key, before, after in changed)
        again = f"let a new run go on from there: {run.branch_command(step, [(key, now) for key, _, now in changed])}"
        raise CheckpointError(
            f"the checkpoint in {run.checkpoints} belongs to another configuration: {named}; set these back, or "
            f"{again if _of_one_size(stored, now) else 'start a new run'}"
        )


def _of_one_size(first: Config, second: Config) -> bool:
    """Can one go on from the other's state?"""
    from mls.core import methods

    sizes = lambda config: {name: one.shape for name, one in methods.planned(config).named_parameters()}
    try:
        return first.optim.name == second.optim.name and sizes(first) == sizes(second)
    except Exception:  # a network from elsewhere, a method that needs the labels of the images
        return True
