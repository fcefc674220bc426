"""What happens to one of a run's processes, or to what it reads: all end soon, the cause is named in a sentence, and
`--resume` ends in the weights of a run undisturbed."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

from mls.tools.bench.faults import fault
from mls.tools.bench.faults.commands import Command, start
from mls.tools.bench.faults.kills import TINY

FEW = [*TINY, "optim.epochs=2", "engine.checkpoint_every=4", "data.workers=0", "engine.timeout_minutes=0.05"]
SECONDS = 40  # in which all processes end, with time-outs of three
LAST_STEP = 24
GONE = "another process of this run is gone"


def finished(commands: Sequence[Command], seconds: float = 300) -> tuple[list[int | None], str]:
    ends = time.monotonic() + seconds
    codes = [command.code(max(0.1, ends - time.monotonic())) for command in commands]
    return codes, "".join(command.words for command in commands)


@cache
def undisturbed(count: int, *changes: str) -> bytes:
    folder = Path(mkdtemp(prefix="mls-fault-"))
    (folder / "images").symlink_to(images())
    codes, words = finished(start(folder, "pretrain", *FEW, *changes, processes=count))
    assert set(codes) == {0}, words
    return (folder / "runs" / "run" / "backbone.safetensors").read_bytes()


def wait_for_step(folder: Path, step: int) -> bool:
    """Until the log has it."""
    log, ends = folder / "runs" / "run" / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < ends:
        if log.exists() and log.read_text().count("\n") * 2 >= step:
            return True
        time.sleep(0.005)
    return False


def disturbed(
    folder: Path,
    count: int,
    step: int,
    disturb: Callable[[list[Command]], None],
    sentence: str,
    repair: Callable[[], None] = lambda: None,
    changes: Sequence[str] = (),
) -> str:
    """ "" where a run that is disturbed at a step ends in time with the sentence, and a resume as one undisturbed."""
    weights = undisturbed(count, *changes)
    (folder / "images").symlink_to(images())
    commands = start(folder, "pretrain", *FEW, *changes, processes=count)
    wait_for_step(folder, step)
    disturb(commands)
    codes, words = finished(commands, SECONDS)
    for command in commands:
        command.send()
    if not (folder / "runs" / "run" / "DONE").exists():  # it may have been done before
        what = _unlike(codes, words, sentence)
        if what:
            return what
    repair()
    resumed = start(folder, "pretrain", "--resume", "runs/run", "engine.timeout_minutes=1", processes=count)
    codes, again = finished(resumed)
    if set(codes) != {0}:
        return f"it did not go on ({codes}): {again[-300:]}"
    same = (folder / "runs" / "run" / "backbone.safetensors").read_bytes() == weights
    return "" if same else "other weights than those of a run undisturbed"


def _unlike(codes: list[int | None], words: str, sentence: str) -> str:
    if 0 in codes or "Traceback" in words or sentence not in words:
        return f"ended with {codes} and without '{sentence}': {words[-300:]}"
    return "" if None not in codes else f"not all ended within {SECONDS} s"


def some_step(number: int) -> int:
    return random.Random(number).randrange(2, LAST_STEP - 4)


# The last process is the one that is disturbed; SIGKILL is what the kernel sends where memory runs out.
@fault("kill -9 of one of two ranks (out of memory), then --resume", 12, quick=0)
def rank_killed(folder: Path, number: int) -> str:
    return disturbed(
        folder, 2, some_step(number), lambda ranks: ranks[-1].send(), "another process of this run is gone"
    )


@fault("SIGSTOP of one of two ranks: the other ends after engine.timeout_minutes, then --resume", 12)
def rank_stopped(folder: Path, number: int) -> str:
    def stop(ranks: list[Command]) -> None:
        ranks[-1].send(signal.SIGSTOP)
        ranks[0].code(SECONDS)
        ranks[-1].send(signal.SIGKILL)

    return disturbed(folder, 2, some_step(number), stop, "rank 1 (process ")


@fault("SIGSTOP of rank 0, which holds the store of all", 6, quick=0)
def first_rank_stopped(folder: Path, number: int) -> str:
    def stop(ranks: list[Command]) -> None:
        ranks[0].send(signal.SIGSTOP)
        ranks[1].code(SECONDS)
        ranks[0].send(signal.SIGKILL)

    return disturbed(folder, 2, some_step(number), stop, "rank 0, which all others need, does not answer")


@fault("a rank that may take no more memory (RLIMIT_AS), unless it needs none; then --resume", 12, quick=0)
def rank_without_memory(folder: Path, number: int) -> str:
    def limit(ranks: list[Command]) -> None:
        pid = ranks[-1].process.pid
        assert pid is not None
        used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_AS, (used, used))

    # What the rank says depends on where the memory ends; the other one says that it is gone.
    return disturbed(folder, 2, some_step(number), limit, GONE)


# ---------------------------------------------------------------------------------------------- what a rank reads

FROM_FILES = ["data.source=folder", "data.root=images", "data.limit=96", "augment.size=32"]
WORKERS = [*FROM_FILES, "data.workers=2", "engine.timeout_minutes=0.1"]


@cache
def images() -> Path:
    import numpy as np
    from PIL import Image

    folder = Path(mkdtemp(prefix="mls-fault-"))
    for number in range(96):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.jpg")
    return folder


def workers_of(command: Command) -> list[int]:
    pid = command.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def signal_a_worker(number: signal.Signals, commands: list[Command]) -> None:
    for worker in workers_of(commands[0])[:1]:
        os.kill(worker, number)


@fault("kill -9 of a data worker (by the kernel), then --resume", 12, quick=0)
def worker_killed(folder: Path, number: int) -> str:
    kill = partial(signal_a_worker, signal.SIGKILL)
    return disturbed(folder, 1, some_step(number), kill, "a data worker was ended from outside", changes=WORKERS)


@fault("a data worker that does not answer (SIGSTOP; a mount that hangs), then --resume", 12, quick=0)
def worker_stopped(folder: Path, number: int) -> str:
    stop = partial(signal_a_worker, signal.SIGSTOP)
    return disturbed(folder, 1, some_step(number), stop, "a data worker has made nothing", changes=WORKERS)


@fault("the folder of the images vanishes (a lost mount); it comes back, then --resume", 12, quick=0)
def images_vanish(folder: Path, number: int) -> str:
    vanish = lambda commands: (folder / "images").unlink()
    back = lambda: (folder / "images").symlink_to(images())
    return disturbed(folder, 1, some_step(number), vanish, "cannot be read", back, FROM_FILES)


@fault("the clock jumps back and forth by days at each reading", 6)
def clock_jumps(folder: Path, number: int) -> str:
    from mls import engine
    from mls.recipes import load_config

    draws, true = random.Random(number), time.time
    with mock.patch("time.time", side_effect=lambda: true() + draws.uniform(-1e6, 1e6)):
        run = engine.pretrain(load_config(FEW[0], [*FEW[1:], f"run.root={folder}"]), quiet=True)
    same = (run.path / "backbone.safetensors").read_bytes() == undisturbed(1)
    return "" if same else "other weights than those of a run undisturbed"
