"""What `mls submit pretrain` and `mls submit eval` share: options, and submitting jobs with a message about it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mls.errors import UserError

if TYPE_CHECKING:
    from mls.slurm.job_spec import JobSpec
    from mls.slurm.profile import Profile

ProfileName = Annotated[str | None, typer.Option("--profile", help="A file, or a name of configs/slurm/.")]
Changes = Annotated[list[str] | None, typer.Option("--slurm", metavar="KEY=VALUE", help="Changes the profile.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the sbatch script; submit nothing.")]


def hand_over(specs: Sequence[JobSpec], profile: Profile, title: str, folder: Path | None = None) -> list[JobSpec]:
    """Submit, and say so. `folder` was made for this alone: it goes again if nothing could be submitted."""
    from mls.slurm import submit as launch

    say("copying the code and submitting")
    try:
        submitted = launch.submit(specs, profile, title)
    except UserError:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    jobs = [one.job for one in submitted]
    say(f"job {jobs[0]}" if len(jobs) == 1 else f"jobs {jobs[0]} to {jobs[-1]}, {profile.concurrency} at a time")
    return submitted


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
