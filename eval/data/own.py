"""The user's own images: what their readers (own_objects.py, own_masks.py, table.py) share. Which images are for
training and which for the test, which can be read, and sentences that never ask to download anything."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mls.data.listing import FileSource, printable, show
from mls.data.unreadable import readable
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages
from mls.eval.data.one_class import every_image

PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
HELD_OUT = 5  # without parts of its own every fifth image is held out for the test


def split(paths: Sequence[bytes]) -> dict[str, list[int]]:
    """The images of the two parts: the test has those whose path has the lowest SHA-1. So the parts are the same
    everywhere, and an image that is added moves few others from one part to the other.

    >>> split([b"%d.jpg" % i for i in range(10)])
    {'train': [0, 1, 3, 4, 6, 7, 8, 9], 'test': [2, 5]}
    """
    if len(paths) < 2:
        raise DataError(f"{len(paths)} images cannot be split into training and test: give two or more")
    ranked = sorted(range(len(paths)), key=lambda row: hashlib.sha1(paths[row]).digest())
    chosen = set(ranked[: max(1, round(len(paths) / HELD_OUT))])
    return {
        "train": [row for row in range(len(paths)) if row not in chosen],
        "test": [row for row in range(len(paths)) if row in chosen],
    }


def part_of(name: str) -> str | None:
    """The part that a file or folder is called after.

    >>> part_of("annotations/instances_train2017.json"), part_of("valid/_annotations.coco.json"), part_of("data.json")
    ('train', 'val', None)
    """
    words = set(re.findall("[a-z]+", name.lower()))
    return next((part for part, known in PARTS.items() if words & set(known)), None)


def all_readable(data: DataSet[Any], most: float) -> DataSet[Any]:
    """Without images that cannot be read, which are named; more than this share of them are an error."""

    def of(images: Any) -> Any:
        if images is None:
            return None
        numbers = images.numbers() if isinstance(images, LabelledImages) else range(len(images))
        rows = readable(images.images, numbers, most, "data.max_unreadable")
        return images if len(rows) == len(images) else images.part(torch.tensor(rows))

    return replace(data, train=of(data.train), test=of(data.test), val=of(data.val))


def listed(name: str, root: Path, paths: Sequence[bytes], named_by: Path) -> FileSource:
    """The images that a file names, each once, all there and all below `root`."""
    outside = next((path for path in paths if leaves(os.fsdecode(path))), None)
    if outside is not None:
        raise DataError(
            f"{show(named_by)} names {printable(outside)}, which leaves {show(root)}: write paths below that folder"
        )
    return every_image(name, root, paths, named_by, own=True)


def leaves(path: str) -> bool:
    """Whether a path leads out of the folder that it is relative to."""
    return os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == os.pardir


def data_set(name: str, parts: dict[str, Any], root: Path) -> DataSet[Any]:
    """Of the parts that are there. A val without a test is the test; what is tested on must not be learnt from."""
    train, val, test = parts["train"], parts.get("val"), parts.get("test")
    if test is None:
        val, test = None, val
    learnt = {train.images.path(row) for row in range(len(train))}
    for part, images in {"val": val, "test": test}.items():
        twice = [] if images is None else [row for row in range(len(images)) if images.images.path(row) in learnt]
        if images is not None and twice:
            raise DataError(
                f"{len(twice)} of the {len(images)} images of {show(root)} for the {part} are training images, too "
                f"(first: {images.describe(twice[0])}): name others, or none, and a fifth is held out"
            )
    return DataSet(name, train, test, val)
