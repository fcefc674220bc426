"""`mls bench objectives`: every loss as the pretraining objective, beside MoCo-v2 (no multi-label term) and BCE, the
paper's choice. One table: what the features are worth, how good the pseudo-labels are, what a step costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mls.errors import ConfigError, command

if TYPE_CHECKING:
    import torch

    from mls.config import Config
    from mls.core.methods import MoCo
    from mls.data import Views

NONE, PAPER = "none (MoCo-v2)", "bce"  # the two references of every table
# Of losses that have no recipe of their own (LOSS_scenes_tiny). Weights make the term pull about a tenth as hard as
# InfoNCE, as BCE does at 0.5: measured on the embedded scenes at step 200 (`gradient/multi_label` in the log).
SETTINGS: dict[str, tuple[str, ...]] = {
    "bce_pos": ("objective.weight=250",),
    "iu": ("objective.weight=250",),
    "wan": ("objective.weight=350",),
    "dw": ("objective.weight=350",),
    "epr": ("objective.weight=5",),
    "ent_min": ("objective.weight=10",),
    "em_apl": ("objective.weight=10",),
    "pairwise_rank": ("objective.weight=0.1",),
    "symmetric_ce": ("objective.weight=1.2",),
}
# Without known negatives and soft labels, as here, and with their own options these are the same as another loss.
TWINS = {"an": "bce", "iu": "bce_pos", "dw": "wan", "em_apl": "em"}
ROUNDS = 15


def objectives(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE KEY=VALUE", help="An MLS recipe, and overrides.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    loss: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this one and the references. May be repeated.")
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="A quick look: two epochs on fewer scenes.")] = False,
    out: Annotated[Path | None, typer.Option(help="Default: $MLS_RUNS/objectives-RECIPE.")] = None,
) -> None:
    """Pretrain with every loss on the same recipe and print what each gives and costs.

    A loss is taken with the options of its recipe (`em_scenes_tiny` and so on) where it has one. The time of a step is
    measured here, in turns on one batch, and given as a multiple of BCE's. Finished cells are not run again.

    Examples:

        mls bench objectives --short --loss em --loss two_way

        mls bench objectives mls_scenes_tiny optim.epochs=8 --seeds 5
    """
    from mls.config import runs_root
    from mls.eval.pretraining import MEASURED, Pretraining, compare, table_of
    from mls.files import file_name
    from mls.recipes import applicable, is_override, load_config
    from mls.tables import Column, show
    from mls.tools.bench.ablations import SHORT

    recipe, *overrides = arguments or ["mls_scenes_tiny"]
    if is_override(recipe):
        raise ConfigError(
            f"name the recipe before the overrides: {command('mls bench objectives mls_scenes_tiny', recipe)}"
        )
    if short:
        quick = [change for change in SHORT if not change.startswith("data.scenes") or "scenes" in recipe]
        overrides = [*quick, *overrides]
    losses = {name: applicable(recipe, [*overrides, *changes]) for name, changes in chosen(loss).items()}
    base = load_config(recipe, overrides)
    times = relative_times({name: load_config(recipe, changes) for name, changes in losses.items()})

    folder = out or runs_root(base) / file_name(f"objectives-{base.run.recipe}{'-short' * short}", "the folder's name")
    cells = {name: Pretraining(name, recipe, changes) for name, changes in losses.items()}
    note = f"{base.run.recipe}, {base.optim.epochs} epochs, {seeds} seed{'s' * (seeds > 1)}; time: forward, backward "
    note += f"and optimizer over {PAPER}'s, in turns on one batch, median of {ROUNDS}"
    table = table_of(compare(cells, seeds, folder), "loss", MEASURED, note)
    time = Column("time of a step", "time", digits=2, scale=1)
    show(table.with_column(time, [[times[name]] for name in cells]), folder / "objectives.md")
    print(f"{folder}: runs, table, results.jsonl")


def chosen(wanted: list[str] | None = None) -> dict[str, list[str]]:
    """The overrides of every row of the table: the references, then the losses that were asked for, or all.

    >>> chosen(["em"])["none (MoCo-v2)"], list(chosen(["em"]))
    (['objective.method=moco_v2'], ['none (MoCo-v2)', 'bce', 'em'])
    """
    from mls.core import losses

    if wanted is None:
        wanted = [name for name in losses.names() if name not in TWINS and not losses.LOSSES[name].only_supervised]
    rest = {name: settings(name) for name in wanted if name != PAPER}
    return {NONE: ["objective.method=moco_v2"], PAPER: settings(PAPER), **rest}


def settings(loss: str) -> list[str]:
    """The overrides that make a recipe's objective this loss."""
    from mls.config import MLSOptions
    from mls.recipes import load_config, recipes

    if f"{loss}_scenes_tiny" not in recipes():
        return [f"objective.loss={loss}", *SETTINGS.get(loss, ())]
    objective = load_config(f"{loss}_scenes_tiny").objective
    assert isinstance(objective, MLSOptions)
    options = [f"objective.options.{key}={value}" for key, value in objective.options.items()]
    return [f"objective.loss={loss}", f"objective.weight={objective.weight}", *options]


def relative_times(configs: Mapping[str, Config]) -> dict[str, float]:
    """How long a step of each takes, over BCE's: forward, backward and optimizer on one batch, in turns, so that
    whatever else the machine does falls on all of them."""
    import time

    import torch

    from mls import distributed
    from mls.core import methods
    from mls.engine import optim
    from mls.models.momentum import precision_on

    base = configs[PAPER]
    device = distributed.start(base.engine.device).device
    if base.engine.threads:
        torch.set_num_threads(base.engine.threads)
    # One network and one dictionary for all: only what the losses do differs.
    layout = torch.channels_last if base.engine.channels_last else torch.contiguous_format
    precision = precision_on(device, base.engine.precision)
    trained = {name: methods.build(config, precision).to(device) for name, config in configs.items()}
    shared = trained[PAPER].to(memory_format=layout)
    views = _random_batch(base, trained[PAPER], device)
    optimizers = {}
    for name, method in trained.items():
        method.pair, method.dictionary = shared.pair, shared.dictionary
        method.set_progress(step=base.optim.epochs, epoch=base.optim.epochs, steps_per_epoch=1)  # schedules at work
        optimizers[name] = optim.build(configs[name], method, method.own_rates())
        optim.set_lr(optimizers[name], 0.0)  # the random batch teaches nothing
    ratios: dict[str, list[float]] = {name: [] for name in trained}
    for number in range(-2, ROUNDS):  # two to warm up
        took = {}
        for name, method in trained.items():
            began = time.perf_counter()
            method(views).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took[name] = time.perf_counter() - began
        for name in trained if number >= 0 else ():
            ratios[name].append(took[name] / took[PAPER])
    return {name: statistics.median(values) for name, values in ratios.items()}


def _random_batch(config: Config, method: MoCo, device: torch.device) -> Views:
    """Two views of noise, and a dictionary full of other noise."""
    import torch
    import torch.nn.functional as F

    from mls.data import Views

    count, size, rows = config.data.batch_size, config.augment.size, config.dictionary.size
    widths = method.backbone.feature_dim, config.model.projection
    memory = [F.normalize(torch.randn(rows, width, device=device), dim=1) for width in widths]
    method.dictionary.enqueue(*memory, ids=torch.arange(rows, device=device))
    images = [torch.randn(count, 3, size, size, device=device) for _ in range(2)]
    if config.engine.channels_last:
        images = [image.contiguous(memory_format=torch.channels_last) for image in images]
    return Views(images, [torch.zeros(count, 4, device=device)] * 2, torch.arange(rows, rows + count, device=device))
