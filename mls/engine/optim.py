"""Optimizers by name. The learning rate in a config is per 256 images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from mls.config import Config
from mls.core.method import OwnRate
from mls.models.stages import stages, tokens


def scaled_lr(config: Config) -> float:
    """The peak learning rate of the run.

    >>> from mls.config import Config, DataConfig
    >>> scaled_lr(Config(data=DataConfig(batch_size=512)))
    0.6
    """
    return config.optim.lr * (config.data.batch_size / 256 if config.optim.scale_lr else 1.0)


def build(
    config: Config, network: nn.Module, own: Sequence[OwnRate] = (), backbone: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Parameters with a rate of their own get no weight decay. `backbone`: the part of the network whose stages
    `optim.layer_decay` counts."""
    optim, lr = config.optim, scaled_lr(config)
    apart = {id(parameter) for rate in own for parameter in rate.parameters}
    learning = [p for p in network.parameters() if p.requires_grad and id(p) not in apart]
    below = list(reversed(stages(backbone))) if backbone is not None and optim.layer_decay < 1 else []
    distance = {id(p): far for far, stage in enumerate(below, start=1) for p in stage}
    spared = set() if optim.decay_norm_and_bias else tokens(network) | {id(p) for p in learning if p.ndim < 2}
    groups: list[dict[str, object]] = []
    for far in range(len(below) + 1):
        here = [p for p in learning if distance.get(id(p), 0) == far]
        decayed, share = [p for p in here if id(p) not in spared], optim.layer_decay**far
        rest = [p for p in here if id(p) in spared]
        groups.append({"params": decayed, "weight_decay": optim.weight_decay, "share": share})
        groups.append({"params": rest, "weight_decay": 0.0, "share": share, "adapt": False})
    groups += [
        {"params": rate.parameters, "weight_decay": 0.0, "share": rate.multiplier, "adapt": False} for rate in own
    ]
    groups = [{"adapt": True, **group} for group in groups if group["params"]]
    if optim.name == "sgd":
        # All parameters in one call, on a CPU too: the same bits in fewer dispatches.
        return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum, nesterov=optim.nesterov, foreach=True)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=optim.betas)
    return LARS(groups, lr=lr, momentum=optim.momentum)


def set_lr(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float | None = None) -> None:
    """And the weight decay of those groups that have one, where it is scheduled."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
        if weight_decay is not None and group["adapt"]:
            group["weight_decay"] = weight_decay


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (https://arxiv.org/abs/1708.03888), as MoCo-v3 uses them: a weight's step is scaled by
    trust · |weight| / |gradient + decay|; groups with `adapt=False` take plain momentum steps."""

    def __init__(
        self, params: Iterable[dict[str, object]], lr: float, momentum: float = 0.9, trust: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        value = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return value

    def _move(self, parameter: Tensor, group: dict[str, float]) -> None:
        assert parameter.grad is not None
        step = parameter.grad + group["weight_decay"] * parameter
        if group["adapt"]:
            size, pull = parameter.norm(), step.norm()
            trusted = group["trust"] * size / pull
            step = step * torch.where((size > 0) & (pull > 0), trusted, torch.ones_like(size))
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].mul_(group["momentum"]).add_(step)
        parameter.add_(state["momentum_buffer"], alpha=-group["lr"])
