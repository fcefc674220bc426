"""VISPR (Orekondy et al. 2017, https://arxiv.org/abs/1703.10660): which of 68 kinds of private information an image
shows. Every label is annotated: what an image is not said to show is absent."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from mls.data.annotated import folder_with
from mls.data.listing import FileSource
from mls.eval.data import DataSet, LabelledImages, Layout, presence, register
from mls.eval.data.annotations import parsing


def read(root: Path) -> DataSet:
    """`attributes.tsv` (columns idx and attribute_id; rows without idx are no attributes of the benchmark), and for
    each of train2017, val2017 and test2017 a json file an image (image_path, labels: attribute ids) and the images.
    Both lie in `root/annotations/SPLIT` and `root/images/SPLIT`, or together in `root/SPLIT`."""
    file = root / "attributes.tsv"
    with parsing(file, "VISPR attribute list"), file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines, delimiter="\t") if row["idx"]]
        names = [row["attribute_id"] for row in sorted(rows, key=lambda row: int(row["idx"]))]
    train, val, test = (_split(root, split, names) for split in ("train2017", "val2017", "test2017"))
    return DataSet("vispr", train, test, val)


def _split(root: Path, split: str, names: list[str]) -> LabelledImages:
    inside = root / "annotations" / split
    folder = inside if inside.is_dir() else root / split
    files = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
    if not files:
        raise FileNotFoundError(f"{folder}/*.json")
    column = {name: place for place, name in enumerate(names)}
    truth = np.zeros((len(files), len(names)), np.int8)
    paths = []
    for row, name in enumerate(files):
        with parsing(folder / name, "VISPR annotation"):
            content = json.loads((folder / name).read_bytes())
            paths.append(os.fsencode(PurePosixPath(content["image_path"]).name))
            truth[row, [column[label] for label in content["labels"]]] = 1
    images = folder_with([root / "images" / split, root / split], paths, folder)
    return LabelledImages(FileSource(f"vispr:{split}", images, paths), presence(torch.from_numpy(truth)), names)


DOWNLOAD = (
    "put attributes.tsv, the annotations and the images (folders train2017, val2017, test2017) "
    "of https://tribhuvanesh.github.io/vpa into one folder"
)
register("vispr", Layout(read, "vispr", DOWNLOAD, {"classes": 68, "train": 10_000, "val": 4_167, "test": 8_000}))
