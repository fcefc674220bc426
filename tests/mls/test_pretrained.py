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


# ------------------------------------------------------------------------------------------------ the grammar of names

TIMM = "convnext_atto.d2_in1k"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache of a machine without a network."""
    pytest.importorskip("timm")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def publish(hub: Path) -> None:
    """The published file in the cache's layout; its weights are drawn here."""
    import timm
    from safetensors.torch import save_file

    folder = hub / f"models--timm--{TIMM}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    torch.manual_seed(7)
    state = timm.create_model(TIMM).state_dict()
    save_file(state, folder / "snapshots" / ("0" * 40) / "model.safetensors")


def test_a_network_of_timm_has_its_published_weights_and_random_ones_are_called_so(hub: Path) -> None:
    publish(hub)
    first, second = load_backbone(f"timm:{TIMM}").state_dict(), load_backbone(f"timm:{TIMM}").state_dict()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    other = load_backbone(f"random:timm:{TIMM}").state_dict()
    assert other.keys() == first.keys()
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert load_backbone(f"timm:{TIMM}").card["input_size"] == 224


def test_published_weights_that_are_not_at_hand_are_one_sentence(hub: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"timm:{TIMM} cannot be downloaded here: copy hub/models--timm--convnext"
    ):
        load_backbone(f"timm:{TIMM}")
    with pytest.raises(CheckpointError, match=r"timm publishes no weights as .*: random:timm:"):
        load_backbone("timm:vit_tiny_patch16_384.nothing")


def test_random_names_every_network(hub: Path) -> None:
    names = ["resnet18", "resnet_tiny", "mobilenet_v3_small", "timm:resnet10t"]
    assert [load_backbone(f"random:{name}").feature_dim for name in names] == [512, 128, 1024, 512]
