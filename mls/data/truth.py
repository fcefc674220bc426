"""What may be odd in annotations of objects, found while they are read: numbers that are none, boxes outside, ids that
stand twice. Readers leave such entries out and keep a list; who trains on the rest says so, or refuses."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mls.data.listing import printable, show
from mls.errors import DataError

LEFT_OUT = "left out; a run says so at its start"
KINDS = {  # of an entry: what is done with it
    "malformed": LEFT_OUT,
    "not finite": LEFT_OUT,
    "negative size": LEFT_OUT,
    "outside": LEFT_OUT,
    "overhanging": f"{LEFT_OUT}, and in pretraining cut at the edge",
    "area": LEFT_OUT,
    "image size": f"the image and its objects {LEFT_OUT}",
    "duplicate id": f"all but the first {LEFT_OUT}",
    "duplicate image": f"all but the first {LEFT_OUT}",
    "unknown image": LEFT_OUT,
    "unknown class": LEFT_OUT,
    "broken mask": LEFT_OUT,
    "no area": f"{LEFT_OUT}, as detectron2 does",
    "no label file": f"the image is {LEFT_OUT}; an empty file says that nothing is there",
}
AS_DETECTRON2 = ("no area", "unknown image")  # its reader leaves these out, too
PART_OF = ("unknown image", "no label file")  # kinds of entries that a part of a data set has
FOR_CLASSES = ("no area", "overhanging")  # kinds that say nothing against the class of an object
SLACK = 2.0  # pixels that a box may be larger than its image: published files round
LARGEST = 100_000  # pixels of a side: more is no image
MOST = 0.1  # share of the entries; with more the file follows another convention than the reader
SHOWN = 1  # examples of a kind in a sentence


@dataclass
class Odd:
    """What of an annotation file was left out, by kind: which entry, and what is wrong with it."""

    file: Path
    entries: int = 0  # that were looked at
    found: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def note(self, kind: str, entry: str, detail: str) -> None:
        self.found.setdefault(kind, []).append((f"{show(self.file)}: {entry}", detail))

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))

    def __str__(self) -> str:
        """One sentence for people."""
        kinds = [f"{len(entries)} {kind} ({_examples(entries)})" for kind, entries in self.found.items()]
        word = "entry" if len(self) == 1 else "entries"
        return f"{show(self.file)} has {len(self)} odd {word} of {self.entries:,}: {', '.join(kinds)}"

    def refuse_most(self) -> None:
        of_others = sum(len(self.found.get(kind, ())) for kind in PART_OF)
        if len(self) - of_others > MOST * self.entries:
            raise DataError(f"{self}; so many are no accident: is it another format, or another data set's file?")


def _examples(entries: Sequence[tuple[str, str]]) -> str:
    shown = [f"{entry.rpartition(': ')[2]}: {detail}" for entry, detail in entries[:SHOWN]]
    return "; ".join(shown) + ("; …" if len(entries) > SHOWN else "")


Pairs = Float[np.ndarray, "objects 2"]


def odd_boxes(corner: Pairs, extent: Pairs, sizes: Pairs) -> list[str]:
    """Of boxes with this first corner, width and height, in images of these widths and heights, what each is: the name
    of a kind, or "".

    >>> corner, extent = np.array([[0, 0], [5, 5], [0, 0], [30, 0.0]]), np.array([[9, 9], [-1, 4], [np.nan, 1], [9, 9]])
    >>> odd_boxes(corner, extent, np.full((4, 2), 10.0))
    ['', 'negative size', 'not finite', 'outside']
    """
    with np.errstate(invalid="ignore", over="ignore"):
        conditions = {
            "not finite": ~(np.isfinite(corner) & np.isfinite(extent)),
            "negative size": extent < 0,
            "outside": (corner >= sizes) | (corner + extent <= 0) & (extent > 0),
            "overhanging": (corner < -SLACK) | (corner + extent > sizes + SLACK),
            "no area": extent == 0,
        }
    return np.select([found.any(1) for found in conditions.values()], list(conditions), "").tolist()


def size_of(entry: Any) -> tuple[int, int] | None:
    """Width and height where they are those of an image."""
    sides = [entry.get(key) for key in ("width", "height")]
    whole = is_numbers(sides, 2) and all(1 <= side <= LARGEST for side in sides)
    return (int(sides[0]), int(sides[1])) if whole else None


@dataclass(frozen=True)
class CocoTruth:
    """The entries of an instances file that are whole: images by id, and objects each of which names one of them."""

    images: dict[Any, dict[str, Any]]
    names: dict[Any, str]  # of the categories
    objects: list[dict[str, Any]]
    odd: Odd


def coco_truth(content: Any, file: Path, for_classes: bool = False) -> CocoTruth:
    """`for_classes`: images may lack a size, and boxes need not fit in them. An error of Python means that it is no
    instances file at all."""
    odd = Odd(file)
    for key in ("categories", "images", "annotations"):
        if not isinstance(content[key], list):
            raise TypeError(f"{key} is no list")
    names = {key: str(entry["name"]) for key, entry in by_id(content["categories"], file).items()}
    images = _images(content["images"], not for_classes, odd)
    objects = _objects(content["annotations"], images, names, odd)
    boxes = np.array([one["bbox"] for one in objects], np.float64).reshape(-1, 4)
    sizes = np.array([size_of(images[one["image_id"]]) or (np.inf, np.inf) for one in objects], np.float64)
    whole = []
    for one, kind in zip(objects, odd_boxes(boxes[:, :2], boxes[:, 2:], sizes.reshape(-1, 2)), strict=True):
        if not kind or (for_classes and kind in FOR_CLASSES):
            whole.append(one)
        else:
            odd.note(kind, entry_name(one, images), f"bbox {', '.join(f'{value:g}' for value in one['bbox'])}")
    odd.refuse_most()
    return CocoTruth(images, names, whole, odd)


def by_id(entries: Sequence[dict[str, Any]], file: Path) -> dict[Any, dict[str, Any]]:
    found = {entry["id"]: entry for entry in entries}
    if len(found) < len(entries):
        raise DataError(f"{show(file)} gives one id to several images or categories: correct it, or take a whole copy")
    return found


def _images(entries: list[Any], need_sizes: bool, odd: Odd) -> dict[Any, dict[str, Any]]:
    images: dict[Any, dict[str, Any]] = {}
    files: set[str] = set()
    for number, entry in enumerate(entries):
        odd.entries += 1
        key, name = entry["id"], entry["file_name"]
        who = f"image {key} {printable(str(name).encode(errors='backslashreplace'))}"
        if not _is_file_name(name):
            odd.note("malformed", who, f"file_name of entry {number} is none")
        elif key in images or name in files:
            odd.note("duplicate image", who, "the id stands twice" if key in images else "the file stands twice")
        elif need_sizes and size_of(entry) is None:
            odd.note("image size", who, f"{entry.get('width')} × {entry.get('height')}")
        else:
            images[key] = entry
            files.add(name)
    return images


def _is_file_name(name: Any) -> bool:
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    try:
        os.fsencode(name)
    except UnicodeError:  # half a surrogate pair
        return False
    return True


def _objects(entries: list[Any], images: dict[Any, Any], names: dict[Any, str], odd: Odd) -> list[dict[str, Any]]:
    objects, ids = [], set()
    for entry in entries:
        odd.entries += 1
        key, image = entry.get("id"), entry["image_id"]
        who = entry_name(entry, images)
        if image not in images or isinstance(image, bool):
            odd.note("unknown image", who, f"image_id {image}")
        elif entry["category_id"] not in names or isinstance(entry["category_id"], bool):
            odd.note("unknown class", who, f"category_id {entry['category_id']}")
        elif key is not None and key in ids:
            odd.note("duplicate id", who, f"id {key} stands twice")
        elif not is_numbers(entry.get("bbox"), 4):
            odd.note("malformed", who, f"bbox {str(entry.get('bbox'))[:60]}")
        elif entry.get("iscrowd", 0) not in (0, 1):
            odd.note("malformed", who, f"iscrowd {str(entry['iscrowd'])[:60]}")
        elif not _is_area(area := entry.get("area", 0), size_of(images[image])):
            odd.note("area", who, f"area {str(area)[:60]}")
        else:
            objects.append(entry)
            ids.add(key)
    return objects


def entry_name(entry: dict[str, Any], images: Mapping[Any, dict[str, Any]]) -> str:
    image = entry["image_id"]
    name = str(images[image]["file_name"] if image in images else image)
    return f"annotation {entry.get('id', 'without id')} of {printable(name.encode(errors='backslashreplace'))}"


def is_numbers(values: Any, count: int) -> bool:
    """
    >>> is_numbers([1, 2.5], 2), is_numbers([1, "2"], 2), is_numbers("ab", 2)
    (True, False, False)
    """
    plain = isinstance(values, list) and len(values) == count
    return plain and all(type(value) in (int, float) for value in values)


def _is_area(value: Any, size: tuple[int, int] | None) -> bool:
    return is_numbers([value], 1) and 0 <= value <= (math.inf if size is None else 1.01 * size[0] * size[1])


def odd_outline(shape: Any, height: int, width: int) -> str:
    """What is wrong with an annotation's `segmentation`; "" where it is a mask of an image of this size."""
    if isinstance(shape, dict):
        return _odd_runs(shape, height, width)
    if not isinstance(shape, list) or not shape:
        return f"segmentation {str(shape)[:40]}"
    limit = 10 * max(height, width)
    for polygon in shape:
        try:
            if len(polygon) % 2 or not isinstance(polygon, list) or not math.isfinite(sum(polygon)):
                return f"polygon {str(polygon)[:40]}"
            if polygon and not -limit <= min(polygon) <= max(polygon) <= limit:
                return f"polygon far outside, {str(polygon)[:40]}"
        except (TypeError, OverflowError):
            return f"polygon {str(polygon)[:40]}"
    return "" if any(len(polygon) >= 6 for polygon in shape) else "no polygon of three points"


def _odd_runs(shape: dict[str, Any], height: int, width: int) -> str:
    counts, size = shape.get("counts"), shape.get("size")
    if size != [height, width]:
        return f"mask of {str(size)[:40]} in an image of {height} × {width}"
    if isinstance(counts, str | bytes):
        counts = run_lengths(counts.encode(errors="replace") if isinstance(counts, str) else counts)
    if not isinstance(counts, list) or any(type(count) is not int or count < 0 for count in counts):
        return f"run lengths {str(counts)[:40]}"
    total = sum(counts)
    return "" if total == height * width else f"run lengths of {total} pixels, not {height * width}"


def run_lengths(text: bytes) -> list[int] | None:
    """Of COCO's compression: five bits a letter, from the third number on as the difference to the last but one.

    >>> run_lengths(b"52203")
    [5, 2, 2, 2, 5]
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = letter - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16 and 1) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts if not shift else None
