"""`mls slurm box`, as a user calls it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mls.slurm import box

Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.skipif(bool(box.missing()), reason="no SLURM here")
@pytest.mark.long
def test_a_box_is_started_with_the_commands_to_use_and_to_end_it(tmp_path: Path, mls_command: Call) -> None:
    folder = tmp_path / "box"
    done = mls_command("slurm", "box", "start", str(folder), "--nodes", "1")
    try:
        assert done.returncode == 0, done.stderr
        assert f"export SLURM_CONF={folder}" in done.stdout
        assert f"End it with `mls slurm box stop {folder}`" in done.stdout
    finally:
        ended = mls_command("slurm", "box", "stop", str(folder))
    assert ended.stdout == f"{folder}: ended\n" and not folder.exists()
