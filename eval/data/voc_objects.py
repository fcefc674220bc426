"""VOC as detection uses it: trained on trainval of 2007 and 2012, tested on test of 2007 (07+12)."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch

from mls.data.annotated import VOC_CLASSES
from mls.data.listing import show
from mls.data.truth import LARGEST, Odd, odd_boxes, size_of
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
    many, sizes, paths, odd = [], [], [], Odd(root)
    with counting(f"annotations of {parts[-1][1]}", len(stems)) as progress:
        for number, (year, stem) in enumerate(stems, start=1):
            objects, size = annotation(root / year / "Annotations" / f"{stem}.xml", odd)
            if size is not None:
                many.append(objects)
                sizes.append(size)
                paths.append(os.fsencode(f"{year}/JPEGImages/{stem}.jpg"))
            progress(number)
    odd.refuse_most()
    source = every_image(f"voc0712 {parts[-1][1]}", root, paths, files[0])
    source.odd = odd
    return ObjectImages(source, torch.tensor(sizes).view(-1, 2), *gather(many), list(VOC_CLASSES), "voc07")


def annotation(file: Path, odd: Odd) -> tuple[Objects, tuple[int, int] | None]:
    """The objects of an image, and its height and width where they can be those of an image. VOC counts pixels from 1,
    ends included."""
    try:
        root = ElementTree.parse(file).getroot()
        found = list(root.iter("object"))
        size = root.find("size")
        sides = [float(size.findtext(side, "")) for side in ("height", "width")]  # pyright: ignore
    except (ElementTree.ParseError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{show(file)} is not a VOC annotation ({error}): unpack the VOC archives again") from None
    fits = size_of({"height": sides[0], "width": sides[1]})
    odd.entries += 1 + len(found)
    if fits is None:
        odd.note("image size", file.name, f"{sides[1]:g} × {sides[0]:g}")
    whole, corners = _whole(found, file.name, fits or (LARGEST, LARGEST), odd)
    boxes = torch.tensor(corners, dtype=torch.float32).view(-1, 4) - torch.tensor([1.0, 1.0, 0.0, 0.0])
    classes = torch.tensor([VOC_CLASSES.index(one.findtext("name", "")) for one in whole], dtype=torch.int64)
    difficult = torch.tensor([one.findtext("difficult") == "1" for one in whole], dtype=torch.bool)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Objects(boxes, classes, areas, torch.zeros_like(difficult), difficult), fits and (fits[1], fits[0])


def _whole(
    found: list[ElementTree.Element], name: str, size: tuple[int, int], odd: Odd
) -> tuple[list[ElementTree.Element], list[list[int]]]:
    """The objects that are whole, and their corners."""
    whole, corners = [], []
    for number, one in enumerate(found, start=1):
        words = [one.findtext(f"bndbox/{corner}", "") for corner in CORNERS]
        kind, detail = "", f"bndbox {', '.join(words)[:60]}"
        try:
            box = np.array([[float(word) for word in words]])
            box = np.trunc(box)
            kind = odd_boxes(box[:, :2] - 1, box[:, 2:] - box[:, :2] + 1, np.array([size], np.float64))[0]
        except ValueError:
            kind = "malformed"
        if one.findtext("difficult", "0") not in ("0", "1"):
            kind, detail = "malformed", f"difficult {one.findtext('difficult', '')[:60]}"
        if one.findtext("name", "") not in VOC_CLASSES:
            kind, detail = "unknown class", one.findtext("name", "")[:60]
        if kind:
            odd.note(kind, f"object {number} of {name}", detail)
        else:
            whole.append(one)
            corners.append(box[0].astype(int).tolist())
    return whole, corners


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
