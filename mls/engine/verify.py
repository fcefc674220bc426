"""Proves on this machine that a stop and a resume change nothing: a short run undisturbed, and one that is killed,
resumed, stopped by a signal and resumed again. Each part is a process of its own, so nothing survives but the folder.
Under torchrun every process calls this; each starts the part of its rank."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf, nan
from pathlib import Path
from typing import Any

import torch

from mls.config import Config
from mls.engine.run import Run
from mls.errors import EXIT_SAVED, Stopped, UserError
from mls.files import write_atomically
from mls.monitor.log import TIMES


@dataclass
class Part:
    """Of a run's state: how much was compared, and by how much two runs differ."""

    name: str
    values: int = 0
    differ: int = 0
    largest: float = 0.0  # difference, as a share of the tensor's largest value


def verify(config: Config, folder: Path, steps: int) -> list[Part]:
    """What the two runs differ in; of several ranks the first compares, the others give nothing."""
    main = os.environ.get("RANK", "0") == "0"
    engine = replace(config.engine, max_steps=steps, checkpoint_every=max(1, steps // 4), milestone_epochs=None)
    monitor = replace(config.monitor, log_every=1, tensorboard=False, wandb=None, mlflow=None)
    # Each part of a run: the step after which it ends, and how.
    parts = {"undisturbed": [(0, 0)], "disturbed": [(steps // 3 + 1, signal.SIGKILL), (2 * steps // 3, signal.SIGTERM)]}
    parts["disturbed"].append((0, 0))
    auto = [key for key in config.run.auto if key != "engine.checkpoint_every"]  # there must be a step to go on from
    for name, endings in parts.items():
        run = replace(config.run, name=name, root=str(folder), auto=auto)
        if main:
            Run.create(replace(config, engine=engine, monitor=monitor, run=run))
        for step, number in endings:
            _train(folder / name, config, step, number)
    return compare(Run(folder / "undisturbed"), Run(folder / "disturbed")) if main else []


def _train(folder: Path, config: Config, step: int, number: int) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _use_a_fresh_store(folder.parent / f"{folder.name}-{step}-{number}.port")
    child = multiprocessing.get_context("fork").Process(target=_child, args=(folder, config, step, number))
    child.start()
    child.join()
    expected = {0: (0,), signal.SIGKILL: (-signal.SIGKILL, 1), signal.SIGTERM: (EXIT_SAVED,)}[number]
    if child.exitcode not in expected:
        raise UserError(f"the run in {folder} ended with {child.exitcode} (its own words are above): nothing is proven")


def _use_a_fresh_store(file: Path) -> None:
    """A port of its own: the store that torchrun keeps for all ranks still holds what the part before wrote there."""
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("", 0))
            write_atomically(file, str(free.getsockname()[1]).encode())
    ends = time.monotonic() + 600
    while not file.exists():
        if time.monotonic() > ends:
            raise UserError(f"rank 0 has not written {file} for ten minutes: give --out a folder that all ranks share")
        time.sleep(0.05)
    os.environ |= {"MASTER_PORT": file.read_text(), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _child(folder: Path, config: Config, step: int, number: int) -> None:
    from mls import distributed, engine
    from mls.engine.trainer import Trainer

    after_step = Trainer.after_step

    def ending(self: Trainer) -> None:
        after_step(self)
        if self.step == step:
            self.session.writer.wait()  # so that there is a checkpoint to resume from
            os.kill(os.getpid(), number)

    Trainer.after_step = ending  # this process trains nothing else
    try:
        distributed.start(config.engine.device, config.engine.timeout_minutes)  # the first rank has made the folder
        engine.run(folder, quiet=True)
    except Stopped as stopped:
        sys.exit(stopped.exit_code)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        distributed.stop()


def compare(first: Run, second: Run) -> list[Part]:
    from mls.engine.checkpoint import Checkpoints

    states = [Checkpoints(run.checkpoints, 1).newest() or {} for run in (first, second)]
    methods = [dict(state.pop("method", {})) for state in states]
    memories = [method.pop("_extra_state", {}) for method in methods]
    optimizers = [state.pop("optimizer", {}) for state in states]
    logs = [[{k: v for k, v in row.items() if k not in TIMES} for row in run.metrics()] for run in (first, second)]
    for state in states:
        state.pop("log_offset", None)  # images per second take more or fewer digits
        state.get("config", {}).pop("run", None)
    named = {
        "weights": methods,
        "optimizer": optimizers,
        "dictionary": memories,
        "log": logs,
        "all other state": states,
    }
    return [part(name, *pair) for name, pair in named.items()]


def part(name: str, first: Any, second: Any) -> Part:
    found, ours, theirs = Part(name), dict(_leaves(first)), dict(_leaves(second))
    for key in ours.keys() | theirs.keys():
        one, other = torch.as_tensor(ours.get(key, nan)), torch.as_tensor(theirs.get(key, inf))
        found.values += one.numel()
        if one.shape != other.shape or one.dtype != other.dtype:
            found.differ, found.largest = found.differ + 1, inf
        elif not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            gap, scale = (one.double() - other.double()).abs(), one.double().abs().max().clamp(min=1e-300)
            found.differ += max(1, int((gap > 0).sum()))
            found.largest = max(found.largest, float((gap.max() / scale).nan_to_num(inf)))
    return found


def _leaves(state: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and numbers; of anything else a number that stands for it."""
    if isinstance(state, (Mapping, list, tuple)):
        for name, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            yield from _leaves(value, f"{key}/{name}")
    else:
        yield key, state if isinstance(state, (torch.Tensor, float, int)) else zlib.crc32(repr(state).encode())
