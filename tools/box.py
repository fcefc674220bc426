"""`mls slurm box`: a real SLURM on this machine, to rehearse in and for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mls.errors import command

app = typer.Typer(help="SLURM on this machine.", no_args_is_help=True)
box_app = typer.Typer(help="Start and stop a private, real SLURM on this machine.", no_args_is_help=True)
app.add_typer(box_app, name="box")
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Holds its configuration, state and logs.")]


@box_app.command("start")
def start(
    folder: Folder = Path("slurm-box"),
    nodes: Annotated[int, typer.Option(min=1, max=200)] = 2,
    cpus: Annotated[int, typer.Option(min=1, help="A node; may be more than this machine has.")] = 4,
    gpus: Annotated[int, typer.Option(min=0, help="A node; pretended.")] = 2,
) -> None:
    """Start it: pretended nodes, partitions low and high (high preempts low). Needs Debian's packages, no root.

    Examples:

        mls slurm box start

        mls slurm box start /tmp/box --nodes 4
    """
    from mls.slurm import box

    started = box.start(folder, box.Settings(nodes=nodes, cpus=cpus, gpus=gpus))
    print(f"{nodes} nodes are up. In the shell that submits:\n\n    export SLURM_CONF={started.conf}\n")
    print(
        f"    mls submit pretrain mls_scenes_tiny --profile box\n\nEnd it with {command('mls slurm box stop', folder)}."
    )


@box_app.command("stop")
def stop(folder: Folder = Path("slurm-box")) -> None:
    """End it with all its jobs, and delete its folder.

    Examples:

        mls slurm box stop
    """
    from mls.slurm import box

    print(f"{folder}: ended" if box.stop(folder, delete=True) else f"{folder}: no box runs there")
