"""`mls runs`: what it says of runs follows from their files."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mls import locks
from mls.engine import events, status
from mls.tools.runs import runs

Make = Callable[..., Any]


def ended(run: Any, **stop: Any) -> Any:
    """The same run before its end: without what says that it was finished."""
    (run.path / "DONE").unlink()
    lines = (run.path / "events.jsonl").read_text().splitlines()[:-1]
    (run.path / "events.jsonl").write_text("\n".join(lines) + "\n")
    if stop:
        events.EventLog(run.path / "events.jsonl").write("stop", step=8, **stop)
    return run


def test_the_list_tells_state_step_and_last_probe(
    synthetic_run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probed = synthetic_run("finished", row=lambda step: {"linear/map": 0.5} if step == 8 else {})
    ended(synthetic_run("interrupted"), reason="SIGINT")
    ended(synthetic_run("broken"), reason="DivergedError: 10 non-finite steps in a row")
    ended(synthetic_run("gone"))
    training = ended(synthetic_run("training", row=lambda step: {"time": time.time()}))
    monkeypatch.setenv("MLS_RUNS", str(probed.path.parent))
    with locks.locked(training.path / ".lock", "it is being trained"):
        runs()
        assert locks.holder(training.path / ".lock") is not None
        seen = status.status_of(training)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    table = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    states = {name: row["state"] for name, row in table.items()}
    told = {"finished": "done", "interrupted": "stopped", "broken": "failed", "gone": "killed", "training": "running"}
    assert states == told
    assert table["finished"]["step"] == "8/8" and table["finished"]["last probe"] == "linear mAP 50.0"
    assert table["broken"]["because"].startswith("DivergedError")
    assert table["training"]["heard"].endswith(" ago") and seen.left == 0


def test_the_time_left_follows_from_the_present_speed(synthetic_run: Make) -> None:
    run = ended(synthetic_run(row=lambda step: {"time": time.time(), "images_per_second": 64.0}))
    events.EventLog(run.path / "events.jsonl").write("resume", step=8, total=108)
    with locks.locked(run.path / ".lock", "it is being trained"):
        seen = status.status_of(run)
    assert seen.total == 108 and seen.left == pytest.approx(100 * 128 / 64, abs=5)


def test_one_run_is_shown_and_two_are_compared_by_what_changes_the_result(
    synthetic_run: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    others = ("optim.lr=0.1", "monitor.log_every=7", "data.workers=1", "data.root=/other")
    first, second = synthetic_run("a"), synthetic_run("b", *others)
    runs([str(first.path)])
    shown = capsys.readouterr().out
    assert "8/8  eta 0:00" in shown and "| multi_label | 0.600 | 0.600 | 0.650" in shown and "done, last heard" in shown
    runs(["diff", str(first.path), str(second.path)])
    keys = [line.split("|")[1].strip() for line in capsys.readouterr().out.split("\n\n")[0].splitlines()[2:]]
    assert keys == ["optim.lr", "data.root"]


def test_files_that_hold_anything_end_no_list(
    synthetic_run: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ended(synthetic_run())
    (run.path / "config.yaml").write_text("optim: [")
    (run.path / "metrics.jsonl").write_bytes(b"\xff\n{}\n[1]\n")
    with open(run.path / "events.jsonl", "a") as file:
        file.write('[1]\n{"event": 3}\n{"event": "stop", "step": 3, "time": 7, "reason": null}\n{"event"')
    monkeypatch.setenv("MLS_RUNS", str(run.path.parent))
    runs()
    assert "stopped" in capsys.readouterr().out


def test_a_lock_of_a_dead_process_is_nobody_s(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locks.locked(path, "x"):
        held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "started": held["started"] + "1"}))
    assert locks.holder(path) is None
    path.write_text(json.dumps({**held, "machine": "another"}))
    assert locks.holder(path) is not None
    os.utime(path, (0, time.time() - 2 * locks.STALE))
    assert locks.holder(path) is None
