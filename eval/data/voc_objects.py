"""VOC as detection uses it: trained on trainval of 2007 and 2012, tested on test of 2007 (07+12)."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import torch

from mls.data.annotated import VOC_CLASSES
from mls.data.listing import show
from mls.errors import DataError
from mls.eval.data import DataSet, Layout, register
from mls.eval.data.objects import ObjectImages, Objects, gather
from mls.eval.data.one_class import every_image
from mls.progress import counting

CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read(folder: Path) -> DataSet[ObjectImages]:
    """`VOC2007` and `VOC2012` below the folder or its VOCdevkit, each with Annotations, ImageSets/Main, JPEGImages."""
    root = devkit(folder)
    train = _split(root, [("VOC2007", "trainval"), ("VOC2012", "trainval")])
    return DataSet("voc0712", train, _split(root, [("VOC2007", "test")]))


def devkit(folder: Path) -> Path:
    """The folder of the years: this one, or its VOCdevkit."""
    return folder / "VOCdevkit" if (folder / "VOCdevkit").is_dir() else folder


def _split(root: Path, parts: list[tuple[str, str]]) -> ObjectImages:
    files = [root / year / "ImageSets" / "Main" / f"{phase}.txt" for year, phase in parts]
    stems = [
        (year, line.split()[0])
        for (year, _), file in zip(parts, files, strict=True)
        for line in file.read_text().splitlines()
        if line.strip()
    ]
    many, sizes = [], []
    with counting(f"annotations of {parts[-1][1]}", len(stems)) as progress:
        for number, (year, stem) in enumerate(stems, start=1):
            objects, size = annotation(root / year / "Annotations" / f"{stem}.xml")
            many.append(objects)
            sizes.append(size)
            progress(number)
    paths = [os.fsencode(f"{year}/JPEGImages/{stem}.jpg") for year, stem in stems]
    source = every_image(f"voc0712 {parts[-1][1]}", root, paths, files[0])
    return ObjectImages(source, torch.tensor(sizes), *gather(many), list(VOC_CLASSES), "voc07")


def annotation(file: Path) -> tuple[Objects, tuple[int, int]]:
    """VOC counts pixels from 1, ends included."""
    try:
        root = ElementTree.parse(file).getroot()
        found = list(root.iter("object"))
        number = lambda parent, tag: int(float(parent.findtext(tag, "")))
        corners = [[number(one.find("bndbox"), corner) for corner in CORNERS] for one in found]
        boxes = torch.tensor(corners, dtype=torch.float32).view(-1, 4) - torch.tensor([1.0, 1.0, 0.0, 0.0])
        classes = torch.tensor([VOC_CLASSES.index(one.findtext("name", "")) for one in found], dtype=torch.int64)
        difficult = torch.tensor([one.findtext("difficult") == "1" for one in found], dtype=torch.bool)
        size = root.find("size")
        height, width = number(size, "height"), number(size, "width")
    except (ElementTree.ParseError, ValueError, AttributeError) as error:
        raise DataError(f"{show(file)} is not a VOC annotation ({error}): unpack the VOC archives again") from None
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Objects(boxes, classes, areas, torch.zeros_like(difficult), difficult), (height, width)


register(
    "voc0712",
    Layout(
        read,
        "VOCdevkit",
        "download VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar and VOCtrainval_11-May-2012.tar from "
        "host.robots.ox.ac.uk/pascal/VOC and unpack their VOCdevkit into $MLS_DATA",
        {"classes": 20, "train": 16551, "test": 4952},
    ),
)
