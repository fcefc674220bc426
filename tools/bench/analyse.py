"""`mls bench analyse NAME`: the analyses of the papers on noisy multi-labels, each one picture and one table."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

NAMES = (
    *("gradients", "proportion", "landscape"),  # regimes.py, landscape.py
    *("correlation", "margins", "top5"),  # hyperspherical.py
    *("scores", "losscurve", "classwise", "imbalance", "examples"),  # distributions.py
    *("memorisation", "cam", "evolution"),  # large_loss.py
)
QUICK = ("data.scenes.count=600", "data.scenes.test_count=200", "training.epochs=3")


def analyse(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="NAME KEY=VALUE", help=f"One of {', '.join(NAMES)}, or all.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="A multi-label protocol: `mls eval list`.")] = "spml_scenes",
    weights: Annotated[str | None, typer.Option(help="A run, a file or a name; default: the protocol's.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A first look on few embedded scenes.")] = False,
    out: Annotated[Path | None, typer.Option(help="Default: $MLS_RUNS/analyses.")] = None,
) -> None:
    """Draw one of the papers' analyses: a picture (NAME.png) and a table (NAME.md).

    gradients: of the losses over the logit (EM). landscape: how flat the minimum is (EM). proportion: mAP over the
    share of labels (EM). correlation: of the label embeddings (HML). margins: fixed and adaptive, and the gradients
    they give (HML). top5: predictions, right, wrong or unannotated (HML). scores: of unannotated positives and
    negatives (EM). losscurve: of the annotated labels (EM). classwise: gain of each class (EM). imbalance: how many
    unannotated labels are positive (EM). examples: predictions for training and test images (EM). memorisation: the
    epoch of the highest loss (LL). cam: class activation maps and the pointing game of its eight methods, on the
    scenes and on VOC's and COCO's boxes (LL). evolution: how an image's labels change over the epochs (LL).

    Examples:

        mls bench analyse gradients

        mls bench analyse all --quick

        mls bench analyse scores --protocol spml_voc2012 data.workers=8
    """
    from mls.errors import ConfigError, command, unknown_name
    from mls.files import runs_folder
    from mls.tables import markdown_table, terminal_width
    from mls.tools.analyses import Study, analyses

    name, *overrides = arguments or ["all"]
    if "=" in name:
        raise ConfigError(f"name the analysis before the overrides: {command('mls bench analyse gradients', name)}")
    known = analyses()
    if name not in (*known, "all"):
        raise unknown_name("analysis", name, [*known, "all"])
    folder = out or runs_folder() / "analyses"
    folder.mkdir(parents=True, exist_ok=True)
    short = QUICK if quick else ()
    study = Study(protocol, [*short, *overrides], weights, seed, folder)
    for one in known if name == "all" else [name]:
        finding = known[one](study)
        finding.figure.savefig(folder / f"{one}.png", dpi=150, bbox_inches="tight")
        table = partial(markdown_table, finding.header, finding.rows)
        (folder / f"{one}.md").write_text(f"{table()}\n\n{finding.summary}\n")
        print(f"{table(width=terminal_width())}\n\n{finding.summary}\n\n{folder / one}.png\n")
