"""Classifiers out of any backbone: a head is added and trained, and gives class activation maps."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mls.config import AugmentConfig
from mls.core import losses
from mls.errors import ConfigError
from mls.eval.classifier import Classifier, CosineHead, build_classifier, last_map
from mls.models import backbones, load_backbone, save_backbone


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


def test_an_unknown_head_is_answered_with_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown head 'cosin': did you mean 'cosine'"):
        build_classifier("resnet_tiny", classes=3, head="cosin")


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
    backbone, images = load_backbone("random:timm:resnet10t"), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(last_map(backbone, images).mean((2, 3)), backbone(images))


@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v3_small", "convnext_tiny"])
def test_a_network_whose_features_are_no_average_has_no_activation_maps(name: str) -> None:
    backbone = build_classifier(f"scratch:{name}", classes=3).backbone
    with torch.no_grad(), pytest.raises(ConfigError, match="not the mean of a map"):
        last_map(backbone, torch.rand(1, 3, 64, 64))
