"""The measuring command itself; what it measures is no test's business, since it depends on the machine."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.long
def test_all_steps_are_measured_side_by_side(
    mls_command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    small = ["--backbone", "resnet18", "--batch", "2", "--size", "32", "--rows", "128", "--rounds", "1"]
    done = mls_command("bench", "step", *small, "--no-compiled", "--out", str(tmp_path / "step.json"), COLUMNS="80")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    (found,) = rows["steps"]
    assert all(one["images/s"] > 0 and 0 <= one["data wait"] < 1 for one in rows["from JPEG files"].values())
    assert {"encoders, optimizer", "ours, moco_v2", "ours, mls", "official MoCo, fp32"} <= set(found["steps"])
    ours, mls = (found["steps"][f"ours, {name}"]["dispatches"] for name in ("moco_v2", "mls"))
    assert found["steps"]["encoders, optimizer"]["dispatches"] < ours < mls < 1.5 * ours
    assert "images/s" in done.stdout and "TFLOP/s" in done.stdout
