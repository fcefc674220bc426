"""`mls pretrain`: train a recipe, or go on with a run."""

from __future__ import annotations

from typing import Annotated

import typer

from mls.errors import ConfigError


def pretrain(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG|DIR KEY=VALUE", help="A recipe, YAML file or folder of images, and overrides."),
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with this run folder instead.")] = None,
    from_step: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --resume: train a new run from this step of RUN, with other KEY=VALUE."),
    ] = None,
    accept_data: Annotated[
        bool, typer.Option("--accept-data", help="With --resume: images came or went; map their numbers by name.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the run folder (default: recipe, date, hash).")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Pretrain on a folder of images; no labels needed.

    Stop it anyhow (Ctrl-C, SIGTERM, kill -9) and `--resume RUN` goes on exactly where it was last saved. After a
    divergence, `--from-step N` lets a new run go on from an earlier checkpoint with another configuration.
    Exit codes: 0 done, 2 a mistake in the command, 75 saved and stopped on a signal, 130 the same on Ctrl-C.

    A folder stands for `mls_folder_r50 data.root=FOLDER`, which sizes itself to the images and the device.

    Examples:

        mls pretrain mls_scenes_tiny

        mls pretrain /path/to/images data.batch_size=128

        torchrun --nproc-per-node 8 -m mls.tools pretrain mls_coco_r50 data.root=/data/coco

        mls pretrain --resume runs/mls_scenes_tiny-20260101-120000-1a2b

        mls pretrain --resume runs/first --from-step 4000 optim.lr=0.003 --name second
    """
    positional = list(arguments or [])
    from mls.recipes import is_override, override, recipes

    named = [] if name is None else [override("run.name", name)]  # as it is: 010 is no number here
    if resume is None and (not positional or is_override(positional[0])):
        raise ConfigError(
            f"say what to train: `mls pretrain CONFIG`, a folder of images, a file or one of {', '.join(recipes())}"
        )
    if resume is not None and positional and "=" not in positional[0]:
        raise ConfigError(f"--resume takes its configuration from the run: leave out '{positional[0]}'")
    if from_step is not None and resume is None:
        raise ConfigError("--from-step needs --resume RUN: whose step it is")
    if accept_data and (resume is None or from_step is not None):
        raise ConfigError(
            "--accept-data is for the images of a run that goes on: give --resume RUN without --from-step"
        )
    if named and resume is not None and from_step is None:
        raise ConfigError("--name is a new run's: leave it out, or give --from-step N to branch one off")

    config = None
    if resume is None:
        from mls.recipes import load_config, of_folder

        positional = of_folder(positional)
        config = load_config(positional[0], positional[1:] + named)

    from mls import distributed, engine  # seconds: a mistake in the configuration is told before

    try:
        if resume is not None and from_step is not None:
            run = engine.branch(resume, from_step, positional + named, quiet=quiet)
        elif resume is not None:
            run = engine.resume(resume, positional, quiet=quiet, accept_data=accept_data)
        else:
            assert config is not None
            run = engine.pretrain(config, quiet=quiet)
        if distributed.rank() == 0:
            print(run.path)
    finally:
        distributed.stop()
