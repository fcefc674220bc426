"""Writes the embedded scenes as VOCdevkit: images, XML annotations, indexed masks and the lists of the image sets.
The other layouts are in layouts.py."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageFilter

from mls.data.annotated import VOC_CLASSES
from mls.data.pictures import VOID, Export, Picture, save_photo, with_folder, write_text
from mls.errors import DataError

DIFFICULT = 0.05  # objects that cover a smaller share of the image are marked difficult; about one in twenty


def voc(export: Export) -> None:
    """VOCdevkit with VOC2007 and VOC2012. The train scenes are spread evenly over train and val of both years, the test
    scenes are VOC2007's test, as for the 07+12 protocols. Every image is segmented.

    Readers expect VOC's twenty class names, so these are used: digit d is class d in scenes of an even type and
    class 10 + d in scenes of an odd type. All twenty occur.
    """
    if export.train < 4:
        raise DataError(f"VOC spreads its {export.train} train scenes over four lists: ask for 4 or more")
    bounds = [round(part * export.train / 4) for part in range(1, 5)]
    parts = [("VOC2007", "train"), ("VOC2007", "val"), ("VOC2012", "train"), ("VOC2012", "val")]
    years = {"VOC2007": VocYear(export, "VOC2007"), "VOC2012": VocYear(export, "VOC2012")}
    for i, picture in enumerate(export.pictures("train")):
        year, part = parts[int(np.searchsorted(bounds, i, side="right"))]
        years[year].add(picture, part)
    for picture in export.pictures("test"):
        years["VOC2007"].add(picture, "test")
    for year in years.values():
        year.write_lists()


class VocYear:
    """One year's folder, and the content of its image sets."""

    def __init__(self, export: Export, name: str) -> None:
        self.root, self.name = export.out / "VOCdevkit" / name, name
        self.count = 0
        self.lists: dict[str, list[tuple[str, dict[str, int]]]] = {"train": [], "val": []}

    def add(self, picture: Picture, part: str) -> None:
        self.count += 1
        stem = f"{self.count:06d}" if self.name == "VOC2007" else f"2012_{self.count:06d}"
        classes = [digit + 10 * (picture.type % 2) for digit in picture.classes]
        difficult = [bool(mask.mean() < DIFFICULT) for mask in picture.masks]
        save_photo(picture, self.root / "JPEGImages" / f"{stem}.jpg")
        write_text(self.root / "Annotations" / f"{stem}.xml", self._annotation(stem, picture, classes, difficult))
        void = _border(np.logical_or.reduce(picture.masks))
        for folder, values in (
            ("SegmentationClass", [one + 1 for one in classes]),
            ("SegmentationObject", list(range(1, len(classes) + 1))),
        ):
            pixels = np.where(void, VOID, (picture.masks * np.array(values)[:, None, None]).sum(0)).astype(np.uint8)
            indexed = Image.fromarray(pixels)
            indexed.putpalette(VOC_PALETTE)
            indexed.save(with_folder(self.root / folder / f"{stem}.png"))
        presence: dict[str, int] = {}  # 1, or 0 where every object of the class is difficult
        for one, hard in zip(classes, difficult, strict=True):
            presence[VOC_CLASSES[one]] = max(presence.get(VOC_CLASSES[one], 0), int(not hard))
        self.lists.setdefault(part, []).append((stem, presence))

    def write_lists(self) -> None:
        self.lists["trainval"] = sorted(self.lists["train"] + self.lists["val"], key=lambda entry: entry[0])
        for part, entries in self.lists.items():
            stems = "".join(f"{stem}\n" for stem, _ in entries)
            for task in ("Main", "Segmentation"):
                write_text(self.root / "ImageSets" / task / f"{part}.txt", stems)
            for name in VOC_CLASSES:
                lines = "".join(f"{stem} {presence.get(name, -1):2d}\n" for stem, presence in entries)
                write_text(self.root / "ImageSets" / "Main" / f"{name}_{part}.txt", lines)

    def _annotation(self, stem: str, picture: Picture, classes: list[int], difficult: list[bool]) -> str:
        size = len(picture.image)
        objects = []
        for one, (x0, y0, x1, y1), hard in zip(classes, picture.boxes, difficult, strict=True):
            cut = int(min(x0, y0) == 0 or max(x1, y1) == size)
            corners = {"xmin": x0 + 1, "ymin": y0 + 1, "xmax": x1, "ymax": y1}  # VOC counts from 1, ends included
            flags = {"pose": "Unspecified", "truncated": cut, "difficult": int(hard)}
            objects.append({"name": VOC_CLASSES[one], **flags, "bndbox": corners})
        fields = {
            "folder": self.name,
            "filename": f"{stem}.jpg",
            "source": {"database": "Embedded scenes", "annotation": "PASCAL VOC layout", "image": "mls"},
            "size": {"width": size, "height": size, "depth": 3},
            "segmented": 1,
            "object": objects,
        }
        root = ElementTree.Element("annotation")
        _fill(root, fields)
        ElementTree.indent(root, "\t")
        return ElementTree.tostring(root, encoding="unicode")


def _fill(parent: ElementTree.Element, fields: dict) -> None:
    for tag, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            child = ElementTree.SubElement(parent, tag)
            if isinstance(one, dict):
                _fill(child, one)
            else:
                child.text = str(one)


def _border(mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """The pixels next to the mask: VOC leaves a void line around its objects."""
    grown = np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(3)))
    return (grown > 0) & ~mask


def _voc_palette() -> list[int]:
    """VOC's colours: the bits of an index, three at a time, are the high bits of red, green and blue."""
    bit = lambda index, channel, level: (index >> (3 * level + channel) & 1) << (7 - level)
    return [sum(bit(index, channel, level) for level in range(3)) for index in range(256) for channel in range(3)]


VOC_PALETTE = _voc_palette()
