"""`mls verify-resume`: that a stop and a resume change nothing, on this machine and with this number of processes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from mls.errors import ConfigError


def verify_resume(
    arguments: Annotated[list[str], typer.Argument(metavar="CONFIG KEY=VALUE", help="As for `mls pretrain`.")],
    steps: Annotated[int, typer.Option(min=6, help="Of each of the two runs.")] = 12,
    out: Annotated[Path | None, typer.Option(help="For the runs; default: a folder that is removed.")] = None,
) -> None:
    """Train a few steps undisturbed, and again killed, resumed, stopped by a signal and resumed; compare the two.

    Weights, optimizer, dictionary and log are compared bit by bit. Exit code 0: all are equal; 1: they are not, and the
    table says by how much. `engine.deterministic=true` asks torch for algorithms that give the same bits each time.

    Examples:

        mls verify-resume mls_scenes_tiny

        torchrun --nproc-per-node 8 -m mls.tools verify-resume mls_coco_r50 data.root=/data/coco --steps 40
    """
    from mls.engine.verify import verify
    from mls.files import runs_folder
    from mls.recipes import is_override, load_config
    from mls.tables import print_table

    name, *overrides = arguments
    if is_override(name):
        raise ConfigError(f"name the configuration before the overrides: `mls verify-resume CONFIG {name}`")
    config = load_config(name, overrides)
    # All ranks come to the same name; the port tells two that run at once apart.
    folder = out or runs_folder() / f"verify-resume-{os.environ.get('MASTER_PORT', os.getpid())}"
    parts = verify(config, folder.absolute(), steps)
    if not parts:
        return
    words = lambda part: (
        f"{part.differ:,} differ, by up to {part.largest:.1g} of the largest" if part.differ else "equal"
    )
    print_table(["part", "values", "bit by bit"], [[part.name, f"{part.values:,}", words(part)] for part in parts])
    world = int(os.environ.get("WORLD_SIZE", 1))
    setting = f"{steps} steps with {world} process{'es' * (world > 1)}"
    if not any(part.differ for part in parts):
        if out is None:
            shutil.rmtree(folder)
        print(f"\na resume is exact here: {setting}, killed once and stopped once, end in the same bits")
        return
    print(f"\na resume is not exact here ({setting}; both runs are in {folder}): try engine.deterministic=true")
    raise typer.Exit(1)
