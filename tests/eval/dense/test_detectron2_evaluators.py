"""The same detections have the same numbers, whether detectron2's evaluators look at them or ours."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval import mask
from torch import Tensor
from torchvision.ops import box_iou

from mls.data.layouts import write
from mls.eval import load_protocol
from mls.eval.data.objects import ObjectImages, encode
from mls.eval.dense import detectron2_data
from mls.eval.dense.coco_ap import Detections, coco_ap
from mls.eval.dense.prepare import load_images
from mls.eval.dense.schema import Detection
from mls.eval.dense.voc_ap import voc_ap
from mls.frameworks import installed as frameworks

pytestmark = pytest.mark.skipif(
    bool(frameworks.missing("detectron2")),
    reason="detectron2 is not installed: `mls doctor --frameworks` has the command",
)


def near_the_truth(truth: ObjectImages) -> list[Detections]:
    """Three detections around every object. detectron2's evaluator of VOC writes scores with three decimals and boxes
    with one, so these have no more; no score occurs twice, and no overlap is just a threshold, where the type of the
    numbers would decide."""
    draws, found = np.random.default_rng(0), []
    scores = torch.from_numpy(draws.permutation(999) + 1).float().div(1000)
    last = 0
    for row, (height, width) in enumerate(truth.sizes.tolist()):
        objects = truth.objects(row)
        first, last = last, last + 3 * len(objects)
        shifts = torch.from_numpy(draws.normal(0, 2, (last - first, 4))).float()
        boxes = (objects.boxes.repeat(3, 1) + shifts).clamp(0, width).round(decimals=1)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 2)
        steps = 20 * box_iou(boxes.double(), objects.boxes.double())
        clear = ((steps - steps.round()).abs() > 1e-3).logical_or(steps < 9).all(1).nonzero()[:, 0]
        order = clear[scores[first:last][clear].argsort(descending=True)]
        outlines = encode(filled(boxes[order], height, width))
        found.append(Detections(boxes[order], scores[first:last][order], objects.classes.repeat(3)[order], outlines))
    assert last <= len(scores)
    return found


def filled(boxes: Tensor, height: int, width: int) -> Tensor:
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for one, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist(), strict=True):
        one[y0:y1, x0:x1] = True
    return masks


def detectron2s_numbers(protocol: Detection, found: list[Detections], masks: bool) -> dict[str, float]:
    """Of its evaluator, to which the detections are handed as its network's."""
    from detectron2.data import DatasetCatalog
    from detectron2.structures import Boxes, Instances

    with frameworks.quiet(), contextlib.redirect_stdout(io.StringIO()):
        _, name = detectron2_data.register(protocol.data, Path())
        images = DatasetCatalog.get(name)
        evaluator = detectron2_data.build_evaluator(name, masks)
        evaluator.reset()
        for image, one in zip(images, found, strict=True):
            instances = Instances((image["height"], image["width"]))
            instances.pred_boxes, instances.scores = Boxes(one.boxes), one.scores
            instances.pred_classes = one.classes
            if masks:
                outlines = [torch.from_numpy(mask.decode(outline)).bool() for outline in one.outlines or ()]
                instances.pred_masks = torch.stack(outlines) if outlines else torch.zeros(0, 1, 1, dtype=torch.bool)
            evaluator.process([image], [{"instances": instances}])
        return detectron2_data.renamed(evaluator.evaluate())


@pytest.mark.parametrize("masks", [True, False])
def test_cocos_numbers_are_those_of_detectron2s_evaluator(masks: bool, tmp_path: Path) -> None:
    write("coco", tmp_path / "coco", train=2, test=40, size=96)
    file = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    for one in content["annotations"][::7]:
        one["iscrowd"] = 1
    file.write_text(json.dumps(content))
    where = [f"data.root={tmp_path / 'coco'}", "data.check_sizes=false", f"model.masks={str(masks).lower()}"]
    protocol = load_protocol("coco_fpn_1x", where)
    truth = load_images(protocol).test
    assert truth.everything.crowd.any()
    found = near_the_truth(truth)
    ours = coco_ap(found, truth, masks)
    assert detectron2s_numbers(protocol, found, masks) == pytest.approx(ours, abs=1e-9)
    assert 0.2 < ours["box_ap"] < 0.9 and len(ours) >= (6 if masks else 3)
    none = [Detections(one.boxes[:0], one.scores[:0], one.classes[:0], []) for one in found]
    theirs = detectron2s_numbers(protocol, none, masks)
    assert theirs == coco_ap(none, truth, masks) and set(theirs.values()) == {0.0}


def test_vocs_numbers_are_those_of_detectron2s_evaluator(tmp_path: Path) -> None:
    write("voc", tmp_path / "voc", train=4, test=80, size=96)
    protocol = load_protocol("voc0712_c4", [f"data.root={tmp_path / 'voc'}", "data.check_sizes=false"])
    truth = load_images(protocol).test
    counted = truth.everything.classes[~truth.everything.difficult]
    assert truth.everything.difficult.any()
    found = near_the_truth(truth)
    ours = voc_ap(found, truth)
    # A class that does not occur counts as nought there and is left out here. In VOC 2007's test all classes occur.
    share = len(counted.unique()) / len(truth.class_names)
    expected = {name: share * value for name, value in ours.items()}
    assert detectron2s_numbers(protocol, found, masks=False) == pytest.approx(expected, abs=1e-9)
    assert 0.2 < ours["box_ap"] < 0.9
