"""In the worker: choose the crops of an image, decode it once at the scale they need, cut them, keep their boxes.
Pixels stay uint8; they are flipped and coloured here by augment_uint8.py, or on the device (augment.py). How files are
decoded is in decode.py. A crop is a pure function of (seed, epoch, image id, view number)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mls.config import AugmentConfig
from mls.data import Batch, Source, View, ViewPlan
from mls.data.augment import draw
from mls.data.decode import Encoded, UnreadableImage, decode
from mls.errors import DataError
from mls.streams import derive, uniforms

__all__ = ["CropDataset", "UnreadableImage", "centre", "crop_box", "cut", "decode", "shares"]

CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
CROP_DRAWS = 2 + 2 * CROP_ATTEMPTS  # place, then area and ratio of each attempt
REPLACEMENTS = 20  # images tried in the place of one that cannot be read
SPARE = 1.5  # an image is decoded smaller only as far as every crop still has this many times its target's pixels

Box = tuple[int, int, int, int]  # top, left, height, width
Shares = tuple[float, float, float, float]  # x0 y0 x1 y1 as shares of the image's width and height


class CropDataset(Dataset[Batch]):
    """Whole batches of crops. An index is (epoch, id); a batch sampler hands over all indices of one batch together.

    An image that cannot be read is replaced by another one, and noted in `Batch.unreadable`. In a worker process the
    crops are written into `buffers` sets of shared memory in turn, so a batch's crops are overwritten when the same
    worker makes its `buffers`-th batch after it; 0 means that every batch has its own. `finish`: augment the crops too.
    """

    def __init__(
        self,
        source: Source,
        augment: AugmentConfig,
        seed: int,
        buffers: int = 0,
        plan: ViewPlan | None = None,
        finish: bool = False,
    ) -> None:
        self.source, self.seed, self.augment, self.buffers, self.finish = source, seed, augment, buffers, finish
        self.views = (plan or ViewPlan.crops(augment)).views
        self.spare = SPARE
        self.ring: deque[list[Tensor]] = deque(maxlen=buffers)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch:
        epoch = indices[0][0]
        if any(other != epoch for other, _ in indices):
            raise ValueError("the indices of one batch must share their epoch")
        ids = np.array([index for _, index in indices], dtype=np.int64)
        draws = self._draws(epoch, ids)
        crops = self._room(len(ids))
        boxes = np.empty((len(self.views), len(ids), 4), dtype=np.float32)
        unreadable: list[tuple[int, str]] = []
        for row, wanted in enumerate(ids.tolist()):
            out = [view[row : row + 1] for view in crops]
            ids[row], boxes[:, row] = self._cut(epoch, wanted, draws[:, row], out, unreadable)
        if self.finish:
            from mls.data.augment_uint8 import augment_in_place  # OpenCV takes a moment to import

            for view, images in enumerate(crops):
                augment_in_place(images, draw(self.augment, self.seed, epoch, ids, view), self.augment)
        places = [torch.from_numpy(view) for view in boxes]
        return Batch(crops, places, torch.from_numpy(ids), epoch, unreadable, augmented=self.finish)

    def _draws(self, epoch: int, ids: NDArray[np.int64]) -> Float64[np.ndarray, "views batch draws"]:
        seeds = [derive(self.seed, "crop", epoch, view) for view in range(len(self.views))]
        return np.stack([uniforms(seed, ids, CROP_DRAWS) for seed in seeds])

    def _room(self, count: int) -> list[UInt8[Tensor, "batch 3 size size"]]:
        """Where a batch's crops go. Fresh memory for each costs a worker a tenth of its time in page faults, and a copy
        into shared memory comes on top."""
        if len(self.ring) >= self.buffers > 0 and len(self.ring[0][0]) == count:
            self.ring.rotate(-1)
            return self.ring[-1]
        crops = [empty_crops(count, view.size) for view in self.views]
        if self.buffers and get_worker_info() is not None:
            self.ring.append([view.share_memory_() for view in crops])
            return self.ring[-1]
        return crops

    def _cut(
        self, epoch: int, wanted: int, draws: NDArray[np.float64], out: list[Tensor], unreadable: list[tuple[int, str]]
    ) -> tuple[int, list[Shares]]:
        """Fills `out` with the crops of the wanted image or of the first readable replacement; its id and boxes."""
        for index in self._candidates(epoch, wanted):
            if index != wanted:
                draws = self._draws(epoch, np.array([index]))[:, 0]
            try:
                return index, self._cut_from(Encoded(self.source.read(index)), draws, out)
            except (UnreadableImage, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error)  # an OSError's text repeats the path
                note = (index, f"{self.source.describe(index)}: {reason}")
                if note not in unreadable:
                    unreadable.append(note)
        raise DataError(
            f"{self.source.describe(wanted)} and {REPLACEMENTS} images tried in its place cannot be read "
            f"(last: {unreadable[-1][1]}): check that data.root holds whole image files you may read"
        )

    def _cut_from(self, image: Encoded, draws: NDArray[np.float64], out: list[Tensor]) -> list[Shares]:
        height, width = image.height, image.width
        boxes: list[Box] = []
        for view, numbers in zip(self.views, draws.tolist(), strict=True):
            if view.near is None:
                boxes.append(crop_box_within(height, width, view, self.augment.ratio, numbers))
            else:
                boxes.append(moved(boxes[view.near], height, width, view.jitter, numbers))
        factor = image.factor(
            min(min(box[2:]) / view.size for box, view in zip(boxes, self.views, strict=True)) / self.spare
        )
        boxes = [reduced(box, factor) for box in boxes]
        pixels = image.pixels(factor)
        for box, place in zip(boxes, out, strict=True):
            cut_into(place, pixels, box)
        return [shares(box, height / factor, width / factor) for box in boxes]

    def _candidates(self, epoch: int, wanted: int) -> Iterator[int]:
        yield wanted
        draws = uniforms(derive(self.seed, "replacement", epoch), np.array([wanted]), REPLACEMENTS)[0]
        yield from (draws * len(self.source)).astype(np.int64).tolist()


def crop_box_within(height: int, width: int, view: View, ratio: tuple[float, float], draws: Sequence[float]) -> Box:
    """`crop_box` of the part of the image that the view is cut from.

    >>> crop_box_within(90, 90, View(8, (1.0, 1.0), within=(1 / 3, 0.0, 2 / 3, 1 / 3)), (1.0, 1.0), [0.5] * CROP_DRAWS)
    (0, 30, 30, 30)
    """
    x0, y0, x1, y1 = view.within
    left, top = int(x0 * width + 0.5), int(y0 * height + 0.5)
    right, bottom = max(left + 1, int(x1 * width + 0.5)), max(top + 1, int(y1 * height + 0.5))
    row, column, h, w = crop_box(min(bottom, height) - top, min(right, width) - left, view.scale, ratio, draws)
    return top + row, left + column, h, w


def moved(box: Box, height: int, width: int, jitter: float, draws: Sequence[float]) -> Box:
    """The box with its sides scaled and its middle moved by up to a share `jitter` of them, inside the image.

    >>> moved((10, 20, 40, 60), 100, 100, 0.1, [0.5, 0.5, 1.0]), moved((0, 20, 40, 80), 100, 100, 0.25, [0.0, 1.0, 0.5])
    ((8, 17, 44, 66), (0, 20, 40, 80))
    """
    top, left, h, w = box
    down, right, larger = (jitter * (2 * draw - 1) for draw in draws[:3])
    tall, wide = (min(max(1, round(side * (1 + larger))), most) for side, most in ((h, height), (w, width)))
    top = round(top + (h - tall) / 2 + down * h)
    left = round(left + (w - wide) / 2 + right * w)
    return min(max(0, top), height - tall), min(max(0, left), width - wide), tall, wide


def crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Sequence[float]
) -> Box:
    """The distribution of torchvision's RandomResizedCrop, as a pure function of CROP_DRAWS numbers in [0, 1).

    >>> crop_box(100, 200, (1.0, 1.0), (2.0, 2.0), [0.5] * CROP_DRAWS)
    (0, 0, 100, 200)
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(2, CROP_DRAWS, 2):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[attempt])
        aspect = math.exp(low + (high - low) * draws[attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[0] * (height - h + 1)), int(draws[1] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def reduced(box: Box, factor: int) -> Box:
    """The box in an image `factor` times smaller, its edges moved to that image's pixels.

    >>> reduced((5, 8, 448, 449), 4)
    (1, 2, 112, 112)
    """
    top, left, h, w = box
    return top // factor, left // factor, (top + h) // factor - top // factor, (left + w) // factor - left // factor


def shares(box: Box, height: float, width: float) -> Shares:
    """The box as x0 y0 x1 y1 in shares of the image's width and height."""
    top, left, h, w = box
    return left / width, top / height, (left + w) / width, (top + h) / height


def cut(image: UInt8[Tensor, "3 height width"], box: Box, size: int) -> UInt8[Tensor, "3 size size"]:
    """The box of the image, scaled to size × size (bilinear, antialiased)."""
    out = empty_crops(1, size)
    cut_into(out, image, box)
    return out[0].contiguous()


def empty_crops(count: int, size: int) -> UInt8[Tensor, "count 3 size size"]:
    """Channels-last, as decoders leave pixels: cutting takes three quarters of the time, and OpenCV works in place."""
    return torch.empty(count, 3, size, size, dtype=torch.uint8, memory_format=torch.channels_last)


def cut_into(out: UInt8[Tensor, "1 3 size size"], image: UInt8[Tensor, "3 height width"], box: Box) -> None:
    top, left, h, w = box
    crop = image[None, :, top : top + h, left : left + w]
    if crop.is_contiguous():  # a whole image, channel by channel: torch writes it wrongly into channels-last memory
        crop = crop.contiguous(memory_format=torch.channels_last)
    if crop.shape == out.shape:
        out.copy_(crop)
    else:  # `interpolate` has no `out`, and a crop more to copy is a fiftieth of an image's time
        torch.ops.aten._upsample_bilinear2d_aa.out(crop, list(out.shape[2:]), False, None, None, out=out)


def centre(image: UInt8[Tensor, "3 height width"], size: int) -> UInt8[Tensor, "3 size size"]:
    """The largest square in the middle, scaled to size × size: what evaluation sees."""
    height, width = image.shape[1:]
    side = min(height, width)
    return cut(image, ((height - side) // 2, (width - side) // 2, side, side), size)
