"""Exact resume: a run killed mid-epoch and resumed equals a run that was never stopped, bit for bit."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mls
from mls.engine import Run
from mls.engine.checkpoint import Checkpoints
from mls.errors import CheckpointError, Stopped
from mls.models import load_backbone
from mls.monitor import moments
from mls.monitor.log import TIMES
from mls.tools.bench.faults.commands import Command

GOLDEN = """data.scenes.count=320 data.scenes.test_count=64 data.batch_size=32 dictionary.size=80 objective.k=5
optim.epochs=4 engine.checkpoint_every=17 engine.keep_last=9 monitor.log_every=2 monitor.health_every=9
monitor.knn_images=64 model.projection=16 objective.warmup_epochs=1 engine.threads=1""".split()  # 10 steps an epoch


def same(first: Any, second: Any, where: str = "") -> list[str]:
    """The places in which two states differ by so much as a bit."""
    if isinstance(first, torch.Tensor):
        equal = first.dtype == second.dtype and torch.equal(first.nan_to_num(7e7), second.nan_to_num(7e7))
        return [] if equal else [where]
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return [place for key in first for place in same(first[key], second[key], f"{where}.{key}")]
    if isinstance(first, (list, tuple)):
        return [
            place for i, (a, b) in enumerate(zip(first, second, strict=True)) for place in same(a, b, f"{where}.{i}")
        ]
    return [] if first == second else [where]


def final_state(run: Run) -> dict[str, Any]:
    state = Checkpoints(run.checkpoints, 1).newest()
    assert state is not None
    state.pop("log_offset")  # the log also holds images per second, which take more or fewer digits
    for name in ("name", "root"):
        state["config"]["run"].pop(name)
    return state


def metrics(run: Run) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in run.metrics()]


@pytest.mark.parametrize(
    ("workers", "processes", "more"),
    [
        (0, 1, ["objective.normalise=balanced", "model.key_norm=split"]),
        (2, 1, ["engine.accumulate=2", "optim.name=adamw", "optim.lr=0.001"]),
        (0, 2, ["model.key_norm=shuffle"]),
    ],
    ids=["no workers", "two workers", "two processes"],
)
def test_killed_mid_epoch_and_resumed_equals_uninterrupted_run(
    workers: int,
    processes: int,
    more: list[str],
    tmp_path: Path,
    mls_command: Callable[..., subprocess.CompletedProcess[str]],
    mls_started: Callable[..., list[Command]],
) -> None:
    overrides = ["mls_scenes_tiny", *GOLDEN, f"data.workers={workers}", f"run.root={tmp_path}", *more]
    done = mls_command("pretrain", *overrides, "--name", "whole", processes=processes)
    assert done.returncode == 0, done.stderr
    whole = Run.open(tmp_path / "whole")
    assert whole.done

    killed = Run(tmp_path / "killed")
    ranks = mls_started("pretrain", *overrides, "--name", "killed", processes=processes)
    while not (killed.checkpoints / "step-00000017.pt").exists():
        assert ranks[0].running, "the run ended before its first checkpoint"
        time.sleep(0.005)
    for rank in ranks:
        rank.send(signal.SIGKILL)
    assert [rank.code() for rank in ranks] == [-signal.SIGKILL] * processes
    assert not killed.done
    assert max(Checkpoints(killed.checkpoints, 1).steps()) < 40

    resumed = mls_command("pretrain", "--resume", str(killed.path), processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step" in resumed.stderr
    assert killed.done
    assert same(final_state(whole), final_state(killed)) == []
    assert metrics(whole) == metrics(killed)
    kept = [[replace(moment, seconds=0.0) for moment in moments.read(run.path)] for run in (whole, killed)]
    assert kept[0] == kept[1] and [moment.step for moment in kept[0]] == [10, 20, 30, 40]
    assert [row["step"] for row in metrics(whole) if "loss" in row] == list(range(2, 41, 2))


def test_killed_while_a_checkpoint_is_written_beside_the_steps_and_resumed_equals_uninterrupted_run(
    tmp_path: Path,
    mls_command: Callable[..., subprocess.CompletedProcess[str]],
    mls_started: Callable[..., list[Command]],
) -> None:
    overrides = [*GOLDEN, "optim.epochs=2", "engine.checkpoint_every=6", f"run.root={tmp_path}"]
    assert mls_command("pretrain", "mls_scenes_tiny", *overrides, "--name", "whole").returncode == 0
    whole, killed = Run.open(tmp_path / "whole"), Run(tmp_path / "killed")
    script = tmp_path / "slow.py"
    script.write_text(f"""
import time
import mls
from mls.engine.checkpoint import HashingFile

write = HashingFile.write

def slow(file, data):
    if "step-00000012" in file.file.name:
        time.sleep(0.2 if data.nbytes < 100_000 else 600)
    return write(file, data)

HashingFile.write = slow
mls.pretrain(mls.load_config("mls_scenes_tiny", {overrides!r} + ["run.name=killed"]), quiet=True)
""")
    (process,) = mls_started(script=script)
    # Until the writer is in the middle of step 12, and training is beyond it: the last step is 20, and waits for it.
    while not (unfinished(killed) and any(row["step"] > 12 for row in killed.metrics())):
        assert process.running, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send(signal.SIGKILL)
    process.code()
    assert unfinished(killed) and Checkpoints(killed.checkpoints, 1).steps() == [6]

    resumed = mls_command("pretrain", "--resume", str(killed.path))
    assert resumed.returncode == 0 and "resumed after step 6" in resumed.stderr
    assert same(final_state(whole), final_state(killed)) == []
    assert metrics(whole) == metrics(killed)
    assert torch.equal(*(load_backbone(run.path).conv1.weight for run in (whole, killed)))
    assert not unfinished(killed)
    events = [json.loads(line) for line in (killed.path / "events.jsonl").read_text().splitlines()]
    done = [(row["event"], row["step"]) for row in events if row["event"] not in ("term", "moment", "warning")]
    assert done == [("start", 0), ("save", 6), ("resume", 6), ("save", 12), ("save", 18), ("save", 20), ("stop", 20)]


def unfinished(run: Run) -> list[Path]:
    return [path for path in run.checkpoints.glob(".step-*.tmp") if path.stat().st_size]


@pytest.mark.parametrize(
    ("number", "code", "workers"), [(signal.SIGTERM, 75, 2), (signal.SIGUSR2, 75, 0), (signal.SIGINT, 130, 2)]
)
def test_a_signal_saves_at_a_step_boundary_and_says_how_to_go_on(
    number: signal.Signals, code: int, workers: int, tmp_path: Path, mls_started: Callable[..., list[Command]]
) -> None:
    run = Run(tmp_path / "run")
    overrides = [*GOLDEN, "engine.checkpoint_every=1000", "optim.epochs=400", f"data.workers={workers}"]
    (process,) = mls_started("pretrain", "mls_scenes_tiny", *overrides, f"run.root={tmp_path}", "--name", "run")
    while not (run.path / "metrics.jsonl").exists() or len(run.metrics()) < 3:
        assert process.running
        time.sleep(0.01)
    process.send(number)  # the whole group, workers included, as a terminal or a scheduler does
    assert process.code(60) == code, process.words
    said = process.words
    assert "everything is saved" in said
    assert "mls pretrain --resume" in said
    assert "Traceback" not in said
    (step,) = Checkpoints(run.checkpoints, 1).steps()
    assert 6 <= step < 4000
    assert not run.done


def test_two_processes_stop_at_the_same_step_when_one_gets_the_signal(
    tmp_path: Path, mls_started: Callable[..., list[Command]]
) -> None:
    run = Run(tmp_path / "run")
    overrides = [*GOLDEN, "engine.checkpoint_every=1000", "optim.epochs=400", f"run.root={tmp_path}", "--name", "run"]
    ranks = mls_started("pretrain", "mls_scenes_tiny", *overrides, processes=2)
    while not (run.path / "metrics.jsonl").exists() or len(run.metrics()) < 3:
        assert ranks[0].running
        time.sleep(0.01)
    ranks[1].send(signal.SIGUSR2)
    assert [rank.code(60) for rank in ranks] == [75, 75]
    assert len(Checkpoints(run.checkpoints, 1).steps()) == 1


def test_resume_goes_on_with_another_number_of_processes(
    tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    overrides = ["mls_scenes_tiny", *GOLDEN, f"run.root={tmp_path}", "--name", "run"]
    assert mls_command("pretrain", *overrides, "engine.max_steps=17", processes=2).returncode == 0
    run = Run(tmp_path / "run")
    before = final_state(run)
    assert before["step"] == 17
    assert mls_command("pretrain", "--resume", str(run.path), "engine.max_steps=18").returncode == 0
    after = final_state(run)
    assert after["step"] == 18
    # The new step wrote 32 of the 80 rows over the oldest; all others are where they were.
    ids = before["method"]["_extra_state"]["dictionary"]["ids"]
    assert int((after["method"]["_extra_state"]["dictionary"]["ids"] == ids).sum()) >= 80 - 32
    assert mls_command("pretrain", "--resume", str(run.path), "engine.max_steps=null").returncode == 0
    assert run.done


def test_resume_refuses_another_configuration_and_names_the_keys(
    tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    overrides = ["mls_scenes_tiny", *GOLDEN, f"run.root={tmp_path}", "engine.max_steps=3", "--name", "run"]
    assert mls_command("pretrain", *overrides).returncode == 0
    refused = mls_command("pretrain", "--resume", str(tmp_path / "run"), "objective.k=6", "data.workers=1")
    assert refused.returncode == 2
    assert "objective.k (5 there, 6 now)" in refused.stderr
    assert "data.workers" not in refused.stderr
    assert (
        f"let a new run go on from there: `mls pretrain --resume {tmp_path}/run --from-step 3 objective.k=6"
        in refused.stderr
    )
    wider = mls_command("pretrain", "--resume", str(tmp_path / "run"), "model.projection=32")
    assert "set these back, or start a new run" in wider.stderr  # which no state of this one fits
    assert Run(tmp_path / "run").config.objective.k == 5  # what was refused was not stored either


def test_resume_refuses_other_images(tiny: list[str], tmp_path: Path) -> None:
    """data.root may change, to where the same images lie."""
    for folder, count in (("a", 40), ("b", 40), ("c", 39)):
        for number in range(count):
            file = tmp_path / folder / f"{number:02d}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(file)
    changes = [*tiny, "data.source=folder", f"data.root={tmp_path / 'a'}", "run.name=run", "monitor.knn_every_epochs=0"]
    with pytest.raises(Stopped):
        mls.pretrain(mls.load_config("mls_scenes_tiny", [*changes, "engine.max_steps=1"]), quiet=True)
    run = tmp_path / "runs" / "run"
    with pytest.raises(CheckpointError, match=r"other images: 1 are gone \(39.png\): give the same images"):
        mls.resume(run, [f"data.root={tmp_path / 'c'}", "engine.max_steps=2"], quiet=True)
    with pytest.raises(Stopped, match="step 2"):
        mls.resume(run, [f"data.root={tmp_path / 'b'}", "engine.max_steps=2"], quiet=True)
