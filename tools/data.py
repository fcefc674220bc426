"""`mls data`: look for what is odd in a set of images, or pack it into few files that load faster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mls.data import Source
    from mls.data.check import Report

SHOWN = 3  # examples of a kind in the table
LISTED = 50  # files of formats that are not read

app = typer.Typer(help="Check a set of images, or pack it so that it loads faster.", no_args_is_help=True)

Kind = Annotated[str, typer.Option("--source", help="folder, list, coco, voc or tar; auto finds out.")]
Annotations = Annotated[str | None, typer.Option(help="COCO json, VOC split or list, as data.annotations.")]
DataSetName = Annotated[
    str | None,
    typer.Option("--dataset", help="SRC is a data set with objects or regions: coco2017, voc0712, cityscapes, …"),
]
Workers = Annotated[int | None, typer.Option(help="Processes; default: the cores that may be used.")]


@app.command()
def check(
    src: Annotated[str, typer.Argument(metavar="SRC", help="What data.root can be.")],
    workers: Workers = None,
    source: Kind = "auto",
    annotations: Annotations = None,
    dataset: DataSetName = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every finding, for programs.")] = False,
) -> None:
    """Decode every image once and say what is odd, in its annotations too, and what the loader does with it. Nothing is
    changed.

    Exit code 0 if every image can be read, every shard is what was written and no annotation is wrong, else 2.

    Examples:

        mls data check /data/images

        mls data check /data/coco --source coco --json > findings.json

        mls data check /data/coco2017 --dataset coco2017
    """
    from mls.data.check import Report, check
    from mls.errors import DataError
    from mls.progress import counting

    name, parts = _parts(dataset, src) if dataset else (src, [(_source(src, source, annotations), {})])
    report = Report(0)
    for images, annotated in parts:
        with counting("checking", len(images)) as advance:
            report.add(check(images, _workers(workers), advance, **annotated))
    if as_json:
        print(json.dumps({"images": report.images, "unreadable": report.unreadable, "found": report.found}, indent=1))
    else:
        _show(name if dataset else parts[0][0].name, report)
        _list([image for image, _ in report.found.get("ignored", ())], src)
    counts = {
        f"{report.unreadable} of {report.images} images cannot be read: repair or remove them": report.unreadable,
        f"damaged or changed shards: {report.shards}: pack or download them again": report.shards,
        f"{report.odd_truth} entries of the annotations are odd: repair or remove them": report.odd_truth,
    }
    if any(counts.values()):
        raise DataError("; ".join(words for words, count in counts.items() if count))


@app.command()
def pack(
    src: Annotated[str, typer.Argument(metavar="SRC", help="What data.root can be.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="A new folder, or that of a pack to go on with.")],
    short_side: Annotated[
        int | None, typer.Option(min=1, help="Scale larger images down to this many pixels; else keep the files.")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of what is scaled.")] = 90,
    per_shard: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 2000,
    workers: Workers = None,
    source: Kind = "auto",
    annotations: Annotations = None,
) -> None:
    """Pack images into tar shards (WebDataset's layout), labels beside them.

    Interrupted at any moment, the same command goes on: finished shards are kept if their checksum is right.

    Examples:

        mls data pack /data/images /data/packed --short-side 320

        mls pretrain mls_folder_r50 data.root=/data/packed
    """
    from mls.data.formats import missed
    from mls.data.listing import printable
    from mls.data.pack import Packing, pack
    from mls.progress import counting

    images, dst = _source(src, source, annotations), dst.expanduser()
    with counting("packing", len(images)) as advance:
        made = pack(images, dst, Packing(short_side, quality, per_shard), _workers(workers), advance)
    if ignored := getattr(images, "ignored", ()):
        print(missed(ignored), file=sys.stderr)
        _list([printable(path) for path in ignored], src)
    shards = made["shards"].values()
    size = sum(shard["bytes"] for shard in shards) / 2**20
    print(f"{sum(shard['images'] for shard in shards)} images in {len(shards)} shards, {size:.0f} MiB: {dst}")
    left_out = [note for shard in shards for note in shard["left_out"]]
    for image, reason in left_out[:SHOWN]:
        print(f"left out {image}: {reason}", file=sys.stderr)
    if left_out:
        print(f"{len(left_out)} images cannot be read: left out, listed in {dst / 'manifest.json'}", file=sys.stderr)


def _list(ignored: list[str], src: str) -> None:
    from mls.errors import command

    for path in ignored[:LISTED]:
        print(f"ignored {path}", file=sys.stderr)
    if len(ignored) > LISTED:
        every = command("mls data check", src, "--json")
        print(f"and {len(ignored) - LISTED} more: {every} lists all", file=sys.stderr)


def _parts(name: str, src: str) -> tuple[str, list[tuple[Source, dict[str, Any]]]]:
    """The images of each part of a data set with objects or regions, and how its annotations are looked at."""
    from mls.errors import DataError
    from mls.eval import data

    found = data.build(name, src, check_sizes=False)
    parts = [part for part in (found.train, found.val, found.test) if part is not None]
    if not hasattr(parts[0], "odd_at"):
        raise DataError(f"{name} has neither objects nor regions: leave out --dataset, and SRC is checked as images")
    return f"{name} in {src}", [(part.images, {"annotated": part.odd_at}) for part in parts]


def _source(src: str, kind: str, annotations: str | None) -> Source:
    from mls.config import DataConfig
    from mls.data.sources import build_source

    return build_source(DataConfig(source=kind, root=src, annotations=annotations))  # type: ignore[arg-type]


def _workers(wanted: int | None) -> int:
    from mls.data.loader import cores

    return cores() if wanted is None else wanted


def _show(name: str, report: Report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mls.data.check import KINDS, TRUTH

    console = Console(highlight=False)
    if not report.found:
        console.print(f"{report.images} images of {name}: nothing odd", markup=False, soft_wrap=True)
        return
    table = Table("kind", "found", "what the loader does", "for example", title=escape(name))
    for kind, meaning in {**KINDS, **TRUTH}.items():
        if found := report.found.get(kind):
            examples = "\n".join(f"{Path(image).name} ({detail})" for image, detail in found[:SHOWN])
            table.add_row(kind, str(len(found)), meaning, escape(examples))
    console.print(table)
