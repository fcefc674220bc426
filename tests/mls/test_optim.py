from itertools import pairwise

import pytest
import torch
from torch import nn

from mls.config import Config, DataConfig, OptimConfig
from mls.engine import optim
from mls.engine.schedule import cosine, epoch_of
from mls.models import backbones


def test_cosine_warms_up_linearly_then_falls_to_the_final_share() -> None:
    rates = [cosine(step, total=110, warmup=10, final=0.01) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert max(rates) == 1.0
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert 0.01 <= rates[-1] < 0.012


def test_epochs_and_steps_count_from_one() -> None:
    assert [epoch_of(step, 4) for step in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]


def test_learning_rate_follows_the_batch_unless_told_not_to() -> None:
    assert optim.scaled_lr(Config(data=DataConfig(batch_size=64))) == pytest.approx(0.3 / 4)
    assert optim.scaled_lr(Config(data=DataConfig(batch_size=64), optim=OptimConfig(scale_lr=False))) == 0.3


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_every_optimizer_lowers_a_loss_and_resumes_exactly(name: str) -> None:
    def train(steps: int, state: dict | None = None, weights: dict | None = None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        optimizer = optim.build(Config(optim=OptimConfig(name=name, lr=0.05, decay_norm_and_bias=False)), model)
        if state is not None:
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
        losses = []
        for _ in range(steps):
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, optimizer.state_dict(), model.state_dict()

    whole, _, _ = train(20)
    first, state, weights = train(8)
    second, _, _ = train(12, state, weights)
    assert first + second == whole
    assert whole[-1] < whole[0]


def test_norm_and_bias_are_decayed_only_when_asked() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    groups = optim.build(Config(optim=OptimConfig(decay_norm_and_bias=False)), model).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 1e-4), (3, 0.0)]


def test_positions_and_tokens_of_a_transformer_are_decayed_as_biases_are() -> None:
    model = backbones.build("timm:test_vit")
    for wanted in (False, True):
        config = Config(optim=OptimConfig(name="adamw", decay_norm_and_bias=wanted, layer_decay=0.9, weight_decay=0.1))
        groups = optim.build(config, nn.ModuleList([model, nn.Linear(64, 2)]), backbone=model).param_groups
        decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        found = {decay[id(model.pos_embed)], decay[id(model.cls_token)], decay[id(model.norm.weight)]}
        assert found == {0.1 if wanted else 0.0} and decay[id(model.blocks[0].attn.qkv.weight)] == 0.1


def test_lars_step_is_trust_times_the_weights_norm() -> None:
    weight = nn.Parameter(torch.full((2, 2), 3.0))
    optimizer = optim.LARS([{"params": [weight], "weight_decay": 0.0, "adapt": True}], lr=1.0, momentum=0.0)
    weight.grad = torch.full((2, 2), 5.0)
    optimizer.step()
    assert (weight.detach() - 3.0).norm().item() == pytest.approx(0.001 * 6.0, rel=1e-4)
