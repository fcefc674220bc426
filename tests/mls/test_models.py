import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from mls.config import AugmentConfig, ModelConfig
from mls.errors import CheckpointError, ConfigError
from mls.frozen.untrained import with_batch_statistics
from mls.models import backbones, build_pair, load_backbone, save_backbone
from mls.models.gradient_checkpointing import checkpoint_blocks
from mls.models.norm import KeyNorm


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet_tiny"])
def test_backbones_give_one_feature_an_image(name: str) -> None:
    backbone = backbones.build(name).eval()
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, backbone.feature_dim)


def test_a_timm_backbone_works_where_timm_is_there() -> None:
    pytest.importorskip("timm", reason="timm is not installed (pip install mls[timm])")
    backbone = backbones.build("timm:resnet10t").eval()
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, backbone.feature_dim)
    with pytest.raises(ConfigError, match="unknown timm backbone 'resnet10x'"):
        backbones.build("timm:resnet10x")


def test_an_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown backbone 'resnet5': did you mean 'resnet50'"):
        backbones.build("resnet5")


@pytest.mark.parametrize("name", ["resnet18", "resnet_tiny"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_every_weight_is_initialised(name: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def filled_with_nan(*args, **kwargs):
        out = real(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", filled_with_nan)
    pair = build_pair(ModelConfig(backbone=name, head_norm=norm, projection=8), seed=0)
    assert all(torch.isfinite(tensor).all() for tensor in pair.state_dict().values())


def test_initialisation_depends_on_the_seed_alone() -> None:
    config = ModelConfig(backbone="resnet_tiny")
    torch.manual_seed(1)
    first = build_pair(config, seed=0)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other = build_pair(config, seed=0), build_pair(config, seed=1)
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is left alone
    assert torch.equal(first.query.backbone.conv1.weight, second.query.backbone.conv1.weight)
    assert not torch.equal(first.query.backbone.conv1.weight, other.query.backbone.conv1.weight)


def test_a_backbone_survives_saving_and_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbones.build("resnet_tiny").eval()
    save_backbone(tmp_path, backbone, {"architecture": "resnet_tiny"}, AugmentConfig(size=32))
    (tmp_path / "config.yaml").touch()
    monkeypatch.setenv("MLS_RUNS", str(tmp_path.parent))
    for weights in (tmp_path, tmp_path / "backbone.safetensors", tmp_path.name):
        loaded = load_backbone(weights)
        x = torch.randn(2, 3, 32, 32)
        assert loaded.feature_dim == 128
        assert not loaded.training
        assert torch.equal(loaded(x), backbone(x))
    pair = build_pair(ModelConfig(backbone="resnet_tiny", weights=str(tmp_path)), seed=5)
    assert torch.equal(pair.query.backbone.conv1.weight, backbone.conv1.weight)
    with pytest.raises(ConfigError, match="does not fit model.backbone"):
        build_pair(ModelConfig(backbone="resnet18", weights=str(tmp_path)), seed=5)


def test_weights_that_are_not_there_or_broken_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="did you mean 'resnet50'"):
        load_backbone("resnet5")
    with pytest.raises(CheckpointError, match=r"holds no backbone\.safetensors"):
        load_backbone(tmp_path)
    (tmp_path / "backbone.safetensors").write_bytes(b"nonsense")
    (tmp_path / "backbone.json").write_text('{"architecture": "resnet_tiny"}')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_backbone(tmp_path)


class Spy(nn.Module):
    """Batch normalisation that remembers the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.batches.append(len(x))
        y = self.norm(x.mean((2, 3)))
        return y, 2 * y


def test_split_normalises_random_groups_and_keeps_the_order() -> None:
    spy, images = Spy(), torch.randn(40, 3, 4, 4)
    mode = KeyNorm("split", group=16)
    g, z = mode(spy, images, torch.Generator().manual_seed(0))
    assert spy.batches == [20, 20]
    assert torch.equal(z, 2 * g)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    plain = nn.BatchNorm1d(3)
    expected = torch.empty(40, 3)
    for group in order.tensor_split(2):
        expected[group] = plain(images[group].mean((2, 3)))
    assert torch.allclose(g, expected, atol=1e-6)


def test_shuffle_with_one_process_becomes_split_and_says_so() -> None:
    mode = KeyNorm("shuffle", group=32)
    assert mode.mode == "split"
    assert "with one it is split" in mode.note


def test_none_normalises_the_whole_batch() -> None:
    spy = Spy()
    images = torch.randn(40, 3, 4, 4)
    g, _ = KeyNorm("none", group=4)(spy, images, torch.Generator())
    assert spy.batches == [40]
    assert torch.allclose(g, copy.deepcopy(spy).norm.train()(images.mean((2, 3))), atol=1e-6)


def test_keys_of_a_network_without_batch_normalisation_are_encoded_as_they_come() -> None:
    mode = KeyNorm("shuffle", 32, nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))
    assert mode.mode == "none" and "there is no batch normalisation" in mode.note
    assert KeyNorm("sync", 32, nn.BatchNorm1d(3)).mode == "sync"


def test_stochastic_depth_is_the_query_s_alone_and_a_frozen_projection_stays() -> None:
    config = ModelConfig(backbone="timm:test_vit", drop_path=0.5, freeze_patches=True, projection=8)
    pair = build_pair(config, seed=0)
    rates = [[module.drop_prob for module in backbones.drop_paths(side)] for side in (pair.query, pair.key)]
    assert max(rates[0]) == 0.5 and rates[1] and not any(rates[1])
    frozen = [name for name, parameter in pair.query.named_parameters() if not parameter.requires_grad]
    assert frozen == ["backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"]
    plain = build_pair(ModelConfig(backbone="timm:test_vit", projection=8), seed=0)
    same = zip(pair.state_dict().values(), plain.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in same)


@pytest.mark.parametrize("name", ["vit_tiny", "timm:swin_tiny_patch4_window7_224"])  # Swin's own rate is 0.1
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_stochastic_depth_is_what_is_asked_for_whatever_the_network_s_own_rate(name: str, rate: float) -> None:
    with torch.device("meta"):
        network = backbones.build(name, rate)
    assert max((layer.drop_prob for layer in backbones.drop_paths(network)), default=0.0) == pytest.approx(rate)


def test_statistics_of_batch_normalisation_are_taken_with_nothing_dropped() -> None:
    images, norm = torch.rand(8, 3, 4, 4), nn.BatchNorm2d(3)
    with_batch_statistics(nn.Sequential(nn.Dropout(0.9), norm), [images[:4], images[4:]])
    torch.testing.assert_close(norm.running_mean, images.mean((0, 2, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet_tiny", "drop_path": 0.1}, "drop_path=0.1 is for networks of timm"),
        ({"backbone": "timm:vgg11", "drop_path": 0.1}, "has no stochastic depth: set model.drop_path=0"),
        ({"backbone": "timm:test_convnext", "freeze_patches": True}, "has no patch projection"),
    ],
)
def test_what_a_network_has_not_is_one_sentence(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_pair(ModelConfig(**changes), seed=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet_tiny", "timm:test_vit", "timm:test_convnext"])
def test_checkpointing_gives_the_same_gradients_and_statistics_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    plain = backbones.build(name, 0.3 if name.startswith("timm:") else 0.0)
    torch.manual_seed(0)
    twin = backbones.build(name, 0.3 if name.startswith("timm:") else 0.0)
    names = [one for one, _ in twin.named_parameters()]
    checkpoint_blocks(twin)
    assert [one for one, _ in copy.deepcopy(twin).named_parameters()] == names
    images = torch.randn(4, 3, 32, 32)
    for network in (plain, twin):
        torch.manual_seed(1)  # of what stochastic depth leaves out
        network(images).square().sum().backward()
    for one, other in zip(plain.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)
    assert all(torch.equal(one, other) for one, other in zip(plain.buffers(), twin.buffers(), strict=True))
    assert torch.equal(plain.eval()(images), twin.eval()(images))


def test_a_network_without_blocks_cannot_be_checkpointed() -> None:
    with pytest.raises(ConfigError, match="set engine.checkpointing=false"):
        checkpoint_blocks(nn.Sequential(nn.Conv2d(3, 4, 3)))
