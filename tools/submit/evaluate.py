"""`mls submit eval`: the cells of a suite as one job array. Here eval/ and slurm/ meet; neither knows the other."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mls.errors import ConfigError, command
from mls.tools.eval import ROWS
from mls.tools.submit.options import Changes, DryRun, ProfileName, hand_over, say

if TYPE_CHECKING:
    from mls.eval.cells import Evaluation
    from mls.slurm.job_spec import JobSpec
    from mls.slurm.profile import Profile


def evaluate(
    arguments: Annotated[list[str], typer.Argument(metavar="SUITE KEY=VALUE", help="See `mls eval list`.")],
    weights: Annotated[list[str] | None, typer.Option(help=ROWS)] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="The same methods on the embedded scenes.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Default: as the protocol says.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this row. May be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Holds results.jsonl; default: $MLS_RUNS.")] = None,
    profile: ProfileName = None,
    slurm: Changes = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Each cell gets all processes and GPUs of the profile.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Run a suite as a job array: one task for each protocol, row, seed and weights. Finished cells are left out.

    A task is one process with at most one GPU. With --whole all the profile's share each cell: detection, segmentation,
    fine-tuning and weak labels can, frozen features cannot.

    Afterwards `mls eval suite` with the same arguments prints the table from the stored results.

    Examples:

        mls submit eval scenes_single_positive --weights runs/a --weights runs/b --profile box

        mls submit eval paper_spml --weights torchvision:resnet50 --profile one_node_8gpu --slurm concurrency=4

        mls submit eval paper_dense --weights MLS=runs/a --profile one_node_8gpu --whole
    """
    from mls.files import runs_folder
    from mls.slurm import submit as launch
    from mls.slurm.profile import load_profile

    name, *overrides = arguments
    root = (out or runs_folder()).absolute()
    loaded = load_profile(profile, slurm or [])
    wanted = loaded if whole else one_process(loaded)
    weights = [_absolute_weights(one) for one in weights or ()]
    tasks = plan(name, weights, root, tiny, seeds, only or (), overrides)
    if not tasks:
        say(f"nothing to submit: every cell is in {root / 'results.jsonl'}")
        return
    if whole:
        refuse_frozen(tasks)
    title = f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = root / title
    made = job_specs(tasks, folder, folder / "submission")
    if dry_run:
        print(launch.sbatch_script(made[0], wanted, title, len(made)), end="")
        return
    hand_over([one.write() for one in made], wanted, title, folder)
    print(folder)
    jobs, table = command("mls jobs", folder), command("mls eval suite", *arguments)
    say(f"look at it with {jobs}; once it is done {table}, with the same options, shows the table")


@dataclass(frozen=True)
class Task:
    """One task of the array: a function below, with plain arguments."""

    name: str
    function: Callable[..., None]
    arguments: dict[str, Any]
    protocol: str = ""  # a cell's, as YAML; empty for a row
    frozen: bool = False  # it cannot be shared by processes


def plan(
    name: str,
    weights: Sequence[str],
    root: Path,
    tiny: bool = False,
    seeds: int | None = None,
    only: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> list[Task]:
    """What a suite has to run that is not finished, each cell once. A row that chooses a value on the validation part
    is one task, since its seeds wait for the choice."""
    from mls.eval import suite as suites
    from mls.eval.dense.schema import FrozenDense
    from mls.eval.protocol import Frozen, to_yaml

    suite = suites.on_own_data(suites.load_suite(name), tiny, overrides)
    tasks: dict[str, Task] = {}
    for column in suite.tiny if tiny else suite.columns:
        for row in suites.chosen_rows(suite, weights, tiny, only, overrides):
            if row.choose and not tiny:
                call = {"suite": _absolute(name), "weights": list(weights), "only": row.made_of or row.name}
                call |= {"seeds": seeds, "overrides": list(overrides), "root": str(root)}
                tasks.setdefault(row.name, Task(row.name, run_row, call))
                continue
            for cell in suites.plan(suite, row, column, seeds, overrides):
                known, cell_name = _look_up(cell, root)
                call = {"weights": cell.weights, "seed": cell.seed, "root": str(root)}
                if not known:
                    frozen = isinstance(cell.protocol, Frozen | FrozenDense)
                    tasks.setdefault(cell_name, Task(cell_name, run_cell, call, to_yaml(cell.protocol), frozen))
    return list(tasks.values())


def refuse_frozen(tasks: Sequence[Task]) -> None:
    """Before anything is handed over."""
    for task in tasks:
        if task.frozen:
            raise ConfigError(
                f"{task.name} learns from frozen features in one process: leave out --whole, or use --only"
            )


def _look_up(cell: Evaluation, root: Path) -> tuple[bool, str]:
    """Whether a cell is finished, and its name. Neither is known before its weights are there."""
    from mls.errors import UserError

    try:
        return cell.stored(root) is not None, cell.name
    except UserError:
        digest = hashlib.sha256(f"{cell.protocol}{cell.weights}".encode()).hexdigest()[:8]
        return False, f"{cell.protocol.recipe}-seed{cell.seed}-{digest}"


def _absolute_weights(weights: str) -> str:
    """WEIGHTS or LABEL=WEIGHTS, from everywhere.

    >>> _absolute_weights("torchvision:resnet50")
    'torchvision:resnet50'
    """
    label, separator, path = ("", "", weights) if Path(weights).exists() else weights.rpartition("=")
    return f"{label}{separator}{Path(path).absolute()}" if Path(path).exists() else weights


def _absolute(name: str) -> str:
    """A suite's file from everywhere; a name stays a name."""
    return str(Path(name).absolute()) if Path(name).is_file() else name


def job_specs(tasks: Sequence[Task], folder: Path, shared: Path) -> list[JobSpec]:
    """A folder for each task: its protocol, and what SLURM is to call."""
    from mls.slurm import job_spec

    made = []
    for number, task in enumerate(tasks, start=1):
        inside = folder / f"{number:03d}-{re.sub(r'[^A-Za-z0-9_.=-]+', '-', task.name)}"
        arguments = dict(task.arguments)
        if task.protocol:
            inside.mkdir(parents=True, exist_ok=True)
            # The file's name becomes the protocol's where it says none; this one does.
            (inside / "protocol.yaml").write_text(task.protocol)
            arguments["protocol"] = str(inside / "protocol.yaml")
        call = f"{task.function.__module__}:{task.function.__name__}"
        made.append(job_spec.create(inside, call, arguments, shared, "slurm"))
    return made


def run_cell(protocol: str, weights: str, seed: int, root: str) -> None:
    """In the job: one cell."""
    from mls import distributed
    from mls.eval import cells

    values = cells.run(protocol, weights, seed, Path(root), keep=False)
    if distributed.rank() == 0:
        print(values)


def run_row(suite: str, weights: list[str], only: str, seeds: int | None, overrides: list[str], root: str) -> None:
    """In the job: a row that chooses a value first."""
    from mls.eval import suite as suites

    part = suites.Part(weights, seeds=seeds, only=[only], overrides=overrides)
    suites.run(suites.load_suite(suite), Path(root), part)


def one_process(profile: Profile) -> Profile:
    """An evaluation is one process with at most one GPU; it gets a task's share of the node."""
    share = None if profile.memory_gb is None else profile.memory_gb / profile.tasks_per_node
    gpus = None if not profile.gpus_per_node else 1
    return replace(profile, nodes=1, tasks_per_node=1, gpus_per_node=gpus, memory_gb=share)
