"""What a large run asks for: a back-end chosen by measuring and kept, rows in half precision, and an end, not a hang,
when one of several processes dies."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mls
from mls.core import matching
from mls.core.matching import FaissMatcher, TorchMatcher
from mls.engine import Run
from mls.engine.checkpoint import Checkpoints
from mls.errors import CheckpointError, Stopped

SHORT = ["optim.epochs=1", "monitor.knn_every_epochs=0"]


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.metrics() if "loss" in row]


@pytest.mark.parametrize("name", matching.names())
def test_auto_takes_the_fastest_says_so_and_a_resume_keeps_it(
    name: str, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "torch" if name == "faiss" else "faiss"
    monkeypatch.setattr(matching, "seconds_of_each", lambda *_: {name: 0.0012, other: 0.003})
    config = mls.load_config("mls_scenes_tiny", [*tiny, *SHORT, "matching.backend=auto", "run.name=run"])
    with pytest.raises(Stopped):
        mls.pretrain(mls.load_config("mls_scenes_tiny", [*tiny, *SHORT, "matching.backend=auto", "engine.max_steps=5"]))
    said = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert f"matching with {name} (a search takes {name} 1.2 ms, {other} 3.0 ms)" in said
    (path,) = Path(config.run.root or "").iterdir()
    monkeypatch.setattr(matching, "seconds_of_each", lambda *_: pytest.fail("a resume measures again"))
    run = mls.resume(path, ["engine.max_steps=null"], quiet=True)
    state = Checkpoints(run.checkpoints, 1).newest()
    assert state is not None
    assert state["decided"]["backend"] == name


def test_auto_measures_real_searches_as_large_as_the_runs(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    for matcher in (TorchMatcher, FaissMatcher):
        topk = matcher.topk
        monkeypatch.setattr(
            matcher,
            "topk",
            lambda self, queries, rows, k, exclude=None, topk=topk: (
                shapes.append((len(queries), tuple(rows.shape), k)),
                topk(self, queries, rows, k, exclude),
            )[1],
        )
    run = mls.pretrain(mls.load_config("mls_scenes_tiny", [*tiny, *SHORT, "matching.backend=auto"]), quiet=True)
    assert shapes.count((16, (64, 128), 5)) >= 12
    plain = mls.pretrain(mls.load_config("mls_scenes_tiny", [*tiny, *SHORT]), quiet=True)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)


def test_a_run_may_keep_its_rows_in_half_precision(tiny: list[str]) -> None:
    few = [*tiny, *SHORT, "optim.lr=0.001"]
    plain = mls.pretrain(mls.load_config("mls_scenes_tiny", few), quiet=True)
    half = mls.pretrain(mls.load_config("mls_scenes_tiny", [*few, "dictionary.storage=fp16"]), quiet=True)
    assert losses(half) == pytest.approx(losses(plain), rel=1e-2)
    assert losses(half) != losses(plain)
    state = Checkpoints(half.checkpoints, 1).newest()
    assert state is not None
    assert state["method"]["_extra_state"]["dictionary"]["backbone"].dtype == torch.float16
    (half.path / "DONE").unlink()
    with pytest.raises(CheckpointError, match=r"dictionary\.storage \(fp16 there, fp32 now\)"):
        mls.resume(half, ["dictionary.storage=fp32"], quiet=True)


def test_a_process_that_dies_takes_the_run_down_with_one_line(
    tiny: list[str], tmp_path: Path, mls_command_line: Callable[..., list[str]]
) -> None:
    endless = ["optim.epochs=100000", "monitor.knn_every_epochs=0", "monitor.log_every=1", "run.name=run"]
    process = subprocess.Popen(
        mls_command_line("pretrain", "mls_scenes_tiny", *tiny, *endless, "data.batch_size=18", processes=3),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    run = Run(tmp_path / "runs" / "run")
    while not (run.path / "metrics.jsonl").exists() or len(run.metrics()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    told = re.findall(r"\[rank \d\] error: another process of this run is gone .* `mls pretrain --resume .*", said)
    assert len(told) == 1
    assert "RuntimeError" not in said
