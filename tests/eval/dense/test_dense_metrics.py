"""Average precision and intersection over union, against the published programs and against plain loops."""

import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from mls.eval.data.objects import ObjectImages, Objects, encode, gather
from mls.eval.dense.coco_ap import Detections, as_coco, coco_ap, detections_as_coco
from mls.eval.dense.voc_ap import voc_ap
from mls.frozen.confusion import confusion, segmentation_metrics

CLASSES = ["a", "b", "c"]


def boxes_of(draws: np.random.Generator, count: int, size: int) -> torch.Tensor:
    corners = draws.uniform(0, size - 12, (count, 2))
    return torch.tensor(np.concatenate([corners, corners + draws.uniform(4, 12, (count, 2))], 1), dtype=torch.float32)


def filled(boxes: torch.Tensor, size: int) -> torch.Tensor:
    masks = torch.zeros(len(boxes), size, size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def truth_and_detections(seed: int, images: int = 12, size: int = 64) -> tuple[ObjectImages, list[Detections]]:
    """Objects, some of them crowds or difficult, and detections of which most lie near one."""
    draws, many, found = np.random.default_rng(seed), [], []
    for _ in range(images):
        count = int(draws.integers(0, 6))
        boxes, classes = boxes_of(draws, count, size), torch.from_numpy(draws.integers(0, 3, count))
        flag = lambda share, count=count: torch.from_numpy(draws.random(count) < share)
        masks = filled(boxes, size)
        many.append(Objects(boxes, classes, masks.sum((1, 2)).float(), flag(0.1), flag(0.2), encode(masks)))
        near = boxes + torch.from_numpy(draws.normal(0, 1, boxes.shape)).float()
        far = boxes_of(draws, 3, size)
        boxes = torch.cat([near, near, far]).clamp(0, size)
        kinds = torch.cat([classes, classes, torch.from_numpy(draws.integers(0, 3, 3))])
        scores = torch.from_numpy(draws.permutation(1000)[: len(boxes)] / 1000).float()
        found.append(Detections(boxes, scores, kinds, encode(filled(boxes, size))))
    everything, starts = gather(many)
    sizes = torch.tensor([[size, size]] * images)
    return ObjectImages(None, sizes, everything, starts, CLASSES), found  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_cocos_average_precision_equals_pycocotools(seed: int) -> None:
    truth, found = truth_and_detections(seed)
    ours = coco_ap(found, truth, masks=True)
    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = as_coco(truth)
        true.createIndex()
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            left_out = "bbox" if kind == "segm" else "segmentation"  # what says how large a detection is
            rows = [
                {key: value for key, value in row.items() if key != left_out} for row in detections_as_coco(found, True)
            ]
            evaluation = COCOeval(true, true.loadRes(rows), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
            for key, value in zip(keys, evaluation.stats, strict=False):
                assert ours.get(f"{name}_{key}", -1) == pytest.approx(value, abs=1e-12)  # -1: nothing of this size
    assert 0.1 < ours["box_ap"] < 0.9


def test_nothing_found_is_an_average_precision_of_nought() -> None:
    truth, found = truth_and_detections(0)
    none = [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), []) for _ in found]
    assert coco_ap(none, truth, masks=True)["mask_ap50"] == 0
    assert voc_ap(none, truth)["box_ap"] == 0


def plain_voc(truth: ObjectImages, found: list[Detections], number: int, threshold: float, eleven: bool) -> float:
    """The devkit's loops, detection by detection."""
    detections = [
        (float(one.scores[i]), row, one.boxes[i])
        for row, one in enumerate(found)
        for i in range(len(one.scores))
        if int(one.classes[i]) == number
    ]
    objects = {row: truth.objects(row) for row in range(len(truth))}
    mine = {row: (one.classes == number).nonzero()[:, 0].tolist() for row, one in objects.items()}
    total = sum(not objects[row].difficult[i] for row, rows in mine.items() for i in rows)
    taken, true, false, curve = set(), 0, 0, []
    for _, row, box in sorted(detections, key=lambda one: -one[0]):
        overlaps = [(float(box_iou(box[None], objects[row].boxes[i][None])), i) for i in mine[row]]
        best, i = max(overlaps, default=(0.0, -1), key=lambda one: one[0])
        if best <= threshold:
            false += 1
        elif objects[row].difficult[i]:
            continue
        elif (row, i) in taken:
            false += 1
        else:
            taken.add((row, i))
            true += 1
        curve.append((true / total, true / max(1, true + false)))
    if eleven:
        return sum(max([p for r, p in curve if r >= step * 0.1], default=0.0) for step in range(11)) / 11
    value, before = 0.0, 0.0
    for place, (recall, _) in enumerate(curve):
        value += (recall - before) * max(p for _, p in curve[place:])
        before = recall
    return value


@pytest.mark.parametrize("eleven", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_vocs_average_precision_equals_the_devkits_loops(seed: int, eleven: bool) -> None:
    truth, found = truth_and_detections(seed)
    ours = voc_ap(found, truth, eleven)
    for key, threshold in (("box_ap50", 0.5), ("box_ap75", 0.75)):
        plain = np.mean([plain_voc(truth, found, number, threshold, eleven) for number in range(len(CLASSES))])
        assert ours[key] == pytest.approx(plain, abs=1e-9)
    assert ours["box_ap75"] < ours["box_ap50"] < 1


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_the_confusion_matrix_equals_sets_of_pixels(seed: int, classes: int) -> None:
    draws = np.random.default_rng(seed)
    truth = draws.integers(0, classes, (6, 7)).astype(np.uint8)
    truth[draws.random((6, 7)) < 0.2] = 255
    found = draws.integers(0, classes, (6, 7))
    values = segmentation_metrics(confusion(torch.from_numpy(found), torch.from_numpy(truth), classes))
    known, unions, recalls = truth != 255, [], []
    for number in range(classes):
        both = ((truth == number) & (found == number) & known).sum()
        either = (((truth == number) | (found == number)) & known).sum()
        unions += [both / either] if either else []
        recalls += [both / (truth == number).sum()] if (truth == number).any() else []
    assert values["miou"] == pytest.approx(np.mean(unions))
    assert values["macc"] == pytest.approx(np.mean(recalls))
    assert values["aacc"] == pytest.approx(((truth == found) & known).sum() / known.sum())
