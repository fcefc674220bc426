"""`mls bench ablations`: the paper's Tables 6 to 8 on any recipe, printed beside the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mls.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Ablation:
    name: str
    overrides: tuple[str, ...]
    paper: str = ""  # box / mask AP on COCO, R50-FPN, 400 epochs (MLS, ICCV 2023)


GRIDS: dict[str, tuple[Ablation, ...]] = {
    "loss": (  # Table 6
        Ablation("none (MoCo-v2)", ("objective.method=moco_v2",), "38.8 / 35.5"),
        Ablation("softmax over neighbours", ("objective.method=knn_moco", "objective.weight=0.4"), "39.1 / 35.3"),
        Ablation("bce_pos", ("objective.loss=bce_pos",), "39.6 / 35.7"),
        Ablation("bce", ("objective.loss=bce",), "40.1 / 36.2"),
        Ablation("bce without InfoNCE", ("objective.info_nce_weight=0", "objective.warmup_epochs=0"), "unstable"),
    ),
    "queues": tuple(  # Table 7
        Ablation(
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
        Ablation(f"k {k}", (f"objective.k={k}",), paper)
        for k, paper in ((1, "39.7 / 35.9"), (5, "40.0 / 36.1"), (20, "40.1 / 36.2"), (40, "39.2 / 35.4"))
    ),
    "size": tuple(  # Figure 5 prints no numbers
        Ablation(f"dictionary {size}", (f"dictionary.size={size}",)) for size in (1024, 2048, 4096, 8192, 16384)
    ),
    "weight": tuple(Ablation(f"λ {weight}", (f"objective.weight={weight}",)) for weight in (0.1, 0.3, 0.5, 0.7, 1.0)),
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
    from mls.eval.pretraining import OVERLAP, PROBES, Pretraining, compare, table_of
    from mls.recipes import load_config
    from mls.tables import Column, show

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
    note = f"{base.run.recipe}, {base.optim.epochs} epochs, {seeds} seed{'s' * (seeds > 1)}"
    note += "; the paper's column is another task, data set and network"
    for name in chosen:
        cells = {row.name: Pretraining(row.name, recipe, [*overrides, *row.overrides]) for row in GRIDS[name]}
        ours = table_of(compare(cells, seeds, folder), name, (*PROBES, *OVERLAP), note)
        paper = Column("paper: COCO box / mask AP", "paper")
        show(ours.with_column(paper, [row.paper for row in GRIDS[name]]), folder / f"{name}.md")
        print()
    print(f"{folder}: runs, tables, results.jsonl")
