"""Optimizers by name. The learning rate in a config is per 256 images."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mls.config import Config


def scaled_lr(config: Config) -> float:
    """The peak learning rate of the run.

    >>> from mls.config import Config, DataConfig
    >>> scaled_lr(Config(data=DataConfig(batch_size=512)))
    0.6
    """
    return config.optim.lr * (config.data.batch_size / 256 if config.optim.scale_lr else 1.0)


def build(config: Config, method: nn.Module) -> torch.optim.Optimizer:
    """Parameters of a method's `loss` get no weight decay and `loss.lr_multiplier` times the rate."""
    optim, lr = config.optim, scaled_lr(config)
    loss = getattr(method, "loss", None)
    of_loss = [p for p in loss.parameters() if p.requires_grad] if loss is not None else []
    network = [p for p in method.parameters() if p.requires_grad and not any(p is other for other in of_loss)]
    decayed = [p for p in network if p.ndim > 1 or optim.decay_norm_and_bias]
    others = [p for p in network if not (p.ndim > 1 or optim.decay_norm_and_bias)]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay, "share": 1.0},
        {"params": others, "weight_decay": 0.0, "share": 1.0, "adapt": False},
        {"params": of_loss, "weight_decay": 0.0, "share": getattr(loss, "lr_multiplier", 1.0), "adapt": False},
    ]
    groups = [{"adapt": True, **group} for group in groups if group["params"]]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=optim.momentum, nesterov=optim.nesterov)
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=optim.betas)
    return LARS(groups, lr=lr, momentum=optim.momentum)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]


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
