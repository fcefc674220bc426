"""The user's own images with boxes or masks: `coco`, json files in COCO's format with any categories, and `yolo`, a
data.yaml with a text file of boxes or polygons for each image."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mls import yaml_files
from mls.data.annotated import folder_with
from mls.data.listing import FileSource, list_images, printable, show
from mls.data.masks import numbered_names
from mls.data.truth import CocoTruth, Odd, coco_truth, odd_boxes
from mls.errors import DataError, reason
from mls.eval.data import DataSet, Layout, register
from mls.eval.data.annotations import parsing
from mls.eval.data.coco_objects import objects_of, run_lengths_of
from mls.eval.data.objects import ObjectImages, Objects, gather
from mls.eval.data.own import PARTS, data_set, leaves, listed, part_of, split
from mls.progress import counting

FIX_JSON = "export it again as COCO's instances, with images, annotations and categories"


def read_coco(root: Path) -> DataSet[ObjectImages]:
    """A json file, which is split, or a folder with one for each part: `train/*.json` and `valid/*.json` beside their
    images, or `annotations/*train*.json` and `annotations/*val*.json`."""
    found = {part: (_truth(file), file) for part, file in _instances(root).items()}
    names = {tuple(sorted(truth.names.items())) for truth, _ in found.values()}
    if len(names) > 1:
        raise DataError(f"the json files of {show(root)} have different categories: give all files the same list")
    parts: dict[str, ObjectImages] = {}
    for part, (truth, file) in found.items():
        images = sorted(truth.images.values(), key=lambda image: image["file_name"])
        paths = [os.fsencode(image["file_name"]) for image in images]
        folder = _image_folder(root, file, part, paths)
        rows = {part: range(len(images))} if part else split(paths)
        for name, of_part in rows.items():
            source = listed(f"coco {name}", folder, [paths[row] for row in of_part], file)
            parts[name] = objects_of(truth, [images[row] for row in of_part], source)
        if not part:
            parts["test"].images.odd = None  # pyright: ignore[reportAttributeAccessIssue]  (told of the training part)
    return data_set("coco", alike(parts), root)


def _truth(file: Path) -> CocoTruth:
    with parsing(file, "COCO instances file", FIX_JSON):
        return coco_truth(json.loads(file.read_bytes()), file)


def _instances(root: Path) -> dict[str, Path]:
    """The json file of each part, or under "" the only one."""
    if root.is_file():
        return {"": root}
    folders = [root, root / "annotations", *(root / name for names in PARTS.values() for name in names)]
    found = sorted(file for folder in folders for file in folder.glob("*.json"))
    found = [file for file in found if file.name.startswith("instances")] or found
    if len(found) == 1:
        return {"": found[0]}
    parts: dict[str, Path] = {}
    for file in found:
        part = part_of(str(file.relative_to(root)))
        if part is None or part in parts:
            several = ", ".join(show(file.relative_to(root)) for file in found[:4])
            raise DataError(
                f"{show(root)} has {len(found)} json files ({several}): leave one for each of train, val and test, or "
                "name one with data.root=FILE.json"
            )
        parts[part] = file
    if len(parts) < 2 or "train" not in parts:
        raise DataError(
            f"no json files for training and test in {show(root)}, its annotations, train, valid, test: put them "
            "there, or name one with data.root=FILE.json"
        )
    return parts


def _image_folder(root: Path, file: Path, part: str, paths: list[bytes]) -> Path:
    """The folder that has the images of a json file."""
    if outside := next((path for path in paths if leaves(os.fsdecode(path))), None):
        raise DataError(f"{show(file)} names {printable(outside)}, which leaves its folder: write paths below it")
    base = file.parent.parent if file.parent.name == "annotations" else file.parent
    phases = dict.fromkeys([file.stem.removeprefix("instances_"), *PARTS.get(part, ())])
    inside = [inner for phase in phases for inner in (phase, f"images/{phase}")]
    folders = [file.parent, *(base / inner for inner in (*inside, "images")), base]
    return folder_with(folders, paths, file) if paths else base


# --------------------------------------------------------------------------------------------------------------- YOLO


def read_yolo(root: Path) -> DataSet[ObjectImages]:
    """`data.yaml`, or a folder with it: `names`, `train` and `val` (folders or lists of images below `path`), `test`.
    The labels of images/x.jpg are the lines of labels/x.txt: a class and a box (its centre and sides) or a polygon, as
    shares of the image's sides."""
    file = _yaml(root)
    content = yaml_files.read(file, numbered=True)[0]
    names = numbered_names(content, file)
    if content.get("nc", len(names)) != len(names):
        raise DataError(f"{show(file)} says nc: {content['nc']} and has {len(names)} names: correct one of them")
    base = Path(os.path.normpath(file.parent / str(content.get("path") or "")))
    if not base.is_dir():
        raise DataError(f"{show(file)} says path: {content['path']}, and {show(base)} is no folder: correct that line")
    places = {part: content[part] for part in PARTS if content.get(part)}
    if "train" not in places:
        raise DataError(f"{show(file)} names no training images: write `train: images/train`, a folder below its path")
    paths = {part: _image_paths(base, place, part, file) for part, place in places.items()}
    if len(paths) == 1:
        rows = split(paths["train"])
        paths = {part: [paths["train"][row] for row in of_part] for part, of_part in rows.items()}
    parts = {part: _yolo_part(part, base, of_part, names, file) for part, of_part in paths.items()}
    return data_set("yolo", alike(parts), root)


def _yaml(root: Path) -> Path:
    if root.is_file():
        return root
    found = [file for file in (root / "data.yaml", root / "data.yml") if file.is_file()]
    found = found or sorted([*root.glob("*.yaml"), *root.glob("*.yml")])
    if len(found) != 1:
        words = f"{len(found)} .yaml files" if found else "no data.yaml"
        raise DataError(f"{show(root)} has {words}: name it with data.root=FILE.yaml; it lists names, train and val")
    return found[0]


def _image_paths(base: Path, place: Any, part: str, file: Path) -> list[bytes]:
    """The images that `place` names, relative to the base."""
    if isinstance(place, list):
        return [path for one in place for path in _image_paths(base, one, part, file)]
    if not isinstance(place, str):
        raise DataError(f"{show(file)} says {part}: {place}: write a folder of images, or a list of folders")
    # Roboflow writes ../train/images beside the folder train.
    inner = place.removeprefix("../") if not (base / place).exists() else place
    found = os.path.relpath(base / inner, base)
    if leaves(found):
        raise DataError(
            f"{show(file)} says {part}: {place}, which leaves {show(base)}: set its `path` to a folder that holds all "
            "images"
        )
    if (base / found).is_dir():
        paths = [os.path.normpath(os.fsencode(found) + b"/" + path) for path in list_images(base / found)]
        if not paths:
            raise DataError(f"{show(file)} says {part}: {place}, and no images are there: correct that line")
        return paths
    if not (base / found).is_file():
        raise DataError(f"{show(file)} says {part}: {place}, and {show(base / found)} is missing: correct that line")
    lines, folder = (base / found).read_bytes().splitlines(), os.fsencode(os.path.dirname(found))
    return [os.path.normpath(os.path.join(folder, line.strip())) for line in lines if line.strip()]


def _yolo_part(part: str, base: Path, paths: list[bytes], names: dict[int, str], file: Path) -> ObjectImages:
    odd, kept, many, sizes = Odd(file), [], [], []
    column = {number: place for place, number in enumerate(names)}
    listed(f"yolo {part}", base, paths, file)  # all are there
    with counting(f"labels of {part}", len(paths)) as progress:
        for number, path in enumerate(paths, start=1):
            image = base / os.fsdecode(path)
            labels, size = labels_of(image), None
            odd.entries += 1
            if not labels.is_file():
                odd.note("no label file", printable(path), f"{show(labels.name)} is missing")
            else:
                size = _size(image, path, odd)
            if size is not None:
                kept.append(path)
                sizes.append(size)
                many.append(_objects(labels, column, size, odd))
            progress(number)
    if not kept:
        where = show(labels_of(base / os.fsdecode(paths[0])))
        raise DataError(f"no image of {show(file)} for {part} has labels (looked for {where}): put them there")
    odd.refuse_most()
    source = FileSource(f"yolo {part}", base, kept)
    source.odd = odd
    return ObjectImages(source, torch.tensor(sizes), *gather(many), [names[number] for number in column])


def labels_of(image: Path) -> Path:
    """The file with an image's labels: beside it, or in the folder labels that lies beside the folder images.

    >>> labels_of(Path("/data/images/train/a.b.jpg"))
    PosixPath('/data/labels/train/a.b.txt')
    """
    before, found, after = str(image).rpartition("/images/")
    return Path(f"{before}/labels/{after}" if found else image).with_suffix(".txt")


def _size(image: Path, path: bytes, odd: Odd) -> tuple[int, int] | None:
    """Height and width, upright, from the head of the file."""
    try:
        with warnings.catch_warnings(), Image.open(image) as opened:
            warnings.simplefilter("ignore")  # what Pillow thinks of metadata
            turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            width, height = opened.size[::-1] if turned else opened.size
            return height, width
    except Exception as error:  # Pillow has its own kinds for a damaged file
        odd.note("image size", printable(path), f"it cannot be read ({reason(error)})")
        return None


def _objects(file: Path, column: dict[int, int], size: tuple[int, int], odd: Odd) -> Objects:
    """Of one image. Outlines where each of its objects is a polygon."""
    height, width = size
    shapes, classes = [], []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        odd.entries += 1
        if wrong := _wrong(words, column):
            odd.note(wrong[0], f"line {number} of {show(file.name)}", wrong[1])
            continue
        points = np.array(words[1:], np.float64).reshape(-1, 2)
        if len(points) == 2:  # centre and sides
            points = np.stack([points[0] - points[1] / 2, points[0] + points[1] / 2])
        shapes.append((number, points * [width, height]))
        classes.append(column[int(float(words[0]))])
    corners = np.array([[*points.min(0), *points.max(0)] for _, points in shapes]).reshape(-1, 4)
    kinds = odd_boxes(corners[:, :2], corners[:, 2:] - corners[:, :2], np.tile([width, height], (len(shapes), 1)))
    for (number, _), kind, corner in zip(shapes, kinds, corners, strict=True):
        if kind:
            told = ", ".join(f"{value:.0f}" for value in corner)
            odd.note(kind, f"line {number} of {show(file.name)}", f"x0 y0 x1 y1 {told} of {width} × {height}")
    whole = [row for row, kind in enumerate(kinds) if not kind]
    boxes = torch.from_numpy(corners[whole].clip(0, [width, height] * 2)).float()
    polygons = [shapes[row][1] for row in whole]
    none = torch.zeros(len(whole), dtype=torch.bool)
    columns = torch.tensor(classes, dtype=torch.int64)[whole]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    if any(len(points) == 2 for points in polygons):
        return Objects(boxes, columns, areas, none, none)
    outlines = [run_lengths_of([points.flatten().tolist()], height, width) for points in polygons]
    if outlines:
        from faster_coco_eval import mask

        areas = torch.from_numpy(np.asarray(mask.area(outlines), np.float32))
    return Objects(boxes, columns, areas, none, none, outlines)


def _wrong(words: list[str], column: dict[int, int]) -> tuple[str, str] | None:
    """The kind and detail of a line that is no object."""
    told = " ".join(words)[:60]
    try:
        values = [float(word) for word in words]
    except ValueError:
        return "malformed", told
    if len(values) < 5 or len(values) % 2 == 0:
        return "malformed", f"{len(values)} numbers, not a class and a box or a polygon: {told}"
    if not np.isfinite(values).all():
        return "not finite", told
    if values[0] not in column:
        return "unknown class", f"class {words[0]} of {len(column)} ({min(column)} to {max(column)})"
    return None


def alike(parts: dict[str, ObjectImages]) -> dict[str, ObjectImages]:
    """Masks only where all parts have them."""
    if all(part.everything.outlines is not None for part in parts.values()):
        return parts
    return {name: replace(part, everything=replace(part.everything, outlines=None)) for name, part in parts.items()}


register(
    "coco",
    Layout(read_coco, "coco", "put a json file in COCO's format and its images there", own=True),
)
register(
    "yolo",
    Layout(read_yolo, "yolo", "put data.yaml, images and labels there", own=True),
)
