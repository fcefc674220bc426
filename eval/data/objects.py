"""Images with objects: boxes, classes, masks. What the readers of COCO and VOC for detection give (coco_objects.py,
voc_objects.py), and the embedded scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from mls.config import ScenesConfig
from mls.data import Source
from mls.data.crops import decode
from mls.data.scenes import ScenesSource
from mls.data.truth import Odd
from mls.errors import DataError
from mls.eval.data import DataSet, Layout, register

RunLengths = dict[str, Any]  # a mask as COCO's programs compress it: {"size": [height, width], "counts": bytes}


@dataclass(frozen=True)
class Objects:
    """Of one image, or of all below each other."""

    boxes: Float[Tensor, "objects 4"]  # x0 y0 x1 y1 in pixels
    classes: Int64[Tensor, "objects"]
    areas: Float[Tensor, "objects"]  # in pixels: COCO's small, medium and large
    crowd: Bool[Tensor, "objects"]  # a region of many: neither learnt from nor counted (COCO)
    difficult: Bool[Tensor, "objects"]  # learnt from, and not counted (VOC)
    outlines: list[RunLengths] | None = None  # where there are masks

    def __len__(self) -> int:
        return len(self.boxes)

    def some(self, rows: slice | Tensor) -> Objects:
        outlines = self.outlines
        if outlines is not None:
            outlines = outlines[rows] if isinstance(rows, slice) else [outlines[i] for i in rows.nonzero()[:, 0]]
        named = {name: getattr(self, name)[rows] for name in ("boxes", "classes", "areas", "crowd", "difficult")}
        return Objects(**named, outlines=outlines)

    def masks(self) -> UInt8[Tensor, "objects height width"]:
        from faster_coco_eval import mask

        assert self.outlines
        return torch.from_numpy(np.ascontiguousarray(mask.decode(self.outlines))).permute(2, 0, 1)


@dataclass(frozen=True)
class ObjectImages:
    """One split."""

    images: Source  # what it says of labels is not used
    sizes: Int64[Tensor, "images 2"]  # height and width
    everything: Objects  # of all images, image by image
    starts: Int64[Tensor, "images_and_one"]  # where each image's objects begin; the last number is their count
    class_names: list[str]
    metric: Literal["coco", "voc07"] = "coco"  # how average precision is taken

    def __len__(self) -> int:
        return len(self.sizes)

    def objects(self, row: int) -> Objects:
        return self.everything.some(slice(int(self.starts[row]), int(self.starts[row + 1])))

    def part(self, rows: Int64[Tensor, "rows"]) -> ObjectImages:
        """Of one's own files."""
        everything, starts = gather([self.objects(row) for row in rows.tolist()])
        images: Any = self.images
        some = images.some(rows.tolist())
        return replace(self, images=some, sizes=self.sizes[rows], everything=everything, starts=starts)

    def pixels(self, row: int) -> UInt8[Tensor, "3 height width"]:
        pixels = decode(self.images.read(row))
        if pixels.shape[1:] != (size := tuple(self.sizes[row].tolist())):
            raise another_size(self.describe(row), pixels.shape[1:], size)
        return pixels

    def describe(self, row: int) -> str:
        return self.images.describe(row)

    @property
    def odd(self) -> Odd | None:
        """What of the annotations was left out."""
        return getattr(self.images, "odd", None)

    def odd_at(self, row: int, size: tuple[int, int]) -> list[tuple[str, str]]:
        """For `mls data check`: what an image of this height and width has that its annotations have not."""
        height, width = self.sizes[row].tolist()
        return [] if size == (height, width) else [("another size", f"{size[1]} × {size[0]}, not {width} × {height}")]

    def with_objects(self) -> Int64[Tensor, "rows"]:
        """The images that can be learnt from."""
        rows = torch.repeat_interleave(torch.arange(len(self)), self.starts.diff())
        return rows[~self.everything.crowd].unique()


def another_size(image: str, size: Sequence[int], annotated: Sequence[int]) -> DataError:
    return DataError(
        f"{image} has {size[1]} × {size[0]} pixels and its annotations are of {annotated[1]} × {annotated[0]}: "
        "bring back the image that was annotated, or annotate this one (`mls data check --dataset` finds all of them)"
    )


def gather(many: list[Objects]) -> tuple[Objects, Int64[Tensor, "images_and_one"]]:
    """The objects of all images below each other, and where each image's begin."""
    names = ("boxes", "classes", "areas", "crowd", "difficult")
    named = {name: torch.cat([getattr(one, name) for one in many]) for name in names}
    masked = all(one.outlines is not None for one in many)
    outlines = [outline for one in many for outline in one.outlines or ()] if masked else None
    starts = torch.tensor([0, *(len(one) for one in many)]).cumsum(0)
    return Objects(**named, outlines=outlines), starts


def encode(masks: Bool[Tensor, "objects height width"]) -> list[RunLengths]:
    from faster_coco_eval import mask

    return cast(list[RunLengths], mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))))


def scenes(config: ScenesConfig) -> DataSet[ObjectImages]:
    """
    >>> data = scenes(ScenesConfig(count=3, test_count=2))
    >>> data.train.objects(0).masks().shape[1:], len(data.test)
    (torch.Size([32, 32]), 2)
    """

    def split(name: str) -> ObjectImages:
        source = ScenesSource(config, name, masks=True)
        made = source.scenes
        assert made.masks is not None
        many = []
        for boxes, classes, masks in zip(made.boxes, made.classes, made.masks, strict=True):
            seen = classes >= 0
            none, masks = torch.zeros(int(seen.sum()), dtype=torch.bool), masks[seen]
            areas = masks.sum((1, 2)).float()
            many.append(Objects(boxes[seen].float(), classes[seen], areas, none, none, encode(masks)))
        sizes = torch.tensor([[config.size, config.size]] * len(source))
        return ObjectImages(source, sizes, *gather(many), source.class_names)

    return DataSet("scenes_objects", split("train"), split("test"))


register("scenes_objects", Layout(lambda _: scenes(ScenesConfig()), "", ""))
