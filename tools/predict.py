"""`mls predict`: what an evaluation's classifier, detector or segmenter says of any images."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from mls.chunks import chunks
from mls.files import atomic_file, demand_pyarrow

if TYPE_CHECKING:
    from mls.eval.prediction import Predictions

ROWS = 4096  # written at a time


def predict(
    classifier: Annotated[
        str,
        typer.Argument(metavar="CLASSIFIER|RUN|WEIGHTS", help="A folder under eval/, or weights that have one there."),
    ],
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="What data.root can be.")],
    out: Annotated[Path, typer.Option(help="Of a classifier x.csv or x.parquet; of others a folder.")],
    draw: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Draw what is found (folders).")] = True,
) -> None:
    """Write what was trained by `mls eval run` says of each image: scores of all classes; boxes and masks as COCO json;
    or a mask of classes; and pictures of them.

    Stopped anyhow, the same command goes on. An image that cannot be read is named and left out.

    Examples:

        mls predict runs/eval/linear-seed0-4f1d… /data/new --out preds.csv

        mls predict runs/my-run /data/new --out preds.parquet

        mls predict runs/eval/detection-seed0-9c2e… /data/new --out found
    """
    from mls.eval import prediction

    if out.suffix not in (".csv", ".parquet"):
        count = prediction.predict_dense(classifier, images, out.expanduser(), draw)
        print(f"{out}: {count:,} images, {', '.join(sorted(path.name for path in out.expanduser().iterdir()))}")
        return
    demand_pyarrow(out)
    found = prediction.predict(classifier, images)
    with atomic_file(out.expanduser()) as file:
        (_csv if out.suffix == ".csv" else _parquet)(file, found)
    print(f"{out}: {len(found.paths):,} images, scores of {len(found.class_names)} classes")


def _csv(file: BinaryIO, found: Predictions) -> None:
    from mls.eval.data.table import cell_text

    text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", *map(cell_text, found.class_names)])
    for part in chunks(len(found.paths), ROWS):
        scores = found.scores[part].tolist()
        rows.writerows(
            [cell_text(path), *map("{:.6g}".format, row)] for path, row in zip(found.paths[part], scores, strict=True)
        )
    text.detach()


def _parquet(file: BinaryIO, found: Predictions) -> None:
    import pyarrow as pa  # pyright: ignore
    from pyarrow.parquet import ParquetWriter  # pyright: ignore

    schema = pa.schema([("path", pa.string()), *((name, pa.float32()) for name in found.class_names)])
    with ParquetWriter(file, schema) as writer:
        for part in chunks(len(found.paths), ROWS):
            columns = [pa.array(column) for column in found.scores[part].T.numpy()]
            writer.write_table(pa.table([pa.array(found.paths[part]), *columns], schema))
