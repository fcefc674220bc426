"""The optimizer of the supervised loop: what learns and at which rate, from step to step. When it steps is decided in
training.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mls.core.losses import Loss, own_rate
from mls.engine.schedule import cosine, stepwise
from mls.eval.classifier import Classifier, Several
from mls.eval.protocol import TrainingConfig
from mls.models.stages import stages


def build(training: TrainingConfig, classifier: Classifier | Several, loss: Loss) -> torch.optim.Optimizer:
    """Weight decay is on everything but what the loss learns, biases and normalisation too: as in published fine-tuning
    code. A group's `share` is its multiple of the learning rate."""
    groups: list[dict[str, Any]] = []
    for network in classifier.networks:
        body = stages(network.backbone)
        for distance, parameters in zip(range(len(body), 0, -1), body, strict=True):
            groups.append({"params": parameters, "share": training.layer_decay**distance})
        groups.append({"params": list(network.head.parameters()), "share": training.head_lr})
    own_share = loss_share(training, loss, classifier, adaptive=training.optimizer != "sgd")
    groups.append({"params": list(loss.parameters()), "share": own_share, "weight_decay": 0.0})
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        group["lr"] = training.lr * group["share"]
    groups = [group for group in groups if group["params"]]
    decay = training.weight_decay
    if training.optimizer == "sgd":
        momentum, nesterov = training.momentum, training.nesterov
        return torch.optim.SGD(groups, training.lr, momentum=momentum, weight_decay=decay, nesterov=nesterov)
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, training.lr, weight_decay=decay)


def build_linear_init(training: TrainingConfig, classifier: Classifier | Several, loss: Loss) -> torch.optim.Optimizer:
    """Adam for the last layer and what the loss learns, as in published LinearInit."""
    own_share = loss_share(training, loss, classifier, adaptive=True)
    heads = [parameter for network in classifier.networks for parameter in network.head.parameters()]
    groups: list[dict[str, Any]] = [{"params": heads}]
    if own := list(loss.parameters()):
        groups.append({"params": own, "lr": training.linear_lr * own_share})
    return torch.optim.Adam(groups, lr=training.linear_lr)


def loss_share(training: TrainingConfig, loss: Loss, classifier: Classifier | Several, adaptive: bool) -> float:
    """The rate of what the loss learns (HML's scale and margin, ROLE's estimates), times the network's."""
    if training.loss_lr is not None:
        return training.loss_lr
    return own_rate(loss, training.batch_size * classifier.networks[0].head.out_features, adaptive)


def idle(loss: Loss, before: dict[str, Tensor]) -> dict[str, float]:
    """What the loss learns and has moved by less than one per cent of itself since `before`, with the share it moved.

    >>> idle(torch.nn.Linear(2, 1), {})
    {}
    """
    now = {name: parameter.detach() for name, parameter in loss.named_parameters()}
    moved = {name: float((now[name] - old).norm() / old.norm().clamp(min=1e-12)) for name, old in before.items()}
    return {name: share for name, share in moved.items() if share < 0.01}


def set_lr(optimizer: torch.optim.Optimizer, training: TrainingConfig, step: int, steps_per_epoch: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = training.lr * group["share"] * lr_share(training, step, steps_per_epoch)


def lr_share(training: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """The share of the peak learning rate at a step; both count from 1.

    >>> training = TrainingConfig(epochs=4, schedule="steps", steps=[2], warmup_epochs=0.5)
    >>> [lr_share(training, step, steps_per_epoch=4) for step in (1, 2, 8, 9)]
    [0.5, 1.0, 1.0, 0.1]
    """
    warmup = round(training.warmup_epochs * steps_per_epoch)
    if training.schedule == "cosine":
        return cosine(step, training.epochs * steps_per_epoch, warmup)
    falls = training.steps if training.schedule == "steps" else []
    return stepwise(step, [epoch * steps_per_epoch for epoch in falls], warmup)


def frozen_parts(training: TrainingConfig, classifier: Classifier) -> Iterable[nn.Module]:
    """What the protocol leaves as it was pretrained."""
    if training.train == "head":
        return [classifier.backbone]
    if training.batch_norm == "frozen":
        return [part for part in classifier.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return []


def weight_penalty(training: TrainingConfig, classifier: Classifier | Several) -> Tensor | float:
    """L1R and L2R: over the weights of all layers that learn, not over biases and normalisation."""
    if training.weight_penalty == "none":
        return 0.0
    weights = [p.float() for p in classifier.parameters() if p.ndim > 1 and p.requires_grad]
    size = (lambda w: w.abs().sum()) if training.weight_penalty == "l1" else (lambda w: w.square().sum())
    return training.penalty * torch.stack([size(weight) for weight in weights]).sum()
