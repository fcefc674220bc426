"""The .npy files in which the code of the papers on single positive labels (https://arxiv.org/abs/2106.09708) keeps a
data set, and what all readers of image lists share. The data sets that may lie so: voc_coco.py, nus.py, cub.py."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mls.data.annotated import folder_with
from mls.data.listing import FileSource, show
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, presence


def is_formatted(folder: Path) -> bool:
    return (folder / "formatted_train_images.npy").is_file()


def read_formatted(
    name: str, folder: Path, image_folders: Sequence[Path], class_names: Sequence[str] | None = None
) -> DataSet:
    """`formatted_{train,val}_images.npy`: paths below the first of `image_folders` that has them;
    `formatted_{train,val}_labels.npy`: 0 or 1 for each image and class; `formatted_{train,val}_labels_obs.npy`, if it
    is there: the labels a training may see, +1 present, -1 absent, 0 unknown. The papers test on the official val
    images, so `val` is the test set here. Classes have no names in these files: those not given are numbers.
    """
    names = class_names or _category_list(folder)
    return DataSet(name, *(_split(name, folder, phase, image_folders, names) for phase in ("train", "val")))


def listed_images(name: str, folders: Sequence[Path], paths: Sequence[bytes], named_by: Path) -> FileSource:
    """The images of a published list, below the first of the folders that has them."""
    if not paths:
        raise DataError(f"{show(named_by)} lists no images: download it again")
    return FileSource(name, folder_with(folders, paths, named_by), paths)


def _split(
    name: str, folder: Path, phase: str, image_folders: Sequence[Path], class_names: Sequence[str] | None
) -> LabelledImages:
    file = lambda what: folder / f"formatted_{phase}_{what}.npy"
    images = _load(file("images"))
    if images.ndim != 1 or images.dtype.kind not in "US":
        raise DataError(f"{show(file('images'))} holds no list of paths: it must be a one-dimensional array of text")
    labels = _labels(file("labels"), len(images), (0, 1))
    classes = labels.shape[1]
    if class_names is not None and len(class_names) != classes:
        raise DataError(f"{show(file('labels'))} has {classes} classes where {name} has {len(class_names)}: correct it")
    observed = None
    if file("labels_obs").is_file():
        observed = torch.from_numpy(_labels(file("labels_obs"), len(images), (-1, 0, 1)))
        if observed.shape[1] != classes:
            raise DataError(f"{show(file('labels_obs'))} has other classes than {show(file('labels'))}: make it again")
    return LabelledImages(
        listed_images(
            f"{name} {phase}", image_folders, [os.fsencode(path) for path in images.tolist()], file("images")
        ),
        presence(torch.from_numpy(labels)),
        class_names or [str(number) for number in range(classes)],
        observed=observed,
    )


def _labels(file: Path, images: int, values: tuple[int, ...]) -> np.ndarray:
    labels = _load(file)
    if labels.ndim != 2 or len(labels) != images:
        raise DataError(f"{show(file)} has shape {labels.shape} for {images} images: it needs one row for each of them")
    if labels.dtype.kind not in "biuf" or not np.isin(labels, values).all():
        raise DataError(f"{show(file)} holds other labels than {', '.join(map(str, values))}: make it again")
    return labels.astype(np.int8)


def _load(file: Path) -> np.ndarray:
    try:
        with open(file, "rb") as opened:
            return np.lib.format.read_array(opened, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(
            f"{show(file)} is missing: put it beside formatted_train_images.npy, or remove that one to read the "
            "published annotations"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{show(file)} cannot be read ({error}): save it again as plain numbers or text, because pickled objects "
            "could run code"
        ) from None


def _category_list(folder: Path) -> list[str] | None:
    """Beside its COCO files the papers' code writes formatted_metadata.json, with the names of the classes."""
    file = folder / "formatted_metadata.json"
    if not file.is_file():
        return None
    try:
        return [str(name) for name in json.loads(file.read_bytes())["category_list"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{show(file)} has no readable category_list ({error}): remove or repair it") from None
