"""What a user of several processes sees on the terminal."""

import re
import subprocess
from collections.abc import Callable

Call = Callable[..., subprocess.CompletedProcess[str]]


def test_torchrun_prints_no_warning(tiny: list[str], mls_command: Call) -> None:
    few = [*tiny, "optim.epochs=1", "optim.warmup_epochs=0", "objective.in_batch_negatives=true"]
    done = mls_command("pretrain", "mls_scenes_tiny", *few, processes=2, PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    assert "on 2 × cpu" in done.stderr
    assert [line for line in done.stderr.splitlines() if re.search(r"Warning:|\bwarning\b", line)] == []
