"""Where images come from and how they become views. The three types every other file speaks of are defined here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64, UInt8
from torch import Tensor


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


@dataclass
class Batch:
    """What a worker hands over: uint8 crops, and all that the device needs to finish the views."""

    crops: list[UInt8[Tensor, "batch 3 size size"]]  # view 0 is the query, view 1 the key, the rest are small crops
    boxes: list[Float[Tensor, "batch 4"]]  # where each crop lies in its image: x0 y0 x1 y1 as shares of width, height
    ids: Int64[Tensor, "batch"]
    epoch: int
    unreadable: list[tuple[int, str]] = field(default_factory=list)  # (id, reason) of images that had to be replaced

    def pin_memory(self) -> Batch:
        """Called by the DataLoader, so that copies to the GPU do not wait."""
        crops, boxes = [c.pin_memory() for c in self.crops], [b.pin_memory() for b in self.boxes]
        return Batch(crops, boxes, self.ids.pin_memory(), self.epoch, self.unreadable)


@dataclass
class Views:
    """What a method sees: normalised float images on the training device."""

    images: list[Float[Tensor, "batch 3 size size"]]
    boxes: list[Float[Tensor, "batch 4"]]
    ids: Int64[Tensor, "batch"]
