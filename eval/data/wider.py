"""WIDER Attribute (Li et al. 2016): people in scenes, 14 attributes each, a row for each person's box."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch

from mls.data.annotated import folder_with
from mls.data.listing import FileSource
from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.annotations import corners, parsing


def read(root: Path) -> DataSet:
    """`wider_attribute_trainval.json` and `wider_attribute_test.json`, in `root` or a folder in it, and the images
    they name under `Image`. Each has attribute_id_map and, for each image, file_name and targets: attribute (1 present,
    -1 absent, 0 unspecified) and bbox (x, y, width, height). As published results are, training is on train and val."""
    return DataSet("wider_attribute", _split(root, "trainval"), _split(root, "test"))


def _split(root: Path, split: str) -> LabelledImages:
    file = _annotations(root, f"wider_attribute_{split}.json")
    with parsing(file, "WIDER Attribute file"):
        content = json.loads(file.read_bytes())
        names = [name for _, name in sorted(content["attribute_id_map"].items(), key=lambda item: int(item[0]))]
        images = content["images"]
        paths = [os.fsencode(image["file_name"]) for image in images]
        people = [person for image in images for person in image["targets"]]
        truth = np.array([person["attribute"] for person in people], np.int8).reshape(len(people), len(names))
        boxes = corners([person["bbox"] for person in people])
        rows = np.repeat(np.arange(len(images)), [len(image["targets"]) for image in images])
        source = FileSource(f"wider_attribute:{split}", folder_with([root / "Image", root], paths, file), paths)
    return LabelledImages(
        source, torch.from_numpy(truth), names, torch.from_numpy(rows).long(), torch.from_numpy(boxes)
    )


def _annotations(root: Path, name: str) -> Path:
    """People unpack the annotations beside the images, or into a folder of one name or another."""
    return next(iter([*root.glob(name), *sorted(root.glob(f"*/{name}"))]), root / "wider_attribute_annotation" / name)


DOWNLOAD = (
    "unpack wider_attribute_annotation and the images (folder Image with train, val and test) "
    "of http://mmlab.ie.cuhk.edu.hk/projects/WIDERAttribute.html into one folder"
)
SIZES = {"classes": 14, "train": 28_345, "test": 29_179}  # boxes; published as 57,524 in all
register("wider_attribute", Layout(read, "wider_attribute", DOWNLOAD, SIZES))
