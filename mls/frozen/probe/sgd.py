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
from mls.frozen.probe.design import Design, unscaled
from mls.frozen.probe.labels import Labels, read_labels
from mls.frozen.probe.linear import Candidate, Probe, ProbeOptions, Selection, build_probe, nan_lowest, objective
from mls.models.finite import finite
from mls.streams import generator

MOMENTUM = 0.9
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
    first: int | None = None  # epochs of a first comparison; the best pair of each of the `rates` best rates goes on
    rates: int = 2

    def __post_init__(self) -> None:
        if not self.lr or not self.weight_decay or min(self.lr) <= 0 or min(self.weight_decay) < 0:
            raise ConfigError("the probe needs one or more learning rates above 0 and weight decays from 0")
        if min(self.epochs, self.batch_size, self.rates, 1 if self.first is None else self.first) < 1:
            raise ConfigError("the probe needs an epoch, a batch and a rate of 1 or more")


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
    `linear_probe` chooses its penalty; of equal values the lower rate is taken. With `sgd.first` all pairs are first
    trained for so many epochs, on the whole schedule, and few of them, of different rates, for all: nearly the cost of
    these few. `progress` is called with (epochs done, epochs) for each training. The features are read a batch at a
    time, so they may be memory-mapped.

    >>> x = torch.cat([torch.zeros(20, 1), torch.ones(20, 1)])
    >>> found = sgd_probe(x, x[:, 0].long(), x, x[:, 0].long(), Sgd(lr=[1.0, 10.0], weight_decay=[0.0]))
    >>> found.value, found.chosen
    (1.0, {'lr': 1.0, 'weight_decay': 0.0})
    """
    labels = read_labels(train_labels.to(train_features.device), options.multilabel)
    settings = [{"lr": rate, "weight_decay": decay} for rate, decay in product(sgd.lr, sgd.weight_decay)]
    selection = Selection(train_features, labels, options)

    def train(chosen: Sequence[dict[str, float]], rows: Tensor | None, epochs: int) -> tuple[Tensor, Tensor]:
        design = unscaled(train_features.detach())
        design.rows = rows
        return _train(design, labels, chosen, replace(sgd, epochs=epochs), options)

    def compare(chosen: Sequence[dict[str, float]], epochs: int) -> tuple[Tensor, Tensor, list[Candidate]]:
        weight, bias = train(chosen, selection.rows, epochs)
        values = [selection.measure(w, b) for w, b in zip(weight, bias, strict=True)]
        return weight, bias, list(map(Candidate, chosen, values))

    if sgd.first and len(set(sgd.lr)) > sgd.rates:
        settings = _best_of_rates(compare(settings, sgd.first)[2], sgd.rates)
    weight, bias, tried = compare(settings, sgd.epochs)
    best = max(range(len(tried)), key=lambda i: _rank(tried[i]))
    if options.refit and selection.rows is not None:
        weight, bias = train([settings[best]], None, sgd.epochs)
        return build_probe(weight[0], bias[0], tried, best, labels, test_features, test_labels)
    return build_probe(weight[best], bias[best], tried, best, labels, test_features, test_labels)


def _rank(one: Candidate) -> tuple[float, float]:
    return nan_lowest(one.value), -one.settings["lr"]


def _best_of_rates(tried: Sequence[Candidate], count: int) -> list[dict[str, float]]:
    """The best pair of each of the best rates: pairs of one rate are alike, and neighbours would crowd out the others.

    >>> tried = [Candidate({"lr": lr, "weight_decay": wd}, lr - wd) for lr, wd in product((0.1, 1.0, 0.5), (0.0, 0.01))]
    >>> _best_of_rates(tried, 2)
    [{'lr': 1.0, 'weight_decay': 0.0}, {'lr': 0.5, 'weight_decay': 0.0}]
    """
    best: dict[float, Candidate] = {}
    for one in sorted(tried, key=_rank, reverse=True):
        best.setdefault(one.settings["lr"], one)
    return [one.settings for one in list(best.values())[:count]]


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
