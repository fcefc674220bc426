"""The metrics of a run: `metrics.jsonl` always, TensorBoard, W&B and MLflow where asked for. Rank 0 alone writes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mls.config import MonitorConfig
from mls.errors import ConfigError, reason
from mls.files import telling_disk_errors, write_atomically

if TYPE_CHECKING:  # it would load numpy and Pillow for commands that read a log
    from mls.frozen.match_picture import Pixels

DISK_FULL = "free some, and `mls pretrain --resume` goes on"
# What no two runs have in common.
TIMES = {"time", "images_per_second", "data_wait", "monitoring", "probes", "cpu_seconds", "gpu_memory_gib"}
TAIL = 1 << 16  # bytes: a hundred rows
LARGEST_STEP, LARGEST = 1 << 53, 1e300  # what is read: beyond them sums and differences overflow


class MetricsLog:
    """One JSON object a line: {"step": …, "epoch": …, "time": Unix seconds, name: number, …}. `say` tells what is amiss
    with the file."""

    def __init__(
        self,
        folder: Path,
        config: MonitorConfig,
        run_name: str,
        settings: Mapping[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        self.path, self.say = folder / "metrics.jsonl", say
        with telling_disk_errors(self.path, DISK_FULL):
            self.file = open(self.path, "a+b")  # noqa: SIM115 (closed by close())
        self.last: dict[str, float] = {}  # values of each name since this process logs
        self.others = _other_loggers(folder, config, run_name, settings)

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        # JSON knows no NaN: a value that is not finite is written as null.
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with telling_disk_errors(self.path, DISK_FULL):
            self._put_back()
            facts = {"step": step, "epoch": epoch, "time": round(time.time(), 3)}
            self.file.write(json.dumps({**facts, **row}).encode() + b"\n")
            self.file.flush()
        self.last |= {name: value for name, value in row.items() if value is not None}
        self._pass_on(lambda other: other(step, values))

    def show(self, step: int, name: str, picture: Callable[[], Pixels]) -> None:
        """To those who show pictures; else it is not even drawn."""
        if self.others:
            pixels = picture()
            self._pass_on(lambda other: other.show(step, name, pixels))

    def conclude(self) -> None:
        """The run is finished: its settings beside its last values, for tables of many runs."""
        self._pass_on(lambda other: other.conclude(self.last))

    def _pass_on(self, to: Callable[[Any], Any]) -> None:
        """What is only shown elsewhere ends no training: who fails gets nothing more."""
        for other in list(self.others):
            try:
                to(other)
            except Exception as error:  # of a server, a network, a disk
                self.others.remove(other)
                self.say(f"{type(other).__name__.strip('_')} gets nothing more of this run: {reason(error)}")

    def offset(self) -> int:
        """How long the file is now, safely on disk: a resume truncates to it."""
        with telling_disk_errors(self.path, DISK_FULL):
            self._put_back()
            self.file.flush()
            os.fsync(self.file.fileno())
            return self.file.tell()

    def rewind(self, offset: int) -> None:
        """Forget what was written after a checkpoint. Where less is there, or other lines, say so, and go on with a new
        line after those that are."""
        self.file.seek(0)
        whole = self.file.read(offset).rpartition(b"\n")
        kept = len(whole[0]) + len(whole[1])
        if kept < offset:
            self.say(f"{self.path} has lost lines: {kept} of the {offset} bytes that the checkpoint knows of are there")
        self.file.truncate(kept)
        self.file.seek(0, os.SEEK_END)

    def _put_back(self) -> None:
        """Where somebody has deleted or replaced the file while it is open, write it anew from what is open."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self.path), os.fstat(self.file.fileno())):
                return
        self.say(f"{self.path} was deleted or replaced while it was being written: it is put back")
        self.file.seek(0)
        write_atomically(self.path, self.file.read())
        self.file.close()
        self.file = open(self.path, "a+b")  # noqa: SIM115

    def close(self) -> None:
        self.file.close()
        self._pass_on(lambda other: other.close())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line torn by a power cut is left out."""
    return rows_and_odd_lines(path)[0]


def rows_and_odd_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """All rows, and the numbers of the lines that hold none. What is no number is None, as the log writes it."""
    rows: list[dict[str, Any]] = []
    odd: list[int] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), start=1):
        row = _row_of(line)
        if row is None:
            odd.append(number)
        else:
            rows.append(row)
    return rows, odd


def newest_rows(path: Path, most: int = TAIL) -> Iterator[dict[str, Any]]:
    """The rows in the last `most` bytes, the newest first: what a long log says now, without reading it."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        lines = file.read().splitlines()  # the first may be a part of one, which is no row
    yield from (row for row in map(_row_of, reversed(lines)) if row is not None)


def rows_at_the_ends(path: Path) -> list[dict[str, Any]]:
    """In order, the rows in the first and in the last TAIL bytes: where a log began and what it says now."""
    newest = list(newest_rows(path))[::-1]
    if not newest:
        return []
    with open(path, "rb") as file:
        first = [row for row in map(_row_of, file.read(TAIL).splitlines()) if row is not None]
    return [row for row in first if row["step"] < newest[0]["step"]] + newest


def _row_of(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        if not all(type(row[name]) is int and 0 <= row[name] < LARGEST_STEP for name in ("step", "epoch")):
            return None
        return {name: value if _is_number(value) else None for name, value in row.items()}
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST  # NaN is not smaller


def _other_loggers(folder: Path, config: MonitorConfig, run_name: str, settings: Mapping[str, Any]) -> list[Any]:
    others: list[Any] = []
    if config.tensorboard:
        others.append(_TensorBoard(folder, settings))
    if config.wandb:
        others.append(_Wandb(folder, config.wandb, run_name, settings))
    if config.mlflow:
        others.append(_MLflow(folder, config.mlflow, run_name, settings))
    return others


class _TensorBoard:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                'monitor.tensorboard=true needs TensorBoard: pip install "mls[tensorboard]", or set it to false'
            ) from None
        self.writer, self.settings = SummaryWriter(str(folder / "tensorboard")), settings

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def show(self, step: int, name: str, pixels: Pixels) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def conclude(self, last: Mapping[str, float]) -> None:
        """In the tab of hyper-parameters, which knows texts and numbers alone."""
        known = (bool, int, float, str)
        plain = {key: value if isinstance(value, known) else str(value) for key, value in _flat(self.settings)}
        self.writer.add_hparams(plain, {f"final/{name}": value for name, value in last.items()}, run_name=".")

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

    def show(self, step: int, name: str, pixels: Pixels) -> None:
        import wandb  # pyright: ignore

        self.run.log({name: wandb.Image(pixels)}, step=step)

    def conclude(self, last: Mapping[str, float]) -> None:
        self.run.summary.update({f"final/{name}": value for name, value in last.items()})  # its settings are `config`

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """Where $MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, experiment: str, run_name: str, settings: Mapping[str, Any]) -> None:
        try:
            from mlflow import MlflowClient  # pyright: ignore
        except ImportError:
            raise ConfigError(
                f'monitor.mlflow={experiment} needs MLflow: pip install "mls[mlflow]", or unset monitor.mlflow'
            ) from None
        self.settings, kept = settings, folder / "mlflow_run"
        try:
            self.client = MlflowClient()
            if kept.is_file():  # a resumed run goes on in the same run
                self.run = kept.read_text().strip()
                return self.client.update_run(self.run, status="RUNNING")
            found = self.client.get_experiment_by_name(experiment)
            place = found.experiment_id if found else self.client.create_experiment(experiment)
            self.run = self.client.create_run(place, run_name=run_name).info.run_id
        except Exception as error:  # of a server, a database, a network
            raise ConfigError(
                f"MLflow cannot be written to ({reason(error)}): set $MLFLOW_TRACKING_URI, or unset monitor.mlflow"
            ) from None
        write_atomically(kept, self.run.encode())

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # pyright: ignore

        now = int(1000 * time.time())
        self.client.log_batch(self.run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def show(self, step: int, name: str, pixels: Pixels) -> None:
        self.client.log_image(self.run, pixels, key=name, step=step)

    def conclude(self, last: Mapping[str, float]) -> None:
        """Parameters come last, since a resume may change those that compute nothing, and MLflow keeps the first."""
        from mlflow.entities import Param  # pyright: ignore

        flat = [Param(key, str(value)) for key, value in _flat(self.settings)]
        self.client.log_batch(self.run, params=flat)
        for name, value in last.items():
            self.client.log_metric(self.run, f"final/{name}", value)

    def close(self) -> None:
        self.client.set_terminated(self.run)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
