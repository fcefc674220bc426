"""Where images come from and how they become views. The types every other file speaks of are defined here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from mls.config import AugmentConfig


@runtime_checkable
class Source(Protocol):
    """A numbered collection of images. The number of an image (its id) never changes between runs."""

    name: str

    @property
    def class_names(self) -> Sequence[str] | None:
        """None when the source has no labels."""
        ...

    @property
    def labels(self) -> Tensor | None:  # read-only, so that a lazily made one fits as well
        """Float [images, classes] in {0, 1}, made when first asked for: for monitoring and probing, never to train."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | UInt8[Tensor, "3 height width"]:
        """The encoded file, or the pixels where the source makes them itself."""
        ...

    def describe(self, index: int) -> str:
        """What a person needs to find the image: its path, or its place in a shard."""
        ...

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """All ids in the order of one epoch (epochs count from 1): a pure function of its arguments."""
        ...


@dataclass(frozen=True)
class View:
    """How one view is cut from an image: a random box of a share `scale` of the area, scaled to size × size."""

    size: int
    scale: tuple[float, float]
    within: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # x0 y0 x1 y1: the part that it is cut from
    near: int | None = None  # cut where this earlier view of the plan was, and not at random,
    jitter: float = 0.0  # but moved and scaled by up to this share of its sides


@dataclass(frozen=True)
class ViewPlan:
    """The views of an image that a method wants, in the order in which it gets them.

    >>> plan = ViewPlan.crops(AugmentConfig(size=32, small_crops=1, small_size=16)).with_grid(rows=3, columns=3, size=8)
    >>> [view.size for view in plan.views]
    [32, 32, 16, 8, 8, 8, 8, 8, 8, 8, 8, 8]
    """

    views: tuple[View, ...]
    positions: bool = False  # does the method ask where the cells of a view lie in the image (`Views.positions`)?

    @classmethod
    def crops(cls, augment: AugmentConfig, positions: bool = False) -> ViewPlan:
        """A query and a key crop, then `augment.small_crops` small ones."""
        large = View(augment.size, augment.scale)
        return cls((large, large) + (View(augment.small_size, augment.small_scale),) * augment.small_crops, positions)

    def with_windows(self, count: int, size: int, scale: tuple[float, float]) -> ViewPlan:
        """And `count` small windows anywhere in the image."""
        return replace(self, views=(*self.views, *[View(size, scale)] * count))

    def with_window_pairs(self, count: int, size: int, scale: tuple[float, float], jitter: float) -> ViewPlan:
        """The same, and then each of these windows once more, cut a little beside."""
        plan = self.with_windows(count, size, scale)
        again = [View(size, scale, near=len(self.views) + number, jitter=jitter) for number in range(count)]
        return replace(plan, views=(*plan.views, *again))

    def with_grid(self, rows: int, columns: int, size: int, scale: tuple[float, float] = (1.0, 1.0)) -> ViewPlan:
        """And a window in each cell of a grid, row by row; a scale below 1 leaves it room to move in its cell."""
        cells = [(column / columns, row / rows) for row in range(rows) for column in range(columns)]
        windows = [View(size, scale, (x, y, x + 1 / columns, y + 1 / rows)) for x, y in cells]
        return replace(self, views=(*self.views, *windows))


@dataclass
class Batch:
    """What a worker hands over: uint8 crops, and all that the device needs to finish the views."""

    crops: list[UInt8[Tensor, "batch 3 size size"]]  # one for each view of the plan
    boxes: list[Float[Tensor, "batch 4"]]  # where each crop lies in its image: x0 y0 x1 y1 as shares of width, height
    ids: Int64[Tensor, "batch"]
    epoch: int
    unreadable: list[tuple[int, str]] = field(default_factory=list)  # (id, reason) of images that had to be replaced
    augmented: bool = False  # all but noise and normalisation is done

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, so that copies to the GPU do not wait."""
        crops, boxes = [c.pin_memory() for c in self.crops], [b.pin_memory() for b in self.boxes]
        return replace(self, crops=crops, boxes=boxes, ids=self.ids.pin_memory())


@dataclass
class Views:
    """What a method sees: normalised float images on the training device."""

    images: list[Float[Tensor, "batch 3 size size"]]  # in the order of the plan: 0 is the query, 1 the key crop
    boxes: list[Float[Tensor, "batch 4"]]
    ids: Int64[Tensor, "batch"]
    flips: list[Bool[Tensor, "batch"]] = field(default_factory=list)  # where the plan asks for positions

    def positions(self, view: int, rows: int, columns: int) -> Float[Tensor, "batch cells 2"]:
        """Where in its image (x, y as shares of width and height) the centre of each cell of a view's map lies, row by
        row: what dense correspondence is told by."""
        box, flip = self.boxes[view], self.flips[view]
        x = (torch.arange(columns, device=box.device) + 0.5) / columns
        y = (torch.arange(rows, device=box.device) + 0.5) / rows
        x = torch.where(flip[:, None], 1 - x, x)  # [batch, columns]
        x = box[:, 0, None] + x * (box[:, 2] - box[:, 0])[:, None]
        y = box[:, 1, None] + y * (box[:, 3] - box[:, 1])[:, None]
        return torch.stack([x[:, None].expand(-1, rows, -1), y[:, :, None].expand(-1, -1, columns)], -1).flatten(1, 2)
