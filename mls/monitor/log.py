"""The metrics of a run: `metrics.jsonl` always, TensorBoard and W&B where asked for. Rank 0 writes, nobody else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mls.config import MonitorConfig
from mls.errors import ConfigError, UserError


class MetricsLog:
    """One JSON object a line: {"step": …, "epoch": …, name: number, …}."""

    def __init__(self, folder: Path, config: MonitorConfig, run_name: str, settings: Mapping[str, Any]) -> None:
        self.path = folder / "metrics.jsonl"
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close())
        self.others = _other_loggers(folder, config, run_name, settings)

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        # JSON knows no NaN: a value that is not finite is written as null.
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self.file.write(json.dumps({"step": step, "epoch": epoch, **row}) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; free some disk space and resume") from error
        for other in self.others:
            other(step, values)

    def offset(self) -> int:
        """How long the file is now, safely on disk: a resume truncates to it."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def rewind(self, offset: int) -> None:
        """Forget what was written after a checkpoint."""
        self.file.truncate(offset)
        self.file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self.file.close()
        for other in self.others:
            getattr(other, "close", lambda: None)()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line torn by a power cut is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _other_loggers(folder: Path, config: MonitorConfig, run_name: str, settings: Mapping[str, Any]) -> list[Any]:
    others: list[Any] = []
    if config.tensorboard:
        others.append(_TensorBoard(folder))
    if config.wandb:
        others.append(_Wandb(folder, config.wandb, run_name, settings))
    return others


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                'monitor.tensorboard=true needs TensorBoard: pip install "mls[tensorboard]", or set it to false'
            ) from None
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, folder: Path, project: str, run_name: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore
        except ImportError:
            raise ConfigError(
                f'monitor.wandb={project} needs wandb: pip install "mls[wandb]", or unset monitor.wandb'
            ) from None
        # The folder's name is the id, so a resumed run goes on in the same W&B run.
        self.run = wandb.init(
            project=project, name=run_name, id=run_name, resume="allow", dir=str(folder), config=dict(settings)
        )

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()
