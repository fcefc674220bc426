"""What readers of data sets with one class an image share: published lists become images and class numbers, checked.
Lists with many labels an image are read in their own files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from mls.data.listing import FileSource, printable, show
from mls.errors import DataError
from mls.eval.data import LabelledImages
from mls.eval.data.annotations import parsing
from mls.eval.data.formatted import listed_images


def listed(
    name: str,
    folder: Path,
    paths: Sequence[bytes],
    truth: Int64[Tensor, "images"],
    class_names: Sequence[str],
    named_by: Path,
) -> LabelledImages:
    """The images that a published list names, each once, all there."""
    return LabelledImages(every_image(name, folder, paths, named_by), truth, class_names)


def every_image(name: str, folder: Path, paths: Sequence[bytes], named_by: Path, own: bool = False) -> FileSource:
    """Listed images of which none is named twice and none is missing. Each folder is listed once: asking for every file
    by itself takes minutes on a shared disk. `own`: the user's, who can correct them and not download them again."""
    if own and not paths:
        raise DataError(f"{show(named_by)} lists no images: add some")
    source = FileSource(name, folder, paths) if own else listed_images(name, [folder], paths, named_by)
    path, times = Counter(paths).most_common(1)[0]
    if times > 1:
        fix = "name it once" if own else "download it again"
        raise DataError(f"{show(named_by)} names {printable(path)} {times} times: {fix}")
    parts = [path.rpartition(b"/") for path in paths]
    found = {parent: _names_in(os.path.join(os.fsencode(folder), parent)) for parent in {part[0] for part in parts}}
    missing = [path for path, (parent, _, file) in zip(paths, parts, strict=True) if file not in found[parent]]
    if missing:
        fix = "put them there, or correct their names" if own else "unpack the images again"
        raise DataError(
            f"{len(missing)} of the {len(paths)} images that {show(named_by)} names are not in {show(folder)} "
            f"(first: {printable(missing[0])}): {fix}"
        )
    return source


def _names_in(folder: bytes) -> set[bytes]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def numbered(labels: Sequence[Any], classes: int, file: Path, first: int = 1) -> Int64[Tensor, "images"]:
    """The labels of a file in which classes count from `first`, as class numbers from 0.

    >>> numbered([b"1", b"3"], 3, Path("labels.txt"))
    tensor([0, 2])
    """
    with parsing(file, "list of classes"):
        numbers = np.array([int(label) for label in labels], np.int64)
    wrong = np.flatnonzero((numbers < first) | (numbers >= first + classes))
    if len(wrong):
        raise DataError(
            f"{show(file)} gives its image {wrong[0] + 1} the class {numbers[wrong[0]]} where classes go from {first} "
            f"to {first + classes - 1}: download it again"
        )
    return torch.from_numpy(numbers - first)


def by_folder(paths: Sequence[bytes], classes: Sequence[bytes], named_by: Path) -> Int64[Tensor, "images"]:
    """Of paths CLASS/FILE, the numbers of the classes.

    >>> by_folder([b"cat/1.jpg", b"ant/1.jpg"], [b"ant", b"cat"], Path("list.txt"))
    tensor([1, 0])
    """
    number = {name: place for place, name in enumerate(classes)}
    found = [number.get(path.partition(b"/")[0], -1) for path in paths]
    if -1 in found:
        raise DataError(
            f"{show(named_by)} has {printable(paths[found.index(-1)])}, which is in none of the {len(classes)} class "
            "folders of the training images: correct or remove it"
        )
    return torch.tensor(found, dtype=torch.int64)


def first_folders(paths: Sequence[bytes]) -> list[bytes]:
    """The first folders of the paths, sorted.

    >>> first_folders([b"cat/1.jpg", b"ant/1.jpg", b"cat/2.jpg"])
    [b'ant', b'cat']
    """
    return sorted({path.partition(b"/")[0] for path in paths})


def lines(file: Path) -> list[bytes]:
    """The lines of a text file that are not empty."""
    return [line.strip() for line in file.read_bytes().splitlines() if line.strip()]


def load_mat(file: Path) -> dict[str, Any]:
    """The variables of a MATLAB file, without dimensions of size one."""
    from scipy.io import loadmat

    with open(file, "rb") as opened:
        try:
            return loadmat(opened, squeeze_me=True)
        except Exception as error:  # there is no end to what it raises at broken files
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{show(file)} is not a whole MATLAB file ({reason}): download it again") from None
