"""Training images of the dense tasks: read, scaled, cropped, flipped and colour-jittered in the worker, as uint8. A
view is a pure function of (seed, its place in the training), so that workers, processes and a resume change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as tv

from mls import distributed
from mls.data.crops import UnreadableImage
from mls.data.loader import already_collated, made, worker_count
from mls.data.pictures import VOID
from mls.errors import DataError, UserError, reason
from mls.eval.data.objects import ObjectImages
from mls.eval.data.regions import RegionImages
from mls.eval.dense.schema import DenseData, SegmentationData
from mls.eval.images import unreadable
from mls.signals import leave_signals_to_the_parent
from mls.streams import derive, generator

CROP_DRAWS = 10  # tries until no class covers too much of the crop
Image = UInt8[Tensor, "3 height width"]


@dataclass(frozen=True)
class ObjectTarget:
    boxes: Float[Tensor, "objects 4"]
    classes: Int64[Tensor, "objects"]
    masks: UInt8[Tensor, "objects height width"] | None


def object_view(images: ObjectImages, row: int, data: DenseData, seed: int) -> tuple[Image, ObjectTarget]:
    """Flipped or not. Scaling is done on the device."""
    pixels, objects = images.pixels(row), images.objects(row)
    objects = objects.some(~objects.crowd)
    boxes, masks = objects.boxes, None if objects.outlines is None else objects.masks()
    if np.random.default_rng(seed).random() < data.flip:
        pixels, width = pixels.flip(2), pixels.shape[2]
        boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        masks = None if masks is None else masks.flip(2)
    return pixels, ObjectTarget(boxes, objects.classes, masks)


def region_view(
    images: RegionImages, row: int, data: SegmentationData, seed: int
) -> tuple[Image, UInt8[Tensor, "height width"]]:
    """mmsegmentation's order: scaled by a random factor, cropped, flipped, colour-jittered. Smaller than the crop size
    if the scaled image is."""
    draws = np.random.default_rng(seed)
    pixels = images.pixels(row)
    labels = images.labels_for(row, pixels.shape[1:])
    size = fitting(pixels, data.resize, draws.uniform(*data.ratio))
    pixels = tv.resize(pixels, list(size), antialias=False)
    labels = F.interpolate(labels[None, None], size)[0, 0]
    (width, height), most = data.crop, data.most
    for _ in range(CROP_DRAWS):
        top, left = (int(draws.integers(0, max(0, a - b) + 1)) for a, b in zip(size, (height, width), strict=True))
        cut = labels[top : top + height, left : left + width]
        counts = torch.bincount(cut[cut != VOID].flatten())
        if (counts > 0).sum() > 1 and counts.max() < most * counts.sum():
            break
    pixels, labels = pixels[:, top : top + height, left : left + width], cut
    if draws.random() < data.flip:
        pixels, labels = pixels.flip(2), labels.flip(1)
    return photometric(pixels, draws) if data.photometric else pixels, labels


def fitting(pixels: Image, frame: tuple[int, int], factor: float = 1.0) -> tuple[int, int]:
    """Height and width of the image scaled to fit into the frame times the factor, long side to long side.

    >>> fitting(torch.zeros(3, 100, 200, dtype=torch.uint8), (2048, 1024), 0.5)
    (512, 1024)
    """
    height, width = pixels.shape[1:]
    long, short = factor * max(frame), factor * min(frame)
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def photometric(pixels: Image, draws: np.random.Generator) -> Image:
    """Brightness, contrast, saturation and hue, each with probability one half; contrast before or after the colours
    (https://arxiv.org/abs/1512.02325 in mmsegmentation's numbers)."""
    image = pixels.float() / 255
    if draws.random() < 0.5:
        image = (image + draws.uniform(-32, 32) / 255).clamp(0, 1)
    contrast_first = draws.random() < 0.5
    contrast = draws.uniform(0.5, 1.5) if draws.random() < 0.5 else 1.0
    if contrast_first:
        image = (image * contrast).clamp(0, 1)
    if draws.random() < 0.5:
        image = tv.adjust_saturation(image, draws.uniform(0.5, 1.5))
    if draws.random() < 0.5:
        image = tv.adjust_hue(image, draws.uniform(-0.1, 0.1))
    if not contrast_first:
        image = (image * contrast).clamp(0, 1)
    return (image * 255).round().to(torch.uint8)


class TrainingViews(Dataset[list[Any] | UserError]):
    """Whole batches of (image, target). An index is (place in the training, row)."""

    def __init__(self, images: ObjectImages | RegionImages, data: DenseData, seed: int) -> None:
        self.images, self.data, self.seed = images, data, seed

    def __getitems__(self, indices: list[tuple[int, int]]) -> list[Any] | UserError:
        try:
            return [self._view(place, row) for place, row in indices]
        except UserError as error:  # raised in a worker, its message would be wrapped in a traceback
            return error

    def _view(self, place: int, row: int) -> Any:
        try:
            return self.view(row, derive(self.seed, "dense view", place))
        except (UnreadableImage, OSError) as error:
            raise unreadable(self.images.describe(row), reason(error)) from None

    def view(self, row: int, seed: int) -> tuple[Image, Any]:
        if isinstance(self.images, ObjectImages):
            return object_view(self.images, row, self.data, seed)
        assert isinstance(self.data, SegmentationData)
        return region_view(self.images, row, self.data, seed)


def training_batches(
    images: ObjectImages | RegionImages, data: DenseData, batch_size: int, seed: int, first: int, last: int
) -> Iterator[list[tuple[Image, Any]]]:
    """This process' share of the batches of the steps `first` to `last`."""
    return made(training_loader(TrainingViews(images, data, seed), batch_size, first, last))


def training_loader(views: TrainingViews, batch_size: int, first: int, last: int) -> DataLoader[Any]:
    images = views.images
    rows = images.with_objects() if isinstance(images, ObjectImages) else torch.arange(len(images))
    if not len(rows):
        raise DataError(f"none of the {len(images)} training images has an object: give others with data.root")
    return loader(views, Places(rows, batch_size, views.seed, range(first, last + 1)))


def loader(views: TrainingViews, batches: Places | list[list[tuple[int, int]]]) -> DataLoader[Any]:
    """Yields a UserError in place of a batch that cannot be read."""
    return DataLoader(
        views,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=min(worker_count(views.data.workers), len(batches)) if not in_memory(views.images) else 0,
        collate_fn=already_collated,  # type: ignore[arg-type]
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # its own: the global stream is not used
    )


def in_memory(images: ObjectImages | RegionImages) -> bool:
    """Workers would then take longer than reading."""
    return images.images.name == "scenes"


@dataclass(frozen=True)
class Places:
    """An endless sequence of shuffled epochs, cut into batches that may span two of them.

    >>> rows = torch.tensor([5, 6, 7])
    >>> sorted(row for batch in Places(rows, 2, 0, range(1, 4)) for _, row in batch)
    [5, 5, 6, 6, 7, 7]
    """

    rows: Int64[Tensor, "rows"]
    batch_size: int
    seed: int
    steps: Sequence[int]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        count, epoch, order = len(self.rows), -1, self.rows
        for step in self.steps:
            batch = []
            for place in range((step - 1) * self.batch_size, step * self.batch_size):
                if place // count != epoch:
                    epoch = place // count
                    order = self.rows[torch.randperm(count, generator=generator(self.seed, "order", epoch + 1))]
                batch.append((place, int(order[place % count])))
            yield batch[distributed.rank() :: distributed.world()]
