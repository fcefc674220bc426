"""COCO's average precision of boxes and masks, by faster-coco-eval, which equals pycocotools (tested)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float, Int64
from torch import Tensor

from mls.eval.data.objects import ObjectImages, RunLengths

# The six of COCO's twelve numbers that papers report.
NUMBERS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}


@dataclass(frozen=True)
class Detections:
    """The detections of one image, in descending order of their scores."""

    boxes: Float[Tensor, "detections 4"]  # x0 y0 x1 y1 in pixels of the image file
    scores: Float[Tensor, "detections"]
    classes: Int64[Tensor, "detections"]
    outlines: list[RunLengths] | None = None


def coco_ap(found: Sequence[Detections], truth: ObjectImages, masks: bool) -> dict[str, float]:
    """box_ap and so on, as shares; sizes without objects are left out. `found` has one entry per image."""
    from faster_coco_eval import COCO, COCOeval_faster

    true = COCO(as_coco(truth))
    rows = detections_as_coco(found, masks)
    values = {}
    kinds: tuple[tuple[Literal["bbox", "segm"], str], ...] = (("bbox", "box"), ("segm", "mask"))
    for kind, name in kinds[: 1 + masks]:
        if not rows:
            values |= dict.fromkeys((f"{name}_ap", f"{name}_ap50", f"{name}_ap75"), 0.0)
            continue
        if kind == "segm":  # so that small, medium and large follow from the mask's area, as in detectron2
            rows = [{key: value for key, value in row.items() if key != "bbox"} for row in rows]
        evaluation = COCOeval_faster(true, true.loadRes(rows), kind, print_function=lambda *text: None)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        stats = {f"{name}_{number}": float(evaluation.stats[place]) for number, place in NUMBERS.items()}
        values |= {number: value for number, value in stats.items() if value >= 0}  # -1: no objects
    return values


def as_coco(truth: ObjectImages) -> dict[str, Any]:
    """The true objects in the format of an instances file."""
    objects, annotations = truth.everything, []
    owner = [row for row, count in enumerate(truth.starts.diff().tolist()) for _ in range(count)]
    for number, row in enumerate(owner):
        annotation = {
            "id": number + 1,
            "image_id": row + 1,
            "category_id": int(objects.classes[number]) + 1,
            "bbox": corner_and_size(objects.boxes[number]),
            "area": float(objects.areas[number]),
            "iscrowd": int(objects.crowd[number]),
        }
        if objects.outlines is not None:
            annotation["segmentation"] = objects.outlines[number]
        annotations.append(annotation)
    images = [{"id": row + 1, "height": h, "width": w} for row, (h, w) in enumerate(truth.sizes.tolist())]
    categories = [{"id": number, "name": name} for number, name in enumerate(truth.class_names, start=1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def detections_as_coco(found: Sequence[Detections], masks: bool) -> list[dict[str, Any]]:
    """In COCO's results format."""
    rows = []
    for image, one in enumerate(found, start=1):
        for place in range(len(one.scores)):
            row = {
                "image_id": image,
                "category_id": int(one.classes[place]) + 1,
                "bbox": corner_and_size(one.boxes[place]),
                "score": float(one.scores[place]),
            }
            if masks:
                assert one.outlines is not None
                row["segmentation"] = one.outlines[place]
            rows.append(row)
    return rows


def corner_and_size(box: Float[Tensor, "4"]) -> list[float]:
    x0, y0, x1, y1 = box.tolist()
    return [x0, y0, x1 - x0, y1 - y0]
