"""`mls verify-resume`: what is equal is called equal, and a difference has its size."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from mls.engine.verify import part


def test_a_difference_has_its_count_and_its_size() -> None:
    state = {"a": torch.tensor([1.0, -4.0]), "b": [torch.tensor(3), {"c": "text"}], "d": float("nan")}
    assert (same := part("state", state, dict(state))).differ == 0 and same.values == 5
    other = part("state", state, state | {"a": torch.tensor([1.0, -3.0])})
    assert (other.differ, other.largest) == (1, 0.25)
    assert part("state", state, state | {"b": [torch.tensor(3), {"c": "other"}]}).differ == 1
    assert part("state", state, {"a": state["a"]}).largest == float("inf")
    assert part("state", {"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)}).differ == 1


def test_a_killed_and_stopped_run_is_proven_to_resume_exactly(
    tiny: list[str], tmp_path: Path, mls_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    few = [one for one in tiny if not one.startswith("run.root")]
    done = mls_command("verify-resume", "mls_scenes_tiny", *few, "engine.deterministic=true", MLS_RUNS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "a resume is exact here: 12 steps with 1 process, killed once and stopped once" in done.stdout
    assert list(tmp_path.iterdir()) == []
