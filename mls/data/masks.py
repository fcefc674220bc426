"""Masks on disk: a PNG for each image whose pixels are numbers of classes, and the list of the classes beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mls import yaml_files
from mls.data.listing import printable, show
from mls.data.pictures import VOID
from mls.errors import DataError, reason

LISTS = ("classes.yaml", "classes.yml", "classes.txt")
FOLDERS = ("masks", "labels", "annotations")
CAMVID = [*"sky building pole road pavement tree sign fence car pedestrian bicyclist".split()]


@dataclass(frozen=True)
class IndexedFiles:
    """Palette or grey PNGs: the numbers that are in them. `first`: the number of the first class; a smaller one is
    void, and those above move down. `void`: other numbers that are void. `values`: the number of each class, or
    its several numbers, where they do not follow on `first`. `grey`: pictures of any kind are read as grey."""

    paths: list[Path]
    classes: int
    first: int = 0
    void: int | tuple[int, ...] = VOID
    values: tuple[int, ...] | tuple[tuple[int, ...], ...] = ()
    fix: str = "convert or unpack the annotations again"
    grey: bool = False

    @cached_property
    def table(self) -> NDArray[np.int16]:
        """The class of each number; -1: unknown."""
        table = np.full(1 << 16, -1, np.int16)
        table[: self.first] = VOID
        if not self.values:
            table[self.first : self.first + self.classes] = np.arange(self.classes)
        for number, values in enumerate(self.values):
            table[values if isinstance(values, int) else list(values)] = number
        table[[self.void] if isinstance(self.void, int) else list(self.void)] = VOID
        return table

    def __call__(self, row: int) -> UInt8[Tensor, "height width"]:
        file = show(self.paths[row])
        try:
            with Image.open(self.paths[row]) as image:
                image = image.convert("L") if self.grey else image
                numbers = np.array(image, np.uint8 if image.mode == "1" else None)
        except Exception as error:  # Pillow has its own kinds for a damaged file
            raise DataError(f"{file} cannot be read ({reason(error)}): {self.fix}") from None
        if numbers.dtype not in (np.uint8, np.uint16) or numbers.ndim != 2:
            kind = f"{list(numbers.shape)} of {numbers.dtype}"
            raise DataError(f"{file} holds no class numbers ({kind}): {self.fix}")
        labels = self.table[numbers]
        unknown = numbers[labels < 0]
        if len(unknown):
            known = f"go from {self.first} to {self.first + self.classes - 1}"
            known = f"are {', '.join(map(str, self.values))}"[:200] if self.values else known
            raise DataError(
                f"{file} has {len(unknown)} pixels of unknown classes, such as {unknown[0]}; they {known}: {self.fix}"
            )
        return torch.from_numpy(labels.astype(np.uint8))


def classes_of(root: Path) -> tuple[dict[int, str], tuple[int, ...]]:
    """The number and name of each class, by number, and the numbers of no class."""
    file = next((root / name for name in LISTS if (root / name).is_file()), None)
    if file is None:
        raise DataError(
            f"{show(root)} has no list of classes: write {LISTS[0]}, with `names: [road, tree]` and `void: 255`"
        )
    if file.suffix == ".txt":
        lines = [printable(line.strip()) for line in file.read_bytes().splitlines()]
        content: Any = {"names": [line for line in lines if line]}
    else:
        content = yaml_files.read(file, numbered=True)[0]
    numbered = numbered_names(content, file, ", and `void: 255`, a number or several")
    void = content.get("void", VOID)
    voids = void if isinstance(void, list) else [void]
    if not all(type(number) is int and 0 <= number < 1 << 16 for number in voids):
        raise DataError(f"{show(file)} says void: {void}: write `void: 255`, a number or a list of numbers")
    numbered = {number: name for number, name in numbered.items() if number not in voids}
    if len(numbered) > VOID:
        raise DataError(f"{show(file)} has {len(numbered)} classes: at most {VOID} are read, so join some")
    return numbered, tuple(voids)


def numbered_names(content: Any, file: Path, more: str = "") -> dict[int, str]:
    """The number of each class in the labels, and its name, by number, as `names` in a YAML file says."""
    names = content.get("names") if isinstance(content, Mapping) else None
    numbered = dict(enumerate(names)) if isinstance(names, list) else names
    whole = isinstance(numbered, Mapping) and all(type(number) is int and 0 <= number < 1 << 16 for number in numbered)
    if not whole or not numbered:
        raise DataError(
            f"{show(file)} has no names of classes: write `names: [cat, dog]` in the order of their numbers, or "
            f"`names: {{7: cat, 8: dog}}`{more}"
        )
    return {number: str(name) for number, name in sorted(numbered.items())}


def masks_beside(folder: Path, paths: Sequence[Path]) -> IndexedFiles:
    """Of images in a folder: ROOT/masks/… beside ROOT/images/…, with the list of the classes in ROOT; or of CamVid as
    SegNet has it `trainannot` beside `train`."""
    annotated = folder.with_name(f"{folder.name}annot")
    if annotated.is_dir():
        return IndexedFiles([annotated / path.with_suffix(".png") for path in paths], len(CAMVID), void=len(CAMVID))
    root = next((parent.parent for parent in (folder, *folder.parents) if parent.name == "images"), None)
    masks = root and next((root / name for name in FOLDERS if (root / name).is_dir()), None)
    if root is None or masks is None:
        raise DataError(
            f"{show(folder)} has no masks beside it: they are looked for in ROOT/masks, with a list of the classes in "
            f"ROOT/{LISTS[0]}, for images in ROOT/images"
        )
    names, void = classes_of(root)
    files = [masks / folder.relative_to(root / "images") / path.with_suffix(".png") for path in paths]
    return IndexedFiles(files, len(names), void=void, values=tuple(names), fix="correct it, or the list of classes")
