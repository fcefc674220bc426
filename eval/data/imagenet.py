"""ImageNet-1k (ILSVRC 2012). The published val images are the test. torchvision's reader would unpack 150 GB of
archives by itself when it is only asked what is there, so the folders are read here."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mls.data.listing import FileSource, list_images, printable, show
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.annotations import parsing
from mls.eval.data.class_folders import images_in, labelled
from mls.eval.data.one_class import by_folder, first_folders, lines, load_mat

VAL_NAME = re.compile(rb"ILSVRC2012_val_(\d{8})\.JPEG")


def read(root: Path) -> DataSet:
    """`train/WNID/...` and `val/WNID/...`; or `val/ILSVRC2012_val_NNNNNNNN.JPEG` as the archive unpacks, with
    `ILSVRC2012_devkit_t12/data`: line N of `ILSVRC2012_validation_ground_truth.txt` has the number under which
    `meta.mat` lists the class. Classes are sorted by their WordNet id, as everywhere."""
    paths = images_in(root / "train")
    classes = first_folders(paths)
    train = labelled("imagenet train", root / "train", paths, classes)
    val = root / "val"
    if any(val.glob("*.JPEG")):
        return DataSet("imagenet", train, _flat(val, root / "ILSVRC2012_devkit_t12" / "data", classes))
    return DataSet("imagenet", train, labelled("imagenet val", val, images_in(val), classes))


def _flat(val: Path, devkit: Path, classes: list[bytes]) -> LabelledImages:
    paths, names = list_images(val), [printable(one) for one in classes]
    file, meta = devkit / "ILSVRC2012_validation_ground_truth.txt", devkit / "meta.mat"
    synsets = load_mat(meta)
    with parsing(meta, "list of ImageNet's classes"):
        folders = {int(synset["ILSVRC2012_ID"]): synset["WNID"].encode() for synset in np.ravel(synsets["synsets"])}
    answers = [b"", *lines(file)]  # counted from 1
    with parsing(file, "list of ImageNet's answers"):
        shown = [folders[int(answers[_number(path, val)])] for path in paths]
    return LabelledImages(FileSource("imagenet val", val, paths), by_folder(shown, classes, file), names)


def _number(path: bytes, val: Path) -> int:
    found = VAL_NAME.fullmatch(path)
    if found is None:
        raise DataError(f"{printable(path)} in {show(val)} is not named like a val image: remove it")
    return int(found[1])


DOWNLOAD = (
    "download ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from image-net.org and "
    "unpack them into train/WNID, val and ILSVRC2012_devkit_t12 in $MLS_DATA/imagenet"
)
register("imagenet", Layout(read, "imagenet", DOWNLOAD, {"classes": 1000, "train": 1_281_167, "test": 50_000}))
