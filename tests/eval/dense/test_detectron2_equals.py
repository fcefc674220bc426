"""What detectron2 and we have in common is the same: its evaluators' numbers, and its detector with our weights."""

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import mask
from torch import Tensor, nn
from torchvision.ops import box_iou

from mls.data.layouts import write
from mls.eval import load_protocol
from mls.eval.data.objects import ObjectImages, encode
from mls.eval.dense import detectron2_data
from mls.eval.dense.coco_ap import Detections, coco_ap
from mls.eval.dense.detector import Detector
from mls.eval.dense.prepare import load_images
from mls.eval.dense.run import build_network
from mls.eval.dense.schema import Detection
from mls.eval.dense.voc_ap import voc_ap
from mls.eval.dense.with_detectron2 import prepare
from mls.exporting import frameworks
from mls.models.resnet_names import to_detectron2

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


def detectron2s_numbers(protocol: Detection, found: list[Detections], metric: str, masks: bool) -> dict[str, float]:
    """Of its evaluator, to which the detections are handed as its network's."""
    from detectron2.data import DatasetCatalog
    from detectron2.structures import Boxes, Instances

    with frameworks.quiet(), contextlib.redirect_stdout(io.StringIO()):
        _, name = detectron2_data.register(protocol.data, Path())
        images = DatasetCatalog.get(name)
        evaluator = detectron2_data.build_evaluator(name, metric, masks)
        evaluator.reset()
        for image, one in zip(images, found, strict=True):
            instances = Instances((image["height"], image["width"]))
            instances.pred_boxes, instances.scores = Boxes(one.boxes), one.scores
            instances.pred_classes = one.classes
            if masks:
                outlines = [torch.from_numpy(mask.decode(outline)).bool() for outline in one.outlines or ()]
                instances.pred_masks = torch.stack(outlines) if outlines else torch.zeros(0, 1, 1, dtype=torch.bool)
            evaluator.process([image], [{"instances": instances}])
        return detectron2_data.in_our_names(evaluator.evaluate())


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
    assert detectron2s_numbers(protocol, found, "coco", masks) == pytest.approx(ours, abs=1e-9, nan_ok=True)
    assert 0.2 < ours["box_ap"] < 0.9 and len(ours) == (12 if masks else 6)
    none = [Detections(one.boxes[:0], one.scores[:0], one.classes[:0], []) for one in found]
    theirs = detectron2s_numbers(protocol, none, "coco", masks)
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
    assert detectron2s_numbers(protocol, found, "voc07", masks=False) == pytest.approx(expected, abs=1e-9)
    assert 0.2 < ours["box_ap"] < 0.9


# Our detector's parts in detectron2's names.
PLACES = [
    (r"backbone\.trunk\.(.*)", lambda found: f"backbone.bottom_up.{to_detectron2(found[1])}"),
    (
        r"backbone\.pyramid\.(inner|layer)_blocks\.(\d)\.([01])\.(.*)",
        lambda found: (
            f"backbone.fpn_{'lateral' if found[1] == 'inner' else 'output'}{int(found[2]) + 2}."
            f"{'norm.' * int(found[3])}{found[4]}"
        ),
    ),
    (r"rpn\.head\.conv\.0\.0\.(.*)", lambda found: f"proposal_generator.rpn_head.conv.{found[1]}"),
    (r"rpn\.head\.cls_logits\.(.*)", lambda found: f"proposal_generator.rpn_head.objectness_logits.{found[1]}"),
    (r"rpn\.head\.bbox_pred\.(.*)", lambda found: f"proposal_generator.rpn_head.anchor_deltas.{found[1]}"),
    (
        r"roi_heads\.box_head\.([0-3])\.([01])\.(.*)",
        lambda found: f"roi_heads.box_head.conv{int(found[1]) + 1}.{'norm.' * int(found[2])}{found[3]}",
    ),
    (r"roi_heads\.box_head\.5\.(.*)", lambda found: f"roi_heads.box_head.fc1.{found[1]}"),
    (r"roi_heads\.box_predictor\.(.*)", lambda found: f"roi_heads.box_predictor.{found[1]}"),
    (
        r"roi_heads\.mask_head\.([0-3])\.([01])\.(.*)",
        lambda found: f"roi_heads.mask_head.mask_fcn{int(found[1]) + 1}.{'norm.' * int(found[2])}{found[3]}",
    ),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(.*)", lambda found: f"roi_heads.mask_head.deconv.{found[1]}"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(.*)", lambda found: f"roi_heads.mask_head.predictor.{found[1]}"),
]


def in_detectron2s_names(ours: Detector) -> dict[str, Tensor]:
    """torchvision counts the background as class 0 and gives it a box and a mask; detectron2 counts it last."""
    held = {}
    for name, tensor in ours.model.state_dict().items():
        (place,) = [to(found) for form, to in PLACES if (found := re.fullmatch(form, name))]
        if "box_predictor.cls_score" in name:
            tensor = tensor.roll(-1, 0)
        elif "box_predictor.bbox_pred" in name:
            tensor = tensor[4:]
        elif "mask_fcn_logits" in name:
            tensor = tensor[1:]
        held[place] = tensor
    return held


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, nn.Module, Tensor]:
    """Our detector, detectron2's with the same weights, and an image that neither scales."""
    from detectron2.modeling import build_model

    size = 96
    options = ["model.backbone=scratch:resnet18", "model.anchors=[8,16,24,32,48]", f"data.min_sizes=[{size}]"]
    options += [
        f"data.test_size={size}",
        f"data.max_size={2 * size}",
        "data.scenes.count=2",
        "data.scenes.test_count=1",
    ]
    protocol = load_protocol("detection_scenes", [*options, "model.score=0.0", "training.device=cpu"])
    images = load_images(protocol).train
    ours = build_network(protocol, "random", 0, images.class_names).eval()
    assert isinstance(ours, Detector)
    generator = torch.Generator().manual_seed(0)
    for part in ours.modules():  # so that no normalisation is the identity
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1, generator=generator)
            for tensor in (part.running_var, part.weight.data):
                tensor.uniform_(0.5, 1.5, generator=generator)
    with frameworks.quiet():
        there = dataclasses.replace(protocol, backend="detectron2")
        cfg, _, _ = prepare(there, "random", 0, tmp_path_factory.mktemp("state"))
        theirs = build_model(cfg).eval()
    missing, unexpected = theirs.load_state_dict(in_detectron2s_names(ours), strict=False)
    assert unexpected == [] and missing == []
    image = torch.randint(0, 256, (3, size, 128), dtype=torch.uint8, generator=generator)
    return ours, theirs, image


def seen(network: nn.Module, parts: list[str], run: Callable[[], Any]) -> tuple[dict[str, Any], Any]:
    """What some parts of a network give while it runs."""
    kept: dict[str, Any] = {}
    hooks = [
        network.get_submodule(part).register_forward_hook(lambda _, __, output, part=part: kept.update({part: output}))
        for part in parts
    ]
    with torch.no_grad(), frameworks.quiet():
        result = run()
    for hook in hooks:
        hook.remove()
    return kept, result


def test_with_the_same_weights_the_maps_and_the_proposals_scores_are_the_same(
    both: tuple[Detector, nn.Module, Tensor],
) -> None:
    ours, theirs, image = both
    mine, _ = seen(ours.model, ["backbone", "rpn.head"], lambda: ours.predict([image]))
    other, _ = seen(theirs, ["backbone", "proposal_generator.rpn_head"], lambda: theirs([{"image": image}]))
    for a, b in zip(mine["backbone"].values(), other["backbone"].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for found, expected in zip(mine["rpn.head"], other["proposal_generator.rpn_head"], strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_with_the_same_weights_and_unrounded_anchors_the_detections_are_the_same(
    both: tuple[Detector, nn.Module, Tensor],
) -> None:
    """torchvision rounds its anchors to whole pixels; nothing else lies between the two."""
    ours, theirs, image = both
    generator = ours.model.rpn.anchor_generator
    rounded, exact = generator.cell_anchors, list(theirs.proposal_generator.anchor_generator.cell_anchors)
    assert all(torch.equal(a, b.round()) for a, b in zip(rounded, exact, strict=True))
    generator.cell_anchors = exact
    mine, (found,) = seen(ours.model, ["roi_heads.mask_predictor"], lambda: ours.predict([image]))
    generator.cell_anchors = rounded
    other, (one,) = seen(theirs, ["roi_heads.mask_head.predictor"], lambda: theirs([{"image": image}]))
    instances = one["instances"]
    assert len(found.scores) == len(instances) > 5
    assert torch.equal(found.classes, instances.pred_classes)
    torch.testing.assert_close(found.scores, instances.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes, instances.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
    # As the heads give them: the two paste a mask into its image in different ways.
    masks, theirs_masks = mine["roi_heads.mask_predictor"][:, 1:], other["roi_heads.mask_head.predictor"]
    torch.testing.assert_close(masks, theirs_masks, rtol=1e-3, atol=1e-3)
