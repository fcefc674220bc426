"""`mls eval`: run a protocol, or a whole table of a paper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mls.errors import ConfigError, command
from mls.tables import Format
from mls.tools.export import ARCHITECTURE, PREFIX

if TYPE_CHECKING:
    from mls.eval.protocol import AnyProtocol

app = typer.Typer(help="Downstream evaluation: one protocol, or a paper's table.", no_args_is_help=True)

WEIGHTS = "A run, a checkpoint file, torchvision:NAME, timm:NAME, random:NAME or random; default: the protocol's own."
ROWS = "As for `mls eval run`, or LABEL=WEIGHTS. May be repeated; several with one LABEL are runs of one row."


@app.command("run")
def run(
    arguments: Annotated[list[str], typer.Argument(metavar="PROTOCOL KEY=VALUE", help="See `mls eval list`.")],
    weights: Annotated[str | None, typer.Option(help=WEIGHTS)] = None,
    architecture: Annotated[str | None, typer.Option(help=ARCHITECTURE)] = None,
    prefix: Annotated[str | None, typer.Option(help=PREFIX)] = None,
    seed: Annotated[int, typer.Option()] = 0,
    out: Annotated[Path | None, typer.Option(help="Holds results.jsonl and eval/; default: $MLS_RUNS.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure what is stored again.")] = False,
) -> None:
    """Run one protocol and store its numbers. The same call goes on where it was stopped, or prints what is stored.

    Examples:

        mls eval run spml_scenes training.loss=em

        mls eval run spml_voc2012 training.loss=ll_r --weights torchvision:resnet50 data.root=/data/VOCdevkit

        mls eval run linear data.name=cub200 --weights runs/mls_coco_r50-…

        mls eval run linear_imagenet --weights vit-b-300ep.pth.tar --architecture timm:vit_base_patch16_224

        mls eval run knn data.name=folder data.root=/data/birds --weights torchvision:resnet50

        torchrun --nproc-per-node 8 -m mls.tools eval run coco_fpn_1x --weights runs/mls_coco_r50-…   (dense tasks)
    """
    from mls import distributed
    from mls.eval import load_protocol
    from mls.eval.cells import evaluation
    from mls.files import runs_folder
    from mls.tables import print_table

    name, *overrides = arguments
    root = out or runs_folder()
    cell = evaluation(load_protocol(name, overrides), weights, seed, architecture, prefix)
    measured = cell.finish(root, keep=True, again=again)
    if distributed.rank() != 0:
        return
    rows = [[f"{cell.dataset}/{metric}", f"{100 * value:.2f}"] for metric, value in measured.values.items()]
    print_table(["metric, in per cent", "test"], rows)
    row = measured.row
    step = f" at step {row['step']}" if row.get("step") is not None else ""
    print(f"\n{row['selection']}, weights {row['weights']}{step}")
    if measured.stored_before:
        print(f"measured on {measured.date}, not run again; --again runs it")
    print(f"{root / 'results.jsonl'}: stored as {row['run']}")
    _name_files(root / "eval" / row["run"], cell.protocol)


def _name_files(folder: Path, protocol: AnyProtocol) -> None:
    """What lies beside the numbers of one training."""
    from mls.eval.dense.schema import Dense, FrozenDense

    backend, network = getattr(protocol, "backend", "torchvision"), folder / "classifier.safetensors"
    if network.is_file() and backend != "torchvision":  # `mls predict` does not build its networks
        print(f"{network}: the network that {backend} trained")
    elif network.is_file() and not isinstance(protocol, FrozenDense):
        place = "found" if isinstance(protocol, Dense) else "preds.csv"
        print(f"{command('mls predict', folder, 'IMAGES', '--out', place)}: what it says of other images")
    if (folder / "found.png").is_file():
        print(f"{folder / 'found.png'}: some test images, what was found in them and what is true")


@app.command("suite")
def suite(
    arguments: Annotated[list[str], typer.Argument(metavar="NAME KEY=VALUE", help="See `mls eval list`.")],
    weights: Annotated[list[str] | None, typer.Option(help=ROWS)] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="The same methods on the embedded scenes: minutes.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Default: as the protocol says.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this row. May be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Holds results.jsonl and the table; default: $MLS_RUNS.")] = None,
    format: Annotated[Format, typer.Option(help="Of what is printed.")] = Format.markdown,
    again: Annotated[bool, typer.Option("--again", help="Measure what is stored again.")] = False,
) -> None:
    """Run a paper's table and print it with our numbers beside. Finished cells are not run again.

    Examples:

        mls eval suite paper_spml --tiny

        mls eval suite paper_two_way --weights torchvision:resnet50 data.workers=8

        mls eval suite paper_spml --only "EM" --only "AN" --seeds 1 training.epochs=2 --tiny

        mls eval suite paper_classification --weights MLS=runs/a --weights MLS=runs/b --weights MoCo-v2=runs/c
    """
    from mls import distributed
    from mls.eval.comparison import as_text
    from mls.eval.suite import Part, load_suite
    from mls.eval.suite import run as run_suite
    from mls.files import runs_folder
    from mls.tables import terminal_width

    name, *overrides = arguments
    root = out or runs_folder()
    say = lambda text: typer.echo(text, err=True) if distributed.rank() == 0 else None
    part = Part(weights or (), tiny, seeds, only or (), overrides, again)
    found = run_suite(load_suite(name), root, part, say)
    if distributed.rank() != 0:
        return
    root.mkdir(parents=True, exist_ok=True)
    own = "".join(f"-{one.removeprefix('data.name=')}" for one in overrides if one.startswith("data.name="))
    path = root / f"{Path(name).stem}{'-tiny' * tiny}{own}.md"  # another table than the paper's
    path.write_text(as_text(found))
    print(as_text(found, format, terminal_width()))
    where = f"{path}; every number with its seed and epoch: {root / 'results.jsonl'}"
    typer.echo(where, err=format is not Format.markdown)  # nothing beside what another program reads
    if len(found.missing) == len(found.columns):
        raise ConfigError("no column could be run: see the lines above, or try --tiny, which needs no data")


@app.command("check")
def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Data sets; default: all.")] = None,
) -> None:
    """Say which data sets are there under $MLS_DATA, with their sizes, and what is missing of the others.

    Examples:

        mls eval check

        MLS_DATA=/data mls eval check voc2012 coco2014
    """
    import os

    from mls.errors import DataError, unknown_name
    from mls.eval import data

    for name in names or []:
        if name not in data.names():
            raise unknown_name("data set", name, data.names(), DataError)
    print(f"looking under $MLS_DATA = {os.environ.get('MLS_DATA') or 'nothing, so here'}")
    for name in names or data.names():
        try:
            found = data.build(name)
        except DataError as error:
            print(f"  no   {name}: {error}")
            continue
        parts = {"train": found.train, "val": found.val, "test": found.test}
        sizes = ", ".join(f"{len(part)} {split}" for split, part in parts.items() if part is not None)
        print(f"  yes  {name}: {len(found.train.class_names)} classes, {sizes}")


@app.command("list")
def list_(
    name: Annotated[str | None, typer.Argument(help="A protocol: prints its keys and values.")] = None,
) -> None:
    """List protocols, suites, data sets, losses; with a protocol's name, its keys and their values.

    Examples:

        mls eval list

        mls eval list spml_voc2012
    """
    if name is not None:
        from mls.eval.protocol import load_protocol, to_yaml

        print(to_yaml(load_protocol(name)), end="")
        return
    from mls.plugins import registered_in
    from mls.recipes import shipped

    lists = {"protocols": shipped("eval"), "suites": shipped("eval/suites")}
    lists |= {"data sets": registered_in("mls.eval.data"), "losses": registered_in("mls.core.losses")}
    for title, names in lists.items():
        print(f"{title}:\n" + "".join(f"  {one}\n" for one in names))
