"""`mls bench ablations`: the paper's Tables 6 to 8 on any recipe, printed beside the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mls.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from mls.config import Config
    from mls.results import Results


@dataclass(frozen=True)
class Cell:
    name: str
    overrides: tuple[str, ...]
    paper: str = ""  # box / mask AP on COCO, R50-FPN, 400 epochs (MLS, ICCV 2023)


GRIDS: dict[str, tuple[Cell, ...]] = {
    "loss": (  # Table 6
        Cell("none (MoCo-v2)", ("objective.method=moco_v2",), "38.8 / 35.5"),
        Cell("softmax over neighbours", ("objective.method=knn_moco", "objective.weight=0.4"), "39.1 / 35.3"),
        Cell("bce_pos", ("objective.loss=bce_pos",), "39.6 / 35.7"),
        Cell("bce", ("objective.loss=bce",), "40.1 / 36.2"),
    ),
    "queues": tuple(  # Table 7
        Cell(
            f"labels from {labels}, classified with {classes}",
            (f"objective.labels_from={labels}", f"objective.classify_with={classes}"),
            paper,
        )
        for labels, classes, paper in (
            ("backbone", "backbone", "39.5 / 35.7"),
            ("projection", "projection", "39.8 / 36.0"),
            ("backbone", "projection", "40.1 / 36.2"),
            ("projection", "backbone", ""),
            ("union", "projection", ""),
            ("intersection", "projection", ""),
        )
    ),
    "k": tuple(  # Table 8
        Cell(f"k {k}", (f"objective.k={k}",), paper)
        for k, paper in ((1, "39.7 / 35.9"), (5, "40.0 / 36.1"), (20, "40.1 / 36.2"), (40, "39.2 / 35.4"))
    ),
    "size": tuple(  # Figure 5 prints no numbers
        Cell(f"dictionary {size}", (f"dictionary.size={size}",)) for size in (1024, 2048, 4096, 8192, 16384)
    ),
    "weight": tuple(Cell(f"λ {weight}", (f"objective.weight={weight}",)) for weight in (0.1, 0.3, 0.5, 0.7, 1.0)),
}
SHORT = ("data.scenes.count=1536", "data.scenes.test_count=500", "optim.epochs=2", "dictionary.size=1024")
SHORT += ("objective.warmup_epochs=0",)


def ablations(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE KEY=VALUE", help="An MLS recipe, and overrides.")
    ] = None,
    grid: Annotated[list[str] | None, typer.Option(help=f"Only this one: {', '.join(GRIDS)}. May be repeated.")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 1,
    short: Annotated[bool, typer.Option("--short", help="A quick look: two epochs on fewer scenes.")] = False,
    out: Annotated[Path | None, typer.Option(help="Default: $MLS_RUNS/ablations-RECIPE.")] = None,
) -> None:
    """Run the paper's ablations on a recipe and print them beside the paper's numbers.

    On the embedded scenes a cell's number is the probes' mAP; on other data with labels the online kNN; without labels
    the run is made, and its number is left to `mls eval`. Finished cells are not run again.

    Examples:

        mls bench ablations --short

        mls bench ablations mls_scenes_tiny --grid k --seeds 3

        mls bench ablations mls_coco_r50 data.root=/data/coco --grid loss
    """
    from mls.config import runs_root
    from mls.recipes import load_config
    from mls.results import Results

    recipe, *overrides = arguments or ["mls_scenes_tiny"]
    if "=" in recipe:
        raise ConfigError(f"name the recipe before the overrides: `mls bench ablations mls_scenes_tiny {recipe}`")
    chosen = grid or list(GRIDS)
    for name in chosen:
        if name not in GRIDS:
            raise unknown_name("grid", name, GRIDS)
    if short:
        overrides += [change for change in SHORT if not change.startswith("data.scenes") or "scenes" in recipe]
    base = load_config(recipe, overrides)
    folder = out or runs_root(base) / f"ablations-{base.run.recipe}{'-short' * short}"
    store = Results(folder / "results.jsonl")
    for name in chosen:
        lines = [_line(store, folder, recipe, overrides, cell, seeds) for cell in GRIDS[name]]
        table = _table(name, base, lines, seeds)
        (folder / f"{name}.md").write_text(table)
        print(table)
    print(f"{folder}: runs, tables, results.jsonl")


def _line(store: Results, folder: Path, recipe: str, overrides: list[str], cell: Cell, seeds: int) -> list[str]:
    """One row of a table: the cell over all seeds."""
    from mls.tools.studies import finish_cell, spread

    found = []
    for seed in range(seeds):
        own = [*overrides, *cell.overrides, f"run.seed={seed}", f"run.root={folder}"]
        found.append(finish_cell(store, cell.name, recipe, own))
    cells = [spread([row[name] for row in found if name in row]) for name in ("linear", "knn")]
    overlap = [spread([row[name] for row in found if name in row], 3) for name in ("overlap", "chance")]
    return [cell.name, *cells, *overlap, cell.paper]


def _table(name: str, base: Config, lines: list[list[str]], seeds: int) -> str:
    from mls.tools.studies import markdown_table

    header = [name, "linear mAP", "kNN mAP", "pseudo-label overlap", "by chance", "paper: COCO box / mask AP"]
    note = f"{base.run.recipe}, {base.optim.epochs} epochs, {seeds} seed{'s' * (seeds > 1)}"
    return f"{markdown_table(header, lines)}\n\n{note}; the paper's column is another task, data set and network\n"
