"""`mls doctor`: what of this installation works, and whether a run that is about to start will. What follows from the
configuration is in mls/engine/findings.py, what is measured in measured.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from mls.tools.submit.options import Changes, ProfileName

if TYPE_CHECKING:
    from mls.config import Config
    from mls.engine.findings import Finding
    from mls.slurm.profile import Profile

MARKS = {"fine": "ok", "warning": "look", "fails": "FAILS"}


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG|DIR KEY=VALUE", help="A recipe, file or folder of images, and overrides."),
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Of the run; default: those of this launcher.")] = None,
    profile: ProfileName = None,
    slurm: Changes = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    frameworks: Annotated[
        bool, typer.Option("--frameworks", help="The programs that exported backbones go to, and how to install them.")
    ] = False,
) -> None:
    """Say what is installed; with a recipe, in a minute, what of the run that it makes is amiss.

    Images are decoded, the loader is timed against three real steps, and memory, disk, dictionary and schedule are
    worked out: finding, what was measured, and an override to paste. Exit codes: 0 it will run, 2 it will fail.

    Examples:

        mls doctor

        mls doctor mls_scenes_tiny

        mls doctor /path/to/images --processes 8 --json

        mls doctor --frameworks
    """
    if not json:
        _machine()
    if frameworks:
        _frameworks()
    if arguments:
        from mls.errors import EXIT_MISTAKE

        found = []
        for finding in _findings(arguments, processes, profile, slurm or []):
            found.append(finding)
            if not json:
                _tell(finding)
        options = [f"--processes={processes}"] if processes else []
        options += [f"--profile={profile}"] if profile else []
        _conclude(found, [*arguments, *options, *(f"--slurm={one}" for one in slurm or [])], json)
        if any(finding.level == "fails" for finding in found):
            raise typer.Exit(EXIT_MISTAKE)


def _findings(
    arguments: list[str], processes: int | None, profile: str | None, changes: list[str]
) -> Iterator[Finding]:
    """Each as soon as it is there."""
    import os

    from mls.engine.findings import Finding
    from mls.errors import UserError
    from mls.recipes import load_config, of_folder
    from mls.slurm.profile import load_profile

    try:
        job = load_profile(profile, changes) if profile or changes else None
        world = processes or (job.nodes * job.tasks_per_node if job else int(os.environ.get("WORLD_SIZE", 1)))
        recipe, *overrides = of_folder(arguments)
        config = load_config(recipe, overrides)
    except UserError as mistake:
        yield Finding("configuration", "fails", str(mistake))
        return
    try:
        yield from _of_config(config, world, job)
    except UserError as mistake:  # whatever the run itself would end with
        yield Finding("start", "fails", str(mistake))


def _of_config(config: Config, world: int, job: Profile | None) -> Iterator[Finding]:
    from mls.config import check
    from mls.data.sources import build_source
    from mls.distributed import start
    from mls.engine import sizing
    from mls.engine.findings import Finding, Plan, Sizes, disk, findings, memory
    from mls.engine.trainer import watched_labels
    from mls.frameworks.installed import FRAMEWORKS, missing
    from mls.tools.doctor import measured

    source, process = build_source(config.data), start(config.engine.device)
    if config.run.auto:  # as training does
        config, _ = sizing.choose(config, sizing.facts_of(source, replace(process, world=world)))
        check(config)
    yield Finding("images", "fine", f"{len(source):,} from {source.name}")
    labels, plan = watched_labels(source), Plan(config, len(source), world)
    yield from (of_plan := findings(plan))
    yield from measured.images(source, config)
    sizes = Sizes.planned(config, world, labels)
    device = process.device
    of_memory = memory(plan, sizes, device)
    yield of_memory
    yield disk(plan, sizes)
    seconds = None
    if not any(finding.level == "fails" for finding in [*of_plan, of_memory]):
        speed, of_steps = measured.speed(plan, source, device)
        seconds = None if speed is None else speed.step
        yield from of_steps
    yield from measured.saving(plan, sizes, seconds, job)
    here = [name for name in FRAMEWORKS if not missing(name)]
    words = f"{', '.join(here) or 'none'} of {', '.join(FRAMEWORKS)} can take the backbone (mls doctor --frameworks)"
    yield Finding("frameworks", "fine", words)


def _tell(finding: Finding) -> None:
    import textwrap

    from mls.tables import terminal_width

    mark, width = MARKS[finding.level], (terminal_width() or 120) - 1
    text = f"{finding.name}: {finding.measured}"
    print(textwrap.fill(text, width, initial_indent=f"{mark:<6}", subsequent_indent=" " * 8, break_on_hyphens=False))
    if finding.override:
        print(f"        {finding.override}")


def _conclude(found: list[Finding], words: list[str], as_json: bool) -> None:
    """The command with all overrides, to paste; or everything as JSON."""
    import json
    from dataclasses import asdict

    from mls.errors import command

    overrides = [finding.override for finding in found if finding.override]
    last = {word.rpartition("=")[0] or word: word for word in [*words, *overrides]}  # of those with the same key
    again = command("mls doctor", *last.values()).strip("`") if overrides else ""
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in found], "again": again}, indent=1))
    elif again:
        print(f"\nwith all overrides: {again}")


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
