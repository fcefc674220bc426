"""Our segmenters are mmsegmentation's: the same weights give the same scores and losses."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mls.data.pictures import VOID
from mls.eval.dense.schema import Segmentation, SegmentationData, SegmenterConfig
from mls.eval.dense.segmenter import Segmenter
from mls.frameworks import installed as frameworks
from mls.frameworks.resnet_plan import ResNetPlan
from mls.models import load_backbone
from mls.models.backbones import RESNETS
from mls.models.spatial import patches_of

if frameworks.missing("mmseg"):
    pytest.skip('mmsegmentation is not installed: pip install "mls[mmseg]"', allow_module_level=True)

CLASSES = 7
STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RENAMED = {  # a pattern of our names, and mmsegmentation's
    r"^trunk\.": "backbone.",
    r"^auxiliary\.convolutions\.": "auxiliary_head.convs.",
    r"^auxiliary\.": "auxiliary_head.",
    r"^head\.convolutions\.": "decode_head.convs.",
    r"^head\.pools\.": "decode_head.psp_modules.",
    r"^head\.collect\.reduce\.": "decode_head.reduce.",
    r"^head\.collect\.weigh\.": "decode_head.attention.",
    r"^head\.distribute\.reduce\.": "decode_head.reduce_p.",
    r"^head\.distribute\.weigh\.": "decode_head.attention_p.",
    r"^head\.project\.": "decode_head.proj.",
    r"^head\.": "decode_head.",
    r"\.classify\.1\.": ".conv_seg.",
    # a convolution and its normalisation
    r"(convs\.\d|psp_modules\.\d\.1|reduce|reduce_p|attention\.0|attention_p\.0|proj|join)\.0\.": r"\1.conv.",
    r"(convs\.\d|psp_modules\.\d\.1|reduce|reduce_p|attention\.0|attention_p\.0|proj|join)\.1\.": r"\1.bn.",
}


def renamed(name: str, head: str) -> str:
    for pattern, new in RENAMED.items():
        name = re.sub(pattern, new, name)
    return name.replace(".join.", ".conv_cat." if head == "fcn" else ".bottleneck.")


def both(head: str, align_corners: bool, backbone: str, output_stride: int) -> tuple[Segmenter, Any]:
    """Ours, and mmsegmentation's with our weights; normalisation with statistics that are not those of a fresh one."""
    frameworks.load("mmseg")
    from mmengine.config import ConfigDict
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS

    from mls.eval.dense import mmseg_config, mmseg_parts  # noqa: F401 (registers its parts)

    settings = {"width": 16, "auxiliary_width": 8, "dropout": 0.0, "output_stride": output_stride}
    protocol = Segmentation(
        data=SegmentationData(crop=(128, 96)),
        model=SegmenterConfig(head=head, align_corners=align_corners, **settings),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    ours = Segmenter(network := load_backbone(backbone), protocol, CLASSES, *STATISTICS)
    for part in ours.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data.uniform_(0.5, 1.5)
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.5, 1.5)
    mean, std = ([round(255 * value, 3) for value in values] for values in STATISTICS)
    channels, own = list(ours.trunk.channels.values()), backbone not in RESNETS
    architecture = backbone.removeprefix("random:")
    taken = mmseg_config.OurTrunk(architecture, channels, patches_of(network)) if own else ResNetPlan.of(backbone)
    start = mmseg_config.Start(taken, mean, std, "")
    config = mmseg_config.model(protocol, start, CLASSES, torch.device("cpu"))
    config["backbone"].pop("init_cfg")
    with frameworks.quiet(), DefaultScope.overwrite_default_scope("mmseg"):
        theirs = MODELS.build(ConfigDict(config))
    place = (lambda name: re.sub(r"^trunk\.", "backbone.trunk.", name)) if own else (lambda name: name)
    theirs.load_state_dict({renamed(place(name), head): tensor for name, tensor in ours.state_dict().items()})
    return ours, theirs


def sample(height: int, width: int, count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (count, height, width), dtype=torch.uint8, generator=generator)
    labels[:, :8] = VOID
    return images, labels


def packed(images: Tensor, labels: Tensor) -> dict[str, Any]:
    """As mmsegmentation's pipelines give them."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = []
    for one in labels:
        found = SegDataSample(metainfo=dict.fromkeys(("ori_shape", "img_shape"), tuple(one.shape)))
        found.gt_sem_seg = PixelData(data=one[None].long())
        samples.append(found)
    return {"inputs": list(images.flip(1)), "data_samples": samples}


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def scores_are_equal(ours: Segmenter, theirs: Any, images: Tensor, labels: Tensor) -> None:
    prepared = theirs.data_preprocessor(packed(images, labels))["inputs"]
    views = torch.stack([ours.normalised(image) for image in images])
    assert apart(views, prepared) < 1e-5
    with torch.no_grad():
        maps, features = ours.trunk(views), theirs.extract_feat(prepared)
        far = {name: apart(maps[name], feature) for name, feature in zip(maps, features, strict=True)}
        far["head"] = apart(
            ours._scores(views), theirs.encode_decode(prepared, [{"img_shape": images.shape[2:]}] * len(images))
        )
        far["auxiliary"] = apart(ours.auxiliary(maps[ours.before]), theirs.auxiliary_head(features))
    assert {name: value for name, value in far.items() if value > 1e-4} == {}


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("head", ["fcn", "pspnet", "psanet"])
def test_the_same_weights_give_the_same_scores_and_losses(head: str, align_corners: bool) -> None:
    ours, theirs = both(head, align_corners, "resnet18", output_stride=32)
    with frameworks.quiet():  # mmsegmentation on corners that do not meet
        for size in ((96, 160), (64, 128)):  # PSANet shrinks maps of odd sides in another way
            scores_are_equal(ours.eval(), theirs.eval(), *sample(*size, count=1))
        images, labels = sample(90, 120)  # smaller than the crop: padded
        found = ours.train()(list(images), list(labels))
        prepared = theirs.train().data_preprocessor(packed(images, labels), training=True)
        expected = theirs.loss(**prepared)
    assert float(found["loss_head"].detach()) == pytest.approx(float(expected["decode.loss_ce"].detach()), rel=1e-4)
    assert float(found["loss_auxiliary"].detach()) == pytest.approx(float(expected["aux.loss_ce"].detach()), rel=1e-4)


@pytest.mark.parametrize(("backbone", "output_stride"), [("resnet50", 8), ("resnet50", 16), ("resnext50_32x4d", 8)])
def test_a_dilated_backbone_of_bottlenecks_is_mmsegmentations(backbone: str, output_stride: int) -> None:
    ours, theirs = both("fcn", False, backbone, output_stride)
    scores_are_equal(ours.eval(), theirs.eval(), *sample(64, 96, count=1))


@pytest.mark.parametrize(
    ("backbone", "output_stride"), [("vit_tiny", 4), ("random:timm:convnext_atto", 8), ("resnet_tiny", 4)]
)
def test_a_backbone_that_mmsegmentation_has_not_gives_our_scores_and_losses(backbone: str, output_stride: int) -> None:
    ours, theirs = both("fcn", False, backbone, output_stride)
    scores_are_equal(ours.eval(), theirs.eval(), *sample(64, 96, count=1))
    images, labels = sample(90, 122, count=1)  # no whole patches: filled up, and what is said of the filling cut off
    with torch.no_grad():
        prepared = theirs.data_preprocessor(packed(images, labels))
        (found,) = theirs.predict(prepared["inputs"], prepared["data_samples"])
        assert apart(ours._scores(ours.normalised(images[0])[None])[0], found.seg_logits.data) < 1e-4
    losses = ours.train()(list(images), list(labels))
    expected = theirs.train().loss(**theirs.data_preprocessor(packed(images, labels), training=True))
    assert float(losses["loss_head"].detach()) == pytest.approx(float(expected["decode.loss_ce"].detach()), rel=1e-4)


def test_of_a_block_without_a_bottleneck_mmsegmentation_dilates_the_first_convolution_alone() -> None:
    """What docs/dense.md says of ResNet-18 and 34."""
    ours, theirs = both("fcn", False, "resnet18", output_stride=8)
    block, other = ours.trunk.layer4[1], theirs.backbone.layer4[1]
    assert block.conv1.dilation == other.conv1.dilation == block.conv2.dilation == (4, 4)
    assert other.conv2.dilation == (1, 1)
