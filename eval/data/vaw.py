"""VAW, visual attributes in the wild (Pham et al. 2021): objects in Visual Genome images, 620 attributes of which a few
are annotated for each object. A row for each object's box."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int8, Int64

from mls.data.listing import FileSource, show
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.annotations import corners, parsing

FOLDERS = ("VG_100K", "VG_100K_2")  # Visual Genome is published as two archives
DOWNLOAD = (
    "put the json files of https://github.com/adobe-research/vaw_dataset (folder data) into one folder, and beside "
    "them both parts of the images of https://visualgenome.org (1.4), unpacked as VG_100K and VG_100K_2"
)


def read(root: Path) -> DataSet:
    """`attribute_index.json` (attribute: column), `train_part1.json`, `train_part2.json`, `val.json` and `test.json`
    in `root` or `root/data`, images in `VG_100K` and `VG_100K_2`. The parts are lists of objects with image_id,
    instance_bbox (x, y, width, height), positive_attributes and negative_attributes; what is in neither is unknown."""
    folder = root / "data" if (root / "data").is_dir() else root
    file = folder / "attribute_index.json"
    with parsing(file, "VAW attribute index"):
        index = json.loads(file.read_bytes())
        names = sorted(index, key=lambda name: int(index[name]))
    found = {file: part for part in FOLDERS if (root / part).is_dir() for file in os.listdir(root / part)}

    def split(name: str, *parts: str) -> LabelledImages:
        return _split(root, name, [folder / f"{part}.json" for part in parts], names, found)

    train = split("train", "train_part1", "train_part2")
    return DataSet("vaw", train, split("test", "test"), split("val", "val"))


def _split(root: Path, split: str, files: list[Path], names: list[str], found: dict[str, str]) -> LabelledImages:
    column = {name: place for place, name in enumerate(names)}
    parts = [_objects(file, column) for file in files]
    ids, boxes, truth = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    images, rows = np.unique(ids, return_inverse=True)
    files_of = [f"{image}.jpg" for image in images.tolist()]
    missing = [file for file in files_of if file not in found]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(files_of)} images of VAW's {split} are neither in {show(root / FOLDERS[0])} "
            f"nor in {FOLDERS[1]} (first: {missing[0]}): {DOWNLOAD}"
        )
    source = FileSource(f"vaw:{split}", root, [os.fsencode(f"{found[file]}/{file}") for file in files_of])
    return LabelledImages(
        source, torch.from_numpy(truth), names, torch.from_numpy(rows).long(), torch.from_numpy(boxes)
    )


def _objects(
    file: Path, column: dict[str, int]
) -> tuple[Int64[np.ndarray, "objects"], Int64[np.ndarray, "objects 4"], Int8[np.ndarray, "objects classes"]]:
    """Image ids, boxes and labels of one file."""
    with parsing(file, "VAW file"):
        objects = json.loads(file.read_bytes())
        ids = np.array([item["image_id"] for item in objects], np.int64)
        boxes = corners([item["instance_bbox"] for item in objects])
        truth = np.zeros((len(objects), len(column)), np.int8)
        for sign, key in ((-1, "negative_attributes"), (1, "positive_attributes")):
            pairs = [(row, column[name]) for row, item in enumerate(objects) for name in item[key]]
            rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T
            truth[rows, columns] = sign
    return ids, boxes, truth


SIZES = {"classes": 620, "train": 216_790, "val": 12_286, "test": 31_819}  # objects; published as 260,895 in all
register("vaw", Layout(read, "vaw", DOWNLOAD, SIZES))
