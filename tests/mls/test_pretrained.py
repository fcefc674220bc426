"""The classification networks of torchvision as backbones: the head is found whatever its name, weights by name."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from mls.errors import CheckpointError, ConfigError
from mls.models import load_backbone
from mls.models.pretrained import detach_head

HEADS = {
    "resnext50_32x4d": ("fc", 2048),
    "densenet169": ("classifier", 1664),
    "regnet_y_400mf": ("fc", 440),
    "vgg16": ("classifier.6", 4096),
    "mobilenet_v3_large": ("classifier.3", 1280),
    "efficientnet_b0": ("classifier.1", 1280),
    "convnext_tiny": ("classifier.2", 768),
    "vit_b_16": ("heads.head", 768),
    "swin_t": ("head", 768),
    "maxvit_t": ("classifier.5", 512),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_found_whatever_its_name(name: str) -> None:
    place, dim = HEADS[name]
    model = models.get_model(name, num_classes=13)
    assert isinstance(model.get_submodule(place), nn.Linear)
    backbone = detach_head(model)
    assert isinstance(backbone.get_submodule(place), nn.Identity)
    assert backbone.feature_dim == dim


def test_what_a_detached_head_took_in_is_what_the_backbone_gives() -> None:
    images = torch.rand(2, 3, 64, 64)
    model = models.efficientnet_b0(num_classes=7).eval()
    head = model.classifier[1]
    with torch.no_grad():
        scores = model(images)
        torch.testing.assert_close(head(detach_head(model)(images)), scores)


def test_finding_the_head_leaves_weights_statistics_and_mode_alone() -> None:
    model = models.resnet18()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("fc")}
    after = detach_head(model).state_dict()
    assert model.training
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_vision_transformer_of_another_image_size_has_a_head_too() -> None:
    assert detach_head(models.vit_b_32(image_size=96)).feature_dim == 768


@pytest.mark.parametrize(("name", "dim"), [("googlenet", 1024), ("inception_v3", 2048)])
def test_auxiliary_outputs_are_dropped(name: str, dim: int) -> None:
    backbone = detach_head(models.get_model(name, init_weights=False)).train()
    assert backbone(torch.rand(2, 3, 96, 96)).shape == (2, dim)  # in training a tensor, not the pair of outputs


def test_a_network_without_a_linear_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="SqueezeNet has no linear layer .* such as resnet50"):
        load_backbone("scratch:squeezenet1_1")
    gated = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), nn.ReLU())
    gated.append(nn.Unflatten(1, (8, 1, 1))).append(nn.Conv2d(8, 8, 1))  # the scores come from a convolution
    with pytest.raises(ConfigError, match="Sequential has no linear layer"):
        detach_head(gated)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("resnet5", "did you mean 'resnet50'"),
        ("random:resnet5", "did you mean 'resnet50'"),
        ("scratch:resnext50", "unknown torchvision network 'resnext50': .*resnext50_32x4d"),
        ("scratch:resnet50@IMAGENET1K_V1", "unknown torchvision network 'resnet50@IMAGENET1K_V1'"),
        ("torchvison:resnet50", "did you mean 'torchvision'"),
        ("torchvision:resnet5O", "did you mean 'resnet50'"),
        ("torchvision:resnet50@IMAGENET_V1", r"did you mean 'IMAGENET1K_V1'\? .*IMAGENET1K_V2"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(weights: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_backbone(weights)


@pytest.mark.parametrize("suffix", ["", "@IMAGENET1K_V1"])
def test_published_weights_are_read_from_where_torch_keeps_them(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = models.shufflenet_v2_x0_5()
    url = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1])
    backbone = load_backbone(f"torchvision:shufflenet_v2_x0_5{suffix}")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in backbone.state_dict().items())


def test_a_failed_download_says_what_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_internet: None
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        load_backbone("torchvision:resnet50@IMAGENET1K_V1")
    url = models.ResNet50_Weights.IMAGENET1K_V1.url
    assert f"download {url} into {tmp_path}/hub/checkpoints" in str(caught.value)
    assert "\n" not in str(caught.value)
