"""`mls maps`: what a network sees where, as colours; two networks side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mls.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from mls.data import Source

LARGEST = 448  # pixels that images are squashed to at most, unless --size says more
STATISTICS = 8  # batches in which an untrained network's statistics are measured


def maps(
    networks: Annotated[list[str], typer.Argument(metavar="RUN [RUN2]", help="Runs, weights files or names.")],
    images: Annotated[str | None, typer.Option(help="What data.root can be; default: the run's own.")] = None,
    count: Annotated[int, typer.Option(min=2, max=64, help="Images that are shown, evenly spaced.")] = 6,
    size: Annotated[int | None, typer.Option(min=16, help="Pixels that images are squashed to.")] = None,
    layer: Annotated[str | None, typer.Option(help="A module, or a transformer's block by number.")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Of the map of a CNN: a smaller one shows more.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The picture; default: maps.png in the (first) run, or in $MLS_RUNS.")
    ] = None,
) -> None:
    """Draw the three principal components of the features of all places as red, green and blue.

    The components are those of all images shown, so a colour means the same in each. Two networks have their own
    components, because their features have nothing to do with one another; the second's are rotated to the first's
    colours, and how much of these they then explain is said. The report of a run shows its maps.png.

    Examples:

        mls maps runs/before runs/after --images /data/photos

        mls maps runs/my-run torchvision:resnet50 --images /data/photos --stride 8 --out maps.png
    """
    from mls.files import check_picture, place_for, save_picture
    from mls.frozen import map_picture
    from mls.tools.neighbours import weights_and_source

    if len(networks) > 2:
        raise ConfigError(f"{len(networks)} networks were named: mls maps draws one, or two side by side")
    weights, source = weights_and_source(networks[0], images, "--images")
    file = place_for("maps.png", out, weights)
    check_picture(file)
    pixels = _pixels(source, count)
    found: list[map_picture.Coloured] = []
    for name in networks:
        features = _maps(name, pixels, size, layer, stride)
        found.append(map_picture.coloured(features, like=found[0] if found else None))
    save_picture(map_picture.draw(pixels, networks, found), file)
    for name, one in zip(networks, found, strict=True):
        print(f"{name}: three components have {one.explained:.0%} of the variance of its features")
    if len(found) == 2:
        print(f"rotated, the second's components explain {found[1].agreement:.0%} of the first's")
    print(file)


def _pixels(source: Source, count: int) -> list[Tensor]:
    """Of images that can be read, evenly spaced."""
    from mls.chunks import spaced
    from mls.data.unreadable import Unreadable, decoded

    rows = spaced(len(source), count)
    return [*decoded(source, rows, Unreadable(len(rows))).values()]


def _maps(name: str, pixels: list[Tensor], size: int | None, layer: str | None, stride: int | None) -> Any:
    """The features of all places of the squashed images."""
    import torch
    from torchvision.transforms.v2 import functional as tv

    from mls.data.augment import normalise
    from mls.distributed import start
    from mls.frozen.neighbours import Embedder
    from mls.frozen.untrained import with_batch_statistics
    from mls.models import is_untrained
    from mls.models.spatial import DenseFeatures, patches_of

    embedder, device = Embedder.of(name), start().device
    short = sorted(min(one.shape[1:]) for one in pixels)[len(pixels) // 2]
    patch = patches_of(embedder.network)[0]
    side = size or max(embedder.augment.size, min(short, LARGEST)) // patch * patch
    if side % patch:
        raise ConfigError(f"--size {side} is no multiple of the network's patches of {patch} pixels: give a multiple")
    network = DenseFeatures(embedder.network.to(device), layer, stride).eval()
    batches = [
        normalise(tv.resize(one, [side, side], antialias=True)[None], embedder.augment, device) for one in pixels
    ]
    if is_untrained(name):
        with_batch_statistics(network, batches[:STATISTICS])
    with torch.no_grad():
        return torch.cat([network(batch).float().cpu() for batch in batches])
