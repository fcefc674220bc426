"""`mls embed`: features of any images as a file, a block at a time; the same command goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from mls.errors import ConfigError
from mls.files import atomic_file, demand_pyarrow

if TYPE_CHECKING:
    from torch import Tensor

    from mls.data import Source

ROWS = 4096  # written at a time


def embed(
    weights: Annotated[str, typer.Argument(metavar="RUN|WEIGHTS", help="A run, a weights file or a backbone's name.")],
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="What data.root can be.")],
    out: Annotated[Path, typer.Option(help="x.parquet, or x.npz.")],
    dense: Annotated[
        bool, typer.Option("--dense", help="A feature for each place of the map, not their mean.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; default: the cores that may be used.")] = None,
) -> None:
    """Write id, path and features of every image: of the middle square, as evaluation sees it.

    With --dense the features are the map (rows × columns × width, fp16): an array of that shape in x.npz, a list of
    all its numbers in x.parquet, whose metadata has the shape.

    Features are kept in $MLS_CACHE a block at a time: stopped anyhow, the same command goes on, and of a .parquet file
    memory does not grow with the images. An image that cannot be read is named and left out.

    Examples:

        mls embed runs/my-run /data/images --out features.parquet

        mls embed torchvision:resnet50 /data/images --out features.npz

        mls embed runs/my-run /data/images --dense --out maps.parquet
    """
    import torch

    from mls.frozen.neighbours import Embedder, source_from, stored_features

    if out.suffix not in (".parquet", ".npz"):
        raise ConfigError(f"--out {out} says no format: name it x.parquet or x.npz")
    demand_pyarrow(out)
    source = source_from(images)
    embedder = Embedder.of(weights)
    grid = embedder.grid() if dense else None
    stored, readable = stored_features(source, embedder, workers, grid)
    shape = (*(grid or ()), stored.features.shape[1])
    features, ids = stored.features.view(len(source), *shape), torch.tensor(readable)
    with atomic_file(out.expanduser()) as file:
        (_parquet if out.suffix == ".parquet" else _npz)(file, source, features, ids)
    broken = len(source) - len(ids)
    told = f" ({broken} that cannot be read are left out)" if broken else ""
    print(f"{out}: {len(ids):,} images, {' × '.join(map(str, shape))} features each{told}")


def _parquet(file: BinaryIO, source: Source, features: Tensor, ids: Tensor) -> None:
    import pyarrow as pa  # pyright: ignore
    from pyarrow.parquet import ParquetWriter  # pyright: ignore

    shape, width = features.shape[1:], features[0].numel()
    kind = pa.float16() if len(shape) > 1 else pa.float32()
    schema = pa.schema([("id", pa.int64()), ("path", pa.string()), ("features", pa.list_(kind, width))])
    schema = schema.with_metadata({"shape": ",".join(map(str, shape))})
    with ParquetWriter(file, schema) as writer:
        for rows in ids.split(max(1, ROWS * shape[-1] // width)):
            values = pa.FixedSizeListArray.from_arrays(pa.array(features[rows].reshape(-1).numpy()), width)
            paths = [source.describe(int(row)) for row in rows]
            writer.write_table(pa.table([pa.array(rows.numpy()), pa.array(paths), values], schema))


def _npz(file: BinaryIO, source: Source, features: Tensor, ids: Tensor) -> None:
    """numpy writes an array in parts; of features without gaps it is the file in the cache."""
    kept = features if len(ids) == len(features) else features[ids]
    import numpy as np

    paths = np.array([source.describe(int(row)) for row in ids])
    np.savez(file, id=ids.numpy(), path=paths, features=kept.numpy())
