"""`mls bench analyse` as a user calls it. What each analysis computes is tested beside this file."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from mls.tools.analyses import analyses
from mls.tools.bench.analyse import NAMES

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_help_names_every_analysis() -> None:
    assert set(NAMES) == set(analyses())


def test_an_analysis_leaves_a_picture_and_a_table(mls_command: Command, tmp_path: Path) -> None:
    done = mls_command("bench", "analyse", "gradients", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gradients.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "gradients.md").read_text() in done.stdout


def test_a_mistyped_analysis_is_answered_with_the_nearest(mls_command: Command, tmp_path: Path) -> None:
    done = mls_command("bench", "analyse", "gradient", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "did you mean 'gradients'" in done.stderr
