"""`mls doctor`: what of this installation works, and the command for what is missing."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    frameworks: Annotated[
        bool, typer.Option("--frameworks", help="The programs that exported backbones go to, and how to install them.")
    ] = False,
) -> None:
    """Say what is installed and usable.

    Examples:

        mls doctor

        mls doctor --frameworks
    """
    _machine()
    if frameworks:
        _frameworks()


def _machine() -> None:
    import platform

    import torch

    import mls

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"mls {mls.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"GPUs: {', '.join(gpus) or 'none, so everything runs on the CPU'}")


def _frameworks() -> None:
    from mls.errors import ConfigError
    from mls.frameworks.installed import FRAMEWORKS, load, missing, quiet, version

    for name, framework in FRAMEWORKS.items():
        absent = missing(name)
        if absent:
            print(f"  no   {name}: {', '.join(absent)} missing")
            for command in framework.commands:
                print(f"         {command}")
            continue
        try:
            with quiet():
                load(name)
            print(f"  yes  {name} {version(name)}")
        except ConfigError as error:
            print(f"  no   {error}")
