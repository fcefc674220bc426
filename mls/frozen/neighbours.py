"""The images of a data set that are nearest to an image, and near-duplicates in two data sets. Features are cached by
features.py and searched by index.py."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from mls.chunks import chunks
from mls.config import AugmentConfig, DataConfig
from mls.data import Source
from mls.data.crops import UnreadableImage, decode
from mls.data.sources import build_source, hash_of_images
from mls.data.unreadable import Unreadable
from mls.errors import DataError, reason
from mls.frozen.features import BLOCK, CachedFeatures, cached_features, embed, embed_batches, hash_of_weights
from mls.frozen.index import Index, build
from mls.frozen.match_picture import GalleryRow, file_name
from mls.models import card_of, load_backbone
from mls.models.spatial import DenseFeatures

SIDE = 16  # pixels of a thumbnail
CALIBRATION_IMAGES = 200  # of which altered copies are made
MAPS = 16  # images whose maps are written together
ROWS = 4096  # of features that are looked at together
SPARE = 64  # neighbours that are asked for beyond k, at most
RECALL = 0.95  # share of the altered copies that lie above the threshold


class Thumbnail(nn.Module):
    """An image as 16 x 16 pixels without their mean, so that a cosine is the correlation of two thumbnails. It needs no
    weights, and sees a copy that was compressed, scaled or brightened, but not one that was cropped or mirrored."""

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch features"]:
        small = F.adaptive_avg_pool2d(images, SIDE).flatten(1)
        return small - small.mean(dim=1, keepdim=True)


@dataclass(frozen=True)
class Embedder:
    """Turns images into features: a trained backbone, or thumbnails."""

    network: nn.Module
    augment: AugmentConfig

    @classmethod
    def of(cls, weights: str | None, size: int | None = None) -> Embedder:
        if weights is None:
            return cls(Thumbnail(), AugmentConfig(size=size or 64))
        facts = card_of(weights) or {}
        statistics: dict[str, Any] = {key: tuple(facts[key]) for key in ("mean", "std") if key in facts}
        return cls(load_backbone(weights), AugmentConfig(size=size or facts.get("input_size", 224), **statistics))

    @torch.no_grad()
    def grid(self) -> tuple[int, int]:
        """Rows and columns of its maps."""
        size = self.augment.size
        rows, columns = DenseFeatures(self.network).eval()(torch.zeros(1, 3, size, size)).shape[2:]
        return rows, columns


def stored_features(
    source: Source, embedder: Embedder, workers: int | None = None, grid: tuple[int, int] | None = None
) -> tuple[CachedFeatures, list[int]]:
    """Of all images of a source, computed once, and which of them can be read: the rows of others are zeros. With the
    `grid` of the embedder's maps a row for each place, image by image, row by row, in fp16."""
    from mls.distributed import start

    device, each = start().device, math.prod(grid or ())
    augment, count = embedder.augment, len(source)
    network = embedder.network if grid is None else DenseFeatures(embedder.network)
    facts: dict[str, Any] = {"images": hash_of_images(source), "weights": hash_of_weights(embedder.network)}
    facts |= {"size": augment.size, "statistics": [*augment.mean, *augment.std]}
    facts |= {} if grid is None else {"maps": grid}

    unreadable = Unreadable(count)

    def compute(ids: Sequence[int]) -> Generator[Tensor, None, None]:
        usual = min(8, len(os.sched_getaffinity(0)) - 1) if len(ids) > 2000 else 0
        several = usual if workers is None else workers
        for found in embed_batches(network, source, ids, augment, device, 64, several, unreadable):
            yield found if grid is None else found.flatten(2).transpose(1, 2).flatten(0, 1)

    title, block = f"{'maps' if grid else 'features'} of {source.name}", MAPS * each if grid else BLOCK
    rest = lambda first: compute(range(first // each, count))
    stored = cached_features(facts, count * each, rest, title, block=block, half=grid is not None)
    read_again(stored.features, compute, unreadable, each)
    return stored, unreadable.others(range(count))


def read_again(
    stored: Float[Tensor, "rows dim"],
    compute: Callable[[Sequence[int]], Iterable[Tensor]],
    unreadable: Unreadable,
    each: int = 1,
) -> None:
    """Rows of zeros that an earlier call stored are those of images that it could not read, or what was computed: these
    images are read again. They are noted, or their rows (`each` of an image) are put in place."""
    dark = list[int]()
    for part in chunks(len(stored) // each, ROWS // each or 1):
        rows = stored[part.start * each : part.stop * each].unflatten(0, (-1, each))
        dark += (part.start + (~rows.flatten(1).any(1)).nonzero()[:, 0]).tolist()
    if dark := [image for image in dark if image not in unreadable.found]:
        stored.unflatten(0, (-1, each))[dark] = torch.cat([*compute(dark)]).unflatten(0, (-1, each)).to(stored.dtype)


@dataclass
class EmbeddedSource:
    """A data set with its features, which are computed once and cached. `broken`: images that cannot be read."""

    source: Source
    embedder: Embedder
    cached: CachedFeatures = field(init=False)
    broken: set[int] = field(init=False)
    index: Index = field(init=False)

    def __post_init__(self) -> None:
        self.cached, readable = stored_features(self.source, self.embedder)
        self.broken = {*range(len(self.source))}.difference(readable)
        # An index finds no image whose row was zeros when it was built: it is kept under the images that were broken.
        dark = "-" + hashlib.sha256(repr(sorted(self.broken)).encode()).hexdigest()[:16] if self.broken else ""
        self.index = build(self.cached.features, self.cached.folder / f"ivfpq{dark}.index")

    def nearest(self, queries: EmbeddedSource | Float[Tensor, "batch dim"], k: int) -> list[list[tuple[int, float]]]:
        """For each query the k nearest images of this data set that can be read: their numbers and cosines."""
        features = queries.cached.features if isinstance(queries, EmbeddedSource) else queries
        more = k + min(len(self.broken), SPARE)  # a row of zeros has the cosine 0: few come before real ones
        found = self.index.search(features, min(more, len(self.source)))
        pairs = zip(found.indices.tolist(), found.scores.tolist(), strict=True)
        return [[one for one in zip(*row, strict=True) if one[0] not in self.broken][:k] for row in pairs]

    def nearest_others(self, numbers: list[int], k: int) -> list[list[tuple[int, float]]]:
        """For each of these images the k nearest other images of this data set."""
        found = self.nearest(self.cached.features[numbers], k + 1)
        return [[pair for pair in pairs if pair[0] != own][:k] for own, pairs in zip(numbers, found, strict=True)]

    def readable(self, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if number not in self.broken]


def source_from(text: str) -> Source:
    """Anything that pretraining reads: a folder, a list, COCO, VOC, shards on disk or behind a URL; `scenes` and
    `scenes:test` are the embedded ones."""
    name, _, split = text.partition(":")
    if name == "scenes":
        return build_source(DataConfig(source="scenes"), split or "train")
    return build_source(DataConfig(root=text))


@dataclass
class InMemorySource:
    """A source of a few images in memory."""

    name: str
    names: Sequence[str]
    pixels: Sequence[UInt8[Tensor, "3 height width"]]
    class_names: Sequence[str] | None = None
    labels: Tensor | None = None

    @classmethod
    def of_files(cls, paths: Sequence[Path]) -> InMemorySource:
        pixels = []
        for path in paths:
            try:
                pixels.append(decode(path.expanduser().read_bytes()))
            except (UnreadableImage, OSError) as error:
                raise DataError(f"{path} cannot be read ({reason(error)}): give the path of an image file") from None
        return cls("queries", [str(path) for path in paths], pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> UInt8[Tensor, "3 height width"]:
        return self.pixels[index]

    def describe(self, index: int) -> str:
        return self.names[index]

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(len(self))


# ------------------------------------------------------------------------------------------------- near-duplicates


@dataclass(frozen=True)
class Calibration:
    """Cosines of images with altered copies of themselves, and with the nearest other image of their data set."""

    copies: Float[Tensor, "copies"]
    others: Float[Tensor, "images"]

    @property
    def threshold(self) -> float:
        """RECALL of the copies lie above it."""
        return float(self.copies.quantile(1 - RECALL))

    def alarms(self, threshold: float) -> float:
        """The share of images that have another image of their own data set above the threshold: the false alarms, if
        that data set has no duplicates."""
        return float((self.others >= threshold).float().mean()) if len(self.others) else 0.0


def calibrate(embedded: EmbeddedSource) -> Calibration:
    embedder = embedded.embedder
    chosen = torch.randperm(len(embedded.source), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    chosen = embedded.readable(chosen.tolist())
    images = [decode(embedded.source.read(i)) for i in chosen]
    features = embedded.cached.features[chosen]
    cosines = []
    for alter in (compressed, cropped, brightened):
        altered = InMemorySource("altered copies", [""] * len(images), [alter(image) for image in images])
        of_copies = embed(embedder.network, altered, range(len(altered)), embedder.augment, batch=64)
        cosines.append(F.cosine_similarity(of_copies, features))
    nearest = embedded.nearest_others(chosen, 1) if len(embedded.source) > 1 else []
    others = [found[0][1] for found in nearest if found]  # of those others that can be read
    return Calibration(torch.cat(cosines), torch.tensor(others))


def compressed(image: UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "3 smaller narrower"]:
    """Two thirds of the size, JPEG quality 50."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    small = picture.resize([max(1, 2 * side // 3) for side in picture.size], Image.Resampling.BILINEAR)
    small.save(stream := io.BytesIO(), "JPEG", quality=50)
    return decode(stream.getvalue())


def cropped(image: UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "3 lower narrower"]:
    """Without a twentieth at each edge."""
    height, width = (side // 20 for side in image.shape[1:])
    return image[:, height : image.shape[1] - height, width : image.shape[2] - width]


def brightened(image: UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "3 height width"]:
    return (image.float() * 0.8 + 40).clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Pair:
    """Image `first` of the pretraining set and image `second` of an evaluation set."""

    first: int
    second: int
    cosine: float


def near_duplicates(first: EmbeddedSource, second: EmbeddedSource, threshold: float) -> list[Pair]:
    """Each image of the second with its nearest image of the first, if their cosine reaches the threshold; largest
    cosine first."""
    nearest = [
        (number, found[0]) for number, found in enumerate(first.nearest(second, 1)) if number not in second.broken
    ]
    pairs = [Pair(found[0], number, found[1]) for number, found in nearest]
    return sorted((pair for pair in pairs if pair.cosine >= threshold), key=lambda pair: -pair.cosine)


# ------------------------------------------------------------------------------------------------- pictures


def gallery_row(queries: Source, number: int, source: Source, found: Sequence[tuple[int, float]]) -> GalleryRow:
    """A row of `match_picture.draw`: an image and those that were found for it."""
    pictures, name = [_pixels(source.read(i)) for i, _ in found], file_name(queries.describe(number))
    ids, cosines = [i for i, _ in found], [cosine for _, cosine in found]
    return GalleryRow(_pixels(queries.read(number)), pictures, cosines, None, number, ids, name=name)


def _pixels(image: Any) -> UInt8[np.ndarray, "height width 3"]:
    """The middle square, which is the network's input."""
    pixels = decode(image)
    side = min(pixels.shape[1:])
    top, left = ((length - side) // 2 for length in pixels.shape[1:])
    return pixels[:, top : top + side, left : left + side].permute(1, 2, 0).contiguous().numpy()
