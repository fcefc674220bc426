"""Frozen features of labelled images, computed once for the same weights, images and size, then read from disk
(`mls.frozen.features.cached_features`). The probes are in frozen.py."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor, nn

from mls.data.scenes import ScenesSource
from mls.data.sources import hash_of_images
from mls.distributed import start
from mls.errors import ConfigError
from mls.eval.data import DataSet, LabelledImages
from mls.eval.images import Batches
from mls.eval.protocol import FeaturesConfig, Frozen, FrozenData, plain
from mls.eval.splits import load
from mls.frozen.features import cached_features, hash_of_weights
from mls.models import load_backbone
from mls.models.momentum import HALF, precision_on


@dataclass(frozen=True)
class Reading:
    """How `extract` reads a data set."""

    root: str | Path | None = None  # default: the data set's folder under $MLS_DATA
    check_sizes: bool = True  # refuse another number of images than published
    workers: int | None = None  # default: the cores this process may use, at most 8


@dataclass(frozen=True)
class Features:
    features: Float[Tensor, "images dim"]  # memory-mapped
    labels: Int64[Tensor, "images"] | Int8[Tensor, "images classes"]  # as LabelledImages.truth
    class_names: Sequence[str]
    sha256: str


def extract(
    backbone: nn.Module | str | Path,
    dataset: str | Path | DataSet | LabelledImages,
    split: str = "train",
    size: int | None = None,
    resize: float | None = None,
    reading: Reading = Reading(),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    quiet: bool = False,
    **more: Any,
) -> Features:
    """Features of a split of a data set, with its labels: the middle square of each image, no augmentation.

    dataset  a name (`mls eval list`), a folder of class folders, or a data set of `mls.eval.data`
    size     of the input; default: what the backbone was pretrained with, else 224 (32 for the embedded scenes)
    resize   the short side is scaled to this many times the size before the crop; default: 256 / 224 (scenes: 1)
    reading  how the data set is read; each of its fields may be given by its own name as well: `root="/data/cub"`

    The second call with the same weights, images and size reads the first one's file.

    >>> features = extract("resnet_tiny", "scenes", "test", quiet=True)
    >>> features.features.shape, features.labels.shape
    (torch.Size([2000, 128]), torch.Size([2000, 10]))
    """
    reading = replace(reading, **more)
    if isinstance(dataset, str | Path) and Path(dataset).expanduser().is_dir():
        dataset, reading = "folder", replace(reading, root=dataset)
    root = None if reading.root is None else str(reading.root)
    data = FrozenData(root=root, check_sizes=reading.check_sizes, workers=reading.workers)
    if isinstance(dataset, str | Path):
        dataset = load(replace(data, name=str(dataset)))
    images = _split(dataset, split) if isinstance(dataset, DataSet) else dataset
    scenes = isinstance(images.images, ScenesSource)
    data = replace(data, test_resize=resize or (1.0 if scenes else data.test_resize))
    backbone = load_backbone(backbone) if isinstance(backbone, str | Path) else backbone
    card = getattr(backbone, "card", {})
    augment = plain(size or card.get("input_size") or (32 if scenes else 224))
    if card:
        augment = replace(augment, mean=tuple(card["mean"]), std=tuple(card["std"]))
    protocol = Frozen(data=data, augment=augment, features=FeaturesConfig(device=device))
    return features_of(backbone, images, protocol, f"of {images.images.name}", quiet=quiet)


def features_of(
    backbone: nn.Module,
    images: LabelledImages,
    protocol: Frozen,
    title: str = "",
    number: int = 0,
    seed: int = 0,
    quiet: bool = False,
) -> Features:
    """Pass `number` over the images with the protocol's sizes: 0 without augmentation, each other with its own."""
    device = start(protocol.features.device).device
    reduced = HALF.get(precision_on(device, protocol.features.precision, "features.precision"))
    network = backbone.eval().to(device)
    batches = Batches(images, protocol, seed, device)

    @torch.no_grad()
    def compute(first: int) -> Generator[Tensor, None, None]:
        for _, views in batches.frozen(number, torch.arange(first, len(images)), protocol.features.batch_size):
            with torch.autocast(device.type, dtype=reduced, enabled=reduced is not None):
                features = network(views)
            yield features.float()

    facts: dict[str, Any] = {
        "weights": hash_of_weights(backbone),
        "images": hash_of_images(images.images, images.rows),
        "parts": None if images.boxes is None else hashlib.sha256(images.boxes.numpy().data).hexdigest(),
        "size": protocol.augment.size,
        "statistics": [*protocol.augment.mean, *protocol.augment.std],
        "crop": [protocol.data.test_crop, protocol.data.test_resize],
        "precision": str(reduced),
    }
    if number:
        facts["pass"] = [number, seed, protocol.data.train_crop, repr(protocol.augment)]
    found = cached_features(facts, len(images), compute, f"features {title}".strip(), quiet)
    return Features(found.features, images.truth, images.class_names, found.sha256)


def _split(data: DataSet, name: str) -> LabelledImages:
    parts = {"train": data.train, "val": data.val, "test": data.test}
    found = parts.get(name)
    if found is None:
        known = ", ".join(part for part, images in parts.items() if images is not None)
        raise ConfigError(f"{data.name} has no split '{name}': choose one of {known}")
    return found
