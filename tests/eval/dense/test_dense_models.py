"""The parts of detectors and segmenters: the dilated trunk, aligned pooling, views, windows, the schedule."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mls.config import ScenesConfig
from mls.errors import ConfigError
from mls.eval.data import objects, regions
from mls.eval.dense.detector import Detector, Pool, SimplePyramid
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
from mls.models.backbones import timm_network

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


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("test_vit", [4, 8, 16, 32, 64]),
        ("test_convnext", [4, 8, 16, 32, 64]),
        ("test_efficientnet", [4, 8, 16, 32, 64]),
    ],
)
def test_every_parameter_of_a_detector_and_a_segmenter_on_a_network_of_timm_learns(
    name: str, strides: list[int]
) -> None:
    torch.manual_seed(0)
    model = DetectorConfig(width=16, box_width=16, box_batch=16, anchors=[4, 8, 12, 16, 24])
    protocol = Detection(data=DetectionData(min_sizes=[48], test_size=48), model=model)
    network, images = (
        Detector(load_backbone(f"random:timm:{name}"), protocol, 10, *STATISTICS),
        objects.scenes(FEW).train,
    )
    views = [object_view(images, row, DetectionData(flip=0.5), seed=row) for row in range(4)]
    assert network.model.backbone.strides == strides
    maps = network.model.backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(one.shape[2:]) for one in maps.values()] == [(64 // s, 96 // s) for s in strides[:4]] + [(1, 2)]
    segmentation = Segmentation(
        data=SegmentationData(resize=(32, 32), crop=(32, 32)),
        model=SegmenterConfig(width=8, auxiliary_width=8, output_stride=16),
    )
    other, labelled = (
        Segmenter(load_backbone(f"random:timm:{name}"), segmentation, 11, *STATISTICS),
        regions.scenes(FEW),
    )
    losses = network(*zip(*views, strict=True)) | other(
        *zip(*(region_view(labelled.train, row, segmentation.data, seed=row) for row in range(4)), strict=True)
    )
    torch.stack(list(losses.values())).sum().backward()
    unlearnt = [part for one in (network, other) for part, p in one.named_parameters() if p.grad is None]
    assert unlearnt == []
    assert network.eval().predict([torch.zeros(3, 30, 41, dtype=torch.uint8)])[0].boxes.shape[1] == 4
    assert other.eval().predict([torch.zeros(3, 30, 41, dtype=torch.uint8)])[0].shape == (30, 41)


def test_a_simple_pyramid_is_vitdets() -> None:
    """detectron2/modeling/backbone/vit.py restated: two, one and no transposed convolution, and pooling; then 1 x 1 and
    3 x 3 convolutions, normalised over channels."""
    torch.manual_seed(0)
    pyramid, x = SimplePyramid(8, 6, LastLevelMaxPool()), torch.randn(1, 8, 4, 6)
    found = list(pyramid({"early": torch.zeros(1, 8, 4, 6), "last": x}).values())

    def normalised(x: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]

    def scaled(scale: float) -> torch.Tensor:
        layers = list(pyramid.levels[[4.0, 2.0, 1.0, 0.5].index(scale)])[:-4]
        if scale == 4.0:
            up = F.gelu(normalised(layers[0](x), layers[1]))
            return F.conv_transpose2d(up, layers[3].weight, layers[3].bias, stride=2)
        if scale == 2.0:
            return F.conv_transpose2d(x, layers[0].weight, layers[0].bias, stride=2)
        return x if scale == 1.0 else F.max_pool2d(x, 2, 2)

    for level, scale in enumerate((4.0, 2.0, 1.0, 0.5)):
        one, norm1, three, norm3 = list(pyramid.levels[level])[-4:]
        assert one.bias is None and three.bias is None
        wanted = normalised(
            F.conv2d(normalised(F.conv2d(scaled(scale), one.weight), norm1), three.weight, padding=1), norm3
        )
        torch.testing.assert_close(found[level], wanted)
    assert torch.equal(found[4], F.max_pool2d(found[3], 1, 2))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("timm:test_vit", {"neck": "c4", "anchors": [8]}, "model.neck=c4 needs a ResNet, VisionTransformer is none"),
        ("timm:test_maxvit", {}, "takes images of one size alone"),
        ("patches of 14", {}, "patches of 14 pixels make no pyramid"),
    ],
)
def test_a_network_that_a_detector_cannot_use_is_one_sentence(name: str, changes: dict, message: str) -> None:
    small = {"patch_size": 14, "img_size": 56}
    backbone = timm_network("test_vit", **small) if "14" in name else load_backbone(f"random:{name}")
    with pytest.raises(ConfigError, match=message):
        Detector(backbone, Detection(model=DetectorConfig(**changes)), 10, *STATISTICS)


def test_a_segmenter_takes_a_transformer_at_the_stride_of_its_patches() -> None:
    with pytest.raises(ConfigError, match="its last map has a stride of 16: set model.output_stride=16"):
        Segmenter(load_backbone("random:timm:test_vit"), Segmentation(), 11, *STATISTICS)


@torch.no_grad()
def test_scores_of_patches_that_reach_beyond_the_view_are_cut_off_not_squeezed_into_it() -> None:
    model = SegmenterConfig(width=8, auxiliary_width=8, output_stride=4)
    network = Segmenter(load_backbone("vit_tiny"), Segmentation(model=model), 11, *STATISTICS).eval()
    view = torch.rand(1, 3, 32, 33)  # patches of 4 pixels
    maps = network.head(network.trunk(view)[network.last])
    whole = F.interpolate(maps, (32, 36), mode="bilinear", align_corners=model.align_corners)
    assert maps.shape[2:] == (8, 9) and torch.equal(network._scores(view), whole[..., :33])
    labels = torch.randint(11, (1, 32, 33))
    torch.testing.assert_close(network.loss(maps, labels), F.cross_entropy(whole[..., :33], labels))


def test_adamw_decays_no_norm_and_layers_learn_slower_the_further_they_are_from_the_heads() -> None:
    network = Segmenter(
        load_backbone("vit_tiny"), Segmentation(model=SegmenterConfig(output_stride=4)), 11, *STATISTICS
    )
    groups = build_optimizer(Schedule(optimizer="adamw", layer_decay=0.5, weight_decay=0.1), network).param_groups
    of = {id(p): (group["weight_decay"], group["share"]) for group in groups for p in group["params"]}
    vit, head = network.trunk.network, network.head.classify[1]
    assert [of[id(p)] for p in (head.weight, head.bias)] == [(0.1, 1.0), (0.0, 1.0)]
    assert [of[id(vit.blocks[block].attn.qkv.weight)] for block in (3, 0)] == [(0.1, 0.5), (0.1, 0.5**4)]
    assert [of[id(p)] for p in (vit.pos_embed, vit.patch_embed.proj.weight)] == [(0.0, 0.5**5), (0.1, 0.5**5)]
    assert of[id(vit.norm.weight)] == (0.0, 0.5)


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
