"""Attacks on annotations of objects and regions: each must be told, by a list of what was left out or by one sentence,
whoever reads them: a detector's or segmenter's training, its test, pretraining, `mls data check`."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from PIL import Image

from mls.config import DataConfig
from mls.data.check import TRUTH, check
from mls.data.layouts import write
from mls.data.sources import build_source
from mls.errors import UserError
from mls.eval import data
from mls.eval.dense.coco_ap import coco_ap
from mls.eval.dense.schema import DetectionData, SegmentationData
from mls.eval.dense.views import TrainingViews
from mls.frozen.confusion import confusion
from mls.tools.bench.faults import fault

SIZE = 32
BAD: list[Any] = [None, "x", "3", [], {}, True, math.nan, math.inf, -math.inf, 1e300, 10**400]


@cache
def tree(layout: str) -> Path:
    """A small data set in a published layout, made once."""
    folder = Path(mkdtemp(prefix="mls-fault-"))
    write(layout, folder, train=12, test=8, size=SIZE, seed=3)
    return folder


def copied(layout: str, folder: Path) -> Path:
    return Path(shutil.copytree(tree(layout), folder / "data"))


def unless_told(name: str, root: Path) -> str:
    """ "" where the data set's reader, the views of a training, the truth of a test or `mls data check` tells it."""
    found = [_told(lambda: used(name, root)), _told(lambda: checked(name, root))]
    if wrong := next((what for what in found if what not in ("told", "nothing")), ""):
        return wrong
    return "" if found == ["told", "told"] else f"trained or tested on: {found[0]}, data check: {found[1]}"


def _told(read: Callable[[], bool]) -> str:
    try:
        return "told" if read() else "nothing"
    except UserError as error:
        text = str(error)
        return "told" if text.strip() and "\n" not in text and len(text) < 2000 else f"said {text[:300]!r}"
    except Exception as error:
        return f"a traceback, {type(error).__name__}: {str(error)[:200]!r}"


def used(name: str, root: Path) -> bool:
    """Whether something was left out of what a training and a test see; an error where they end."""
    read = data.build(name, root, check_sizes=False)
    settings = DetectionData() if name in ("coco2017", "voc0712") else SegmentationData(resize=(64, 64), crop=(32, 32))
    for row in range(len(read.train)):
        views = TrainingViews(read.train, settings, seed=0).__getitems__([(row, row)])
        if isinstance(views, UserError):
            raise views
    for row in range(len(read.test)):
        pixels = read.test.pixels(row)
        if isinstance(settings, SegmentationData):
            labels = read.test.labels_for(row, pixels.shape[1:])
            confusion(labels.long().clamp(max=18), labels, len(read.test.class_names))
    if isinstance(settings, DetectionData):
        coco_ap([], read.test, masks=False)
    return any(getattr(part, "odd", None) for part in (read.train, read.test))


def checked(name: str, root: Path) -> bool:
    read = data.build(name, root, check_sizes=False)
    found = [check(part.images, 0, annotated=part.odd_at).found for part in (read.train, read.test)]
    return any(kind in TRUTH for one in found for kind in one)


# ---------------------------------------------------------------------------------------------------------------- COCO


def values_of(wrong: dict[str, list[Any]]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Changes of an entry: to each of these values, and without the field."""
    for key, values in wrong.items():
        for value in values:
            yield lambda entry, key=key, value=value: entry.__setitem__(key, value)
        yield lambda entry, key=key: entry.pop(key)


IMAGES = {
    "file_name": ["a\0.jpg", "", None, 5, [], "missing.jpg", "\ud800.jpg", "../000001.jpg"],
    "width": [0, -5, 1e9, SIZE + 1, *BAD],
    "height": [0, -5, 1e9, SIZE - 1, *BAD],
}
BOX = [[], None, "x", "abcd", [1, 2, 3], {}, [5, 5, -3, 4], [5, 5, 4, 0], [100, 5, 4, 4], [0, 0, SIZE + 9, 5]]
BOX += [[5, 5, 5, value] for value in BAD] + [[value, 5, 5, 5] for value in BAD]
RUNS = [[-5, 10], [5, 10], [SIZE * SIZE, 5], "zz", "", "\0", None, 5, ["1"], [1.5, 2], [10**12], "~" * 50]
MASKS = ["x", [], [[]], [[1, 2]], ["abcdef"], [list("123456")], [[math.nan] * 6], [[math.inf] * 6], [[1e9] * 6], 7]
MASKS += [[[1, 2, 3, 4, 5]], None, {}, [[1, 2, 3, 4]], [[10**400] * 6], [[None] * 6], [{}], {"size": [1, 1]}]
MASKS += [{"size": [SIZE, SIZE], "counts": runs} for runs in RUNS]
MASKS += [{"size": size, "counts": [0, 4]} for size in ([2, 2], None, "x", [4], [-2, -2])]
OBJECTS = {
    "bbox": BOX,
    "category_id": [77, -1, *BAD],
    "image_id": [999, -1, *BAD],
    "area": [-1, 1e9, *BAD],
    "segmentation": MASKS,
}
SECTIONS: list[Any] = [None, "x", 5, {}, [None], [[]], ["x"], [5], [{}]]
FILES = [b"", b"{", b"\0" * 200, b"[" * 100_000, b"\xff\xfe{}", b"null", b"5", b"{}", b'{"images": []}']


def coco_changes() -> list[Callable[[dict[str, Any], random.Random], None]]:
    """Of a whole instances file."""

    def of(section: str, change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any], random.Random], None]:
        return lambda content, draws: change(draws.choice(content[section]))

    def twice(section: str, *keys: str) -> Callable[[dict[str, Any], random.Random], None]:
        def change(content: dict[str, Any], draws: random.Random) -> None:
            one, other = draws.sample(content[section], 2)
            one.update({key: other[key] for key in keys})

        return change

    changes = [of("images", change) for change in values_of(IMAGES)]
    changes += [of("annotations", change) for change in values_of(OBJECTS)]
    changes += [of("annotations", lambda one, value=value: one.update(iscrowd=value)) for value in (5, "x", None, [])]
    changes += [twice("images", "id"), twice("images", "file_name"), twice("images", "id", "file_name")]
    changes += [twice("annotations", "id"), twice("categories", "id"), of("categories", lambda one: one.pop("id"))]
    for section in ("images", "annotations", "categories"):
        changes += [lambda all, _, key=section, value=value: all.update({key: value}) for value in SECTIONS]
        changes += [lambda all, _, key=section: all.pop(key)]
    return changes


COCO = coco_changes()


@fault("an odd entry in COCO's instances, of the training or the test", tries=2 * len(COCO), quick=25)
def coco(folder: Path, number: int) -> str:
    root = copied("coco", folder)
    changed_instances(root, number)
    return unless_told("coco2017", root)


def changed_instances(root: Path, number: int) -> None:
    number = number * 37 % (2 * len(COCO))  # of every kind some among the first
    file = root / "annotations" / f"instances_{('train', 'val')[number % 2]}2017.json"
    content = json.loads(file.read_text())
    COCO[number // 2](content, random.Random(number))
    file.write_text(json.dumps(content))


@fault("an instances file that is none: empty, cut, NUL, nested without end", tries=len(FILES), quick=2)
def coco_files(folder: Path, number: int) -> str:
    root = copied("coco", folder)
    (root / "annotations" / "instances_train2017.json").write_bytes(FILES[number])
    return unless_told("coco2017", root)


@fault(
    "the same odd entries where pretraining reads the instances: refused, counted, or of no use to it",
    tries=2 * len(COCO),
    quick=10,
)
def coco_source(folder: Path, number: int) -> str:
    """Its masks and the sizes of images are not used there, and boxes without area are objects all the same."""
    root = copied("coco", folder)
    changed_instances(root, number)
    read = lambda: [pretrained_on(root, f"instances_{part}2017.json") for part in ("train", "val")] != [False, False]
    told = _told(read)
    return "" if told in ("told", "nothing") else told


def pretrained_on(root: Path, annotations: str) -> bool:
    source = build_source(DataConfig(source="coco", root=str(root), annotations=f"annotations/{annotations}"))
    labels = source.labels
    assert labels is not None and bool(labels.isfinite().all())
    for number in range(len(source)):
        try:
            source.read(number)
        except OSError:
            return True  # an unreadable image, which a run replaces and lists
    return bool(getattr(source, "odd", None))


# ----------------------------------------------------------------------------------------------------------------- VOC

NUMBERS = ["", "x", "nan", "inf", "-inf", "1e400", "-50", "9999", "0x5", "5,5"]
VOC = [("xmin", text) for text in NUMBERS] + [("ymax", text) for text in NUMBERS]
VOC += [("width", text) for text in (*NUMBERS[:-1], "0", "31")] + [("height", text) for text in ("", "0", "1e9", "33")]
VOC += [("name", text) for text in ("", "digit", "Person", "\u0436")] + [("difficult", text) for text in ("x", "2", "")]
TEXTS = ["", "<annotation>", "\0\0\0", "no XML", "<annotation></annotation>", "<a>" * 5000, "<?xml version='1.0'?>"]
LAUGHS = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(9))
TEXTS += [f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation><object><name>&l9;</name></object></annotation>']


@fault("an odd object or size in an annotation of VOC", tries=len(VOC), quick=6)
def voc(folder: Path, number: int) -> str:
    root = copied("voc", folder)
    field, text = VOC[number * 7 % len(VOC)]
    file = root / "VOCdevkit" / "VOC2007" / "Annotations" / "000001.xml"
    start, tag, rest = file.read_text().partition(f"<{field}>")
    file.write_text(start + tag + text + rest[rest.index("<") :])
    return unless_told("voc0712", root)


@fault("an annotation of VOC that is none, is missing, or an image that is listed twice", tries=len(TEXTS) + 3, quick=3)
def voc_files(folder: Path, number: int) -> str:
    root = copied("voc", folder)
    year = root / "VOCdevkit" / "VOC2007"
    file, sets = year / "Annotations" / "000001.xml", year / "ImageSets" / "Main"
    if number < len(TEXTS):
        file.write_text(TEXTS[number])
    elif number == len(TEXTS):
        file.unlink()
    elif number == len(TEXTS) + 1:
        (sets / "trainval.txt").write_text((sets / "trainval.txt").read_text() * 2)
    else:
        (sets / "test.txt").write_text((sets / "test.txt").read_text() + "a\0b\n")
    return unless_told("voc0712", root)


# ------------------------------------------------------------------------------------------------------------- regions


def labels_as(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        with Image.open(file) as image:
            labels = np.array(image)
        Image.fromarray(change(labels)).save(file)

    return apply


def _with(labels: np.ndarray, value: int) -> np.ndarray:
    labels[5, 5] = value
    return labels


REGIONS: list[Callable[[Path], object]] = [
    *(labels_as(lambda labels, value=value: _with(labels, value)) for value in (19, 100, 254)),
    labels_as(lambda labels: np.stack([labels] * 3, 2)),
    labels_as(lambda labels: labels.astype(np.uint16)),
    labels_as(lambda labels: np.stack([labels] * 4, 2)),
    labels_as(lambda labels: np.stack([labels] * 2, 2)),
    labels_as(lambda labels: labels[:-1]),
    labels_as(lambda labels: np.pad(labels, 3)),
    labels_as(lambda labels: labels[:1, :1]),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(file.read_bytes()[:60]),
    lambda file: file.write_bytes(b"no image"),
    lambda file: file.unlink(),
]


@fault(
    "odd labels of Cityscapes: unknown classes, other sizes, colours, damaged files", tries=2 * len(REGIONS), quick=6
)
def regions(folder: Path, number: int) -> str:
    root = copied("cityscapes", folder)
    files = sorted((root / "gtFine" / ("train", "val")[number % 2]).rglob("*_labelTrainIds.png"))
    REGIONS[number // 2](files[number % len(files)])
    return unless_told("cityscapes", root)
