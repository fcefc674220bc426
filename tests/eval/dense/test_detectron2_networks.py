"""The same weights give the same proposals, detections and masks, in detectron2's detector and in ours."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mls.eval import load_protocol
from mls.eval.dense.detector import RATIOS, Detector
from mls.eval.dense.prepare import load_images
from mls.eval.dense.run import build_network
from mls.eval.dense.with_detectron2 import prepare
from mls.exporting import frameworks
from mls.models.resnet_names import to_detectron2

pytestmark = pytest.mark.skipif(
    bool(frameworks.missing("detectron2")),
    reason="detectron2 is not installed: `mls doctor --frameworks` has the command",
)
SIZE = 96  # of the image's short side, so that nothing is scaled
SIZES = [8, 16, 24, 32, 48]
OPTIONS = [f"model.anchors={SIZES}", f"data.min_sizes=[{SIZE}]", f"data.test_size={SIZE}", f"data.max_size={2 * SIZE}"]
OPTIONS += ["model.score=0.0", "training.device=cpu", "data.scenes.count=2", "data.scenes.test_count=1"]
BACKBONES = {"fpn": "scratch:resnet18", "c4": "scratch:resnet50"}

# Our detector's parts in detectron2's names.
HEAD = "proposal_generator.rpn_head."
SHARED = {
    r"rpn\.head\.conv\.0\.0\.(.*)": HEAD + r"conv.\1",
    r"rpn\.head\.cls_logits\.(.*)": HEAD + r"objectness_logits.\1",
    r"rpn\.head\.bbox_pred\.(.*)": HEAD + r"anchor_deltas.\1",
    r"roi_heads\.box_predictor\.(.*)": r"roi_heads.box_predictor.\1",
    r"roi_heads\.mask_predictor\.conv5_mask\.(.*)": r"roi_heads.mask_head.deconv.\1",
    r"roi_heads\.mask_predictor\.mask_fcn_logits\.(.*)": r"roi_heads.mask_head.predictor.\1",
}
PLACES: dict[str, dict[str, str | Callable[[re.Match[str]], str]]] = {
    "fpn": {
        **SHARED,
        r"backbone\.trunk\.(.*)": lambda found: f"backbone.bottom_up.{to_detectron2(found[1])}",
        r"backbone\.pyramid\.inner_blocks\.(\d)\.([01])\.(.*)": lambda found: behind("backbone.fpn_lateral", 2, found),
        r"backbone\.pyramid\.layer_blocks\.(\d)\.([01])\.(.*)": lambda found: behind("backbone.fpn_output", 2, found),
        r"roi_heads\.box_head\.([0-3])\.([01])\.(.*)": lambda found: behind("roi_heads.box_head.conv", 1, found),
        r"roi_heads\.box_head\.5\.(.*)": r"roi_heads.box_head.fc1.\1",
        r"roi_heads\.mask_head\.([0-3])\.([01])\.(.*)": lambda found: behind("roi_heads.mask_head.mask_fcn", 1, found),
    },
    "c4": {
        **SHARED,
        r"backbone\.trunk\.(.*)": lambda found: f"backbone.{to_detectron2(found[1])}",
        r"roi_heads\.box_head\.0\.(.*)": lambda found: f"roi_heads.{to_detectron2(f'layer4.{found[1]}')}",
        r"roi_heads\.box_head\.1\.(.*)": r"roi_heads.res5.norm.\1",
    },
}


def behind(name: str, first: int, found: re.Match[str]) -> str:
    """A convolution, or its normalisation."""
    return f"{name}{first + int(found[1])}.{'norm.' * int(found[2])}{found[3]}"


def in_detectron2s_names(ours: Detector, neck: str) -> dict[str, Tensor]:
    """torchvision counts the background as class 0 and gives it a box and a mask; detectron2 counts it last. Anchors of
    one place go by ratio and then by size there, and by size first in detectron2."""
    held, order = {}, anchor_order(neck)
    for name, tensor in ours.model.state_dict().items():
        (form,) = [form for form in PLACES[neck] if re.fullmatch(form, name)]
        if "box_predictor.cls_score" in name:
            tensor = tensor.roll(-1, 0)
        elif "box_predictor.bbox_pred" in name:
            tensor = tensor[4:]
        elif "mask_fcn_logits" in name:
            tensor = tensor[1:]
        elif "rpn.head.cls_logits" in name or "rpn.head.bbox_pred" in name:
            tensor = tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)
        held[re.sub(form, PLACES[neck][form], name)] = tensor
    return held


def anchor_order(neck: str) -> Tensor:
    sizes = 1 if neck == "fpn" else len(SIZES)
    return torch.arange(len(RATIOS) * sizes).view(len(RATIOS), sizes).T.flatten()


@pytest.fixture(scope="module", params=["fpn", "c4"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Detector, nn.Module, Tensor]:
    """The neck, our detector, detectron2's with the same weights, and an image."""
    from detectron2.modeling import build_model

    options = [*OPTIONS, f"model.neck={request.param}", f"model.backbone={BACKBONES[request.param]}"]
    protocol = load_protocol("detection_scenes", options)
    ours = build_network(protocol, "random", 0, load_images(protocol).train.class_names).eval()
    assert isinstance(ours, Detector)
    generator = torch.Generator().manual_seed(0)
    for part in ours.modules():  # so that no normalisation is the identity
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(0, 0.1, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
            part.weight.data.uniform_(0.2, 0.6, generator=generator)  # and no map grows with the depth
    with frameworks.quiet():
        there, state = (
            load_protocol("detection_scenes", [*options, "backend=detectron2"]),
            tmp_path_factory.mktemp("d2"),
        )
        theirs = build_model(prepare(there, "random", 0, state)[0]).eval()
    missing, unexpected = theirs.load_state_dict(in_detectron2s_names(ours, request.param), strict=False)
    assert missing == [] and unexpected == []
    return request.param, ours, theirs, torch.randint(0, 256, (3, SIZE, 128), dtype=torch.uint8, generator=generator)


def seen(network: nn.Module, parts: list[str], run: Callable[[], Any]) -> tuple[list[Any], Any]:
    """What some parts of a network give while it runs, and what it gives itself."""
    kept: dict[str, Any] = {}
    hooks = [
        network.get_submodule(part).register_forward_hook(lambda _, __, output, part=part: kept.update({part: output}))
        for part in parts
    ]
    with torch.no_grad(), frameworks.quiet():
        result = run()
    for hook in hooks:
        hook.remove()
    return [kept[part] for part in parts], result


def test_the_maps_and_the_proposals_scores_are_the_same(both: tuple[str, Detector, nn.Module, Tensor]) -> None:
    neck, ours, theirs, image = both
    (maps, (logits, deltas)), _ = seen(ours.model, ["backbone", "rpn.head"], lambda: ours.predict([image]))
    (their_maps, (their_logits, their_deltas)), _ = seen(
        theirs, ["backbone", HEAD.rstrip(".")], lambda: theirs([{"image": image}])
    )
    order = anchor_order(neck)
    in_order = lambda one: one.unflatten(1, (len(order), -1))[:, order].flatten(1, 2)
    pairs = [*zip(maps.values(), their_maps.values(), strict=True)]
    pairs += [(in_order(one), other) for one, other in zip(logits, their_logits, strict=True)]
    pairs += [(in_order(one), other) for one, other in zip(deltas, their_deltas, strict=True)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_with_unrounded_anchors_the_detections_are_the_same(both: tuple[str, Detector, nn.Module, Tensor]) -> None:
    """torchvision rounds its anchors to whole pixels; nothing else lies between the two."""
    neck, ours, theirs, image = both
    generator, back = ours.model.rpn.anchor_generator, anchor_order(neck).argsort()
    exact = [one[back] for one in theirs.proposal_generator.anchor_generator.cell_anchors]
    assert all(torch.equal(a, b.round()) for a, b in zip(generator.cell_anchors, exact, strict=True))
    rounded, generator.cell_anchors = generator.cell_anchors, exact
    (masks,), (found,) = seen(ours.model, ["roi_heads.mask_predictor"], lambda: ours.predict([image]))
    generator.cell_anchors = rounded
    (their_masks,), (one,) = seen(theirs, ["roi_heads.mask_head.predictor"], lambda: theirs([{"image": image}]))
    instances = one["instances"]
    assert len(found.scores) == len(instances) > 5
    assert torch.equal(found.classes, instances.pred_classes)
    torch.testing.assert_close(found.scores, instances.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes, instances.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
    # As the heads give them: the two paste a mask into its image in different ways.
    torch.testing.assert_close(masks[:, 1:], their_masks, rtol=1e-3, atol=1e-3)
