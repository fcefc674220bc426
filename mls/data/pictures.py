"""Scenes for writing to disk: drawn a chunk at a time, saved as image files, their masks converted to polygons. The
published layouts are in layouts.py and voc_layout.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from mls.data.scenes import scene_chunks

QUALITY = 95  # of the JPEG files
VOID = 255  # the label of pixels without a class: neither learnt from nor counted


@dataclass
class Picture:
    """One scene and its visible objects."""

    image: UInt8[np.ndarray, "size size 3"]
    type: int
    classes: list[int]
    boxes: list[list[int]]
    masks: Bool[np.ndarray, "objects size size"]


@dataclass
class Export:
    """What to write and where. Scenes are drawn a chunk at a time, so that memory does not limit their number."""

    out: Path
    train: int = 500
    test: int = 200
    size: int = 128
    seed: int = 0
    progress: Callable[[int], None] = lambda done: None  # called with the number of images written so far
    done: int = 0

    def pictures(self, split: str) -> Iterator[Picture]:
        for scenes in scene_chunks(getattr(self, split), split, self.size, self.seed, masks=True):
            assert scenes.masks is not None
            for i in range(len(scenes)):
                visible = scenes.classes[i] >= 0
                yield Picture(
                    image=scenes.images[i].permute(1, 2, 0).numpy(),
                    type=int(scenes.types[i]),
                    classes=scenes.classes[i, visible].tolist(),
                    boxes=scenes.boxes[i, visible].tolist(),
                    masks=scenes.masks[i, visible].numpy(),
                )
                self.done += 1
                self.progress(self.done)


def save_photo(picture: Picture, path: Path) -> None:
    Image.fromarray(picture.image).save(with_folder(path), quality=QUALITY)  # PNG ignores it


def write_text(path: Path, text: str) -> None:
    with_folder(path).write_text(text, encoding="utf-8")


def with_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def polygons(mask: Bool[np.ndarray, "height width"]) -> list[list[int]]:
    """Polygons x y x y ... that cover exactly the mask's pixels. A polygon cannot have a hole, so each one is a
    stack of runs, one per row; a stack ends where a run splits, merges or ends.

    >>> polygons(np.ones((2, 3), dtype=bool))
    [[3, 0, 3, 2, 0, 2, 0, 0]]
    """
    edges = np.diff(np.pad(mask, ((0, 1), (1, 1))).astype(np.int8), axis=1)
    done: list[list[int]] = []
    growing: list[list[tuple[int, int, int]]] = []  # each a list of (row, start, end)
    for row, changes in enumerate(edges):
        runs = list(zip((changes > 0).nonzero()[0].tolist(), (changes < 0).nonzero()[0].tolist(), strict=True))
        below = [[run for run in runs if run[0] < stack[-1][2] and stack[-1][1] < run[1]] for stack in growing]
        shared = Counter(run for touching in below for run in touching)
        stacks = {run: [] for run in runs}
        for stack, touching in zip(growing, below, strict=True):
            if len(touching) == 1 and shared[touching[0]] == 1:
                stacks[touching[0]] = stack
            else:
                done.append(_outline(stack))
        for (start, end), stack in stacks.items():
            stack.append((row, start, end))
        growing = list(stacks.values())
    return done


def _outline(stack: list[tuple[int, int, int]]) -> list[int]:
    """The corners of a stack, down its right side and up its left."""
    right = [point for row, _, end in stack for point in ((end, row), (end, row + 1))]
    left = [point for row, start, _ in reversed(stack) for point in ((start, row + 1), (start, row))]
    ring = right + left
    corners = [p for i, p in enumerate(ring) if not ring[i - 1][0] == p[0] == ring[(i + 1) % len(ring)][0]]
    return [coordinate for corner in corners for coordinate in corner]
