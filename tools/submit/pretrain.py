"""`mls submit pretrain`: a run or a sweep under SLURM, evaluations behind them, or a rehearsal of what may go wrong."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mls.errors import ConfigError, UserError, command
from mls.tools.submit import evaluate
from mls.tools.submit.options import Changes, DryRun, ProfileName, hand_over, say

if TYPE_CHECKING:
    from mls.config import Config
    from mls.slurm.job_spec import JobSpec
    from mls.slurm.profile import Profile


def pretrain(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG KEY=VALUE", help="A recipe or YAML file, and overrides."),
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="slurm; local: a process of this machine; debug: here and now.")
    ] = "slurm",
    profile: ProfileName = None,
    slurm: Changes = None,
    name: Annotated[str | None, typer.Option(help="Name of the folder (default: recipe, date, hash).")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B,C", help="One run for each value; may be repeated.")
    ] = None,
    suite: Annotated[str | None, typer.Option("--eval", help="Evaluate each run with this suite afterwards.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Submit this run again instead.")] = None,
    from_step: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --resume: submit a new run from this step of RUN, with other KEY=VALUE."),
    ] = None,
    rehearse: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="preempt, timeout, kill-node or requeue, in a SLURM on this machine."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Pretrain under SLURM: queued again on preemption, time limit and lost nodes, until it is done.

    Examples:

        mls submit pretrain mls_scenes_tiny --profile box

        mls submit pretrain mls_coco_r50 data.root=/data/coco --profile two_nodes_8gpu --slurm minutes=720 --dry-run

        mls submit pretrain mls_scenes_tiny --sweep objective.k=1,5,20 --sweep seed=0,1 --eval scenes_single_positive

        mls submit pretrain mls_scenes_tiny --rehearse preempt

        mls submit pretrain --resume runs/mls_scenes_tiny-20260101-120000-1a2b
    """
    from mls.engine.run import run_folder
    from mls.recipes import is_override, load_config, override, recipes
    from mls.slurm import job_spec
    from mls.slurm import submit as launch
    from mls.slurm.profile import load_profile
    from mls.slurm.sweep import combinations

    positional = list(arguments or [])
    launch.check_cluster(cluster, several=bool(sweep or suite))
    wanted = load_profile(profile, slurm or [])
    if resume is not None:
        if sweep or (from_step is None and (positional or name)):
            raise ConfigError("--resume takes its configuration from the run: leave the rest out, or give --from-step")
        if from_step is not None and not dry_run:
            resume = _branch(resume, from_step, positional, name)
        return _again(resume, wanted, cluster, dry_run)
    if not positional or is_override(positional[0]):
        known = ", ".join(recipes())
        raise ConfigError(f"say what to train: `mls submit pretrain CONFIG`, with a YAML file or one of {known}")
    if rehearse is not None:
        return _rehearse(rehearse, positional, wanted)
    cells = combinations(sweep or [])
    named = [] if name is None else [override("run.name", name)]
    config = load_config(positional[0], [*positional[1:], *named])
    for cell in cells:
        load_config(positional[0], [*positional[1:], *cell])  # a mistake is told before anything is made
    if suite is not None:
        from mls.eval import load_suite  # seconds, needed by nobody else

        load_suite(suite)
    if dry_run:
        folder = run_folder(config, fresh=f"{config.run.recipe}-DATE-HASH").absolute()
        made = job_spec.create_pretraining(folder, folder / "submission", cluster)
        print(launch.sbatch_script(made, wanted, folder.name, len(cells)), end="")
        return
    folder, runs = _make_runs(config, positional, cells)
    made = [job_spec.create_pretraining(run, folder / "submission", cluster).write() for run in runs]
    if cluster == "debug":
        return launch.run_here(made[0])
    submitted = hand_over(made, wanted, folder.name, folder)
    if suite is not None:
        _evaluate_behind(submitted, suite, folder.parent, wanted)
    print(folder)
    say(f"look at it with {command('mls jobs', folder)}, end it with {command('mls cancel', folder)}")


def _make_runs(config: Config, positional: Sequence[str], cells: Sequence[Sequence[str]]) -> tuple[Path, list[Path]]:
    """The run's folder; for a sweep a folder of run folders."""
    say("making the run folder")
    from mls.engine import Run
    from mls.recipes import load_config, override
    from mls.slurm.sweep import cell_name

    folder = Run.create(config).path
    if len(cells) == 1 and not cells[0]:
        return folder, [folder]
    (folder / "config.yaml").unlink()
    runs = []
    for cell in cells:
        place = [override("run.root", folder), override("run.name", cell_name(cell))]
        runs.append(Run.create(load_config(positional[0], [*positional[1:], *cell, *place])).path)
    return folder, runs


def _evaluate_behind(runs: Sequence[JobSpec], suite: str, root: Path, profile: Profile) -> None:
    """Behind each run the suite's cells, as an array of their own that starts when the run has succeeded."""
    from mls.slurm import submit as launch

    alone = evaluate.one_process(profile)
    for run in runs:
        tasks = evaluate.plan(suite, [run.folder], root.absolute())
        folder = Path(run.folder) / "evaluation"
        made = [one.write() for one in evaluate.job_specs(tasks, folder, Path(run.code).parent)]
        submitted = launch.submit(made, alone, f"{Path(run.folder).name}-{Path(suite).stem}", after=run.job)
        jobs = command("mls jobs", folder)
        say(f"behind job {run.job}: {len(made)} evaluations from job {submitted[0].job} on; {jobs}")


def _branch(run: str, step: int, overrides: Sequence[str], name: str | None) -> str:
    """The folder of a new run, to be submitted, that goes on from a step of another one."""
    from mls.engine import Run
    from mls.engine.branch import create_branch
    from mls.recipes import override

    named = [] if name is None else [override("run.name", name)]
    return str(create_branch(Run.open(run), step, [*overrides, *named]).path)


def _again(name: str, profile: Profile, cluster: str, dry_run: bool) -> None:
    from mls import plugins
    from mls.engine import Run
    from mls.slurm import job_spec, watch
    from mls.slurm import submit as launch

    run = Run.open(name)
    if run.done:
        raise UserError(f"{run.path} is done: there is nothing to submit")
    if job_spec.is_submitted(run.path):
        (seen,) = watch.status_of([job_spec.read(run.path)], run.path.parent)
        if seen.state in ("queued", "queued again", "running"):
            raise UserError(f"{run.path} is {seen.state} ({seen.reason}): {command('mls cancel', run.path)} first")
    plugins.load(run.config.run.plugins)  # so that the job takes them along
    made = job_spec.create_pretraining(run.path, run.path / "submission", cluster)
    if dry_run:
        print(launch.sbatch_script(made, profile, run.name), end="")
        return
    shutil.rmtree(made.code, ignore_errors=True)  # the code of today
    made.write()
    if cluster == "debug":
        return launch.run_here(made)
    hand_over([made], profile, run.name)
    print(run.path)


def _rehearse(what: str, positional: Sequence[str], profile: Profile) -> None:
    from mls.slurm import rehearse

    outcome = rehearse.run(what, positional[0], positional[1:], profile, say)
    print(outcome.text)
    if not outcome.survived:
        raise typer.Exit(1)
