"""The maps of a split of images, computed once for the same weights, images and size, kept on disk and read from there
by every protocol of frozen maps."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from mls.chunks import chunks
from mls.config import AugmentConfig
from mls.data.augment import normalise
from mls.data.crops import UnreadableImage
from mls.data.loader import in_workers, worker_count
from mls.data.sources import hash_of_images
from mls.distributed import start
from mls.errors import ConfigError, UserError, reason
from mls.eval.data.objects import ObjectImages
from mls.eval.data.regions import RegionImages
from mls.eval.dense.prepare import build_backbone
from mls.eval.dense.schema import FrozenDense
from mls.eval.dense.views import in_memory
from mls.eval.images import unreadable
from mls.frozen.features import cached_features, hash_of_weights
from mls.frozen.untrained import with_batch_statistics
from mls.models import is_untrained
from mls.models.momentum import HALF, precision_on
from mls.models.spatial import DenseFeatures, patches_of

BLOCK = 16  # images whose patches are written together
STATISTICS_BATCH = 16
STATISTICS_IMAGES = 64  # on which an untrained network's batch statistics are measured: thousands of places each


@dataclass(frozen=True)
class Maps:
    """`features`: the patches of all images, image by image, row by row of the grid; memory-mapped."""

    images: Any  # RegionImages or ObjectImages
    rows: Int64[Tensor, "images"]  # which of them
    features: Float[Tensor, "patches dim"]
    grid: tuple[int, int]  # rows, columns
    size: tuple[int, int]  # height, width of the squashed image

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, rows: slice | Tensor) -> Float[Tensor, "images dim rows columns"]:
        patches = self.features.unflatten(0, (len(self), -1))[rows].float()
        return patches.transpose(1, 2).unflatten(2, self.grid)

    def labels(self, row: int) -> UInt8[Tensor, "height width"]:
        """Squashed like the image, to the nearest pixel."""
        return F.interpolate(self.images.labels(int(self.rows[row]))[None, None], self.size, mode="nearest-exact")[0, 0]

    def batches(self, size: int) -> Iterator[tuple[list[int], Float[Tensor, "images dim rows columns"]]]:
        for part in chunks(len(self), size):
            yield list(range(len(self)))[part], self.of(part)


class SquashedImages(Dataset[UInt8[Tensor, "batch 3 height width"] | UserError]):
    """Item i is the i-th batch."""

    def __init__(
        self, images: RegionImages | ObjectImages, size: tuple[int, int], batch: int, rows: Sequence[int] | None = None
    ) -> None:
        self.images, self.size, self.batch = images, size, batch
        self.rows = range(len(images)) if rows is None else rows

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def __getitem__(self, number: int) -> UInt8[Tensor, "batch 3 height width"] | UserError:
        start = number * self.batch
        try:
            return torch.stack([self._read(row) for row in self.rows[start : start + self.batch]])
        except UserError as error:
            return error

    def _read(self, row: int) -> UInt8[Tensor, "3 height width"]:
        try:
            return tv.resize(self.images.pixels(row), list(self.size), antialias=True)
        except (UnreadableImage, OSError) as error:
            raise unreadable(self.images.describe(row), reason(error)) from None


class Extractor:
    """A backbone's maps for one protocol."""

    def __init__(self, protocol: FrozenDense, weights: str, seed: int, train: RegionImages | ObjectImages) -> None:
        self.protocol, settings = protocol, protocol.features
        self.size = (protocol.data.size[1], protocol.data.size[0])
        backbone, mean, std = build_backbone(protocol, weights, seed)
        self.device = start(settings.device).device
        self.reduced = HALF.get(precision_on(self.device, settings.precision, "features.precision"))
        self.standards = AugmentConfig(mean=(mean[0], mean[1], mean[2]), std=(std[0], std[1], std[2]))
        if any(side % patch for side, patch in zip(self.size, patches_of(backbone), strict=True)):
            raise ConfigError(
                f"data.size {protocol.data.size} is no multiple of the network's patches of {patches_of(backbone)[0]} "
                "pixels, whose places in the image would not be known: give a multiple"
            )
        self.network = DenseFeatures(backbone.to(self.device), settings.layer or None, settings.output_stride).eval()
        with torch.no_grad():
            self.grid = tuple(self.network(torch.zeros(1, 3, *self.size, device=self.device)).shape[2:])
        if is_untrained(weights):
            first = SquashedImages(train, self.size, STATISTICS_BATCH)  # whatever features.batch_size is
            count = min(len(first), -(-STATISTICS_IMAGES // STATISTICS_BATCH))
            with_batch_statistics(self.network, (self._images(first[number]) for number in range(count)))

    def _images(self, pixels: UInt8[Tensor, "batch 3 height width"] | UserError) -> Tensor:
        if isinstance(pixels, UserError):
            raise pixels
        return normalise(pixels, self.standards, self.device)

    def of(
        self, images: RegionImages | ObjectImages, title: str, quiet: bool, rows: Int64[Tensor, "rows"] | None = None
    ) -> Maps:
        """`rows`: of which of the images, in ascending order; default: of all."""
        rows = torch.arange(len(images)) if rows is None else rows
        settings = self.protocol.features
        patches = self.grid[0] * self.grid[1]
        workers = 0 if in_memory(images) else worker_count(self.protocol.data.workers)

        @torch.no_grad()
        def compute(first: int) -> Generator[Tensor, None, None]:
            squashed = SquashedImages(images, self.size, settings.batch_size, rows[first // patches :].tolist())
            for pixels in in_workers(squashed, min(workers, len(squashed))):
                with torch.autocast(self.device.type, dtype=self.reduced, enabled=self.reduced is not None):
                    maps = self.network(self._images(pixels))
                yield maps.flatten(2).transpose(1, 2).flatten(0, 1)

        facts = {
            "maps": [self.protocol.features.layer, *self.size, *self.grid, settings.store, BLOCK],
            "weights": hash_of_weights(self.network.backbone),
            "images": hash_of_images(images.images),
            "statistics": [*self.standards.mean, *self.standards.std],
            "precision": str(self.reduced),
        }
        if len(rows) < len(images):
            facts["rows"] = hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]
        count, half = patches * len(rows), settings.store == "fp16"
        found = cached_features(facts, count, compute, title, quiet, BLOCK * patches, half)
        return Maps(images, rows, found.features, self.grid, self.size)
