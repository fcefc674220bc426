"""What our detector learns from, against numbers worked out by hand: anchors, losses, masks, first weights. That all of
it equals detectron2's is in test_detectron2_networks.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead

from mls.errors import ConfigError
from mls.eval import load_protocol
from mls.eval.dense.detector import Detector, Pool
from mls.eval.dense.proposals import Anchors, Coder, Proposals
from mls.eval.dense.roi_heads import BoxHead, BoxPredictor, MaskPredictor, box_losses, mask_loss, masks_in_boxes
from mls.models import load_backbone


def place_anchors(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of an image of 83 × 60 pixels on the maps of stride 32 and 64."""
    maps = [torch.zeros(1, 2, 3, 2, dtype=dtype), torch.zeros(1, 2, 2, 1, dtype=dtype)]
    return Anchors([[32], [64]], [32, 64])(ImageList(torch.zeros(1, 3, 83, 60), [(83, 60)]), maps)[0]


def test_anchors_have_their_areas_and_ratios_exactly_and_lie_whole_strides_apart() -> None:
    anchors = place_anchors()
    width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    torch.testing.assert_close((width * height).sqrt(), torch.tensor([32.0] * 18 + [64.0] * 6))
    torch.testing.assert_close(height / width, torch.tensor([0.5, 1, 2] * 8))
    middles = ((anchors[:, 2:] + anchors[:, :2]) / 2)[::3]
    expected = [[0, 0], [32, 0], [0, 32], [32, 32], [0, 64], [32, 64], [0, 0], [0, 64]]
    torch.testing.assert_close(middles, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=0)


def test_reduced_precision_moves_no_box() -> None:
    assert torch.equal(place_anchors(torch.bfloat16), place_anchors())
    box = torch.tensor([[1001.0, 701.0, 1303.0, 755.0]])
    still = Coder((1.0, 1.0, 1.0, 1.0)).decode(torch.zeros(1, 4, dtype=torch.bfloat16), [box])
    assert torch.equal(still[0], box)
    maps, pool = {"0": torch.rand(1, 2, 90, 90)}, Pool(7, [16])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pool({"0": maps["0"].bfloat16()}, [box], [(1440, 1440)])
    torch.testing.assert_close(found.float(), pool(maps, [box], [(1440, 1440)]), atol=0.005, rtol=0.005)


def test_the_proposals_losses_are_divided_by_the_anchors_that_were_asked_for() -> None:
    network = Proposals(
        Anchors([[8]], [8]),
        RPNHead(4, 3),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=10,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 9, "testing": 9},
        post_nms_top_n={"training": 9, "testing": 9},
        nms_thresh=0.7,
    )
    logits, labels = torch.tensor([[2.0], [-1.0], [0.5]]), [torch.tensor([1.0, 0.0]), torch.tensor([-1.0])]
    deltas = torch.tensor([[0.5, -0.01, 0.02, 0.0], [9.0, 9, 9, 9], [9.0, 9, 9, 9]])
    scores, boxes = network.compute_loss(logits, deltas, labels, [torch.zeros(2, 4), torch.zeros(1, 4)])
    assert scores.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 20)
    assert boxes.item() == pytest.approx(0.53 / 20)


def test_a_boxs_loss_is_its_distance_for_its_own_class() -> None:
    deltas = torch.full((3, 12), 100.0)  # of 3 classes, the background first
    deltas[0, 8:] = torch.tensor([0.05, -0.5, 2.0, 0.0])
    deltas[2, 4:8] = torch.tensor([0.0, 0.0, 0.0, -0.01])
    scores, labels, wanted = torch.randn(3, 3), torch.tensor([2, 0, 1]), torch.zeros(3, 4)
    losses = box_losses(scores, deltas, labels, wanted)
    assert losses["loss_box_reg"].item() == pytest.approx(2.56 / 3)
    assert losses["loss_classifier"].item() == pytest.approx(F.cross_entropy(scores, labels).item())
    nothing = box_losses(scores, deltas, torch.zeros(3, dtype=torch.int64), wanted)
    assert nothing["loss_box_reg"].item() == 0


def test_a_cell_belongs_to_a_mask_that_covers_half_of_it() -> None:
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[1, 2:6, :3] = 1  # from the left edge to the middle of the box's second column
    box = torch.tensor([[0.0, 2.0, 8.0, 6.0]])
    assert masks_in_boxes(masks, box, torch.tensor([1]), 4)[0].tolist() == [[1, 1, 0, 0]] * 4
    assert masks_in_boxes(masks, box, torch.tensor([0]), 4).sum() == 0
    whole = masks_in_boxes(torch.ones(1, 8, 8, dtype=torch.uint8), torch.tensor([[1.0, 1, 7, 7]]), torch.tensor([0]), 4)
    assert whole.min() == 1  # up to its very edge


def test_a_masks_loss_is_that_of_its_own_class_and_none_without_objects() -> None:
    logits, truth = torch.randn(2, 3, 4, 4), torch.randint(2, (2, 4, 4)).float()
    expected = (F.softplus(-logits[0, 2]) * truth[0] + F.softplus(logits[0, 2]) * (1 - truth[0])).mean()
    assert mask_loss(logits[:1], torch.tensor([2]), truth[:1]).item() == pytest.approx(expected.item(), rel=1e-5)
    assert mask_loss(logits[:0], torch.zeros(0, dtype=torch.int64), truth[:0]).item() == 0


def test_heads_begin_with_small_weights_and_no_bias() -> None:
    torch.manual_seed(0)
    boxes, masks, head = BoxPredictor(256, 20), MaskPredictor(64, 64, 20), BoxHead(32, 7, 64)
    begun = {boxes.cls_score: 0.01, boxes.bbox_pred: 0.001, masks.mask_fcn_logits: 0.001, head[-2]: (32 * 49) ** -0.5}
    for layer, std in begun.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
    assert not any(layer.bias.any() for layer in (*begun, masks.conv5_mask))


@pytest.mark.parametrize(
    ("anchors", "fits"), [([8, 12], False), ([8, 12, 16], True), ([8] * 4, True), ([8] * 5, False)]
)
def test_anchors_that_do_not_go_with_the_pyramids_levels_are_refused(anchors: list[int], fits: bool) -> None:
    protocol = load_protocol("detection_scenes", [f"model.anchors={anchors}"])
    build = lambda: Detector(load_backbone("resnet_tiny"), protocol, 10, (0.5,) * 3, (0.2,) * 3)
    if fits:
        build()
        return
    with pytest.raises(
        ConfigError, match=rf"has {len(anchors)} sizes and .* 3 levels: give 3 sizes, or 4 for one more"
    ):
        build()


def test_a_detector_without_anchors_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.anchors is empty"):
        load_protocol("detection_scenes", ["model.anchors=[]", "model.neck=c4"])
