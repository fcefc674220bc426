"""`mls bench ablations`: the paper's Tables 6 to 8 on any recipe, printed beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mls.errors import ConfigError, command, unknown_name

if TYPE_CHECKING:
    from mls.eval.pretraining import Pretraining
    from mls.tables import Table


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
    the run is made. What `mls eval run` has stored of a detector on a run (box and mask AP, the paper's measure) joins
    its row. Finished cells are not run again.

    Examples:

        mls bench ablations --short

        mls bench ablations mls_scenes_tiny --grid k --seeds 3

        mls bench ablations mls_coco_r50 data.root=/data/coco --grid loss
    """
    from mls.config import runs_root
    from mls.eval.pretraining import Pretraining
    from mls.files import file_name
    from mls.recipes import is_override, load_config
    from mls.tables import show

    recipe, *overrides = arguments or ["mls_scenes_tiny"]
    if is_override(recipe):
        raise ConfigError(
            f"name the recipe before the overrides: {command('mls bench ablations mls_scenes_tiny', recipe)}"
        )
    chosen = grid or list(GRIDS)
    for name in chosen:
        if name not in GRIDS:
            raise unknown_name("grid", name, GRIDS)
    if short:
        overrides += [change for change in SHORT if not change.startswith("data.scenes") or "scenes" in recipe]
    base = load_config(recipe, overrides)
    folder = out or runs_root(base) / file_name(f"ablations-{base.run.recipe}{'-short' * short}", "the folder's name")
    note = f"{base.run.recipe}, {base.optim.epochs} epochs, {seeds} seed{'s' * (seeds > 1)}"
    note += "; the paper's column: ResNet-50 on COCO, 400 epochs, then Mask R-CNN with a feature pyramid"
    for name in chosen:
        cells = {row.name: Pretraining(row.name, recipe, [*overrides, *row.overrides]) for row in GRIDS[name]}
        show(_table(name, cells, seeds, folder, note), folder / f"{name}.md")
        print()
    print(f"{folder}: runs, tables, results.jsonl. After `mls eval run coco_fpn_1x --weights RUN` on its runs the same")
    print("command shows their box and mask AP, too.")


def _table(name: str, cells: dict[str, Pretraining], seeds: int, folder: Path, note: str) -> Table:
    from mls.eval.pretraining import OVERLAP, PROBES, compare, table_of
    from mls.files import runs_folder
    from mls.tables import Column

    found = compare(cells, seeds, folder)
    ours = table_of(found, name, (*PROBES, *OVERLAP), note)
    runs = {row: [folder / one.row["run"] for one in measured] for row, measured in found.items()}
    for heading, values in detection_ap(runs, (folder, runs_folder())).items():
        ours = ours.with_column(Column(heading), [values.get(row, []) for row in cells])
    return ours.with_column(Column("paper: COCO box / mask AP", "paper"), [row.paper for row in GRIDS[name]])


def detection_ap(runs: Mapping[str, Sequence[Path]], stores: Sequence[Path]) -> dict[str, dict[str, list[float]]]:
    """For each detector that these folders' results.jsonl know, the AP of each row whose runs it was trained on: they
    are found by the hash of their weights."""
    from mls.eval.protocol import fingerprint, load_protocol, protocols
    from mls.eval.weights import read
    from mls.models import weights_file
    from mls.results import Results, stored_cells

    row_of = {read(str(run), "").hash: row for row, several in runs.items() for run in several if weights_file(run)}
    found: dict[str, dict[str, list[float]]] = {}
    for store in dict.fromkeys(stores):
        for cell in stored_cells(Results(store / "results.jsonl").rows(task="detection")):
            row, protocol, settings = row_of.get(cell.row["weights_hash"]), cell.row["protocol"], cell.row["settings"]
            if row is None or not cell.whole:
                continue
            as_shipped = protocol in protocols() and settings == fingerprint(load_protocol(protocol))
            name = protocol if as_shipped else f"{protocol} with other settings ({settings[:6]})"
            values = {metric.partition("/")[2]: value for metric, value in cell.values.items()}
            for metric, heading in (("box_ap", "box AP"), ("mask_ap", "mask AP")):
                if metric in values:
                    found.setdefault(f"{name}: {heading}", {}).setdefault(row, []).append(values[metric])
    return found
