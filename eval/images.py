"""Batches of labelled images: read and cropped in the worker, finished on the device. Training crops are a pure
function of (seed, epoch, row); test images are not augmented."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

from mls import distributed
from mls.config import AugmentConfig
from mls.data import Batch
from mls.data.augment import Augment, normalise
from mls.data.crops import CROP_DRAWS, UnreadableImage, centre, crop_box, cut
from mls.data.loader import ErrorsAsItems, already_collated, made, worker_count
from mls.data.scenes import ScenesSource
from mls.data.unreadable import Unreadable
from mls.errors import DataError, reason
from mls.eval.data import LabelledImages
from mls.eval.data.cifar import PixelSource
from mls.eval.protocol import Classification, FrozenData, Supervised, TrainingData
from mls.signals import leave_signals_to_the_parent
from mls.streams import derive, generator, uniforms

# AlexNet's principal components of the colours of ImageNet (Krizhevsky et al. 2012), as published in fb.resnet.torch.
COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
VARIANCES = (0.2175, 0.0188, 0.0045)


class Pixels:
    """Whole batches of uint8 images. An index is (epoch, row); epoch 0 has the test's crop. An image that cannot be
    read is an error, or with `skip` black, and named in the batch."""

    def __init__(
        self,
        images: LabelledImages,
        data: TrainingData | FrozenData,
        augment: AugmentConfig,
        seed: int,
        operations: int = 0,
        skip: bool = False,
    ) -> None:
        self.images, self.data, self.augment, self.seed, self.skip = images, data, augment, seed, skip
        self.rand_augment = rand_augment(operations) if operations else None

    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch:
        epoch, rows, size = indices[0][0], np.array([row for _, row in indices], np.int64), self.augment.size
        draws = uniforms(derive(self.seed, "supervised crop", epoch), rows, CROP_DRAWS)
        pixels, broken = torch.zeros(len(rows), 3, size, size, dtype=torch.uint8), []
        for place, row in enumerate(rows.tolist()):
            try:
                image = self.images.pixels(row)
            except (UnreadableImage, OSError) as error:
                if not self.skip:
                    raise unreadable(self.images.describe(row), reason(error)) from None
                broken.append((row, f"{self.images.describe(row)}: {reason(error)}"))
                continue
            pixels[place] = self._to_size(image, epoch, draws[place].tolist())
            if epoch and self.rand_augment is not None:
                pixels[place] = self._rand_augmented(pixels[place], epoch, row)
        return Batch([pixels], [torch.zeros(len(rows), 4)], torch.from_numpy(rows), epoch, broken)

    def _to_size(self, image: Tensor, epoch: int, draws: Sequence[float]) -> UInt8[Tensor, "3 size size"]:
        size, (height, width) = self.augment.size, image.shape[1:]
        if epoch and self.data.train_crop == "random":
            return cut(image, crop_box(height, width, self.augment.scale, self.augment.ratio, draws), size)
        if not epoch and self.data.test_crop == "centre":
            return _centre(image, size, self.data.test_resize)
        return cut(image, (0, 0, height, width), size)

    def _rand_augmented(self, crop: UInt8[Tensor, "3 size size"], epoch: int, row: int) -> UInt8[Tensor, "3 size size"]:
        assert self.rand_augment is not None
        with torch.random.fork_rng(devices=[]):
            # Only the CPU's stream: torch.manual_seed would seed a GPU's, too.
            torch.default_generator.manual_seed(derive(self.seed, "rand augment", epoch, row))
            return self.rand_augment(crop)


def unreadable(image: str, why: str) -> DataError:
    return DataError(
        f"{image} cannot be read ({why}): what is measured needs all of its images, so bring this one back; "
        "of your own images `mls data check` lists all that cannot be read"
    )


def rand_augment(operations: int) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import RandAugment

    return RandAugment(operations, magnitude=9, interpolation=InterpolationMode.BILINEAR)


def shares(rows: Int64[Tensor, "batch"]) -> Int64[Tensor, "processes share"]:
    """The rows of a batch as one block per process; the last block is filled up with the first rows."""
    world = distributed.world()
    share = -(-len(rows) // world)
    return rows[torch.arange(world * share) % len(rows)].view(world, share)


def mixing(alpha: float, count: int, seed: int) -> tuple[float, Int64[Tensor, "count"]]:
    """For mixup (https://arxiv.org/abs/1710.09412): the weight of a batch's images, and the partner of each.

    >>> share, partners = mixing(0.2, 3, seed=0)
    >>> 0 <= share <= 1, partners.sort().values.tolist()
    (True, [0, 1, 2])
    """
    draws = np.random.default_rng(seed)
    return float(draws.beta(alpha, alpha)), torch.from_numpy(draws.permutation(count))


def _centre(image: UInt8[Tensor, "3 height width"], size: int, resize: float) -> UInt8[Tensor, "3 size size"]:
    """The middle square of the image whose short side is `resize` times `size`: Resize(256), CenterCrop(224)."""
    if resize <= 1:
        return centre(image, size)
    height, width = image.shape[1:]
    side = min(min(height, width), max(1, round(min(height, width) / resize)))
    return cut(image, ((height - side) // 2, (width - side) // 2, side, side), size)


class Batches:
    """The batches of one data set on one device. An image that cannot be read is an error, or noted in `unreadable` and
    black."""

    def __init__(
        self,
        images: LabelledImages,
        protocol: Classification,
        seed: int,
        device: torch.device,
        unreadable: Unreadable | None = None,
    ) -> None:
        operations = protocol.training.rand_augment if isinstance(protocol, Supervised) else 0
        self.pixels = Pixels(images, protocol.data, protocol.augment, seed, operations, unreadable is not None)
        self.protocol, self.seed, self.device, self.unreadable = protocol, seed, device, unreadable
        self.finish = Augment(protocol.augment, seed, device)
        self.workers = worker_count(protocol.data.workers)
        if isinstance(images.images, ScenesSource | PixelSource):
            self.workers = 0  # in memory: passing images between processes would take longer than cropping

    def training(self, epoch: int, done: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, views) of one epoch in its order, after `done` batches; the last batch may be smaller. Views are
        those of this process' share of the rows."""
        assert isinstance(self.protocol, Supervised)
        order = torch.randperm(len(self.pixels.images), generator=generator(self.seed, "order", epoch))
        batches = order.split(self.protocol.training.batch_size)[done:]
        loaded = self._load(epoch, [shares(rows)[distributed.rank()] for rows in batches])
        for rows, batch in zip(batches, loaded, strict=True):
            yield rows, self._with_lighting(self.finish(batch).images[0], batch, epoch)

    def plain(self, rows: Tensor | None = None, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, images) without augmentation, in order."""
        yield from self.frozen(0, torch.arange(len(self.pixels.images)) if rows is None else rows, size)

    def frozen(self, number: int, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows, images) in the order of `rows`: pass 0 without augmentation, each other pass with its own."""
        for batch in self._load(number, rows.split(size)):
            if self.unreadable is not None:
                self.unreadable.note(batch.unreadable)
            if number:
                yield batch.ids, self.finish(batch).images[0]
            else:
                yield batch.ids, normalise(batch.crops[0], self.protocol.augment, self.device)

    def _load(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Batch]:
        indices = [[(epoch, int(row)) for row in rows] for rows in batches]
        loader = DataLoader(
            ErrorsAsItems(self.pixels),
            batch_sampler=indices,
            num_workers=min(self.workers, len(indices)),
            collate_fn=already_collated,  # type: ignore[arg-type] (Pixels makes whole batches)
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own: the global stream is not used
            worker_init_fn=leave_signals_to_the_parent,
        )
        return made(loader)

    def _with_lighting(self, views: Float[Tensor, "batch 3 size size"], batch: Batch, epoch: int) -> Tensor:
        assert isinstance(self.protocol, Supervised)
        deviation = self.protocol.training.lighting
        if not deviation:
            return views
        normal = [
            torch.randn(3, generator=generator(self.seed, "lighting", epoch, int(row))) for row in batch.ids.tolist()
        ]
        shift = deviation * torch.stack(normal) * torch.tensor(VARIANCES) @ torch.tensor(COMPONENTS).T
        shift = shift / torch.tensor(self.protocol.augment.std)  # the views are standardised already
        return views + shift.to(views.device)[..., None, None]
