"""A run is a folder: its layout, how one is made and found, and which settings may change between its parts."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mls.config import Config, differences, runs_root, to_yaml
from mls.errors import CheckpointError, UserError, command
from mls.files import file_name, runs_folder, write_atomically
from mls.monitor.log import read_metrics
from mls.recipes import load_config


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

    @classmethod
    def create(cls, config: Config) -> Run:
        path = run_folder(config)
        root = path.parent
        try:
            root.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except FileExistsError:
            resume = command("mls pretrain --resume", path)
            raise UserError(f"{path} exists already: choose another run.name, or go on with {resume}") from None
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {error.strerror}; set run.root or $MLS_RUNS") from None
        write_atomically(path / "config.yaml", to_yaml(config).encode())
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at this path, or of this name under $MLS_RUNS. A run may be called like a folder that is here."""
        path = Path(path).expanduser()
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


def _fresh_name(config: Config) -> str:
    salt = f"{time.time_ns()}{os.getpid()}{to_yaml(config)}"
    return f"{config.run.recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{hashlib.sha256(salt.encode()).hexdigest()[:4]}"


# What may change between a checkpoint and its resume, because it changes nothing that is computed.
FREE = ("run.name", "run.root", "run.recipe", "data.root", "data.annotations", "data.workers", "data.max_unreadable")
FREE += ("engine.device", "engine.threads", "engine.checkpoint_every", "engine.checkpoint_minutes")
FREE += ("engine.keep_last", "engine.milestone_epochs", "engine.max_steps", "engine.max_bad_steps", "engine.compile")
FREE += ("dictionary.sharded", "run.plugins", "engine.timeout_minutes", "engine.deterministic")


def refuse_another_configuration(stored: Config, now: Config, where: Path) -> None:
    changed = [
        f"{key} ({before} there, {after} now)"
        for key, before, after in differences(stored, now)
        if key not in FREE and not key.startswith("monitor.")
    ]
    if changed:
        raise CheckpointError(
            f"the checkpoint in {where} belongs to another configuration: {', '.join(changed)}; "
            "set these back, or start a new run"
        )
