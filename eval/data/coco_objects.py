"""COCO 2017 as detection uses it: instances with boxes and masks, crowds included. COCO 2014 for weak labels is in
voc_coco.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mls.data.listing import show
from mls.errors import DataError
from mls.eval.data import DataSet, Layout, register
from mls.eval.data.annotations import parsing
from mls.eval.data.objects import ObjectImages, Objects, RunLengths
from mls.eval.data.one_class import every_image
from mls.progress import counting


def read(folder: Path) -> DataSet[ObjectImages]:
    """`annotations/instances_{train,val}2017.json`, `train2017`, `val2017`; images sorted by id, classes too."""
    train, test = _split(folder, "train2017"), _split(folder, "val2017")
    if train.class_names != test.class_names:
        raise DataError(f"the two instances files in {show(folder)} have different categories: download them again")
    return DataSet("coco2017", train, test)


def _split(folder: Path, phase: str) -> ObjectImages:
    file = folder / "annotations" / f"instances_{phase}.json"
    with parsing(file, "COCO instances file"):
        content = json.loads(file.read_bytes())
        names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        images = sorted(content["images"], key=lambda image: image["id"])
        row = {image["id"]: i for i, image in enumerate(images)}
        column = {category: j for j, category in enumerate(sorted(names))}
        # A box without area teaches nothing: detectron2 leaves it out as well.
        found = [a for a in content["annotations"] if a["image_id"] in row and min(a["bbox"][2:]) > 0]
        found.sort(key=lambda one: row[one["image_id"]])
        rows = np.array([row[one["image_id"]] for one in found], np.int64)
        sizes = torch.tensor([[image["height"], image["width"]] for image in images])
        boxes = torch.tensor([one["bbox"] for one in found], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        everything = Objects(
            boxes,
            torch.tensor([column[one["category_id"]] for one in found], dtype=torch.int64),
            torch.tensor([float(one["area"]) for one in found]),
            torch.tensor([bool(one.get("iscrowd", 0)) for one in found]),
            torch.zeros(len(found), dtype=torch.bool),
            _outlines(found, [tuple(sizes[i].tolist()) for i in rows], file),
        )
        paths = [os.fsencode(f"{phase}/{image['file_name']}") for image in images]
    starts = torch.from_numpy(np.searchsorted(rows, np.arange(len(images) + 1)))
    source = every_image(f"coco2017 {phase}", folder, paths, file)
    return ObjectImages(source, sizes, everything, starts, [names[category] for category in sorted(names)])


def _outlines(found: list[dict[str, Any]], sizes: list[tuple[int, int]], file: Path) -> list[RunLengths]:
    """As run lengths: a hundred bytes each, where the polygons as Python numbers would take a gigabyte."""
    from faster_coco_eval import mask

    outlines = []
    with counting(f"masks of {file.name}", len(found)) as progress:
        for one, (height, width) in zip(found, sizes, strict=True):
            shape = one["segmentation"]
            if isinstance(shape, dict) and isinstance(shape["counts"], list):
                shape = mask.frPyObjects(shape, height, width)
            elif isinstance(shape, list):
                shape = mask.merge(cast(list[Any], mask.frPyObjects(shape, height, width)))
            outlines.append(shape)
            progress(len(outlines))
    return outlines


register(
    "coco2017",
    Layout(
        read,
        "coco2017",
        "download train2017.zip, val2017.zip and annotations_trainval2017.zip from cocodataset.org and unpack them "
        "into $MLS_DATA/coco2017",
        {"classes": 80, "train": 118287, "test": 5000},
    ),
)
