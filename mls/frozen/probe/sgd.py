"""A linear classifier trained as in MoCo (https://arxiv.org/abs/1911.05722): stochastic gradient descent on unscaled
features, here with many learning rates and weight decays in the same matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mls.errors import ConfigError
from mls.frozen.probe.design import ROWS, Design, unscaled
from mls.frozen.probe.labels import Labels, read_labels
from mls.frozen.probe.linear import (
    Candidate,
    Probe,
    ProbeOptions,
    Selection,
    Validation,
    build_probe,
    nan_lowest,
    objective,
)
from mls.models.finite import finite
from mls.streams import generator

MOMENTUM = 0.9
AXES_FROM = 16  # times as many features as axes: on so many the axes are found
RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # MoCo's is 30
Schedule = Literal["steps", "cosine"]


@dataclass(frozen=True)
class Sgd:
    """Every pair of a learning rate and a weight decay is trained."""

    lr: Sequence[float] = RATES  # at batch 256; scaled with the batch
    weight_decay: Sequence[float] = (0.0, 1e-6, 1e-5)
    epochs: int = 100
    batch_size: int = 256
    schedule: Schedule = "steps"  # steps: a tenth after 60 % and 80 % of the epochs
    axes: int | None = (
        None  # pairs are compared on so many leading axes of wider features, the chosen one learns on all
    )

    def __post_init__(self) -> None:
        if not self.lr or not self.weight_decay or min(self.lr) <= 0 or min(self.weight_decay) < 0:
            raise ConfigError("the probe needs one or more learning rates above 0 and weight decays from 0")
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError("the probe needs an epoch and a batch of 1 or more")


@torch.no_grad()
def sgd_probe(
    train_features: Float[Tensor, "train dim"],
    train_labels: Shaped[Tensor, "train ..."],
    test_features: Float[Tensor, "test dim"],
    test_labels: Shaped[Tensor, "test ..."] | None = None,
    sgd: Sgd = Sgd(),
    options: ProbeOptions = ProbeOptions(),  # noqa: B008
) -> Probe:
    """Every pair of a learning rate and a weight decay is trained on the same batches, from zero. The pair is chosen as
    `linear_probe` chooses its penalty; of equal values the lower rate is taken. `progress` is called with (epochs done,
    epochs) for each of the two trainings. The features are read a batch at a time, so they may be memory-mapped.

    >>> x = torch.cat([torch.zeros(20, 1), torch.ones(20, 1)])
    >>> found = sgd_probe(x, x[:, 0].long(), x, x[:, 0].long(), Sgd(lr=[1.0, 10.0], weight_decay=[0.0]))
    >>> found.value, found.chosen
    (1.0, {'lr': 1.0, 'weight_decay': 0.0})
    """
    labels = read_labels(train_labels.to(train_features.device), options.multilabel)
    settings = [{"lr": rate, "weight_decay": decay} for rate, decay in product(sgd.lr, sgd.weight_decay)]
    fewer = bool(sgd.axes and 2 * sgd.axes < train_features.shape[1] and len(settings) > 1)
    compared, validation = (
        _on_leading_axes(train_features, sgd, options) if fewer else (train_features, options.validation)
    )
    selection = Selection(compared, labels, replace(options, validation=validation))

    def train(features: Tensor, chosen: Sequence[dict[str, float]], rows: Tensor | None) -> tuple[Tensor, Tensor]:
        design = unscaled(features.detach())
        design.rows = rows
        return _train(design, labels, chosen, sgd, options)

    weight, bias = train(compared, settings, selection.rows)
    tried = [Candidate(each, selection.measure(w, b)) for each, w, b in zip(settings, weight, bias, strict=True)]
    best = max(range(len(tried)), key=lambda i: (nan_lowest(tried[i].value), -settings[i]["lr"]))
    if fewer or (options.refit and selection.rows is not None):
        weight, bias = train(train_features, [settings[best]], None if options.refit else selection.rows)
        return build_probe(weight[0], bias[0], tried, best, labels, test_features, test_labels)
    return build_probe(weight[best], bias[best], tried, best, labels, test_features, test_labels)


def _on_leading_axes(
    features: Float[Tensor, "train dim"], sgd: Sgd, options: ProbeOptions
) -> tuple[Float[Tensor, "train axes"], Validation | None]:
    """The features, and those to choose on, along the principal axes (not centred) of some of the features. Along all
    axes SGD would take the same steps; what is left out are those along which the features are smallest."""
    assert sgd.axes is not None
    some = torch.randperm(len(features), generator=generator(options.seed, "probe axes"))[: AXES_FROM * sgd.axes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the random directions that the axes are found from
        axes = torch.svd_lowrank(finite(features[some.to(features.device)].float()), sgd.axes, niter=2)[2]
    along = lambda of: torch.cat([finite(part.to(axes)) @ axes for part in of.split(ROWS)])
    held = options.validation
    return along(features), held and (along(held[0]), held[1])


def _train(
    design: Design,
    labels: Labels,
    settings: Sequence[dict[str, float]],
    sgd: Sgd,
    options: ProbeOptions,
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
    for epoch in range(sgd.epochs):
        lr = rate * (sgd.batch_size / 256 * _share(sgd.schedule, epoch, sgd.epochs))
        order = images[torch.randperm(len(images), generator=generator(options.seed, "probe order", epoch))].to(device)
        for batch in order.split(sgd.batch_size):
            x = finite(design.features[batch].to(design.dtype))
            logits = torch.addmm(bias.flatten(0, 1), weight.flatten(0, 1), x.T)
            _, slopes = loss.losses(logits.view(groups, -1, len(batch)), batch)
            slopes = slopes.reshape(-1, len(batch)) / len(batch)
            gradients = (slopes @ x).view_as(weight), slopes.sum(dim=1).view_as(bias)
            for parameter, momentum, gradient in zip((weight, bias), momenta, gradients, strict=True):
                momentum.mul_(MOMENTUM).add_(gradient).add_(decay * parameter)
                parameter.sub_(lr * momentum)
        options.progress(epoch + 1, sgd.epochs)
    return weight.mT, bias[..., 0]


def _share(schedule: Schedule, epoch: int, epochs: int) -> float:
    """The share of the learning rate in an epoch, which counts from 0.

    >>> [_share("steps", epoch, 100) for epoch in (59, 60, 80)]
    [1.0, 0.1, 0.010000000000000002]
    >>> [round(_share("cosine", epoch, 100), 2) for epoch in (0, 50, 99)]
    [1.0, 0.5, 0.0]
    """
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return 0.1 ** sum(epoch >= share * epochs for share in (0.6, 0.8))
