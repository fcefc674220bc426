"""`mls demo`: the whole method on embedded data. Trains, probes, prints one table, leaves runs and a picture."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mls.errors import command

FINE = ["model.backbone=resnet_tiny_fine"]  # which windows need, and which costs what resnet_tiny does
# Row of the table -> the recipe it trains and what it changes there; of "random" the network alone is built.
ROWS: dict[str, tuple[str, list[str]]] = {
    "random": ("moco_v2_scenes_tiny", FINE),
    "MoCo-v2": ("moco_v2_scenes_tiny", FINE),
    "MLS": ("mls_scenes_tiny", FINE),
    "MLS with words": ("mls_words_scenes_tiny", []),
}
CONTROLS: dict[str, tuple[str, list[str]]] = {
    "MLS, random pseudo-labels": ("mls_scenes_tiny", [*FINE, "objective.pseudo_labels=random"]),
    "MLS, oracle pseudo-labels": ("mls_scenes_tiny", [*FINE, "objective.pseudo_labels=oracle"]),
    "MLS, oracle, balanced, weight 2": (
        "mls_scenes_tiny",
        [*FINE, "objective.pseudo_labels=oracle", "objective.normalise=balanced", "objective.weight=2"],
    ),
    "MoCo-v2 with windows": ("mls_regions_scenes_tiny", ["objective.method=moco_v2"]),  # words less their labels
    "MLS with regions": ("mls_regions_scenes_tiny", []),
    "MLS with words of other images": ("mls_words_scenes_tiny", ["objective.pseudo_labels=random"]),
    "supervised": ("mls_scenes_tiny", [*FINE, "objective.method=supervised"]),
}
SHORT = ["data.scenes.count=4000"]  # two thirds of the recipes': five minutes
QUICK = ["data.scenes.count=1024", "data.scenes.test_count=500", "optim.epochs=6", "dictionary.size=1024"]
QUICK += ["objective.warmup_epochs=1"]


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute and a half instead of minutes: fewer scenes and epochs.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with this many seeds and print mean ± std.")] = 1,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Add controls: random and oracle pseudo-labels, true labels, the scene type."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Where everything goes (default: $MLS_RUNS/demo).")] = None,
) -> None:
    """Pretrain on the embedded scenes with MoCo-v2, with MLS and with MLS with visual words, and compare the backbones.

    `--controls` adds random and oracle labels, words of other images, windows without labels and with labels from
    regions, the same network trained with the true labels, and what the scene's type alone, its background, would tell.

    Needs no data and no GPU. What is finished is not done again: interrupt it and call it again.

    Examples:

        mls demo --quick

        mls demo --seeds 3 --controls
    """
    from mls.config import runs_root
    from mls.eval.pretraining import DENSE, OVERLAP, PROBES, Pretraining, compare, scene_type_map, table_of
    from mls.recipes import load_config
    from mls.tables import Row, show

    began = time.monotonic()
    folder = out or runs_root(load_config("mls_scenes_tiny")) / ("demo-quick" if quick else "demo")
    folder.mkdir(parents=True, exist_ok=True)
    short = QUICK if quick else SHORT
    cells = {
        row: Pretraining(row, recipe, [*short, *own], trained=row != "random")
        for row, (recipe, own) in (ROWS | (CONTROLS if controls else {})).items()
    }
    found = compare(cells, seeds, folder, helped=True)
    note = f"mAP and mIoU in per cent on unseen scenes, {seeds} seed{'s' * (seeds > 1)}{', mean ± std' * (seeds > 1)}"
    heading = "backbone (--quick: too short to show anything)" if quick else "backbone"
    table = table_of(found, heading, (*PROBES, DENSE, *OVERLAP), note)
    if controls:
        alone = {"linear": [scene_type_map(load_config("mls_scenes_tiny", short))]}
        table = replace(table, rows=[*table.rows, Row(["scene type alone"], alone)])
    mls_run, moco_run = (folder / found[row][0].row["run"] for row in ("MLS", "MoCo-v2"))
    picture = _picture(mls_run, folder / "pseudo_positives.png")
    show(table, folder / "table.md")
    print(f"\n{picture}: query crops (red) and the rows MLS chose as their positives (yellow)")
    print(f"{command('mls report', mls_run, moco_run)} makes a page of curves and crops")
    print(f"took {time.monotonic() - began:.0f} s")


def _picture(run: Path, target: Path) -> Path:
    from mls.engine.gallery import gallery
    from mls.frozen.match_picture import draw

    draw(gallery(run)).save(target)
    return target
