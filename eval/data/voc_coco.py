"""VOC 2012 and COCO 2014 as the papers on weak multi-labels use them (the official train images, tested on the official
val images), and VOC 2007 as classification does. Pretraining reads these layouts with mls/data/annotated.py."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from mls.data.annotated import VOC_CLASSES, CocoSource
from mls.data.listing import FileSource, show
from mls.data.truth import Odd, by_id
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, Layout, Located, presence, register
from mls.eval.data.annotations import parsing
from mls.eval.data.formatted import is_formatted, listed_images, read_formatted
from mls.eval.data.one_class import every_image
from mls.eval.data.voc_objects import annotation

AGAIN = "unpack the VOC archives again"


def read_voc2012(folder: Path) -> DataSet:
    """`ImageSets/Main/{class}_{train,val}.txt` and `JPEGImages`, in VOC2012 or in the VOCdevkit around it. Images are
    sorted by name. A class of which an image has difficult objects only (label 0) counts as absent."""
    year = folder / "VOC2012" if (folder / "VOC2012").is_dir() else folder
    if is_formatted(folder):
        images = [year / "JPEGImages", folder / "VOCdevkit" / "VOC2012" / "JPEGImages"]
        return read_formatted("voc2012", folder, images, VOC_CLASSES)
    train, test = (_voc_split("voc2012", year, phase) for phase in ("train", "val"))
    return DataSet("voc2012", replace(train, truth=presence(train.truth)), replace(test, truth=presence(test.truth)))


def read_voc2007(folder: Path) -> DataSet:
    """`ImageSets/Main/{class}_{trainval,test}.txt` and `JPEGImages`, in VOC2007 or in the VOCdevkit around it. A class
    of which an image has difficult objects only (label 0) is not annotated: as in the devkit, metrics leave it out."""
    year = folder / "VOC2007" if (folder / "VOC2007").is_dir() else folder
    return DataSet("voc07", _voc_split("voc07", year, "trainval"), _voc_split("voc07", year, "test"))


def _voc_split(name: str, year: Path, phase: str) -> LabelledImages:
    """Images sorted by name, with the labels 1, 0 and -1 of the lists."""
    files = [year / "ImageSets" / "Main" / f"{one}_{phase}.txt" for one in VOC_CLASSES]
    lists = [_class_list(file) for file in files]
    stems = sorted(lists[0])
    for file, present in zip(files, lists, strict=True):
        if present.keys() != lists[0].keys():
            raise DataError(f"{show(file)} lists other images than {show(files[0])}: {AGAIN}")
    paths = [stem + b".jpg" for stem in stems]
    truth = torch.tensor([[present[stem] for present in lists] for stem in stems], dtype=torch.int8)
    return LabelledImages(every_image(f"{name} {phase}", year / "JPEGImages", paths, files[0]), truth, VOC_CLASSES)


def _class_list(file: Path) -> dict[bytes, int]:
    rows = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
    if any(len(row) != 2 or row[1] not in (b"1", b"0", b"-1") for row in rows):
        raise DataError(f"{show(file)} has a line that is not an image name and 1, 0 or -1: {AGAIN}")
    labels = {stem: int(label) for stem, label in rows}
    if len(labels) != len(rows):
        raise DataError(f"{show(file)} names an image twice: {AGAIN}")
    return labels


def read_coco2014(folder: Path) -> DataSet:
    """`annotations/instances_{train,val}2014.json`, `train2014`, `val2014`. Only images with an annotation count. They
    are sorted by id *as text*, as the papers' code does: labels that are drawn row by row depend on the order."""
    if is_formatted(folder):
        return read_formatted("coco2014", folder, [folder])
    train, test = _coco_split(folder, "train"), _coco_split(folder, "val")
    if train.class_names != test.class_names:
        raise DataError(f"the two instances files in {show(folder)} have different categories: download them again")
    return DataSet("coco2014", train, test)


def _coco_split(folder: Path, phase: str) -> LabelledImages:
    file = folder / "annotations" / f"instances_{phase}2014.json"
    with parsing(file, "COCO instances file"):
        content = json.loads(file.read_bytes())
        names = {key: str(entry["name"]) for key, entry in by_id(content["categories"], file).items()}
        files = {key: entry["file_name"] for key, entry in by_id(content["images"], file).items()}
        pairs = [(entry["image_id"], entry["category_id"]) for entry in content["annotations"]]
        ids = sorted({image for image, _ in pairs}, key=str)
        row = {image: i for i, image in enumerate(ids)}
        column = {category: j for j, category in enumerate(sorted(names))}
        places = np.array([(row[image], column[category]) for image, category in pairs], np.int64).reshape(-1, 2)
        paths = [os.fsencode(f"{phase}2014/{files[image]}") for image in ids]
    truth = torch.full((len(ids), len(names)), -1, dtype=torch.int8)
    truth[tuple(torch.from_numpy(places).T)] = 1
    images = listed_images(f"coco2014 {phase}", [folder], paths, file)
    return LabelledImages(images, truth, [names[category] for category in sorted(names)])


def _paths(images: LabelledImages) -> list[Path]:
    source = images.images
    assert isinstance(source, FileSource)
    return [Path(os.fsdecode(source.path(number))) for number in images.numbers()]


def _voc_boxes(_: Path, images: LabelledImages) -> list[Located]:
    """From `Annotations`, beside JPEGImages; difficult objects too."""
    found = []
    for path in _paths(images):
        odd = Odd(path.parents[1] / "Annotations" / f"{path.stem}.xml")
        objects, size = annotation(odd.file, odd)
        if len(odd) or size is None:
            raise DataError(f"{odd}: {AGAIN}")
        height, width = size
        found.append((objects.boxes / torch.tensor([width, height, width, height]), objects.classes))
    return found


def _coco_boxes(folder: Path, images: LabelledImages) -> list[Located]:
    """From the instances file of the images' folder; crowds too."""
    paths = _paths(images)
    phase = paths[0].parent.name
    source = CocoSource([folder / phase, folder], folder / "annotations" / f"instances_{phase}.json")
    numbers = {os.path.basename(os.fsdecode(source.path(number))): number for number in range(len(source))}
    return [source.boxes(numbers[path.name]) for path in paths]


register(
    "voc2012",
    Layout(
        read_voc2012,
        "VOCdevkit",
        "download VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC/voc2012 and unpack its "
        "VOCdevkit into $MLS_DATA",
        {"classes": 20, "train": 5717, "test": 5823},
        _voc_boxes,
    ),
)
register(
    "voc07",
    Layout(
        read_voc2007,
        "VOCdevkit",
        "download VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar from "
        "host.robots.ox.ac.uk/pascal/VOC/voc2007 and unpack their VOCdevkit into $MLS_DATA",
        {"classes": 20, "train": 5011, "test": 4952},
        _voc_boxes,
    ),
)
register(
    "coco2014",
    Layout(
        read_coco2014,
        "coco2014",
        "download train2014.zip, val2014.zip and annotations_trainval2014.zip from cocodataset.org and unpack them "
        "into $MLS_DATA/coco2014",
        {"classes": 80, "train": 82081, "test": 40137},
        _coco_boxes,
    ),
)
