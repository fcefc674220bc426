"""Commands killed at any moment and started again: nothing may be lost, and the result is that of a run undisturbed."""

from __future__ import annotations

import random
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from mls.tools.bench.faults import fault
from mls.tools.bench.faults.commands import Command, run

TINY = """mls_scenes_tiny data.scenes.count=256 data.scenes.test_count=64 data.batch_size=16 dictionary.size=64
objective.k=5 objective.warmup_epochs=0 optim.epochs=3 engine.checkpoint_every=5 monitor.log_every=2
monitor.health_every=8 monitor.knn_images=64 model.projection=16 engine.threads=1 run.name=run""".split()


@fault("kill -9 at a random moment of pretraining, then --resume", tries=200, quick=3)
def pretraining(folder: Path, number: int) -> str:
    weights, seconds = undisturbed()
    command = Command(folder, "pretrain", *TINY)
    time.sleep(random.Random(number).uniform(0, seconds))
    command.send()
    command.code()
    return unless_equal(folder, weights)


def unless_equal(folder: Path, weights: bytes) -> str:
    """ "" where the run, started again, ends in these weights."""
    again = ["--resume", "runs/run"] if (folder / "runs" / "run").exists() else TINY
    code, words = run(folder, "pretrain", *again)
    if code != 0 or "Traceback" in words:
        return f"it did not go on: {words.strip().splitlines()[-1]}"
    same = (folder / "runs" / "run" / "backbone.safetensors").read_bytes() == weights
    return "" if same else "other weights than those of a run undisturbed"


@cache
def undisturbed() -> tuple[bytes, float]:
    """The weights that the run ends in, and the seconds that it takes."""
    folder = Path(mkdtemp(prefix="mls-fault-"))
    run(folder, "config", "mls_scenes_tiny")  # the first start pays for all imports
    began = time.monotonic()
    code, words = run(folder, "pretrain", *TINY)
    assert code == 0, words
    return (folder / "runs" / "run" / "backbone.safetensors").read_bytes(), time.monotonic() - began
