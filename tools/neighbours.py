"""`mls neighbours` and `mls leakcheck`: the images nearest to an image, and images that two data sets share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mls.data import Source
    from mls.frozen.neighbours import Calibration, EmbeddedSource, Pair

SHOWN = 12  # pairs in a picture
QUERIES = 6  # images of the data set, without --query
FIGURE_QUERIES = 60  # crops in the paper's figures


def neighbours(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, a .safetensors file or a backbone's name.")],
    query: Annotated[
        list[Path] | None, typer.Option(metavar="IMAGE", help="May be repeated; default: some of the data set.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Folder, list, COCO, VOC, shards or scenes to look in; default: the run's data."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours of each query.")] = 10,
    figure: Annotated[
        bool, typer.Option("--figure", help="The paper's figure: what a run chose for 60 random crops.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The picture; default: neighbours.png in RUN, or in $MLS_RUNS.")
    ] = None,
) -> None:
    """Find the images of a data set that a network finds most alike, with their cosines, as text and as a picture.

    The data set is embedded once: features are kept in $MLS_CACHE, an interrupted call goes on where it was. Above
    262,144 images they are searched through an IVF-PQ index.

    --figure shows the dictionary instead, as the paper's Figures 4 to 6: 60 random query crops and the key crops that
    the run matched them with, as red and yellow boxes in the whole images, and the crops themselves in OUT-crops.png.

    Examples:

        mls neighbours runs/my-run --query street.jpg --query kitchen.jpg

        mls neighbours runs/my-run --dataset /data/voc -k 20 --out voc.png

        mls neighbours runs/my-run --figure
    """
    from mls.errors import ConfigError
    from mls.files import check_picture, place_for

    check_picture(out or Path("neighbours.png"))
    if figure:
        if query or dataset:
            raise ConfigError("--figure shows crops of the run's own images: leave out --query and --dataset")
        return _draw_figure(run, k, out)
    weights, source = weights_and_source(run, dataset)
    _draw_nearest(weights, source, query or [], k, place_for("neighbours.png", out, weights))


def _draw_nearest(weights: str, source: Source, query: list[Path], k: int, out: Path) -> None:
    from mls.files import save_picture
    from mls.frozen.features import embed
    from mls.frozen.match_picture import draw
    from mls.frozen.neighbours import EmbeddedSource, Embedder, InMemorySource, gallery_row

    queries = InMemorySource.of_files(query) if query else source
    embedded = EmbeddedSource(source, Embedder.of(weights))
    if query:
        numbers = list(range(len(query)))
        found = embedded.nearest(embed(embedded.embedder.network, queries, numbers, embedded.embedder.augment), k)
    else:
        readable = embedded.readable(range(len(source)))
        numbers = readable[:: max(1, len(readable) // QUERIES)][:QUERIES]
        found = embedded.nearest_others(numbers, k)
    lines = []
    for number, pairs in zip(numbers, found, strict=True):
        print(queries.describe(number))
        for image, cosine in pairs:
            print(f"  {cosine:.3f}  {source.describe(image)}")
        lines.append(gallery_row(queries, number, source, pairs))
    save_picture(draw(lines), out)
    print(out)


def _draw_figure(run: str, k: int, out: Path | None) -> None:
    from mls.data.sources import build_source
    from mls.engine import Run
    from mls.engine.gallery import gallery, in_whole_images
    from mls.files import place_for, save_picture
    from mls.frozen.match_picture import WHOLE, draw

    opened = Run.open(run)
    whole = place_for("neighbours.png", out, opened.path)
    crops = whole.with_stem(f"{whole.stem}-crops")
    rows = gallery(opened, FIGURE_QUERIES, k, warn=lambda text: typer.echo(text, err=True))
    save_picture(draw(in_whole_images(rows, build_source(opened.config.data)), WHOLE, frame=0), whole)
    save_picture(draw(rows), crops)
    print(f"{whole}: boxes in the whole images; {crops}: the crops")


def weights_and_source(run: str, dataset: str | None, option: str = "--dataset") -> tuple[str, Source]:
    """The weights, and the data set that was named or else the run's."""
    from mls.errors import ConfigError
    from mls.frozen.neighbours import source_from

    weights, source = _weights_and_data(run)
    source = source_from(dataset) if dataset is not None else source
    if source is None:
        raise ConfigError(f"{run} is no run folder, so it does not say where to look: name the images with {option}")
    return weights, source


def _weights_and_data(run: str) -> tuple[str, Source | None]:
    """The run's folder and data; of a file or a backbone's name only what was given."""
    from mls.data.sources import build_source
    from mls.engine import Run
    from mls.errors import UserError

    try:
        opened = Run.open(run)
    except UserError:
        return run, None
    return str(opened.path), build_source(opened.config.data)


def leakcheck(
    first: Annotated[str, typer.Argument(metavar="A", help="The images to pretrain on.")],
    second: Annotated[list[str], typer.Argument(metavar="B...", help="The images of evaluations.")],
    weights: Annotated[
        str | None, typer.Option(metavar="RUN", help="A trained network; default: thumbnails of 16 × 16 pixels.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="A cosine; default: found with altered copies.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For leakcheck.json and pictures; default: in RUN or $MLS_RUNS.")
    ] = None,
) -> None:
    """Find images of B that have a near-duplicate in A: what was pretrained on should not be evaluated on.

    A and B are anything that pretraining reads, or `scenes` and `scenes:test`. An image of B is compared with its
    nearest image of A. The threshold is the cosine that 95 % of altered copies of images of A reach (scaled and
    compressed; cropped; brightened); how many images of A have *another* image of A above it says how often it would
    be wrong. Thumbnails need no training but miss mirrored and strongly cropped copies: give a trained network for
    those.

    Examples:

        mls leakcheck /data/coco/train2017 /data/VOCdevkit /data/cityscapes/val

        mls leakcheck scenes scenes:test --weights runs/my-run --out leaks
    """
    from mls.files import place_for, slug, write_atomically
    from mls.frozen.neighbours import EmbeddedSource, Embedder, calibrate, near_duplicates, source_from
    from mls.tables import markdown_table, terminal_width

    weights = None if weights is None else _weights_and_data(weights)[0]
    out = place_for("leakcheck", out, weights)
    out.mkdir(exist_ok=True)
    embedded = EmbeddedSource(source_from(first), Embedder.of(weights))
    calibration = calibrate(embedded)
    limit = calibration.threshold if threshold is None else threshold
    print(_explained(embedded, calibration, limit, by_user=threshold is not None))
    lines, report = [], {"first": first, "threshold": limit, "false_alarms": calibration.alarms(limit), "second": {}}
    for number, text in enumerate(second, start=1):
        other = EmbeddedSource(source_from(text), embedded.embedder)
        pairs, total = near_duplicates(embedded, other, limit), len(other.source)
        several = f"-{number}" if len(second) > 1 else ""  # two folders may have one name
        picture = _draw(embedded, other, pairs, out / f"leaks-{slug(other.source.name)}{several}.png")
        lines.append([text, f"{total:,}", f"{len(pairs):,}", f"{len(pairs) / total:.2%}", picture])
        names = lambda pair, other=other: [embedded.source.describe(pair.first), other.source.describe(pair.second)]
        report["second"][text] = {"images": total, "pairs": [vars(pair) | {"names": names(pair)} for pair in pairs]}
    header = ["B", "images", "near-duplicates in A", "share", "picture"]
    print(f"\n{markdown_table(header, lines, terminal_width())}\n")
    write_atomically(out / "leakcheck.json", json.dumps(report, indent=1).encode())
    print(out / "leakcheck.json")


def _explained(embedded: EmbeddedSource, calibration: Calibration, limit: float, by_user: bool) -> str:
    found = float((calibration.copies >= limit).float().mean())
    words = f"A: {len(embedded.source):,} images. An image counts as a near-duplicate from a cosine of {limit:.3f}: "
    alarms = calibration.alarms(limit)
    words += f"{'as you said; ' if by_user else ''}{found:.0%} of altered copies lie above it, and {alarms:.1%} of the "
    words += "images of A have another image of A there."
    if alarms > 0.2:
        words += "\nThat is many: A holds duplicates itself, or these features cannot tell images apart well enough."
        words += " Give a trained network (--weights) or a higher --threshold, and look at the pictures."
    return words


def _draw(first: EmbeddedSource, second: EmbeddedSource, pairs: list[Pair], path: Path) -> str:
    """Each line: an image of B in red, the image of A that it is like in yellow."""
    from mls.files import save_picture
    from mls.frozen.match_picture import draw
    from mls.frozen.neighbours import gallery_row

    if not pairs:
        return ""
    shown = [
        gallery_row(second.source, pair.second, first.source, [(pair.first, pair.cosine)]) for pair in pairs[:SHOWN]
    ]
    save_picture(draw(shown), path)
    return str(path)
