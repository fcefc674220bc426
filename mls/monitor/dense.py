"""The online dense probe: while a run trains on images that happen to have masks, how well do the nearest labelled
patches of some images segment others? As `dense_knn` does it (docs/frozen-dense.md), on few images, kept in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

from mls import distributed
from mls.config import Config
from mls.core import matching
from mls.data import Source
from mls.data.augment import normalise
from mls.data.crops import UnreadableImage, decode
from mls.data.listing import FileSource, show
from mls.data.masks import IndexedFiles, masks_beside
from mls.data.pictures import VOID
from mls.data.scenes import ScenesSource
from mls.errors import ConfigError, DataError
from mls.frozen.confusion import confusion, segmentation_metrics
from mls.frozen.patches import in_context, patch_labels
from mls.frozen.untrained import with_batch_statistics
from mls.models import build_pair
from mls.models.finite import NonFiniteError, finite
from mls.models.spatial import DenseFeatures
from mls.streams import generator

NEIGHBOURS, TEMPERATURE = 30, 0.02
FOR_MEMORY = 0.8  # share of the images whose patches are labelled; the others are segmented
BATCH = 50  # images
Images = UInt8[Tensor, "images 3 size size"]
Labels = UInt8[Tensor, "images size size"]


@dataclass
class DenseProbe:
    """The same images at each measurement, squashed to twice the size of the views."""

    config: Config
    source: Source
    memory: tuple[Images, Labels] | None = None  # read when they are needed first
    asked: tuple[Images, Labels] | None = None
    classes: int = 0
    untrained: float | None = None

    @classmethod
    def build(cls, config: Config, source: Source) -> DenseProbe | None:
        if not config.monitor.dense_every_epochs:
            return None
        if not isinstance(source, ScenesSource):
            drawn(config, source, masks_of(source))  # what is missing is said before the first step
        return cls(config, source)

    def __call__(self, backbone: nn.Module, epoch: int, device: torch.device) -> dict[str, float]:
        """What is due at the end of this epoch, of the first process' network; nothing where it is not finite (the
        training itself judges whether it goes on)."""
        if epoch % self.config.monitor.dense_every_epochs or distributed.rank() != 0:
            return {}
        if self.untrained is None:
            self.read()
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                network = build_pair(replace(self.config.model, weights=None), self.config.run.seed).query.backbone
                with_batch_statistics(network.to(device), self.batches(self.memory, device))
            self.untrained = self.miou(network, device)
        with contextlib.suppress(NonFiniteError):
            return {"dense/miou": self.miou(backbone, device), "dense/miou_untrained": self.untrained}
        return {}

    def refuse_unusable(self, backbone: nn.Module, device: torch.device) -> None:
        """Before the first step, on every process: masks that cannot be used, and a network that gives no map of the
        probe's images. The first process, which measures, finds out."""
        distributed.on_main(lambda: self.tried(backbone, device))

    @torch.no_grad()
    def tried(self, backbone: nn.Module, device: torch.device) -> None:
        self.read()
        training, network = backbone.training, DenseFeatures(backbone).eval()
        try:
            network(next(self.batches(self.memory, device))[:1])
        except ConfigError as error:
            raise ConfigError(
                f"monitor.dense_every_epochs measures at twice augment.size: {error}; or set it to 0"
            ) from None
        finally:
            backbone.train(training)

    def read(self) -> None:
        if self.memory is not None:
            return
        size = 2 * self.config.augment.size
        if isinstance(self.source, ScenesSource):  # they have a test split of their own
            count = min(self.config.monitor.dense_images, len(self.source))
            first = round(FOR_MEMORY * count)
            scenes = replace(self.config.data.scenes, count=first, test_count=count - first)
            self.classes = len(self.source.class_names) + 1
            made = [ScenesSource(scenes, split, masks=True) for split in ("train", "test")]
            self.memory, self.asked = (
                (
                    squashed(one.scenes.images, size),
                    F.interpolate(one.regions[:, None], (size, size), mode="nearest-exact")[:, 0],
                )
                for one in made
            )
            return
        masks = masks_of(self.source)
        images, labels = read_pairs(self.source, masks, drawn(self.config, self.source, masks), size)
        self.classes, first = masks.classes, min(len(images) - 1, round(FOR_MEMORY * len(images)))
        for part, does in ((labels[:first], "learns from"), (labels[first:], "segments")):
            if (part == VOID).all():
                raise DataError(
                    f"the masks of {self.source.name} label no pixel of the {len(part)} images that the dense probe "
                    f"{does}: correct them, raise monitor.dense_images, or set monitor.dense_every_epochs=0"
                )
        self.memory, self.asked = (images[:first], labels[:first]), (images[first:], labels[first:])

    def batches(self, part: tuple[Images, Labels] | None, device: torch.device) -> Iterator[Tensor]:
        assert part is not None
        yield from (normalise(pixels, self.config.augment, device) for pixels in part[0].split(BATCH))

    @torch.no_grad()
    def miou(self, backbone: nn.Module, device: torch.device) -> float:
        self.read()
        training, network = backbone.training, DenseFeatures(backbone).eval()
        try:
            maps, queries = (
                torch.cat([finite(network(images).float().cpu()) for images in self.batches(part, device)])
                for part in (self.memory, self.asked)
            )
        finally:
            backbone.train(training)
        assert self.memory is not None and self.asked is not None
        return segmented(maps, self.memory[1], queries, self.asked[1], self.classes)


def segmented(
    maps: Float[Tensor, "images dim rows columns"],
    labels: Labels,
    queries: Float[Tensor, "others dim rows columns"],
    truth: UInt8[Tensor, "others size size"],
    classes: int,
) -> float:
    """The mIoU of the patches of other images, each with the labels of its nearest patches."""
    as_rows = lambda of: F.normalize(of.flatten(2).transpose(1, 2).flatten(0, 1), dim=1)
    rows, columns = maps.shape[2:]
    shares = patch_labels(labels, (rows, columns), classes).flatten(0, 2)
    known = shares.sum(1) > 0
    k, matcher = min(NEIGHBOURS, int(known.sum())), matching.build("torch")
    votes = in_context(as_rows(queries), as_rows(maps)[known], shares[known], [k], [TEMPERATURE], matcher)
    scores = votes[k, TEMPERATURE].view(len(queries), rows, columns, classes).permute(0, 3, 1, 2)
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for one, wanted in zip(scores.split(1), truth.split(1), strict=True):  # the scores of all pixels may be gigabytes
        counts += confusion(F.interpolate(one, truth.shape[1:], mode="bilinear").argmax(1), wanted, classes)
    return segmentation_metrics(counts)["miou"]


def masks_of(source: Source) -> IndexedFiles:
    if not isinstance(source, FileSource):
        raise ConfigError(
            f"monitor.dense_every_epochs needs masks, and {source.name} has none: pretrain on a folder ROOT/images "
            "with ROOT/masks beside it, or set it to 0"
        )
    return masks_beside(Path(os.fsdecode(source.root)), [Path(os.fsdecode(path)) for path in source.relative_paths])


def drawn(config: Config, source: Source, masks: IndexedFiles) -> list[int]:
    """The same images each time, of those whose mask is there."""
    order = torch.randperm(len(source), generator=generator(config.run.seed, "dense probe")).tolist()
    rows = list(islice((row for row in order if masks.paths[row].is_file()), config.monitor.dense_images))
    if len(rows) < 2:
        raise DataError(
            f"{source.name} has {len(rows)} images with a mask, and the dense probe needs two: put that of each image "
            f"where that of the first is looked for, in {show(masks.paths[0])}, or set monitor.dense_every_epochs to 0"
        )
    return rows


def read_pairs(source: Source, masks: IndexedFiles, rows: Sequence[int], size: int) -> tuple[Images, Labels]:
    """Images that cannot be read are left out (training lists those)."""
    found = []
    for row in rows:
        try:
            pixels = decode(source.read(row))
        except (UnreadableImage, OSError):
            continue
        labels = masks(row)
        if labels.shape != pixels.shape[1:]:
            one, other = (f"{shape[-1]} × {shape[-2]}" for shape in (labels.shape, pixels.shape))
            raise DataError(f"{source.describe(row)} has {other} pixels and its mask {one}: bring back the right one")
        found.append(
            (squashed(pixels, size), F.interpolate(labels[None, None], (size, size), mode="nearest-exact")[0, 0])
        )
    if len(found) < 2:
        raise DataError(f"{source.name} has {len(found)} images that can be read with masks: the dense probe needs two")
    images, labels = (torch.stack(part) for part in zip(*found, strict=True))
    return images, labels


def squashed(pixels: UInt8[Tensor, "*images 3 height width"], size: int) -> UInt8[Tensor, "*images 3 size size"]:
    return tv.resize(pixels, [size, size], antialias=True)
