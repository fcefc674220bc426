"""Classifiers out of any network: the head is found, replaced, trained, and gives class activation maps."""

import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models

from mls import losses
from mls.config import AugmentConfig
from mls.errors import CheckpointError, ConfigError
from mls.eval.classifier import Classifier, CosineHead, build_classifier, detach_head, last_map
from mls.models import backbones, load_backbone, save_backbone

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
        build_classifier("scratch:squeezenet1_1", classes=5)
    gated = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8), nn.ReLU())
    gated.append(nn.Unflatten(1, (8, 1, 1))).append(nn.Conv2d(8, 8, 1))  # the scores come from a convolution
    with pytest.raises(ConfigError, match="Sequential has no linear layer"):
        detach_head(gated)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "densenet169", "regnet_y_32gf"])
def test_big_networks_take_a_training_step(name: str) -> None:
    classifier = build_classifier(f"scratch:{name}", classes=6).train()
    weight = classifier.head.weight.detach().clone()
    first = next(classifier.backbone.parameters())
    stem = first.detach().clone()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    labels = torch.tensor([[1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0]])
    loss = losses.build("an")(classifier(torch.rand(2, 3, 64, 64)), labels)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert not torch.equal(classifier.head.weight, weight)
    assert not torch.equal(first, stem)


def test_a_cosine_head_gives_the_product_of_normalised_features_and_weights() -> None:
    head, features = CosineHead(16, 5).double(), torch.randn(4, 16, dtype=torch.float64)
    expected = F.normalize(features, dim=1) @ F.normalize(head.weight, dim=1).T
    torch.testing.assert_close(head(features), expected)
    torch.testing.assert_close(head(1000 * features), expected)
    assert [name for name, _ in head.named_parameters()] == ["weight"]


def test_a_cosine_head_keeps_fp32_under_autocast() -> None:
    head, features = CosineHead(16, 5), torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = head(features)
    assert reduced.dtype == torch.float32
    assert torch.equal(reduced, head(features))


def test_logits_are_judged_by_their_sigmoid() -> None:
    classifier = build_classifier("resnet_tiny", classes=4)
    outputs = classifier(torch.rand(2, 3, 32, 32))
    assert torch.equal(losses.build("an").predict(outputs), outputs.sigmoid())


def test_cosines_are_judged_by_what_the_loss_has_learnt() -> None:
    loss = losses.build("hml", scale=10.0, margin=0.5)
    classifier = build_classifier("resnet_tiny", classes=4, head="cosine")
    outputs = classifier(torch.rand(2, 3, 32, 32))
    expected = (10 * (outputs.arccos() + 0.5).cos()).sigmoid()
    torch.testing.assert_close(loss.predict(outputs), expected)


def test_a_saved_run_is_loaded(tmp_path: Path) -> None:
    saved = backbones.build("resnet_tiny").eval()
    save_backbone(tmp_path, saved, {"architecture": "resnet_tiny"}, AugmentConfig())
    images = torch.rand(2, 3, 32, 32)
    for weights in (tmp_path, str(tmp_path), tmp_path / "backbone.safetensors"):
        classifier = build_classifier(weights, classes=3)
        assert torch.equal(classifier.features(images), saved(images))
        assert torch.equal(classifier(images), classifier.head(saved(images)))


@pytest.mark.parametrize("weights", ["resnet_tiny", "random:resnet_tiny", "scratch:shufflenet_v2_x0_5"])
def test_a_new_classifier_is_in_evaluation_mode(weights: str) -> None:
    assert not any(module.training for module in build_classifier(weights, classes=3).modules())


def weights_of(classifier: Classifier) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in classifier.state_dict().items()}


@pytest.mark.parametrize("name", ["resnet_tiny", "random:resnet_tiny", "scratch:shufflenet_v2_x0_5"])
@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_the_seed_alone_decides_the_initial_weights(name: str, head: str) -> None:
    torch.manual_seed(1)
    one = build_classifier(name, 4, head, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    same, other = build_classifier(name, 4, head, seed=3), build_classifier(name, 4, head, seed=4)
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is left alone
    torch.testing.assert_close(weights_of(one), weights_of(same), rtol=0, atol=0)
    assert not torch.equal(one.head.weight, other.head.weight)
    assert not torch.equal(next(one.backbone.parameters()), next(other.backbone.parameters()))


def test_the_head_does_not_depend_on_where_the_backbone_comes_from(tmp_path: Path) -> None:
    save_backbone(tmp_path, backbones.build("resnet_tiny"), {"architecture": "resnet_tiny"}, AugmentConfig())
    one, other = build_classifier(tmp_path, classes=3), build_classifier("resnet_tiny", classes=3)
    assert torch.equal(one.head.weight, other.head.weight)


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
        build_classifier(weights, classes=3)


def test_an_unknown_head_is_answered_with_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown head 'cosin': did you mean 'cosine'"):
        build_classifier("resnet_tiny", classes=3, head="cosin")


@pytest.mark.parametrize("suffix", ["", "@IMAGENET1K_V1"])
def test_published_weights_are_read_from_where_torch_keeps_them(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = models.shufflenet_v2_x0_5()
    url = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1])
    backbone = build_classifier(f"torchvision:shufflenet_v2_x0_5{suffix}", classes=3).backbone
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in backbone.state_dict().items())


def test_a_failed_download_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # an earlier one has read the environment already
    with pytest.raises(CheckpointError) as caught:
        build_classifier("torchvision:resnet50@IMAGENET1K_V1", classes=3)
    url = models.ResNet50_Weights.IMAGENET1K_V1.url
    assert f"download {url} into {tmp_path}/hub/checkpoints" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 96),
        ("resnet_tiny", 32),
        ("resnext50_32x4d", 64),
        ("scratch:regnet_y_400mf", 96),
        ("scratch:densenet121", 96),
        ("scratch:mnasnet0_5", 96),
    ],
)
def test_the_last_map_averages_to_the_features(name: str, size: int) -> None:
    classifier = build_classifier(name, classes=3)
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        maps = last_map(classifier.backbone, images)
        assert maps.shape[0] == 2 and maps.shape[2] == maps.shape[3] > 1
        torch.testing.assert_close(maps.mean((2, 3)), classifier.features(images))
        activation = torch.einsum("cd,ndhw->nchw", classifier.head.weight, maps)
        torch.testing.assert_close(activation.mean((2, 3)) + classifier.head.bias, classifier(images))


def test_the_last_map_of_a_timm_backbone() -> None:
    pytest.importorskip("timm", reason="timm is not installed (pip install mls[timm])")
    backbone, images = load_backbone("timm:resnet10t"), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(last_map(backbone, images).mean((2, 3)), backbone(images))


@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v3_small", "convnext_tiny"])
def test_a_network_whose_features_are_no_average_has_no_activation_maps(name: str) -> None:
    backbone = build_classifier(f"scratch:{name}", classes=3).backbone
    with torch.no_grad(), pytest.raises(ConfigError, match="not the mean of a map"):
        last_map(backbone, torch.rand(1, 3, 64, 64))
