"""`mls demo`: the whole method on embedded data. Trains, probes, prints one table, leaves runs and a picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

# Row of the table -> the recipe it trains and what it changes there. None: nothing is trained.
ROWS: dict[str, tuple[str, list[str]] | None] = {
    "random": None,
    "MoCo-v2": ("moco_v2_scenes_tiny", []),
    "MLS": ("mls_scenes_tiny", []),
}
CONTROLS: dict[str, tuple[str, list[str]] | None] = {
    "MLS, random pseudo-labels": ("mls_scenes_tiny", ["objective.pseudo_labels=random"]),
    "MLS, oracle pseudo-labels": ("mls_scenes_tiny", ["objective.pseudo_labels=oracle"]),
    "MLS, oracle, balanced, weight 2": (
        "mls_scenes_tiny",
        ["objective.pseudo_labels=oracle", "objective.normalise=balanced", "objective.weight=2"],
    ),
    "supervised": ("mls_scenes_tiny", ["objective.method=supervised"]),
}
QUICK = ["data.scenes.count=1536", "data.scenes.test_count=500", "optim.epochs=6", "dictionary.size=1024"]
QUICK += ["objective.warmup_epochs=1"]


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute instead of minutes: fewer scenes and epochs.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with this many seeds and print mean ± std.")] = 1,
    controls: Annotated[bool, typer.Option("--controls", help="Add the rows that keep us honest.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where everything goes (default: $MLS_RUNS/demo).")] = None,
) -> None:
    """Pretrain on the embedded scenes with MoCo-v2 and with MLS, and compare the backbones.

    `--controls` adds MLS with random and with oracle pseudo-labels, the same network trained with the true labels, and
    what the scene's type alone, its background, would tell.

    Needs no data and no GPU. What is finished is not done again: interrupt it and call it again.

    Examples:

        mls demo --quick

        mls demo --seeds 3 --controls
    """
    from mls.config import runs_root
    from mls.recipes import load_config
    from mls.results import Results
    from mls.tools.studies import finish_cell, scene_type_alone

    began = time.monotonic()
    folder = out or runs_root(load_config("mls_scenes_tiny")) / ("demo-quick" if quick else "demo")
    folder.mkdir(parents=True, exist_ok=True)
    store = Results(folder / "results.jsonl")
    rows = ROWS | (CONTROLS if controls else {})
    found: dict[str, list[dict[str, Any]]] = {row: [] for row in rows}
    for seed in range(seeds):
        for row, recipe in rows.items():
            name, own = recipe or ("moco_v2_scenes_tiny", [])
            overrides = [*(QUICK if quick else []), *own, f"run.seed={seed}", f"run.root={folder}"]
            found[row].append(finish_cell(store, row, name, overrides, train=recipe is not None))
    if controls:
        found["scene type alone"] = [scene_type_alone(load_config("mls_scenes_tiny", QUICK if quick else []))]
    table = _table(found, seeds, quick)
    (folder / "table.md").write_text(table)
    mls_run, moco_run = folder / found["MLS"][0]["run"], folder / found["MoCo-v2"][0]["run"]
    picture = _picture(mls_run, folder / "pseudo_positives.png")
    print(table)
    print(f"{picture}: query crops (red) and the rows MLS chose as their positives (yellow)")
    print(f"mls report {mls_run} {moco_run}   makes a page of curves and crops")
    print(f"took {time.monotonic() - began:.0f} s")


def _table(found: dict[str, list[dict[str, Any]]], seeds: int, quick: bool) -> str:
    from mls.tools.studies import markdown_table, spread

    lines = []
    for row, values in found.items():
        cells = [spread([value[name] for value in values if name in value]) for name in ("linear", "knn")]
        overlap = [spread([value[name] for value in values if name in value], 3) for name in ("overlap", "chance")]
        lines.append([row, *cells, *overlap])
    header = ["backbone", "linear mAP", "kNN mAP", "pseudo-label overlap", "by chance"]
    note = f"mAP in per cent on unseen scenes, {seeds} seed{'s' * (seeds > 1)}{', mean ± std' * (seeds > 1)}"
    return f"{markdown_table(header, lines)}\n\n{note}{' (quick: too short to mean much)' * quick}\n"


def _picture(run: Path, target: Path) -> Path:
    from mls.frozen.gallery import draw, gallery

    draw(gallery(run)).save(target)
    return target
