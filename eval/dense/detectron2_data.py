"""Data sets made known to detectron2: COCO's and VOC's layouts through its own readers, the embedded scenes as files
that are written for it. Its evaluators read the same files; what they say is told in our names here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mls.errors import ConfigError
from mls.eval.data import DataSet, folder_of
from mls.eval.data.objects import ObjectImages
from mls.eval.data.voc_objects import devkit
from mls.eval.dense.coco_ap import as_coco
from mls.eval.dense.prepare import SCENES
from mls.eval.dense.schema import DetectionData
from mls.files import write_atomically

KINDS = {"bbox": "box", "segm": "mask"}
NUMBERS = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium", "APl": "ap_large"}
NOTHING = {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
SPLITS = {"train": "train2017", "test": "val2017"}


def write_scenes(data: DataSet[ObjectImages], root: Path) -> None:
    """In COCO's layout, pixel for pixel: the scenes that every back-end sees."""
    for split, name in SPLITS.items():
        images: ObjectImages = getattr(data, split)
        content = as_coco(images)
        (root / name).mkdir(parents=True, exist_ok=True)
        for row, entry in enumerate(content["images"]):
            entry["file_name"] = f"{row:06d}.png"
            Image.fromarray(images.pixels(row).permute(1, 2, 0).numpy()).save(root / name / entry["file_name"])
        for one in content["annotations"]:
            one["segmentation"] = {**one["segmentation"], "counts": one["segmentation"]["counts"].decode()}
        (root / "annotations").mkdir(exist_ok=True)
        write_atomically(annotations_of(root, name), json.dumps(content).encode())


def annotations_of(root: Path, name: str) -> Path:
    return root / "annotations" / f"instances_{name}.json"


def register(data: DetectionData, scenes: Path) -> tuple[list[str], str]:
    """The names under which detectron2 now knows what is trained and tested on."""
    if data.name == "voc0712":
        root = devkit(folder_of(data.name, data.root))
        parts = [("VOC2007", "trainval", 2007), ("VOC2012", "trainval", 2012), ("VOC2007", "test", 2007)]
        *train, test = [_register_voc(root, *part) for part in parts]
        return train, test
    if data.name == "coco2017":
        root = folder_of(data.name, data.root)
    elif data.name in SCENES:
        root = scenes
    else:
        raise ConfigError(f"detectron2 is not told how to read {data.name}: set backend=torchvision")
    return [_register_coco(root, SPLITS["train"])], _register_coco(root, SPLITS["test"])


def _register_coco(root: Path, split: str) -> str:
    from detectron2.data.datasets import register_coco_instances

    name = _forgotten(f"{root}/{split}")
    register_coco_instances(name, {}, str(annotations_of(root, split)), str(root / split))
    return name


def _register_voc(root: Path, folder: str, split: str, year: int) -> str:
    from detectron2.data.datasets import register_pascal_voc

    name = _forgotten(f"{root}/{folder}/{split}")
    register_pascal_voc(name, str(root / folder), split, year)
    return name


def _forgotten(name: str) -> str:
    """A name that detectron2 does not know yet, or no longer: the files may be others than before."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    return name


def build_evaluator(name: str, metric: str, masks: bool) -> Any:
    from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator

    if metric == "voc07":
        return PascalVOCDetectionEvaluator(name)
    return COCOEvaluator(name, tasks=("bbox", "segm")[: 1 + masks])


def in_our_names(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """As shares. A size of which there is no object is left out; where nothing was found at all, detectron2 knows no
    number and the average precision is nought.

    >>> in_our_names({"bbox": {"AP": 50.0, "APl": float("nan"), "AP-cat": 50.0}, "segm": {"AP": float("nan")}})
    {'box_ap': 0.5, 'mask_ap': 0.0, 'mask_ap50': 0.0, 'mask_ap75': 0.0}
    """
    values = {}
    for task, numbers in results.items():
        known = {NUMBERS[name]: float(value) / 100 for name, value in numbers.items() if name in NUMBERS}
        found = {name: value for name, value in known.items() if not math.isnan(value)}
        values |= {f"{KINDS[task]}_{name}": value for name, value in (found or NOTHING).items()}
    return values
