"""Commands killed at any moment and started again: nothing may be lost, and the result is that of a run undisturbed."""

from __future__ import annotations

import json
import random
import shutil
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from mls.monitor.log import TIMES
from mls.tools.bench.faults import fault
from mls.tools.bench.faults.commands import Command, run

TINY = """mls_scenes_tiny data.scenes.count=96 data.scenes.test_count=32 data.batch_size=8 dictionary.size=32
objective.k=5 objective.warmup_epochs=0 optim.epochs=1 engine.checkpoint_every=2 monitor.log_every=2
monitor.health_every=8 monitor.knn_images=32 model.projection=16 engine.threads=1 run.name=run""".split()
GOLDEN = 0.618034  # its multiples, less their whole parts, lie evenly between 0 and 1, however many they are
RESUME = ("pretrain", "--resume", "runs/run", "engine.max_steps=null")


@fault("kill -9 at a random moment of pretraining, then --resume", tries=40)
def pretraining(folder: Path, number: int) -> str:
    command = Command(folder, "pretrain", *TINY)
    time.sleep(random.Random(number).uniform(0, undisturbed()[1]))
    command.send()
    command.code()
    return unless_equal(folder)


@fault("kill -9 right after a write, fsync, rename or deletion of pretraining, and of its --resume", tries=40)
def pretraining_at_a_change(folder: Path, number: int) -> str:
    share = number * GOLDEN % 1
    run(folder, "pretrain", *TINY, dies_at=1 + int(share * undisturbed()[2]))
    if number % 2 and (folder / "runs" / "run").exists():
        run(folder, *RESUME, dies_at=1 + int(random.Random(number).random() * (1 - share) * undisturbed()[2]))
    return unless_equal(folder)


@fault("two --resume at once of a run that was killed", tries=15)
def two_resumes(folder: Path, number: int) -> str:
    shutil.copytree(killed(), folder / "runs")
    first = Command(folder, *RESUME)
    time.sleep(random.Random(number).choice([0, 0, 0.1, 0.5]))
    second = Command(folder, *RESUME)
    ended = sorted((one.code(), one.words.strip().splitlines()[-1]) for one in (first, second))
    refused = [words for code, words in ended if code == 2 and " is being trained by process " in words]
    if ended[0][0] != 0 or (ended[1][0] != 0 and not refused):
        return f"they ended so: {ended}"
    return unless_equal(folder, resume=False)


def unless_equal(folder: Path, resume: bool = True) -> str:
    """ "" where the run, started again, ends in the weights and log of a run undisturbed, and leaves nothing else."""
    run_folder = folder / "runs" / "run"
    code, words = run(folder, *(RESUME if run_folder.exists() else ("pretrain", *TINY))) if resume else (0, "")
    if code != 0 or "Traceback" in words:
        return f"it did not go on: {words.strip().splitlines()[-1]}"
    if content(run_folder) != undisturbed()[0]:
        return "another result than that of a run undisturbed"
    left = [str(path.relative_to(folder)) for path in (folder / "runs").rglob(".*") if path.suffix != ".lock"]
    return f"left behind: {left}" if left else ""  # a lock names a holder that is dead, and stands in nobody's way


def content(run_folder: Path) -> tuple[bytes, list[Any]]:
    """The weights, and the log without what depends on the clock."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
    return (run_folder / "backbone.safetensors").read_bytes(), kept


@cache
def undisturbed() -> tuple[tuple[bytes, list[Any]], float, int]:
    """What the run ends in, the seconds that it takes, and how often it changes the file system."""
    folder = Path(mkdtemp(prefix="mls-fault-"))
    run(folder, "config", "mls_scenes_tiny")  # the first start pays for all imports
    began = time.monotonic()
    command = Command(folder, "pretrain", *TINY, dies_at=0)
    assert command.code() == 0, command.words
    return content(folder / "runs" / "run"), time.monotonic() - began, command.changes


@cache
def killed() -> Path:
    """The folder of a run that was killed when a part was saved."""
    folder = Path(mkdtemp(prefix="mls-fault-"))
    run(folder, "pretrain", *TINY, dies_at=int(0.8 * undisturbed()[2]))
    return folder / "runs"


# ------------------------------------------------------------------------------------------------- one part each, cheap


@fault("kill -9 after each single change that saving, exporting and logging make", tries=250, quick=2)
def saving(folder: Path, number: int) -> str:
    _, words = run(folder, folder, call=count, dies_at=1 + number % changes_of(count))
    code, words = run(folder, folder, call=count)
    if code != 0:
        return f"it did not go on: {words.strip().splitlines()[-1]}"
    return unless_counted(folder)


@fault("kill -9 after each single change that making a run folder makes", tries=16, quick=2)
def making(folder: Path, number: int) -> str:
    run(folder, folder, call=make, dies_at=1 + number % changes_of(make))
    code, words = run(folder, folder, call=make)
    if code != 0 and "exists already: choose another run.name, or go on" not in words:
        return f"the name is lost: {words.strip().splitlines()[-1]}"
    left = {path.name for path in (folder / "runs").iterdir()} - {"run"}
    return f"left behind: {left}" if left else ""


@fault("kill -9 after each single change that branching a new run off a checkpoint makes", tries=20)
def branching(folder: Path, number: int) -> str:
    shutil.copytree(killed(), folder / "runs")
    run(folder, folder, call=branch, dies_at=1 + int(number * GOLDEN % 1 * changes_of(branch, killed())))
    code, words = run(folder, folder, call=branch)
    if code != 0 and "exists already: choose another run.name, or go on" not in words:
        return f"the name is lost: {words.strip().splitlines()[-1]}"
    left = {path.name for path in (folder / "runs").iterdir()} - {"run", "new"}
    return f"left behind: {left}" if left else ""


@fault("kill -9 of processes that count under one lock", tries=20)
def counting(folder: Path, number: int) -> str:
    drawn = random.Random(number)
    processes = [Command(folder, folder, call=add_up) for _ in range(6)]
    for process in processes[:3]:
        time.sleep(drawn.uniform(0, 0.2))
        process.send()
    codes = [process.code() for process in processes]
    rows = (folder / "log").read_text().split()
    inside = ""
    for row in rows:  # "in" and "out" of one process follow each other, except where it was killed inside
        what, _, pid = row.partition("-")
        if what == "out" and pid != inside:
            return f"two were inside at once: {rows}"
        inside = pid if what == "in" else ""
    return "" if codes[3:] == [0, 0, 0] else f"they ended so: {codes}"


def add_up(folder: Path) -> None:
    import os

    from mls.locks import locked

    for _ in range(10):
        with locked(folder / ".lock", "it is counted", wait=True):
            for what in ("in", "out"):
                with open(folder / "log", "a") as file:
                    file.write(f"{what}-{os.getpid()}\n")
                time.sleep(0.002)


def make(folder: Path) -> None:
    from mls.engine import Run
    from mls.errors import UserError
    from mls.recipes import load_config

    try:
        Run.create(load_config("mls_scenes_tiny", ["run.name=run"]))
    except UserError as error:
        assert Run.open(folder / "runs" / "run").config.run.name == "run"
        raise SystemExit(str(error)) from None


def branch(folder: Path) -> None:
    from mls.engine import Run
    from mls.engine.branch import create_branch
    from mls.engine.checkpoint import Checkpoints
    from mls.errors import UserError

    parent = Run.open(folder / "runs" / "run")
    step = Checkpoints(parent.checkpoints, 1).steps()[0]
    try:
        create_branch(parent, step, ["run.name=new", "optim.lr=0.01"])
    except UserError as error:
        made = Run.open(folder / "runs" / "new")
        state = Checkpoints(made.checkpoints, 1).newest()
        assert made.config.optim.lr == 0.01 and state is not None and state["step"] == step
        raise SystemExit(str(error)) from None


def count(folder: Path) -> None:
    """A training whose numbers are n after step n."""
    import torch
    from torch import nn

    from mls.config import AugmentConfig, MonitorConfig
    from mls.engine.checkpoint import Checkpoints
    from mls.engine.session import Saving, Session
    from mls.locks import locked
    from mls.models import save_backbone
    from mls.monitor.log import MetricsLog

    class Counting:
        step, offset = 0, 0
        network: Any = nn.Linear(4, 4)

        def state_dict(self) -> dict[str, Any]:
            return {"step": self.step, "weights": self.network.weight, "offset": log.offset()}

        def export(self, state: dict[str, Any]) -> None:
            save_backbone(folder, self.network, {"step": state["step"]}, AugmentConfig(), {"w": state["weights"]})

    training = Counting()
    training.network.feature_dim = 4
    training.network.weight.data.zero_()
    with locked(folder / ".lock", f"{folder} is being counted") as lock:
        store = Checkpoints(folder / "checkpoints", keep_last=2)
        saving = Saving(store, folder / "events.jsonl", 1e9, 1, lambda state: lock.check(), training.export)
        session = Session(training, 4, saving, torch.device("cpu"))
        if state := session.restore():
            training.step, training.offset = state["step"], state["offset"]
            training.network.weight.data.copy_(state["weights"])
        log = MetricsLog(folder, MonitorConfig(), "", {})
        log.rewind(training.offset)
        with session.running(quiet=True):
            while training.step < 4:
                training.step += 1
                training.network.weight.data += 1
                log.write(training.step, 1, {"number": float(training.network.weight[0, 0])})
                session.end_step()
                session.writer.wait()  # so that all changes have an order


def unless_counted(folder: Path) -> str:
    from safetensors.torch import load_file

    from mls.engine.checkpoint import Checkpoints

    state = Checkpoints(folder / "checkpoints", 1).newest()
    if state is None or state["step"] != 4 or not (state["weights"] == 4).all():
        return f"another state: {state}"
    if not (load_file(folder / "backbone.safetensors")["w"] == 4).all():
        return "other weights were exported"
    _, rows = content(folder)
    if rows != [{"step": step, "epoch": 1, "number": step} for step in (1, 2, 3, 4)]:
        return f"another log: {rows}"
    left = [path.name for path in [*folder.rglob(".step*"), *folder.glob(".lock*")]]
    return f"left behind: {left}" if left else ""


@cache
def changes_of(call: Any, runs: Path | None = None) -> int:
    folder = Path(mkdtemp(prefix="mls-fault-"))
    if runs is not None:
        shutil.copytree(runs, folder / "runs")
    command = Command(folder, folder, call=call, dies_at=0)
    assert command.code() == 0, command.words
    return command.changes
