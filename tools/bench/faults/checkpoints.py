"""What a run keeps, damaged, deleted or poisoned: the right values are read or the fault is told."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from mls.tools.bench.faults import fault
from mls.tools.bench.faults.commands import run
from mls.tools.bench.faults.kills import TINY, killed


@fault("random damage to a checkpoint: bits, blocks of zeros, cuts, foreign bytes, at any place", tries=500, quick=30)
def damage(folder: Path, number: int) -> str:
    from mls.engine.checkpoint import Checkpoints

    path = Checkpoints(folder, 1).save(3, state())
    return read_after_damage(path, number)


@fault("the same damage to a checkpoint of version 0.1 whose .json is gone", tries=500, quick=30)
def damage_to_an_old_one(folder: Path, number: int) -> str:
    import torch

    path = folder / "step-00000003.pt"
    torch.save(state(), path)
    return read_after_damage(path, number)


@fault(
    "random damage to the newest of three checkpoints: the one before it is taken, and that is said", tries=100, quick=5
)
def going_back(folder: Path, number: int) -> str:
    from mls.engine.checkpoint import Checkpoints

    store, said = Checkpoints(folder, 3), list[str]()
    for step in (1, 2, 3):
        path = store.save(step, {**state(), "step": step})
    path.write_bytes(damaged(path.read_bytes(), number))
    found = store.newest(said.append)
    if found is None or not equal({**found, "step": 3}, state()):
        return "other values were read"
    return "" if found["step"] == 3 or "going back" in "".join(said) else "it went back in silence"


@fault("metrics.jsonl deleted, cut, overwritten or lengthened between two parts of a run", tries=200, quick=10)
def log_between(folder: Path, number: int) -> str:
    from mls.config import MonitorConfig
    from mls.monitor.log import MetricsLog, read_metrics

    drawn, said = random.Random(number), list[str]()
    path, log = folder / "metrics.jsonl", MetricsLog(folder, MonitorConfig(), "", {})
    for step in range(1, 9):
        log.write(step, 1, {"loss": drawn.random()})
    offset = log.offset()
    before = path.read_bytes()
    log.write(9, 1, {"loss": 0.5})
    log.close()
    kind = drawn.choice(["deleted", "cut", "overwritten", "lengthened"])
    cut = drawn.randrange(offset)
    changed = {"deleted": b"", "cut": before[:cut], "overwritten": before[:cut] + b"\0" * 400, "lengthened": before * 2}
    path.write_bytes(changed[kind])
    if kind == "deleted":
        path.unlink()
    log = MetricsLog(folder, MonitorConfig(), "", {}, said.append)
    log.rewind(offset)
    log.write(9, 1, {"loss": 0.5})
    log.close()
    after = path.read_bytes()
    if b"\0" in after or [json.loads(line)["step"] for line in after.splitlines()] != [
        r["step"] for r in read_metrics(path)
    ]:
        return f"{kind}: the log does not go on cleanly"
    whole = after.startswith(before)
    return "" if whole or said else f"{kind}: lines are gone in silence"


@fault("metrics.jsonl deleted or replaced while a run writes it", tries=100, quick=5)
def log_while_running(folder: Path, number: int) -> str:
    from mls.config import MonitorConfig
    from mls.monitor.log import MetricsLog, read_metrics

    drawn, said = random.Random(number), list[str]()
    path, log = folder / "metrics.jsonl", MetricsLog(folder, MonitorConfig(), "", {}, said.append)
    at = drawn.randrange(1, 9)
    for step in range(1, 10):
        log.write(step, 1, {"loss": drawn.random()})
        if step == at:
            path.unlink()
            if drawn.random() < 0.5:
                path.write_text("{}\n")
    log.close()
    if [row.get("step") for row in read_metrics(path)] != list(range(1, 10)):
        return "lines are gone"
    return "" if "put back" in "".join(said) else "nothing was said"


@fault(
    "checkpoints/ emptied, and any of the other files deleted: --resume does not begin anew in silence",
    tries=28,
    quick=4,
)
def emptied(folder: Path, number: int) -> str:
    from mls.engine import Run
    from mls.errors import CheckpointError

    signs = ["events.jsonl", "backbone.safetensors", "metrics.jsonl"]
    shutil.copytree(killed() / "run", folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints")
    for bit, name in enumerate(signs):
        if (number % 7 + 1) >> bit & 1 == 0:
            (folder / "run" / name).unlink()
    if number % 2:
        (folder / "run" / "checkpoints").mkdir()
    try:
        Run.open(folder / "run").refuse_lost_checkpoints()
    except CheckpointError as error:
        return "" if "put the checkpoints back" in str(error) else str(error)
    return "it begins anew"


@fault(
    "values that are no numbers in weights, statistics, optimizer or dictionary: no good checkpoint goes",
    tries=60,
    quick=2,
)
def poisoned(folder: Path, number: int) -> str:
    """A session whose state is poisoned at some step, in some tensor; before that, some steps are in doubt."""
    import torch

    from mls.engine.checkpoint import Checkpoints, non_finite
    from mls.engine.session import Saving, Session
    from mls.errors import DivergedError

    drawn = random.Random(number)
    content, poison = state(), drawn.choice([float("nan"), float("inf"), -float("inf")])
    at, doubtful = drawn.randrange(4, 12), drawn.randrange(4)

    class Training:
        step = 0

        def state_dict(self) -> dict[str, Any]:
            return {**content, "step": self.step}

    def check(copied: dict[str, Any]) -> None:
        if found := list(non_finite(copied)):
            raise DivergedError(found[0])

    training, store = Training(), Checkpoints(folder / "checkpoints", keep_last=2)
    session = Session(training, 20, Saving(store, folder / "events.jsonl", 1e9, 1, check), torch.device("cpu"))
    try:
        with session.running(quiet=True):
            while training.step < 20:
                training.step += 1
                if training.step == at:
                    tensor = content["method"][drawn.choice(["weight", "variance", "rows"])]
                    tensor.view(-1)[drawn.randrange(tensor.numel())] = poison
                session.end_step(doubtful=at - doubtful <= training.step < at)
                session.writer.wait()
        return "it was not noticed"
    except DivergedError:
        pass
    last_good = at - doubtful - 1
    kept = [step for step in (last_good - 1, last_good) if step > 0]
    if store.steps() != kept:
        return f"kept are {store.steps()}, the last good ones were {kept}"
    return "" if not list(non_finite(store.newest() or {})) else "what is kept is poisoned"


@fault("a learning rate at which pretraining diverges: the advice that it gives trains a new run to its end", tries=6)
def diverging(folder: Path, number: int) -> str:
    from mls.engine.checkpoint import Checkpoints, non_finite

    wild = [
        *TINY,
        f"optim.lr={10.0 ** (6 + number)}",
        "engine.max_bad_steps=3",
        f"engine.checkpoint_every={1 + number}",
    ]
    code, words = run(folder, "pretrain", *wild)
    advice = re.findall(r"`mls (pretrain .*?)`", words)
    if code != 2 or "Traceback" in words or not advice:
        return f"it ended with {code}: {words.strip().splitlines()[-1]}"
    newest = Checkpoints(folder / "runs" / "run" / "checkpoints", 1).newest()
    if newest is not None and list(non_finite(newest["method"])):
        return "a poisoned checkpoint was kept"
    for (
        command
    ) in advice:  # from the last checkpoint, which may hold weights that are only just finite, or from the start
        code, words = run(folder, *(re.sub("optim.lr=.*", "optim.lr=0.01", word) for word in shlex.split(command)))
        if code == 0:
            return ""
    return f"the advice ended with {code}: {words.strip().splitlines()[-1]}"


# ---------------------------------------------------------------------------------------------------------- the means


def state() -> dict[str, Any]:
    import torch

    drawn = torch.Generator().manual_seed(0)
    method = {name: torch.randn(40, 30, generator=drawn) for name in ("weight", "rows")}
    method |= {"variance": torch.rand(30, generator=drawn), "ids": torch.arange(40)}
    return {"step": 3, "method": method, "name": "mls", "rates": [0.1, 0.2]}


def equal(first: Any, second: Any) -> bool:
    import torch

    if isinstance(second, torch.Tensor):
        return isinstance(first, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(second, dict):
        return (
            isinstance(first, dict)
            and first.keys() == second.keys()
            and all(equal(first[k], second[k]) for k in second)
        )
    return first == second


def damaged(content: bytes, number: int) -> bytes:
    drawn, data = random.Random(number), bytearray(content)
    place = drawn.choice([drawn.randrange(len(data)), len(data) - drawn.randrange(1, 400), drawn.randrange(300)])
    length = drawn.choice([1, 8, 64, 512])
    kind = drawn.choice(["bit", "zeros", "noise", "cut", "taken out", "put in"])
    if kind == "bit":
        data[place] ^= 1 << drawn.randrange(8)
    elif kind == "zeros":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif kind == "noise":
        data[place : place + length] = drawn.randbytes(len(data[place : place + length]))
    elif kind == "cut":
        del data[place:]
    elif kind == "taken out":
        del data[place : place + length]
    else:
        data[place:place] = drawn.randbytes(length)
    return bytes(data)


def read_after_damage(path: Path, number: int) -> str:
    from mls.engine.checkpoint import read
    from mls.errors import CheckpointError

    path.write_bytes(damaged(path.read_bytes(), number))
    try:
        found = read(path, warn=lambda text: None)
    except CheckpointError as error:
        return "" if "\n" not in str(error) and "weights_only" not in str(error) else f"it is told so: {error}"
    return "" if equal(found, state()) else "other values were read"
