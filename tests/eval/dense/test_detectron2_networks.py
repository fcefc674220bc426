"""detectron2's detector and ours: the same weights give the same proposals, detections, losses and gradients, and the
first weights are drawn alike."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mls.eval import load_protocol
from mls.eval.dense.detector import Detector
from mls.eval.dense.prepare import load_images
from mls.eval.dense.run import build_network
from mls.eval.dense.views import ObjectTarget
from mls.eval.dense.with_detectron2 import prepare
from mls.frameworks import installed as frameworks
from mls.models.resnet_names import to_detectron2

pytestmark = pytest.mark.skipif(
    bool(frameworks.missing("detectron2")),
    reason="detectron2 is not installed: `mls doctor --frameworks` has the command",
)
SIZE = 100  # of the images' short sides, so that nothing is scaled, and much is padded
EVERY = 100_000  # anchors or proposals an image: all that there are
SIZES = [8, 16, 24, 32, 48]
OPTIONS = [f"model.anchors={SIZES}", f"data.min_sizes=[{SIZE}]", f"data.test_size={SIZE}", f"data.max_size={2 * SIZE}"]
OPTIONS += ["model.score=0.0", "training.device=cpu", "data.scenes.count=2", "data.scenes.test_count=1"]
OPTIONS += [f"model.proposal_batch={EVERY}", f"model.box_batch={EVERY}", "model.proposals=[20,30]"]
BACKBONES = {"fpn": "scratch:resnet18", "c4": "scratch:resnet50", "vitdet": "vit_tiny", "stages": "timm:convnext_atto"}

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
LOSSES = {
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_loc",
    "loss_classifier": "loss_cls",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
}
Places = dict[str, str | Callable[[re.Match[str]], str]]
HEADS: Places = {
    **SHARED,
    r"roi_heads\.box_head\.([0-3])\.([01])\.(.*)": lambda found: behind("roi_heads.box_head.conv", 1, found),
    r"roi_heads\.box_head\.5\.(.*)": r"roi_heads.box_head.fc1.\1",
    r"roi_heads\.mask_head\.([0-3])\.([01])\.(.*)": lambda found: behind("roi_heads.mask_head.mask_fcn", 1, found),
}
STAGES: Places = {
    **HEADS,
    r"backbone\.pyramid\.inner_blocks\.(\d)\.([01])\.(.*)": lambda found: behind("backbone.fpn_lateral", 2, found),
    r"backbone\.pyramid\.layer_blocks\.(\d)\.([01])\.(.*)": lambda found: behind("backbone.fpn_output", 2, found),
}
PLACES: dict[str, Places] = {
    "fpn": {**STAGES, r"backbone\.trunk\.(.*)": lambda found: f"backbone.bottom_up.{to_detectron2(found[1])}"},
    "stages": {**STAGES, r"backbone\.trunk\.(.*)": r"backbone.bottom_up.trunk.\1"},
    "vitdet": {
        **HEADS,
        r"backbone\.trunk\.(.*)": r"backbone.net.trunk.\1",
        r"backbone\.pyramid\.levels\.(\d)\.(\d)\.(.*)": lambda found: in_simple_pyramid(*found.groups()),
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


def in_simple_pyramid(level: str, layer: str, rest: str) -> str:
    """detectron2 counts a convolution and its normalisation as one layer; a level ends with two such."""
    first = {"0": 4, "1": 1, "2": 0, "3": 1}[level]  # layers that change the stride
    number = int(layer)
    pair, norm = (number, 0) if number < first else divmod(number - first, 2)
    return f"backbone.simfp_{level}.{pair + first * (number >= first)}.{'norm.' * norm}{rest}"


def in_detectron2s_names(ours: dict[str, Tensor], neck: str) -> dict[str, Tensor]:
    """torchvision counts the background as class 0 and gives it a box and a mask; detectron2 counts it last."""
    held = {}
    for name, tensor in ours.items():
        (form,) = [form for form in PLACES[neck] if re.fullmatch(form, name)]
        if "box_predictor.cls_score" in name:
            tensor = tensor.roll(-1, 0)
        elif "box_predictor.bbox_pred" in name:
            tensor = tensor[4:]
        elif "mask_fcn_logits" in name:
            tensor = tensor[1:]
        held[re.sub(form, PLACES[neck][form], name)] = tensor
    return held


@dataclass
class Both:
    neck: str
    ours: Detector
    theirs: nn.Module  # with the same weights
    first: tuple[dict[str, Tensor], dict[str, Tensor]]  # the weights that each was built with, in detectron2's names
    images: list[Tensor]


@pytest.fixture(scope="module", params=PLACES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    from detectron2.modeling import build_model

    neck = "c4" if request.param == "c4" else "fpn"
    options = [*OPTIONS, f"model.neck={neck}", f"model.backbone={BACKBONES[request.param]}"]
    protocol = load_protocol("detection_scenes", options)
    ours = build_network(protocol, "random", 0, load_images(protocol).train.class_names).eval()
    assert isinstance(ours, Detector)
    with frameworks.quiet():
        there = load_protocol("detection_scenes", [*options, "backend=detectron2"])
        theirs = build_model(prepare(there, "random", 0, tmp_path_factory.mktemp("d2"))[0]).eval()
    renamed = lambda: in_detectron2s_names(ours.model.state_dict(), request.param)
    first = copy.deepcopy((renamed(), theirs.state_dict()))
    generator = torch.Generator().manual_seed(0)
    for part in ours.modules():  # so that no normalisation is the identity
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(0, 0.1, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
            part.weight.data.uniform_(0.2, 0.6, generator=generator)  # and no map grows with the depth
    heads = ours.model.roi_heads
    for last in (heads.box_predictor.cls_score, heads.box_predictor.bbox_pred, heads.mask_predictor.mask_fcn_logits):
        last.weight.data.normal_(0, 0.1, generator=generator)  # nor all scores the same
    missing, unexpected = theirs.load_state_dict(renamed(), strict=False)
    assert missing == [] and unexpected == []
    images = [torch.randint(0, 256, (3, SIZE, width), dtype=torch.uint8, generator=generator) for width in (130, 111)]
    return Both(request.param, ours, theirs, first, images)


def outputs_of(network: nn.Module, parts: list[str], run: Callable[[], Any]) -> tuple[list[Any], Any]:
    """What some parts of a network give while it runs, and what it gives itself."""
    outputs: dict[str, Any] = {}
    hooks = [
        network.get_submodule(part).register_forward_hook(
            lambda _, __, output, part=part: outputs.update({part: output})
        )
        for part in parts
    ]
    with torch.no_grad(), frameworks.quiet():
        result = run()
    for hook in hooks:
        hook.remove()
    return [outputs[part] for part in parts], result


def test_the_maps_and_the_proposals_scores_are_the_same(both: Both) -> None:
    inputs = [{"image": image} for image in both.images]
    (maps, (logits, deltas), anchors), _ = outputs_of(
        both.ours.model, ["backbone", "rpn.head", "rpn.anchor_generator"], lambda: both.ours.predict(both.images)
    )
    (their_maps, (their_logits, their_deltas), their_anchors), _ = outputs_of(
        both.theirs, ["backbone", HEAD.rstrip("."), "proposal_generator.anchor_generator"], lambda: both.theirs(inputs)
    )
    torch.testing.assert_close(anchors[0], torch.cat([one.tensor for one in their_anchors]))
    pairs = zip((*maps.values(), *logits, *deltas), (*their_maps.values(), *their_logits, *their_deltas), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_the_detections_are_the_same(both: Both) -> None:
    image = both.images[0]
    (masks,), (found,) = outputs_of(both.ours.model, ["roi_heads.mask_predictor"], lambda: both.ours.predict([image]))
    (their_masks,), (one,) = outputs_of(
        both.theirs, ["roi_heads.mask_head.predictor"], lambda: both.theirs([{"image": image}])
    )
    instances = one["instances"]
    assert len(found.scores) == len(instances) > 5
    assert torch.equal(found.classes, instances.pred_classes)
    torch.testing.assert_close(found.scores, instances.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes, instances.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
    # As the heads give them: the two paste a mask into its image in different ways.
    torch.testing.assert_close(masks[:, 1:], their_masks, rtol=1e-3, atol=1e-3)


def ellipses(boxes: Tensor, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    across, down = ((one - middle[:, i, None, None]) / half[:, i, None, None] for i, one in enumerate((x, y)))
    return (across**2 + down**2 <= 1).to(torch.uint8)


def targets(images: list[Tensor]) -> list[ObjectTarget]:
    boxes = [
        torch.tensor([[10.0, 12.5, 42, 40], [50.2, 30, 99, 88], [3, 60, 20, 71]]),
        torch.tensor([[30.0, 5, 70, 95]]),
    ]
    classes = [torch.tensor([0, 3, 9]), torch.tensor([3])]
    return [
        ObjectTarget(some, kinds, ellipses(some, image.shape[2]))
        for some, kinds, image in zip(boxes, classes, images, strict=True)
    ]


def in_detectron2s_form(image: Tensor, target: ObjectTarget) -> dict[str, Any]:
    from detectron2.structures import BitMasks, Boxes, Instances

    assert target.masks is not None
    instances = Instances((image.shape[1], image.shape[2]))
    instances.gt_boxes, instances.gt_classes = Boxes(target.boxes), target.classes
    instances.gt_masks = BitMasks(target.masks)
    return {"image": image, "instances": instances}


def test_the_losses_and_their_gradients_are_the_same(both: Both) -> None:
    """On all anchors and all proposals, so that none is drawn, and with the batch's own statistics."""
    from detectron2.utils.events import EventStorage

    ours, theirs = copy.deepcopy(both.ours).train(), copy.deepcopy(both.theirs).train()
    # The very same pixels: where rounding decides whether a unit is above zero, gradients are others.
    ours.model.transform.normalize = lambda image: ((image * 255).round() - theirs.pixel_mean) / theirs.pixel_std
    truth = targets(both.images)
    losses = ours(both.images, truth)
    with EventStorage(0), frameworks.quiet():
        their_losses = theirs([in_detectron2s_form(*one) for one in zip(both.images, truth, strict=True)])
    values = {LOSSES[name]: loss.item() for name, loss in losses.items()}
    assert values == pytest.approx({name: loss.item() for name, loss in their_losses.items()}, rel=1e-4)
    assert min(values.values()) > 0
    for part in (losses, their_losses):
        torch.stack(list(part.values())).sum().backward()
    gradients = in_detectron2s_names({name: p.grad for name, p in ours.model.named_parameters()}, both.neck)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    nothing = 1e-6 * max(float(one.norm()) for one in expected.values())  # as of a bias below a normalisation
    norm = lambda name: max(float(expected[name].norm()), nothing)
    apart = {name: float((one - expected[name]).norm()) / norm(name) for name, one in gradients.items()}
    assert {name: value for name, value in apart.items() if value > 1e-4} == {}


def test_the_first_weights_are_drawn_alike(both: Both) -> None:
    ours, theirs = both.first
    heads = [name for name in ours if not re.search(r"bottom_up|backbone\.(stem|res|net)|res5\.\d|num_batches", name)]
    assert {name.partition(".")[0] for name in heads} >= {"proposal_generator", "roi_heads"}
    for name in heads:
        one, other = ours[name].flatten().double(), theirs[name].flatten().double()
        spread, few = float(other.std()), len(other) ** -0.5
        assert float(one.mean()) == pytest.approx(float(other.mean()), abs=6 * spread * few), name
        assert float(one.std()) == pytest.approx(spread, rel=5 * few, abs=1e-12), name
