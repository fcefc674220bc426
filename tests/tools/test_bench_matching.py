"""The measuring command itself; what it measures is no test's business, since it depends on the machine."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.long
def test_everything_is_measured_side_by_side_in_one_run(mls_command: Command, tmp_path: Path) -> None:
    out = tmp_path / "matching.json"
    done = mls_command(
        "bench", "matching", "--quick", "--batch", "2", "--queries", "2", "--rounds", "1", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\| 4,096 +\| [\d.]+ s +\| [\d.]+ ms .* \| 3% ", done.stdout)
    for name in ("torch", "faiss", "IVF-PQ"):
        assert len(re.findall(rf"\| 512 \| [\d,]+ +\| 2 +\| {name} +\| [\d.]+ ms +\| [\d.]+ ", done.stdout)) == 2
    assert len(re.findall(r"recall@20 [01]\.\d{3}", done.stdout)) == 2
    assert "time ~ rows^x: torch x = " in done.stdout
    if not torch.cuda.is_available():
        assert "on a GPU: not measured, there is none" in done.stdout
    memory = json.loads(out.read_text())["rows"]["cpu"]["memory"]
    assert memory["in parts"] < memory["in one piece"] / 5
    assert memory["in one piece"] > 65_536 * 256 * 4


def test_the_peak_of_a_process_sees_what_torch_does_not() -> None:
    """In a process of its own: in this one, what other tests have left is freed meanwhile."""
    code = "from mls.tools.bench.memory import peak_of_process as peak; print(peak(lambda: bytearray(100 << 20)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None" or 90 << 20 < int(done.stdout) < 150 << 20
