"""Oxford Flowers 102 (Nilsback & Zisserman 2008). torchvision's reader takes only files with the checksum of the whole
published data set, so that no part of it could be read: only its class names are used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import Flowers102

from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.annotations import parsing
from mls.eval.data.one_class import listed, load_mat, numbered


def read(folder: Path) -> DataSet:
    """`jpg/image_NNNNN.jpg`, `imagelabels.mat` (labels: the class of each image, from 1) and `setid.mat` (trnid, valid,
    tstid: the images of the three parts, from 1). As published results do, training is on train and val."""
    file, parts = folder / "imagelabels.mat", folder / "setid.mat"
    names = list(Flowers102.classes)
    labels = load_mat(file)
    with parsing(file, "list of classes"):
        labels = numbered(labels["labels"], len(names), file)
    sets = load_mat(parts)

    def split(phase: str, *variables: str) -> LabelledImages:
        with parsing(parts, "list of the three parts"):
            images = np.concatenate([np.ravel(sets[variable]) for variable in variables]).astype(np.int64)
            if not ((images >= 1) & (images <= len(labels))).all():
                raise ValueError(f"it goes beyond the {len(labels)} images of {file.name}")
        paths = [b"image_%05d.jpg" % image for image in images]
        truth = labels[torch.from_numpy(images - 1)]
        return listed(f"flowers {phase}", folder / "jpg", paths, truth, names, parts)

    return DataSet("flowers", split("train", "trnid", "valid"), split("test", "tstid"))


DOWNLOAD = (
    "download imagelabels.mat, setid.mat and 102flowers.tgz from www.robots.ox.ac.uk/~vgg/data/flowers/102 "
    "and unpack the archive beside them in $MLS_DATA/flowers-102"
)
register("flowers", Layout(read, "flowers-102", DOWNLOAD, {"classes": 102, "train": 2040, "test": 6149}))
