"""Labelled data sets of published layouts, for downstream work: `build(name)` gives train and test images with what is
known of their labels. One file a data set or family; whatever a layout needs (lists, json, crops) is settled there."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int8, Int64, UInt8
from torch import Tensor

from mls.data import Source
from mls.data.crops import decode
from mls.errors import DataError
from mls.plugins import Registry


@dataclass(frozen=True)
class LabelledImages:
    """One split: images, and for each class whether it is present (+1), absent (-1) or not annotated (0). Where every
    image has just one class, `truth` is the number of that class: of ImageNet a matrix would take 1.3 GB.

    >>> from mls.config import ScenesConfig
    >>> from mls.data.scenes import ScenesSource
    >>> images = LabelledImages(ScenesSource(ScenesConfig(count=3)), torch.tensor([0, 1, 1]), ["indoors", "outdoors"])
    >>> images.single_label, images.part(torch.tensor([2, 0])).truth
    (True, tensor([1, 0]))
    """

    images: Source  # what it says of labels is not used
    truth: Int8[Tensor, "images classes"] | Int64[Tensor, "images"]
    class_names: Sequence[str]
    rows: Int64[Tensor, "images"] | None = None  # an image of `images` for each row; None: row i is image i
    boxes: Int64[Tensor, "images 4"] | None = None  # x0 y0 x1 y1 in pixels: a row is a part of its image
    observed: Int8[Tensor, "images classes"] | None = None  # labels already drawn, where the files bring them

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def single_label(self) -> bool:
        return self.truth.ndim == 1

    def pixels(self, row: int) -> UInt8[Tensor, "3 height width"]:
        image = row if self.rows is None else int(self.rows[row])
        pixels = decode(self.images.read(image))
        if self.boxes is None:
            return pixels
        height, width = pixels.shape[1:]
        x0, y0, x1, y1 = self.boxes[row].tolist()
        x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
        return pixels[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]

    def describe(self, row: int) -> str:
        return self.images.describe(row if self.rows is None else int(self.rows[row]))

    def numbers(self) -> list[int]:
        """Which image of `images` each row is."""
        return list(range(len(self))) if self.rows is None else self.rows.tolist()

    def part(self, rows: Int64[Tensor, "rows"]) -> LabelledImages:
        """Some rows, in this order."""
        pick = lambda values: None if values is None else values[rows]
        images = rows if self.rows is None else self.rows[rows]
        return LabelledImages(
            self.images, self.truth[rows], self.class_names, images, pick(self.boxes), pick(self.observed)
        )


Images = TypeVar("Images")


@dataclass(frozen=True)
class DataSet(Generic[Images]):
    """`Images` are LabelledImages, or those of objects.py and regions.py for detection and segmentation."""

    name: str
    train: Images
    test: Images
    val: Images | None = None  # the published one; without it a protocol holds out a part of train


Located = tuple[Float[Tensor, "objects 4"], Int64[Tensor, "objects"]]  # x0 y0 x1 y1 as shares, and classes


@dataclass(frozen=True)
class Layout:
    """How one published data set lies on disk."""

    read: Callable[[Path], DataSet[Any]]
    folder: str  # under $MLS_DATA
    download: str  # what to download and where to put it: completes "FILE is missing: "
    sizes: dict[str, int] = field(default_factory=dict)  # published counts: classes, train, test, val
    boxes: Callable[[Path, LabelledImages], list[Located]] | None = None  # of each image, where labels have places
    own: bool = False  # the user's own data: its name says nothing of its content
    test_only: bool = False  # there is no training part: `train` is the test images


LAYOUTS = Registry[Layout]("data set", DataError)
register = LAYOUTS.add  # register(name, layout)
names = LAYOUTS.names


def folder_of(name: str, root: str | Path | None = None) -> Path:
    """Where a data set lies: `root`, by default its folder under $MLS_DATA."""
    return Path(root).expanduser() if root else Path(os.environ.get("MLS_DATA") or ".") / LAYOUTS[name].folder


def build(name: str, root: str | Path | None = None, check_sizes: bool = True) -> DataSet[Any]:
    """The data set `name` from `root` (default: its folder under $MLS_DATA). Another number of images or classes than
    published is an error, unless `check_sizes` is False."""
    layout, folder = LAYOUTS[name], folder_of(name, root)
    if layout.folder and not (folder.exists() if layout.own else folder.is_dir()):
        raise DataError(f"{folder} is missing: {layout.download}, or set data.root")
    try:
        data = layout.read(folder)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or error} is missing: {layout.download}") from None
    except OSError as error:
        reason = f"{error.filename or folder} cannot be read ({error.strerror or error})"
        raise DataError(f"{reason}: make it readable, or {layout.download}") from None
    if check_sizes:
        _check_sizes(data, layout, folder)
    return data


def boxes(name: str, root: str | Path | None, images: LabelledImages) -> list[Located]:
    """The objects of each image of a split of the data set `name`."""
    layout = LAYOUTS[name]
    if layout.boxes is None:
        known = ", ".join(one for one in names() if LAYOUTS[one].boxes is not None)
        raise DataError(f"{name} says which classes an image holds and not where: use a data set with boxes ({known})")
    try:
        return layout.boxes(folder_of(name, root), images)
    except FileNotFoundError as error:
        raise DataError(f"{error.filename or error} is missing: {layout.download}") from None


def _check_sizes(data: DataSet[Any], layout: Layout, folder: Path) -> None:
    found = {"classes": len(data.train.class_names), "train": len(data.train), "test": len(data.test)}
    found["val"] = 0 if data.val is None else len(data.val)
    for what, count in layout.sizes.items():
        if found[what] != count:
            raise DataError(
                f"{folder} has {found[what]} {what if what == 'classes' else what + ' images'} where the published "
                f"{data.name} has {count}: complete it, or say data.check_sizes=false for a part of it"
            )


def presence(truth: Tensor) -> Int8[Tensor, "images classes"]:
    """{0, 1} as annotation files give it to {-1, +1}.

    >>> presence(torch.tensor([[0, 1]]))
    tensor([[-1,  1]], dtype=torch.int8)
    """
    return torch.where(truth > 0, 1, -1).to(torch.int8)


# After `register`, which these files use.
from mls.eval.data import (  # noqa: E402
    by_torchvision,
    cifar,
    class_folders,
    coco_objects,
    coco_stuff,
    cub,
    flowers,
    formatted,
    imagenet,
    indoor67,
    nus,
    objects,
    openimages,
    own_masks,
    own_objects,
    pets,
    regions,
    saliency,
    scenes,
    table,
    vaw,
    vispr,
    voc_coco,
    voc_objects,
    wider,
)

__all__ = [
    "DataSet",
    "LabelledImages",
    "Layout",
    "Located",
    "boxes",
    "build",
    "folder_of",
    "names",
    "presence",
    "register",
]
__all__ += ["by_torchvision", "cifar", "class_folders", "flowers", "imagenet", "indoor67", "pets"]
__all__ += ["coco_objects", "coco_stuff", "objects", "own_masks", "own_objects", "regions", "saliency", "voc_objects"]
__all__ += ["cub", "formatted", "nus", "openimages", "scenes", "table", "vaw", "vispr", "voc_coco", "wider"]
