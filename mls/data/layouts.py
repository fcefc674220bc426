"""Writes the embedded scenes to disk as COCO, VOC, Cityscapes or class folders: the published layouts, with real image
files, so that whatever reads the published data sets can be tried without them. Drawing the scenes is in scenes.py."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Bool, UInt8, UInt16
from PIL import Image, ImageFilter

from mls.data.scenes import CLASS_NAMES, SPLITS, scene_chunks
from mls.data.sources import VOC_CLASSES
from mls.errors import DataError, unknown_name

QUALITY = 95  # of the JPEG files
COCO_IDS = [1, 2, 3, 5, 6, 7, 9, 10, 11, 13]  # with gaps, as COCO's own: an id is not a column
DIFFICULT = 0.05  # VOC: an object that covers less of its image is marked; about one in twenty
VOID = 255  # VOC's and Cityscapes' "not to be counted"
THINGS = {0: 24, 1: 25, 2: 26, 3: 27, 4: 28, 5: 31, 6: 32, 7: 33}  # digit: Cityscapes id of a class with instances
DIGIT_IDS = [*THINGS.values(), 19, 20]  # 8 is a traffic light and 9 a traffic sign: no instances
GROUND_IDS = [7, 8, 11, 12, 13, 21, 22, 23]  # by scene type: road, sidewalk, building, wall, fence, vegetation, ...
OUT_OF_ROI, BORDER = 3, 1  # the id of the border, and its pixels


@dataclass
class Picture:
    """One scene on its way to disk; the objects are those that are seen."""

    image: UInt8[np.ndarray, "size size 3"]
    type: int
    classes: list[int]
    boxes: list[list[int]]
    masks: Bool[np.ndarray, "objects size size"]


@dataclass
class Export:
    """What to write and where. Scenes are drawn a few at a time, so the number of images is bounded by the disk."""

    out: Path
    train: int = 500
    test: int = 200
    size: int = 128
    seed: int = 0
    progress: Callable[[int], None] = lambda done: None  # told the number of images written so far
    done: int = 0

    def pictures(self, split: str) -> Iterator[Picture]:
        for scenes in scene_chunks(getattr(self, split), split, self.size, self.seed, masks=True):
            assert scenes.masks is not None
            for i in range(len(scenes)):
                seen = scenes.classes[i] >= 0
                yield Picture(
                    image=scenes.images[i].permute(1, 2, 0).numpy(),
                    type=int(scenes.types[i]),
                    classes=scenes.classes[i, seen].tolist(),
                    boxes=scenes.boxes[i, seen].tolist(),
                    masks=scenes.masks[i, seen].numpy(),
                )
                self.done += 1
                self.progress(self.done)


def write(
    layout: str,
    out: Path,
    train: int = 500,
    test: int = 200,
    size: int = 128,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write `train` and `test` scenes into the empty or new folder `out`. What an error or Ctrl-C leaves is removed."""
    if layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS, DataError)
    for split, count in zip(SPLITS, (train, test), strict=True):
        if count < 1:
            raise DataError(f"{count} {split} scenes make no data set: ask for 1 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not an empty folder: name a new one, or delete what is there")
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        LAYOUTS[layout](Export(out, train, test, size, seed, progress))
    except BaseException as error:
        shutil.rmtree(out, ignore_errors=True)
        if existed:
            out.mkdir(exist_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise DataError(f"cannot write the scenes to {out} ({reason}): choose another --out") from error
        raise


def coco(export: Export) -> None:
    """COCO 2017 detection. The test scenes are val2017; there are no crowd regions."""
    for split, name in zip(SPLITS, ("train2017", "val2017"), strict=True):
        images, annotations = [], []
        for number, picture in enumerate(export.pictures(split), start=1):
            file = f"{number:012d}.jpg"
            _save_photo(picture, export.out / name / file)
            side = {"height": export.size, "width": export.size}
            images.append({"license": 1, "file_name": file, **side, "id": number})
            for digit, box, mask in zip(picture.classes, picture.boxes, picture.masks, strict=True):
                x0, y0, x1, y1 = map(float, box)
                annotations.append(
                    {
                        "segmentation": [[float(v) for v in polygon] for polygon in polygons(mask)],
                        "area": float(mask.sum()),
                        "iscrowd": 0,
                        "image_id": number,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "category_id": COCO_IDS[digit],
                        "id": len(annotations) + 1,
                    }
                )
        content = {
            "info": {"description": "Embedded scenes in COCO's layout", "version": "1.0", "year": 2017},
            "licenses": [{"id": 1, "name": "CC BY 4.0", "url": "https://creativecommons.org/licenses/by/4.0/"}],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"supercategory": "digit", "id": COCO_IDS[digit], "name": name}
                for digit, name in enumerate(CLASS_NAMES)
            ],
        }
        _write_text(export.out / "annotations" / f"instances_{name}.json", json.dumps(content))


def voc(export: Export) -> None:
    """VOCdevkit with VOC2007 and VOC2012. The train scenes are spread evenly over train and val of both years, the test
    scenes are VOC2007's test, as for the 07+12 protocols. Every image is segmented.

    Readers know VOC's twenty class names by heart, so they are kept: digit d is class d in scenes of an even type and
    class 10 + d in scenes of an odd type. All twenty occur.
    """
    if export.train < 4:
        raise DataError(f"VOC spreads its {export.train} train scenes over four lists: ask for 4 or more")
    bounds = [round(part * export.train / 4) for part in range(1, 5)]
    homes = [("VOC2007", "train"), ("VOC2007", "val"), ("VOC2012", "train"), ("VOC2012", "val")]
    years = {"VOC2007": _VocYear(export, "VOC2007"), "VOC2012": _VocYear(export, "VOC2012")}
    for i, picture in enumerate(export.pictures("train")):
        year, part = homes[int(np.searchsorted(bounds, i, side="right"))]
        years[year].add(picture, part)
    for picture in export.pictures("test"):
        years["VOC2007"].add(picture, "test")
    for year in years.values():
        year.write_lists()


def cityscapes(export: Export) -> None:
    """leftImg8bit and gtFine. The train scenes are two cities, the test scenes are the val city.

    Digits 0 to 7 take the eight ids with instances (person to bicycle), 8 and 9 are traffic light and sign; the scene
    type's ground is road, sidewalk, building, wall, fence, vegetation, terrain or sky. The nineteenth training class,
    pole, does not occur. A thin border is "out of roi", which is void.
    """
    from torchvision.datasets import Cityscapes

    table = {entry.id: entry for entry in Cityscapes.classes}
    names = {number: entry.name for number, entry in table.items()}
    train_ids = np.full(256, VOID, np.uint8)
    colours = np.zeros((256, 3), np.uint8)
    for number, entry in table.items():
        if number >= 0:
            train_ids[number], colours[number] = entry.train_id % 256, entry.color
    for split, folder, cities in (("train", "train", ("aachen", "bochum")), ("test", "val", ("frankfurt",))):
        for number, picture in enumerate(export.pictures(split)):
            city = cities[number % len(cities)]
            stem = f"{city}_{number // len(cities):06d}_000019"
            photo = export.out / "leftImg8bit" / folder / city / f"{stem}_leftImg8bit.png"
            _save_photo(picture, photo)
            labels, instances = _cityscapes_ids(picture)
            stem = str(_parent(export.out / "gtFine" / folder / city / stem))
            Image.fromarray(labels).save(f"{stem}_gtFine_labelIds.png")
            Image.fromarray(train_ids[labels]).save(f"{stem}_gtFine_labelTrainIds.png")
            Image.fromarray(instances).save(f"{stem}_gtFine_instanceIds.png")
            Image.fromarray(colours[labels]).save(f"{stem}_gtFine_color.png")
            _write_text(Path(f"{stem}_gtFine_polygons.json"), _cityscapes_polygons(picture, names))


def folders(export: Export) -> None:
    """train/CLASS/*.jpg and val/CLASS/*.jpg, as ImageNet. The class is the digit of which most pixels are seen."""
    for split, folder in zip(SPLITS, ("train", "val"), strict=True):
        counts: Counter[str] = Counter()
        for number, picture in enumerate(export.pictures(split), start=1):
            largest = CLASS_NAMES[picture.classes[int(picture.masks.sum((1, 2)).argmax())]]
            _save_photo(picture, export.out / folder / largest / f"{number:06d}.jpg")
            counts[largest] += 1
        if missing := [name for name in CLASS_NAMES if not counts[name]]:
            raise DataError(
                f"none of the {counts.total()} {split} scenes belongs to class {', '.join(missing)}, and class numbers "
                f"are counted from the folders that exist: raise --{split}"
            )


LAYOUTS: dict[str, Callable[[Export], None]] = {"coco": coco, "voc": voc, "cityscapes": cityscapes, "folders": folders}


class _VocYear:
    """One year's folder, and what its image sets will list."""

    def __init__(self, export: Export, name: str) -> None:
        self.root, self.name = export.out / "VOCdevkit" / name, name
        self.count = 0
        self.lists: dict[str, list[tuple[str, dict[str, int]]]] = {"train": [], "val": []}

    def add(self, picture: Picture, part: str) -> None:
        self.count += 1
        stem = f"{self.count:06d}" if self.name == "VOC2007" else f"2012_{self.count:06d}"
        classes = [digit + 10 * (picture.type % 2) for digit in picture.classes]
        difficult = [bool(mask.mean() < DIFFICULT) for mask in picture.masks]
        _save_photo(picture, self.root / "JPEGImages" / f"{stem}.jpg")
        _write_text(self.root / "Annotations" / f"{stem}.xml", self._annotation(stem, picture, classes, difficult))
        void = _rim(np.logical_or.reduce(picture.masks))
        for folder, values in (
            ("SegmentationClass", [one + 1 for one in classes]),
            ("SegmentationObject", list(range(1, len(classes) + 1))),
        ):
            pixels = np.where(void, VOID, (picture.masks * np.array(values)[:, None, None]).sum(0)).astype(np.uint8)
            indexed = Image.fromarray(pixels)
            indexed.putpalette(VOC_PALETTE)
            indexed.save(_parent(self.root / folder / f"{stem}.png"))
        presence: dict[str, int] = {}  # 1, or 0 where every object of the class is difficult
        for one, hard in zip(classes, difficult, strict=True):
            presence[VOC_CLASSES[one]] = max(presence.get(VOC_CLASSES[one], 0), int(not hard))
        self.lists.setdefault(part, []).append((stem, presence))

    def write_lists(self) -> None:
        self.lists["trainval"] = sorted(self.lists["train"] + self.lists["val"], key=lambda entry: entry[0])
        for part, entries in self.lists.items():
            stems = "".join(f"{stem}\n" for stem, _ in entries)
            for task in ("Main", "Segmentation"):
                _write_text(self.root / "ImageSets" / task / f"{part}.txt", stems)
            for name in VOC_CLASSES:
                lines = "".join(f"{stem} {presence.get(name, -1):2d}\n" for stem, presence in entries)
                _write_text(self.root / "ImageSets" / "Main" / f"{name}_{part}.txt", lines)

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


def _rim(mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """The pixels next to the mask: VOC leaves a void line around its objects."""
    grown = np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(3)))
    return (grown > 0) & ~mask


def _voc_palette() -> list[int]:
    """VOC's colours: the bits of an index, three at a time, are the high bits of red, green and blue."""
    bit = lambda index, channel, level: (index >> (3 * level + channel) & 1) << (7 - level)
    return [sum(bit(index, channel, level) for level in range(3)) for index in range(256) for channel in range(3)]


VOC_PALETTE = _voc_palette()


def _cityscapes_ids(picture: Picture) -> tuple[UInt8[np.ndarray, "size size"], UInt16[np.ndarray, "size size"]]:
    size = len(picture.image)
    labels = np.full((size, size), GROUND_IDS[picture.type % len(GROUND_IDS)], np.uint8)
    instances = labels.astype(np.uint16)
    met: Counter[int] = Counter()
    for digit, mask in zip(picture.classes, picture.masks, strict=True):
        labels[mask] = number = DIGIT_IDS[digit]
        instances[mask] = number * 1000 + met[digit] if digit in THINGS else number
        met[digit] += 1
    border = np.ones((size, size), bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    labels[border] = instances[border] = OUT_OF_ROI
    return labels, instances


def _cityscapes_polygons(picture: Picture, names: dict[int, str]) -> str:
    size = len(picture.image)
    whole = [[0, 0], [size, 0], [size, size], [0, size]]
    objects = [{"label": names[GROUND_IDS[picture.type % len(GROUND_IDS)]], "polygon": whole}]
    for digit, mask in zip(picture.classes, picture.masks, strict=True):
        for flat in polygons(mask):
            points = [list(point) for point in zip(flat[::2], flat[1::2], strict=True)]
            objects.append({"label": names[DIGIT_IDS[digit]], "polygon": points})
    return json.dumps({"imgHeight": size, "imgWidth": size, "objects": objects})


def _save_photo(picture: Picture, path: Path) -> None:
    Image.fromarray(picture.image).save(_parent(path), quality=QUALITY)  # which PNG has no use for


def _write_text(path: Path, text: str) -> None:
    _parent(path).write_text(text, encoding="utf-8")


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def polygons(mask: Bool[np.ndarray, "height width"]) -> list[list[int]]:
    """Polygons x y x y ... that cover exactly the mask's pixels. A polygon cannot have a hole, so each is a stack of
    runs, one a row; where runs part, meet or end, so does the stack.

    >>> polygons(np.ones((2, 3), dtype=bool))
    [[3, 0, 3, 2, 0, 2, 0, 0]]
    """
    edges = np.diff(np.pad(mask, ((0, 1), (1, 1))).astype(np.int8), axis=1)
    done: list[list[int]] = []
    growing: list[list[tuple[int, int, int]]] = []  # each a list of (row, start, end)
    for row, changes in enumerate(edges):
        runs = list(zip((changes > 0).nonzero()[0].tolist(), (changes < 0).nonzero()[0].tolist(), strict=True))
        below = [[run for run in runs if run[0] < stack[-1][2] and stack[-1][1] < run[1]] for stack in growing]
        shared = Counter(run for touching in below for run in touching)
        stacks = {run: [] for run in runs}
        for stack, touching in zip(growing, below, strict=True):
            if len(touching) == 1 and shared[touching[0]] == 1:
                stacks[touching[0]] = stack
            else:
                done.append(_outline(stack))
        for (start, end), stack in stacks.items():
            stack.append((row, start, end))
        growing = list(stacks.values())
    return done


def _outline(stack: list[tuple[int, int, int]]) -> list[int]:
    """Down the right side, up the left; corners only."""
    right = [point for row, _, end in stack for point in ((end, row), (end, row + 1))]
    left = [point for row, start, _ in reversed(stack) for point in ((start, row + 1), (start, row))]
    ring = right + left
    corners = [p for i, p in enumerate(ring) if not ring[i - 1][0] == p[0] == ring[(i + 1) % len(ring)][0]]
    return [coordinate for corner in corners for coordinate in corner]
