"""Data sets registered with detectron2: COCO's and VOC's layouts through its own readers, the embedded scenes and
the user's own data as files that are written for it. Its evaluators read the same files; their results get our metrics'
names here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mls.data.listing import FileSource
from mls.errors import ConfigError
from mls.eval.data import LAYOUTS, DataSet, folder_of
from mls.eval.data.objects import ObjectImages
from mls.eval.data.voc_objects import devkit
from mls.eval.dense.coco_ap import as_coco
from mls.eval.dense.prepare import SCENES
from mls.eval.dense.schema import DetectionData
from mls.files import write_atomically
from mls.frameworks import detectron2_train

KINDS = {"bbox": "box", "segm": "mask"}
NUMBERS = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium", "APl": "ap_large"}
NO_DETECTIONS = {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
SPLITS = {"train": "train2017", "test": "val2017"}


def written(data: DetectionData) -> bool:
    """Whether the annotations are written for detectron2: of the embedded scenes, and of the user's own data."""
    return data.name in SCENES or LAYOUTS[data.name].own


def write(data: DataSet[ObjectImages], root: Path) -> None:
    """In COCO's layout, with the pixels that every back-end is given: the user's files, the scenes as new ones."""
    for split, name in SPLITS.items():
        images: ObjectImages = getattr(data, split)
        content = as_coco(images)
        (root / name).mkdir(parents=True, exist_ok=True)
        for row, entry in enumerate(content["images"]):
            if isinstance(images.images, FileSource):
                entry["file_name"] = os.fsdecode(
                    images.images.path(row)
                )  # absolute: detectron2 puts no folder before it
            else:
                entry["file_name"] = f"{row:06d}.png"
                Image.fromarray(images.pixels(row).permute(1, 2, 0).numpy()).save(root / name / entry["file_name"])
        for one in content["annotations"]:
            if "segmentation" in one:
                one["segmentation"] = {**one["segmentation"], "counts": _text(one["segmentation"]["counts"])}
        (root / "annotations").mkdir(exist_ok=True)
        write_atomically(detectron2_train.annotations_of(root, name), json.dumps(content).encode())


def _text(counts: str | bytes) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def register(data: DetectionData, state: Path) -> tuple[list[str], str]:
    """Returns detectron2's names of the training sets and of the test set. `state`: where `write` has written."""
    if data.name == "voc0712":
        root = devkit(folder_of(data.name, data.root))
        *train, test = [_register_voc(root, *part) for part in ((2007, "trainval"), (2012, "trainval"), (2007, "test"))]
        return train, test
    if data.name != "coco2017" and not written(data):
        raise ConfigError(f"detectron2 cannot read {data.name}: set backend=torchvision")
    root = state if written(data) else folder_of(data.name, data.root)
    train, test = (detectron2_train.register_coco(root, split) for split in SPLITS.values())
    return [train], test


def _register_voc(root: Path, year: int, split: str) -> str:
    from detectron2.data import MetadataCatalog  # pyright: ignore
    from detectron2.data.datasets import register_pascal_voc  # pyright: ignore

    name = detectron2_train.unregistered(f"{root}/VOC{year}/{split}")
    register_pascal_voc(name, str(root / f"VOC{year}"), split, year)
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"  # detectron2 says so of its own sets alone
    return name


def build_evaluator(name: str, masks: bool) -> Any:
    return detectron2_train.build_evaluator(name, tasks=("bbox", "segm")[: 1 + masks])


def renamed(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """As shares under our names. Sizes without objects are left out. Without any detection detectron2 gives NaN: the
    average precision is 0.

    >>> renamed({"bbox": {"AP": 50.0, "APl": float("nan"), "AP-cat": 50.0}, "segm": {"AP": float("nan")}})
    {'box_ap': 0.5, 'mask_ap': 0.0, 'mask_ap50': 0.0, 'mask_ap75': 0.0}
    """
    values = {}
    for task, numbers in results.items():
        known = {NUMBERS[name]: float(value) / 100 for name, value in numbers.items() if name in NUMBERS}
        found = {name: value for name, value in known.items() if not math.isnan(value)}
        values |= {f"{KINDS[task]}_{name}": value for name, value in (found or NO_DETECTIONS).items()}
    return values
