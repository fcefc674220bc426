"""Images with annotations in a published layout: COCO instances and VOC. Labels serve monitoring and probes,
pretraining does not use them. Writing these layouts is in layouts.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mls.config import DataConfig
from mls.data.listing import LOOKED_FOR, FileSource, directory, list_images, locate, printable, show
from mls.data.truth import coco_truth, size_of
from mls.errors import DataError
from mls.files import read_json

VOC_CLASSES: list[str] = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]
FIRST_FEW = 20  # files of an annotation file of which one must exist in the image folder


class CocoSource(FileSource):
    """COCO instances. Images are numbered by file name, classes by category id."""

    def __init__(self, folders: Sequence[Path], annotations: Path, limit: int | None = None) -> None:
        content = read_json(annotations, "name an instances file")
        try:
            truth = coco_truth(content, annotations, for_classes=True)
            images = sorted(truth.images.values(), key=lambda image: image["file_name"])
            row = {image["id"]: i for i, image in enumerate(images)}
            column = {category: j for j, category in enumerate(sorted(truth.names))}
            objects = truth.objects
            pairs = np.array([(row[a["image_id"]], column[a["category_id"]]) for a in objects], np.int64).reshape(-1, 2)
            boxes = np.array([a["bbox"] for a in objects], np.float64).reshape(-1, 4)
            sizes = np.array([size_of(image) or (0, 0) for image in images], np.float64).reshape(-1, 2)
            paths = [os.fsencode(image["file_name"]) for image in images]
            names = [truth.names[category] for category in column]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(
                f"{show(annotations)} is not a COCO instances file ({type(error).__name__}: {error}): it needs images, "
                "annotations with image_id, category_id and bbox, and categories"
            ) from None
        if not paths:
            raise DataError(f"{show(annotations)} lists no images: point data.annotations to another file")
        folder = folder_with(folders, paths, annotations)
        super().__init__(f"coco:{show(annotations.stem)}", folder, paths, names, pairs, limit)
        by_image = np.argsort(pairs[:, 0], kind="stable")
        self.odd = truth.odd
        self._sizes, self._annotations, self._boxes = sizes, annotations, boxes[by_image]
        self._classes = pairs[by_image, 1]
        self._starts = np.searchsorted(pairs[by_image, 0], np.arange(len(paths) + 1))

    def boxes(self, index: int) -> tuple[Float[Tensor, "objects 4"], Int64[Tensor, " objects"]]:
        """The objects of one image: x0 y0 x1 y1 as shares of its width and height, and their classes."""
        rows = slice(self._starts[index], self._starts[index + 1])
        if not self._sizes[index].all():
            raise DataError(f"{show(self._annotations)} gives no width and height for {self.describe(index)}: add them")
        corner, extent = self._boxes[rows, :2], self._boxes[rows, 2:]
        shares = np.concatenate([corner, corner + extent], axis=1) / np.tile(self._sizes[index], 2)
        return torch.from_numpy(shares.clip(0, 1)).float(), torch.from_numpy(self._classes[rows])


def from_coco(config: DataConfig) -> CocoSource:
    root = directory(config, "COCO images")
    if config.annotations is not None:
        inside = root / config.annotations
        file = inside if inside.is_file() else locate(config.annotations, "data.annotations")
    else:
        known = sorted(f for f in root.glob("annotations/instances_*.json") if (root / _coco_folder(f)).is_dir())
        chosen = [f for f in known if _coco_folder(f) == "train2017"] or known
        if len(chosen) != 1:
            found = f"several ({', '.join(show(f.name) for f in chosen)})" if chosen else "none"
            raise DataError(
                f"expected one annotations/instances_NAME.json beside a folder NAME in {show(root)} and found {found}: "
                "set data.annotations to the json file and data.root to its image folder"
            )
        file = chosen[0]
    folders = [folder for folder in (root / _coco_folder(file), root) if folder.is_dir()]
    return CocoSource(folders, file, config.limit)


def _coco_folder(annotations: Path) -> str:
    return annotations.stem.removeprefix("instances_")


def from_voc(config: DataConfig) -> FileSource:
    """All years under data.root together (07+12). A difficult object counts as present."""
    root = directory(config, "VOC")
    years = voc_years(root)
    if not years:
        raise DataError(
            f"no VOC tree in {show(root)}: data.root must be VOCdevkit, or a folder with JPEGImages and Annotations"
        )
    paths, found = [], []
    for year in years:
        files = {printable(os.path.splitext(path)[0]): path for path in list_images(year / "JPEGImages")}
        for stem in _voc_stems(year, config.annotations, sorted(files)):
            file = os.fsdecode(files.get(stem, f"{stem}.jpg".encode()))
            paths.append(os.fsencode((year / "JPEGImages" / file).relative_to(root)))
            found.append(_voc_objects(year / "Annotations" / f"{stem}.xml"))
    if not paths:
        raise DataError(f"no images in {show(root)} ({LOOKED_FOR}): choose another split with data.annotations")
    folder_with([root], paths, years[0])
    names = set().union(*found)
    classes = list(VOC_CLASSES) if names <= set(VOC_CLASSES) else sorted(names)
    pairs = [(i, classes.index(name)) for i, objects in enumerate(found) for name in sorted(objects)]
    name = f"voc:{'+'.join(show(year.name) for year in years)}"
    labels = np.array(pairs, dtype=np.int64).reshape(-1, 2) if pairs else None
    return FileSource(name, root, paths, classes if pairs else None, labels, config.limit)


def voc_years(root: Path) -> list[Path]:
    """The folders with JPEGImages and Annotations: data.root itself, or those in it or its VOCdevkit."""
    inside = sorted(root.glob("VOC20*")) + sorted(root.glob("VOCdevkit/VOC20*"))
    return [year for year in (root, *inside) if (year / "JPEGImages").is_dir() and (year / "Annotations").is_dir()]


def _voc_stems(year: Path, split: str | None, files: list[str]) -> list[str]:
    lists = year / "ImageSets" / "Main"
    if split is None and not lists.is_dir():
        return files  # data sets in VOC's layout often have no splits
    file = lists / f"{split or 'trainval'}.txt"
    if not file.is_file():
        # class lists such as cat_train.txt are in the same folder and are no splits
        known = ", ".join(show(f.stem) for f in sorted(lists.glob("*.txt")) if "_" not in f.stem) or "none"
        raise DataError(f"no split {show(file)}: set data.annotations to one of those there ({known})")
    return [line.split()[0] for line in file.read_text().splitlines() if line.strip()]


def _voc_objects(file: Path) -> set[str]:
    try:
        return {(item.findtext("name") or "").strip() for item in ElementTree.parse(file).getroot().iter("object")} - {
            ""
        }
    except FileNotFoundError:
        return set()  # as for COCO, an image without annotations stays in the source
    except ElementTree.ParseError as error:
        raise DataError(f"{show(file)} is not valid XML ({error}): repair it or delete it") from None


def folder_with(folders: Sequence[Path], paths: Sequence[bytes], named_by: Path) -> Path:
    """The folder in which any of the first few paths exists. Other files are not checked until they are read."""
    for folder in folders:
        if any(os.path.isfile(os.path.join(os.fsencode(folder), path)) for path in paths[:FIRST_FEW]):
            return folder
    raise DataError(
        f"none of the first {len(paths[:FIRST_FEW])} images that {show(named_by)} names is in {show(folders[-1])} "
        f"(first: {printable(paths[0])}): point data.root to the folder that has them"
    )
