"""What became of submitted jobs. A job's end is judged by its own files and by SLURM's word, and both are named."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mls.config import Config
from mls.errors import ConfigError, LaunchError
from mls.monitor.log import read_metrics
from mls.monitor.progress import duration
from mls.recipes import load_config
from mls.results import Results
from mls.slurm import local, order, scheduler
from mls.slurm.order import Order


@dataclass(frozen=True)
class Watched:
    """One job, as `mls jobs` shows it."""

    name: str
    order: Order
    state: str  # one word: queued, running, done, failed, cancelled, lost ...
    why: str  # who says so
    step: str
    eta: str
    restarts: int
    loss: float | None
    results: dict[str, float]  # metric to value, of evaluations of this run


def find(root: Path, wanted: str | None = None) -> list[Order]:
    """The submitted jobs under `root`, oldest first: runs, the runs of a sweep, evaluations. `wanted`: a folder, or the
    name of one under `root`."""
    if wanted is None:
        places = [*root.glob("*/submission/order.json"), *root.glob("*/*/submission/order.json")]
    else:
        base = next((place for place in (Path(wanted), root / wanted) if place.is_dir()), None)
        if base is None:
            raise LaunchError(f"there is no run {wanted} here or under {root}: `mls jobs` lists what was submitted")
        places = [*base.glob("submission/order.json"), *base.glob("*/submission/order.json")]
        if not places:
            raise LaunchError(f"{base} was not submitted: `mls submit pretrain` makes runs that can be watched")
    found = [order.read(place.parents[1]) for place in places]
    return sorted(found, key=lambda one: (one.submitted, one.folder))


def look(orders: list[Order], root: Path) -> list[Watched]:
    """One question to SLURM for all of them."""
    active = [one.job for one in orders if one.cluster == "slurm" and one.job and not one.done]
    known = scheduler.states(active) if active else {}
    results = Results(root / "results.jsonl").rows()
    return [_watch(one, known.get(one.job or ""), root, results) for one in orders]


def judge(one: Order, word: str | None) -> tuple[str, str]:
    """(state, who says so) from the run's files and SLURM's word."""
    events = one.history.rows(job=one.job)
    last = next((row for row in reversed(events) if row["event"] in ("failed", "stopped", "done")), None)
    if one.done:
        return "done", "DONE is there"
    if one.cluster != "slurm":
        if local.alive(one):
            return "running", f"process {one.job}"
        word = "no such process"
    says = f"SLURM: {word}" if word else "SLURM does not know the job any more"
    if word and not word.startswith(scheduler.ENDED) and word != "no such process":
        waits = word.startswith("PENDING")
        again = waits and any(row["event"] == "started" for row in events)
        return ("queued again" if again else "queued" if waits else "running"), says
    failed = [row for row in events if row["event"] == "failed"]
    if failed:
        return "failed", f"{failed[-1]['error']} ({says})"
    if word == "CANCELLED":
        saved = f"saved at step {last['saved']}, " if last and last["saved"] else ""
        return "cancelled", f"{saved}{says}"
    if last is not None and last["event"] == "stopped":
        return "stopped", f"{last['message']} ({says})"
    return "lost", f"it left no word of its own, {says}; it goes on from step {order.last_save(one.folder)}"


def progress(one: Order) -> tuple[str, str, float | None]:
    """(step of all, time left, last loss) of a pretraining run, from its metrics and its last save."""
    folder = Path(one.folder)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row.get("loss") is not None]
    if not rows:
        return "", "", None
    step, loss = rows[-1]["step"], rows[-1]["loss"]
    config, total = _config(folder), None
    try:
        card = json.loads((folder / "backbone.json").read_text())
        total = round(config.optim.epochs * card["step"] / card["epochs"]) if config else None
    except (OSError, ValueError, ZeroDivisionError):
        pass  # nothing was saved yet
    if config is None or total is None:
        return str(step), "", loss
    speed = rows[-1].get("images_per_second")
    left = duration((total - step) * config.data.batch_size / speed) if speed and step < total else ""
    return f"{step}/{total}", left, loss


def log_tail(one: Order, lines: int = 10) -> list[str]:
    """The last lines of what rank 0 printed, its errors first."""
    for file in one.log_files():
        text = file.read_text(errors="replace").rstrip().splitlines()
        if text:
            return text[-lines:]
    return []


def _watch(one: Order, word: str | None, root: Path, results: list[dict[str, Any]]) -> Watched:
    state, why = judge(one, word)
    step, eta, loss = progress(one)
    folder = Path(one.folder)
    name = os.path.relpath(folder, root) if folder.is_relative_to(root.resolve()) else str(folder)
    starts = one.history.rows(event="started", rank=0)
    mine = {row["metric"]: row["value"] for row in results if row.get("weights") == one.folder}
    eta = eta if state == "running" else ""
    return Watched(name, one, state, why, step, eta, max(0, len(starts) - 1), loss, mine)


def _config(folder: Path) -> Config | None:
    try:
        return load_config(folder / "config.yaml")
    except ConfigError:
        return None
