"""The parts of detectors and segmenters: the dilated trunk, aligned pooling, views, windows, the schedule."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import roi_align

from mls.config import ScenesConfig
from mls.errors import ConfigError
from mls.eval.data import objects, regions
from mls.eval.dense.detector import Detector, Pool
from mls.eval.dense.loop import build_optimizer
from mls.eval.dense.schema import (
    Detection,
    DetectionData,
    DetectorConfig,
    Schedule,
    Segmentation,
    SegmentationData,
    SegmenterConfig,
)
from mls.eval.dense.segmenter import Segmenter
from mls.eval.dense.trunk import Trunk
from mls.eval.dense.views import object_view, region_view
from mls.frameworks.psamask import spread
from mls.models import load_backbone

STATISTICS = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
FEW = ScenesConfig(count=6, test_count=4)


def detector(neck: str, masks: bool = True) -> Detector:
    model = DetectorConfig(neck=neck, masks=masks, width=16, box_width=16, box_batch=16, anchors=[8, 12, 16])  # type: ignore[arg-type]
    protocol = Detection(data=DetectionData(min_sizes=[32], test_size=32), model=model)
    torch.manual_seed(0)
    return Detector(load_backbone("resnet_tiny"), protocol, 10, *STATISTICS)


def segmenter(head: str = "fcn", **data: object) -> Segmenter:
    model = SegmenterConfig(head=head, width=8, auxiliary_width=8, output_stride=4)
    options = {"resize": (32, 32), "crop": (32, 32), **data}
    torch.manual_seed(0)
    return Segmenter(
        load_backbone("resnet_tiny"), Segmentation(data=SegmentationData(**options), model=model), 11, *STATISTICS
    )  # type: ignore[arg-type]


def test_a_dilated_trunk_equals_torchvisions_dilated_network() -> None:
    backbone = load_backbone("resnet50")
    dilated = resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    dilated.load_state_dict(backbone.state_dict(), strict=False)
    images = torch.rand(1, 3, 65, 97)
    expected = IntermediateLayerGetter(dilated, {f"layer{i}": f"layer{i}" for i in range(1, 5)})(images)
    trunk = Trunk(backbone, output_stride=8).eval()
    found = trunk(images)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert trunk.strides == {"layer1": 4, "layer2": 8, "layer3": 8, "layer4": 8}


def test_a_network_without_stages_is_refused() -> None:
    with pytest.raises(ConfigError, match="need a ResNet"):
        Trunk(load_backbone("scratch:densenet121"))


@pytest.mark.parametrize("neck", ["fpn", "c4"])
@pytest.mark.parametrize("masks", [True, False])
def test_every_parameter_of_a_detector_learns(neck: str, masks: bool) -> None:
    network, images = detector(neck, masks).train(), objects.scenes(FEW).train
    views = [object_view(images, row, DetectionData(flip=0.5), seed=row) for row in range(6)]
    losses = network(*zip(*views, strict=True))
    assert ("loss_mask" in losses) == masks
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("head", ["fcn", "pspnet", "psanet"])
def test_every_parameter_of_a_segmenter_learns(head: str) -> None:
    network, images = segmenter(head).train(), regions.scenes(FEW).train
    data = SegmentationData(resize=(32, 32), crop=(32, 32))
    losses = network(*zip(*(region_view(images, row, data, seed=row) for row in range(6)), strict=True))
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_a_pool_reads_small_boxes_from_fine_maps_and_large_ones_from_coarse() -> None:
    maps = {str(i): torch.rand(1, 2, 256 // stride, 256 // stride) for i, stride in enumerate((4, 8, 16, 32))}
    boxes = torch.tensor([[10.0, 10, 50, 40], [0, 0, 120, 120], [0, 0, 230, 230], [5, 5, 5, 5]])
    pool = Pool(7, [4, 8, 16, 32])
    assert pool.level_of(boxes).tolist() == [0, 1, 2, 0]
    pooled = pool(maps, [boxes], [(256, 256)])
    for row, level, stride in ((0, "0", 4), (1, "1", 8), (2, "2", 16)):
        expected = roi_align(maps[level], [boxes[row : row + 1]], 7, 1 / stride, 0, aligned=True)
        assert torch.equal(pooled[row], expected[0])


def test_a_mirrored_view_keeps_its_boxes_around_its_masks() -> None:
    images = objects.scenes(FEW).train
    for row in range(6):
        pixels, plain = object_view(images, row, DetectionData(flip=0.0), seed=row)
        mirrored, target = object_view(images, row, DetectionData(flip=1.0), seed=row)
        assert torch.equal(mirrored.flip(2), pixels)
        assert plain.masks is not None and target.masks is not None
        assert torch.equal(target.masks.flip(2), plain.masks)
        for (x0, y0, x1, y1), mask in zip(target.boxes.int().tolist(), target.masks, strict=True):
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum() and inside[:, 0].any() and inside[:, -1].any()


def test_a_views_labels_move_with_its_pixels() -> None:
    """Where the labels are painted into the image, they are found there after scaling, cutting and mirroring."""
    labels = torch.kron(torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.ones(16, 16)).to(torch.uint8)

    class Painted:
        name = "painted"

        def read(self, row: int) -> torch.Tensor:
            return (labels * 40).expand(3, -1, -1)

        def __len__(self) -> int:
            return 1

    images = regions.RegionImages(Painted(), lambda row: labels, list("abcdef"))  # type: ignore[arg-type]
    data = SegmentationData(resize=(48, 32), crop=(24, 24), photometric=False)
    for seed in range(20):
        pixels, cut = region_view(images, 0, data, seed)
        agree = (pixels[0].float() / 40 - cut).abs() < 0.02
        assert agree.float().mean() > 0.75  # pixels between two regions are mixed, labels never are
        assert cut.shape[0] <= 24 and cut.shape[1] <= 24


def test_void_pixels_change_nothing_but_the_losss_weight() -> None:
    network = segmenter()
    scores, labels = torch.randn(1, 11, 4, 4), torch.randint(11, (1, 4, 4))
    half = labels.clone()
    half[:, 2:] = 255
    known = nn.functional.cross_entropy(scores[:, :, :2], labels[:, :2])
    assert network.loss(scores, half) == pytest.approx(float(known) / 2, rel=1e-5)


def test_sliding_one_window_over_the_image_equals_the_whole_image() -> None:
    images = regions.scenes(FEW).test
    whole, slide = segmenter().eval(), segmenter(test="slide", stride=(16, 16)).eval()
    narrow = segmenter(test="slide", crop=(16, 16), stride=(8, 8)).eval()
    rows = [images.pixels(row) for row in range(2)]
    found, same, other = (network.predict(rows) for network in (whole, slide, narrow))
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(found, other, strict=True))


@pytest.mark.parametrize(("height", "width", "window"), [(3, 4, (5, 7)), (4, 3, (3, 3)), (5, 2, (4, 6))])
def test_psanets_attention_equals_a_loop_over_pairs_of_positions(
    height: int, width: int, window: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    weights = torch.randn(2, window[0] * window[1], height, width, dtype=torch.float64, requires_grad=True)
    plain = torch.zeros(2, height * width, height * width, dtype=torch.float64)
    for row, column in np.ndindex(height, width):
        for other_row, other_column in np.ndindex(height, width):
            down, right = other_row - row + (window[0] - 1) // 2, other_column - column + (window[1] - 1) // 2
            if 0 <= down < window[0] and 0 <= right < window[1]:
                there, here = other_row * width + other_column, row * width + column
                plain[:, there, here] = weights[:, down * window[1] + right, row, column]
    found, pull = spread(weights, window), torch.randn_like(plain)
    assert torch.equal(found, plain)
    gradients = [torch.autograd.grad((one * pull).sum(), weights, retain_graph=True)[0] for one in (found, plain)]
    assert torch.equal(*gradients)


def test_normalisation_has_its_own_weight_decay() -> None:
    network = detector("fpn")
    decayed, norms = build_optimizer(Schedule(weight_decay=0.1, norm_decay=0.0), network).param_groups
    assert (decayed["weight_decay"], norms["weight_decay"]) == (0.1, 0.0)
    count = sum(2 for part in network.modules() if isinstance(part, nn.BatchNorm2d))
    assert len(norms["params"]) == count
    assert len(decayed["params"]) + count == len(list(network.parameters()))


def test_detections_lie_in_the_image_as_it_was_given() -> None:
    network = copy.deepcopy(detector("fpn")).eval()
    large = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 90, 120))).to(torch.uint8)
    (found,) = network.predict([large])
    assert len(found.boxes) and (found.boxes >= 0).all() and (found.boxes <= torch.tensor([120, 90, 120, 90])).all()
    assert found.outlines is not None and found.outlines[0]["size"] == [90, 120]
