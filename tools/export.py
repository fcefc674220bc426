"""`mls export` and `mls verify-export`: a backbone for other programs, and whether a file is what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mls.exporting import Checked

TARGETS = (
    "Some of torchvision, timm, detectron2, mmseg, safetensors, huggingface, pt2, onnx; default: all that have such a "
    "network."
)
WEIGHTS = (
    "A run, a checkpoint of MoCo, MoCo-v3, DenseCL, solo-learn, lightly, timm, …, or a name: torchvision:resnet50."
)
ARCHITECTURE = "Where it cannot be found in the file: resnet50, timm:vit_base_patch16_224, …"
PREFIX = "Where a file holds several networks: module.encoder_q"


def export(
    weights: Annotated[str, typer.Argument(metavar="RUN|FILE|NAME", help=WEIGHTS)],
    to: Annotated[str | None, typer.Option(help=TARGETS)] = None,
    out: Annotated[Path | None, typer.Option(help="Default: export in RUN, beside FILE, or in $MLS_RUNS.")] = None,
    architecture: Annotated[str | None, typer.Option(help=ARCHITECTURE)] = None,
    prefix: Annotated[str | None, typer.Option(help=PREFIX)] = None,
) -> None:
    """Write a backbone for other programs, each with the recipe that goes with it, and a certificate.

    The written file is loaded into the other program (or into our restatement of its network where that program is not
    installed) and must give the same features at every stage; else nothing is written.

    Examples:

        mls export runs/mls_coco_r50-…

        mls export runs/mls_coco_r50-… --to detectron2,mmseg --out exported

        mls export moco_v2_800ep_pretrain.pth.tar --to detectron2

        mls export vit-b-300ep.pth.tar --to timm,onnx --architecture timm:vit_base_patch16_224
    """
    from mls.errors import ConfigError
    from mls.exporting import TARGETS, export

    names = None if to is None else [name.strip() for name in to.split(",") if name.strip()]
    if names == []:
        raise ConfigError(f"--to names no target: give some of {', '.join(TARGETS)}, or leave it out")
    checked = export(weights, names, out, architecture, prefix, _say)
    _show(checked)
    folder = min((one.file.parent for one in checked), key=lambda path: len(path.parts))  # one has a folder in it
    print(f"\n{folder}: weights, recipes and certificates; `mls verify-export FILE` checks them again")


def verify_export(
    file: Annotated[Path, typer.Argument(help="backbone.pkl, .pth, .safetensors, .pt2 or .onnx, whoever made it.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="detectron2's YAML or mmsegmentation's configuration; default: those beside FILE."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="The run or checkpoint it should equal; default: FILE's own tensors, as trained."),
    ] = None,
) -> None:
    """Check that a file, used as its recipe says, gives the features that it should. Nothing in it is executed.

    Exit code 0 if it does, else 2 and a sentence that says what differs.

    Examples:

        mls verify-export runs/mls_coco_r50-…/export/backbone.pkl

        mls verify-export converted.pkl --recipe my_detectron2.yaml --against moco_v2_800ep_pretrain.pth.tar
    """
    from mls.exporting import verify_export

    _show(verify_export(file, recipe, against, _say))


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _show(checked: list[Checked]) -> None:
    from mls.tables import print_table

    rows = []
    for one in checked:
        keys = one.facts["coverage"]
        count = f"{keys['keys']} of {keys['of']}"
        recipe = one.facts["recipe"] or "none: the defaults"
        rows.append([one.target, one.file.name, recipe, one.facts["loaded_by"], count, f"{one.worst:.1e}"])
    print_table(["target", "file", "recipe", "loaded by", "tensors", "largest difference"], rows)
