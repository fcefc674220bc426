"""`mls submit`: hand a pretraining run, a sweep or a suite of evaluations to SLURM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mls.errors import UserError, command
from mls.tools.submit import evaluate, pretrain

app = typer.Typer(no_args_is_help=True)
app.command("pretrain")(pretrain.pretrain)
app.command("eval")(evaluate.evaluate)


@app.callback(invoke_without_command=True)
def submit(
    init_profile: Annotated[Path | None, typer.Option(help="Guess a profile from sinfo and write it there.")] = None,
) -> None:
    """Hand work to SLURM: a run, a sweep, a suite of evaluations.

    Examples:

        mls submit --init-profile cluster.yaml

        mls submit pretrain mls_coco_r50 data.root=/data/coco --profile cluster.yaml
    """
    if init_profile is None:
        return
    from mls.slurm.profile import guess

    if init_profile.exists():
        raise UserError(f"{init_profile} exists already: name another file")
    init_profile.write_text(guess())
    print(
        f"{init_profile}: look it over, then {command('mls submit pretrain CONFIG --dry-run --profile', init_profile)}"
    )
