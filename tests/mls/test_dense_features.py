"""Maps of features: any layer of any network, of images of any size."""

from pathlib import Path

import pytest
import torch
from torchvision.models import SwinTransformer, resnet18, resnet50
from torchvision.models._utils import IntermediateLayerGetter

import mls
from mls.config import AugmentConfig
from mls.errors import ConfigError
from mls.models import load_backbone, save_backbone
from mls.models.spatial import DenseFeatures, dense_features

DRAWS = torch.Generator().manual_seed(0)
IMAGES = torch.randn(2, 3, 64, 96, generator=DRAWS)


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [
        ("resnet_tiny", None, (128, 8, 12)),
        ("random:resnet18", "layer3", (256, 4, 6)),
        ("random:mobilenet_v3_small", None, (576, 2, 3)),
        ("random:timm:test_resnet", None, (96, 2, 3)),
        ("random:timm:test_convnext", "stages.1", (32, 8, 12)),
        ("random:timm:test_vit", None, (64, 4, 6)),
        ("random:timm:test_vit", 1, (64, 4, 6)),
        ("random:timm:test_vit", "blocks.1", (64, 4, 6)),
        ("random:timm:test_vit", "patch_embed", (64, 4, 6)),
    ],
)
@torch.no_grad()
def test_every_network_gives_a_map(name: str, layer: str | int | None, shape: tuple[int, ...]) -> None:
    backbone = load_backbone(name)
    maps = dense_features(backbone, IMAGES, layer)
    assert maps.shape == (2, *shape)
    assert maps.std() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet_tiny", "random:resnet18"])
def test_a_map_is_what_the_pooled_feature_is_made_of(name: str) -> None:
    backbone = load_backbone(name)
    torch.testing.assert_close(mls.dense_features(backbone, IMAGES).mean((2, 3)), backbone(IMAGES))


@torch.no_grad()
def test_swin_keeps_its_channels_last_and_we_do_not() -> None:
    network = SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4]).eval()
    network.head = torch.nn.Identity()
    for layer, shape in (("features.1", (8, 16, 24)), ("features.0.0", (8, 16, 24)), ("permute", (16, 8, 12))):
        assert dense_features(network, IMAGES, layer).shape == (2, *shape)  # one before, one behind a permutation
    torch.testing.assert_close(dense_features(network, IMAGES).mean((2, 3)), network(IMAGES))


@torch.no_grad()
def test_blocks_of_a_transformer_are_timms_intermediates() -> None:
    network = load_backbone("random:timm:test_vit4")
    images = torch.randn(2, 3, 50, 70)
    wanted = network.forward_intermediates(images, indices=[0], norm=True)[1][0]
    assert torch.equal(dense_features(network, images, 0), wanted)
    last = dense_features(network, images, -1)
    assert last.shape[2:] == (4, 5)
    assert torch.equal(last, dense_features(network, images))
    with pytest.raises(ConfigError, match="blocks: choose layer from"):
        dense_features(network, images, 99)


@torch.no_grad()
def test_torchvisions_transformer_takes_any_size_and_its_own_gives_the_same() -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    from mls.models.pretrained import detach_head

    torch.manual_seed(0)
    network = VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=7)
    torch.nn.init.normal_(network.heads.head.weight)
    same = VisionTransformer(32, 8, 3, 4, 32, 64, num_classes=7)
    same.load_state_dict(network.state_dict())
    same.heads = torch.nn.Identity()
    network, images = detach_head(network).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(images), same.eval()(images))
    assert network(IMAGES[..., :45, :61]).shape == (2, 32)
    assert dense_features(network, IMAGES[..., :45, :61]).shape == (2, 32, 6, 8)
    assert torch.equal(dense_features(network, images, 2), dense_features(network, images))
    assert not torch.equal(dense_features(network, images, 0), dense_features(network, images))


@torch.no_grad()
def test_dilation_is_torchvisions_and_timms() -> None:
    torch.manual_seed(0)
    backbone = resnet50().eval()
    twin = resnet50(replace_stride_with_dilation=[False, True, True]).eval()
    twin.load_state_dict(backbone.state_dict())
    expected = IntermediateLayerGetter(twin, {"layer4": "map"})(IMAGES)["map"]
    found = dense_features(backbone, IMAGES, output_stride=8)
    torch.testing.assert_close(found, expected)
    assert dense_features(backbone, IMAGES).shape[2:] == (2, 3)  # the network itself is as it was
    for name in ("timm:test_resnet", "timm:test_convnext"):
        double = load_backbone(f"random:{name}").double()
        found = dense_features(double, IMAGES.double(), output_stride=16)
        assert found.shape[2:] == (4, 6) and found.dtype == torch.float64
    with pytest.raises(ConfigError, match="cannot be dilated"):
        DenseFeatures("random:timm:test_vit", output_stride=8)


@torch.no_grad()
def test_maps_come_from_any_checkpoint(tmp_path: Path) -> None:
    backbone = load_backbone("resnet_tiny")
    save_backbone(tmp_path, backbone, {"architecture": "resnet_tiny"}, AugmentConfig(size=32))
    torch.manual_seed(0)
    state = {f"encoder_q.{name}": tensor for name, tensor in resnet18().state_dict().items() if "fc" not in name}
    torch.save({"state_dict": state}, tmp_path / "moco.pth")
    assert torch.equal(dense_features(tmp_path, IMAGES), dense_features(backbone, IMAGES))
    assert dense_features(tmp_path / "moco.pth", IMAGES, "layer2").shape == (2, 128, 8, 12)


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("resnet_tiny", "layer9", "TinyResNet has no layer layer9: name a part that gives a map"),
        ("resnet_tiny", 3, "TinyResNet has no blocks with numbers"),
        ("random:timm:test_maxvit", None, "takes no images of 64 × 96 .*: choose another size"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(name: str, layer: str | int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dense_features(name, IMAGES, layer)


@pytest.mark.parametrize("stride", [0, -1, 6])
def test_a_stride_is_a_power_of_two(stride: int) -> None:
    with pytest.raises(ConfigError, match="give a power of two"):
        dense_features("resnet_tiny", IMAGES, output_stride=stride)


def test_a_size_that_a_backbone_does_not_take_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    overrides = ["model.backbone=timm:test_maxvit", f"run.root={tmp_path}", "engine.device=cpu"]
    with pytest.raises(ConfigError, match="takes no images of 32 × 32"):
        mls.pretrain(mls.load_config("moco_v2_scenes_tiny", overrides), quiet=True)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
