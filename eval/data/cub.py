"""CUB-200-2011: the 200 species of birds, and their 312 attributes as multi-labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int8
from torch import Tensor

from mls.data.listing import printable, show
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.formatted import is_formatted, listed_images, read_formatted
from mls.eval.data.one_class import listed, numbered

AGAIN = "unpack CUB_200_2011.tgz again"


def read_species(folder: Path) -> DataSet:
    """`images.txt`, `train_test_split.txt`, `classes.txt`, `image_class_labels.txt` and `images` as in the archive."""
    names, paths = _names(folder / "classes.txt"), _listed(folder / "images.txt")
    file = folder / "image_class_labels.txt"
    for_training = _for_training(folder / "train_test_split.txt", len(paths))
    truth = numbered(_listed(file, len(paths)), len(names), file)

    def split(phase: str, chosen: list[bool]) -> LabelledImages:
        rows = [path for path, take in zip(paths, chosen, strict=True) if take]
        named_by = folder / "images.txt"
        return listed(f"cub200 {phase}", folder / "images", rows, truth[torch.tensor(chosen)], names, named_by)

    return DataSet("cub200", split("train", for_training), split("test", [not take for take in for_training]))


def read_attributes(folder: Path) -> DataSet:
    """`images.txt`, `train_test_split.txt`, `attributes/image_attribute_labels.txt` and `images` as in the archive,
    which puts `attributes.txt` beside the folder. How sure an annotator was is not used."""
    places = [folder / "attributes" / "attributes.txt", folder / "attributes.txt", folder.parent / "attributes.txt"]
    names_file = next((place for place in places if place.is_file()), places[-1])
    if is_formatted(folder):
        names = _names(names_file) if names_file.is_file() else None
        return read_formatted("cub_attributes", folder, [folder / "images", folder / "CUB_200_2011" / "images"], names)
    names, paths = _names(names_file), _listed(folder / "images.txt")
    split_file = folder / "train_test_split.txt"
    for_training = _for_training(split_file, len(paths))
    truth = _truth(folder / "attributes" / "image_attribute_labels.txt", len(paths), len(names))

    def split(phase: str, chosen: list[bool]) -> LabelledImages:
        rows = [path for path, take in zip(paths, chosen, strict=True) if take]
        images = listed_images(f"cub_attributes {phase}", [folder / "images"], rows, split_file)
        return LabelledImages(images, truth[torch.tensor(chosen)], names)

    return DataSet("cub_attributes", split("train", for_training), split("test", [not take for take in for_training]))


def _names(file: Path) -> list[str]:
    return [printable(name) for name in _listed(file)]


def _for_training(file: Path, images: int) -> list[bool]:
    return [flag == b"1" for flag in _listed(file, images)]


def _listed(file: Path, images: int | None = None) -> list[bytes]:
    """What a file of CUB lists under the ids 1, 2, 3, ... up to the number of images, if these are the ids."""
    rows = [line.split(maxsplit=1) for line in file.read_bytes().strip().splitlines()]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or row[0] != b"%d" % number:
            raise DataError(f"line {number} of {show(file)} does not give something for the id {number}: {AGAIN}")
    if images is not None and len(rows) != images:
        raise DataError(f"{show(file)} is about {len(rows)} images where images.txt has {images}: {AGAIN}")
    return [value.strip() for _, value in rows]


def _truth(file: Path, images: int, attributes: int) -> Int8[Tensor, "images attributes"]:
    try:
        # Some lines of the real file have extra columns after the first five.
        with open(file) as lines:
            image, attribute, present = np.loadtxt(lines, np.int64, usecols=(0, 1, 2), ndmin=2).T
    except ValueError as error:
        raise DataError(f"{show(file)} cannot be read ({error}): {AGAIN}") from None
    known = (image >= 1) & (image <= images) & (attribute >= 1) & (attribute <= attributes)
    truth = np.zeros((images, attributes), np.int8)
    truth[image[known] - 1, attribute[known] - 1] = np.where(present[known] == 1, 1, -1)
    if not (known.all() and truth.all()):
        raise DataError(
            f"{show(file)} does not label just {attributes} attributes for each of {images} images: {AGAIN}"
        )
    return torch.from_numpy(truth)


DOWNLOAD = "download CUB_200_2011.tgz from data.caltech.edu/records/65de6-vp158 and unpack it into $MLS_DATA"
PARTS = {"train": 5994, "test": 5794}
register("cub200", Layout(read_species, "CUB_200_2011", DOWNLOAD, {"classes": 200, **PARTS}))
register("cub_attributes", Layout(read_attributes, "CUB_200_2011", DOWNLOAD, {"classes": 312, **PARTS}))
