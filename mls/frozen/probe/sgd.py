"""The linear classifier trained as MoCo's (https://arxiv.org/abs/1911.05722) is: stochastic gradient descent on the
features as they are, here with many learning rates and weight decays in the same products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mls.errors import ConfigError
from mls.frozen.probe.design import Design, plain
from mls.frozen.probe.labels import Labels, read_labels
from mls.frozen.probe.linear import HELD_OUT, Choice, Probe, Progress, Tried, Validation, finish, objective, quiet, rank
from mls.streams import generator

MOMENTUM = 0.9
RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # MoCo's is 30
Schedule = Literal["steps", "cosine"]


@torch.no_grad()
def sgd_probe(
    train_features: Float[Tensor, "train dim"],
    train_labels: Shaped[Tensor, "train ..."],
    test_features: Float[Tensor, "test dim"],
    test_labels: Shaped[Tensor, "test ..."] | None = None,
    lr: Sequence[float] = RATES,
    weight_decay: Sequence[float] = (0.0, 1e-6, 1e-5),
    epochs: int = 100,
    batch_size: int = 256,
    schedule: Schedule = "steps",
    seed: int = 0,
    multilabel: bool | None = None,
    validation: Validation | None = None,
    held_out: float = HELD_OUT,
    refit: bool = True,
    progress: Progress = quiet,
) -> Probe:
    """Every pair of a learning rate (at batch 256, scaled with the batch) and a weight decay is trained on the same
    batches, from zero; the pair is chosen as `linear_probe` chooses its penalty, equal values going to the lower rate.
    `progress` is told of (epochs done, epochs) of each of the two trainings.

    The rate falls to a tenth after 60 and 80 % of the epochs, or along a cosine. The features are read a batch at a
    time, so they may be a file mapped into memory.

    >>> x = torch.cat([torch.zeros(20, 1), torch.ones(20, 1)])
    >>> found = sgd_probe(x, x[:, 0].long(), x, x[:, 0].long(), lr=[1.0, 10.0], weight_decay=[0.0])
    >>> found.value, found.chosen
    (1.0, {'lr': 1.0, 'weight_decay': 0.0})
    """
    if not lr or not weight_decay or min(lr) <= 0 or min(weight_decay) < 0 or epochs < 1 or batch_size < 1:
        raise ConfigError(
            "the probe needs learning rates above 0, weight decays from 0, an epoch and a batch of 1 or more"
        )
    labels = read_labels(train_labels.to(train_features.device), multilabel)
    settings = [{"lr": rate, "weight_decay": decay} for rate, decay in product(lr, weight_decay)]
    choice = Choice(train_features, labels, seed, validation, held_out)

    def train(chosen: Sequence[dict[str, float]], rows: Tensor | None) -> tuple[Tensor, Tensor]:
        design = plain(train_features.detach())
        design.rows = rows
        return _train(design, labels, chosen, epochs, batch_size, schedule, seed, progress)

    weight, bias = train(settings, choice.rows)
    tried = [Tried(each, choice.measure(w, b)) for each, w, b in zip(settings, weight, bias, strict=True)]
    best = max(range(len(tried)), key=lambda i: (rank(tried[i].value), -settings[i]["lr"]))
    if refit and choice.rows is not None:
        weight, bias = train([settings[best]], None)
        return finish(weight[0], bias[0], tried, best, labels, test_features, test_labels)
    return finish(weight[best], bias[best], tried, best, labels, test_features, test_labels)


def _train(
    design: Design,
    labels: Labels,
    settings: Sequence[dict[str, float]],
    epochs: int,
    batch_size: int,
    schedule: Schedule,
    seed: int,
    progress: Progress,
) -> tuple[Float[Tensor, "settings dim classes"], Float[Tensor, "settings classes"]]:
    device = design.features.device
    loss = objective(labels, design, copies=len(settings))
    groups = len(settings) * (1 if labels.single else labels.classes)
    images = torch.arange(len(design)) if design.rows is None else design.rows.cpu()
    shape = len(settings), labels.classes
    weight = torch.zeros(*shape, design.features.shape[1], dtype=design.dtype, device=device)
    bias = torch.zeros(*shape, 1, dtype=design.dtype, device=device)
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    rate, decay = (
        torch.tensor([each[name] for each in settings], dtype=design.dtype, device=device)[:, None, None]
        for name in ("lr", "weight_decay")
    )
    for epoch in range(epochs):
        now = rate * (batch_size / 256 * _share(schedule, epoch, epochs))
        order = images[torch.randperm(len(images), generator=generator(seed, "probe order", epoch))].to(device)
        for batch in order.split(batch_size):
            x = design.features[batch].to(design.dtype)
            logits = torch.addmm(bias.flatten(0, 1), weight.flatten(0, 1), x.T)
            _, slopes = loss.losses(logits.view(groups, -1, len(batch)), batch)
            slopes = slopes.reshape(-1, len(batch)) / len(batch)
            gradients = (slopes @ x).view_as(weight), slopes.sum(dim=1).view_as(bias)
            for parameter, momentum, gradient in zip((weight, bias), momenta, gradients, strict=True):
                momentum.mul_(MOMENTUM).add_(gradient).add_(decay * parameter)
                parameter.sub_(now * momentum)
        progress(epoch + 1, epochs)
    return weight.mT, bias[..., 0]


def _share(schedule: Schedule, epoch: int, epochs: int) -> float:
    """Of the learning rate, in an epoch counted from 0.

    >>> [_share("steps", epoch, 100) for epoch in (59, 60, 80)]
    [1.0, 0.1, 0.010000000000000002]
    >>> [round(_share("cosine", epoch, 100), 2) for epoch in (0, 50, 99)]
    [1.0, 0.5, 0.0]
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return 0.1 ** sum(epoch >= share * epochs for share in (0.6, 0.8))
