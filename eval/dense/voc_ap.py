"""VOC's average precision: VOC 2007's mean over eleven recalls, or the area under the curve of later years, at each of
COCO's thresholds, as in the tables of MoCo and later papers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.ops import box_iou

from mls.eval.data.objects import ObjectImages
from mls.eval.dense.coco_ap import Detections

THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]


def voc_ap(found: Sequence[Detections], truth: ObjectImages, eleven_points: bool = True) -> dict[str, float]:
    """box_ap is the mean over the thresholds 0.5, 0.55 ... 0.95, as shares; a class without objects is left out."""
    per_class = [
        values
        for number in range(len(truth.class_names))
        if (values := _of_class(number, found, truth, eleven_points)) is not None
    ]
    mean = torch.stack(per_class).mean(0)
    return {"box_ap": mean.mean().item(), "box_ap50": mean[0].item(), "box_ap75": mean[5].item()}


def _of_class(
    number: int, found: Sequence[Detections], truth: ObjectImages, eleven_points: bool
) -> Float[Tensor, "thresholds"] | None:
    """The values of one class at each threshold; None if it has no objects. A detection whose best match is a difficult
    object is ignored."""
    total, scores, right, counted = 0, [], [], []
    for row, one in enumerate(found):
        objects = truth.objects(row)
        mine = objects.classes == number
        boxes, difficult = objects.boxes[mine], objects.difficult[mine]
        total += int((~difficult).sum())
        picked = (one.classes == number).nonzero()[:, 0]
        picked = picked[one.scores[picked].argsort(descending=True, stable=True)]
        hit, known = _match(one.boxes[picked], boxes, difficult)
        scores.append(one.scores[picked])
        right.append(hit)
        counted.append(known)
    if not total:
        return None
    order = torch.cat(scores).argsort(descending=True, stable=True)
    hits, known = torch.cat(right)[order].double(), torch.cat(counted)[order].double()
    values = []
    for place in range(len(THRESHOLDS)):
        true = hits[:, place].cumsum(0)
        recall, precision = true / total, true / known[:, place].cumsum(0).clamp(min=1e-12)
        values.append(_eleven(recall, precision) if eleven_points else _area(recall, precision))
    return torch.tensor(values, dtype=torch.float64)


def _match(
    boxes: Float[Tensor, "detections 4"], true: Float[Tensor, "objects 4"], difficult: Bool[Tensor, "objects"]
) -> tuple[Bool[Tensor, "detections thresholds"], Bool[Tensor, "detections thresholds"]]:
    """Which detections of one image are correct, and which are counted. Each is matched with the object of largest
    overlap; of several for one object the one with the highest score is correct."""
    right = torch.zeros(len(boxes), len(THRESHOLDS), dtype=torch.bool)
    counted = torch.ones_like(right)
    if len(boxes) and len(true):
        overlap, nearest = box_iou(boxes, true).max(1)
        for place, threshold in enumerate(THRESHOLDS):
            taken = torch.zeros(len(true), dtype=torch.bool)
            for i in (overlap > threshold).nonzero()[:, 0].tolist():
                best = int(nearest[i])
                if difficult[best]:
                    counted[i, place] = False
                elif not taken[best]:
                    right[i, place] = taken[best] = True
    return right, counted


def _eleven(recall: Float[Tensor, "n"], precision: Float[Tensor, "n"]) -> float:
    """The mean of the best precision at recall 0, 0.1 ... 1 or more. Multiples of 0.1 in floating point, as in the
    devkit and detectron2: a recall of 3 / 10 is below 3 * 0.1."""
    best = [precision[recall >= step * 0.1] for step in range(11)]
    return sum(float(one.max()) if len(one) else 0.0 for one in best) / 11


def _area(recall: Float[Tensor, "n"], precision: Float[Tensor, "n"]) -> float:
    """The area under the curve, with precision made monotonically decreasing."""
    falling = precision.flip(0).cummax(0).values.flip(0) if len(precision) else precision
    steps = torch.diff(recall, prepend=recall.new_zeros(1)) if len(recall) else recall
    return float((steps * falling).sum())
