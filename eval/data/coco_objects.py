"""COCO 2017 as detection uses it: instances with boxes and masks, crowds included. COCO 2014 for weak labels is in
voc_coco.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mls.data.listing import FileSource, show
from mls.data.truth import CocoTruth, coco_truth, entry_name, odd_outline, size_of
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
        truth = coco_truth(json.loads(file.read_bytes()), file)
        images = sorted(truth.images.values(), key=lambda image: image["id"])
        paths = [os.fsencode(f"{phase}/{image['file_name']}") for image in images]
        return objects_of(truth, images, every_image(f"coco2017 {phase}", folder, paths, file))


def objects_of(truth: CocoTruth, images: list[dict[str, Any]], source: FileSource) -> ObjectImages:
    """Some images of an instances file with their objects."""
    row = {image["id"]: i for i, image in enumerate(images)}
    column = {category: j for j, category in enumerate(sorted(truth.names))}
    sizes = torch.tensor([[int(image["height"]), int(image["width"])] for image in images]).view(-1, 2)
    mine = [one for one in truth.objects if one["image_id"] in row]
    found, outlines = _with_outlines(sorted(mine, key=lambda one: row[one["image_id"]]), truth)
    rows = np.array([row[one["image_id"]] for one in found], np.int64)
    boxes = torch.tensor([one["bbox"] for one in found], dtype=torch.float32).view(-1, 4)
    areas = [float(one.get("area", one["bbox"][2] * one["bbox"][3])) for one in found]
    boxes[:, 2:] += boxes[:, :2]
    everything = Objects(
        boxes,
        torch.tensor([column[one["category_id"]] for one in found], dtype=torch.int64),
        torch.tensor(areas, dtype=torch.float32),
        torch.tensor([bool(one.get("iscrowd", 0)) for one in found], dtype=torch.bool),
        torch.zeros(len(found), dtype=torch.bool),
        outlines,
    )
    starts = torch.from_numpy(np.searchsorted(rows, np.arange(len(images) + 1)))
    source.odd = truth.odd
    return ObjectImages(source, sizes, everything, starts, [truth.names[category] for category in column])


def _with_outlines(
    found: list[dict[str, Any]], truth: CocoTruth
) -> tuple[list[dict[str, Any]], list[RunLengths] | None]:
    """The objects whose masks can be read, and the masks as run lengths: a hundred bytes each, where the polygons as
    Python numbers would take a gigabyte. None where the file has boxes alone (some tools
    write an empty segmentation beside them)."""
    if not any(one.get("segmentation") for one in found):
        return found, None
    whole, outlines, file = [], [], truth.odd.file
    with counting(f"masks of {file.name}", len(found)) as progress:
        for number, one in enumerate(found, start=1):
            width, height = size_of(truth.images[one["image_id"]]) or (0, 0)
            if wrong := odd_outline(one.get("segmentation"), height, width):
                truth.odd.note("broken mask", entry_name(one, truth.images), wrong)
            else:
                whole.append(one)
                outlines.append(run_lengths_of(one["segmentation"], height, width))
            progress(number)
    truth.odd.refuse_most()
    return whole, outlines


def run_lengths_of(shape: dict[str, Any] | list[Any], height: int, width: int) -> RunLengths:
    from faster_coco_eval import mask

    if isinstance(shape, list):
        # A polygon of two points has no area: detectron2 leaves it out as well.
        polygons = [polygon for polygon in shape if len(polygon) >= 6]
        return mask.merge(cast(list[Any], mask.frPyObjects(polygons, height, width)))
    return cast(RunLengths, mask.frPyObjects(shape, height, width)) if isinstance(shape["counts"], list) else shape


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
