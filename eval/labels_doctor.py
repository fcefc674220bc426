"""What is missing in a table of labels that are partly unknown: how much, where, which cells, and which loss copes with
it. Plain tensors of frozen features and labels; reading and writing is in tools/labels.py.

The rate: within a class, let positives be labelled whatever they look like (selected completely at random), and let the
images that a classifier scores highest, each by one that did not see it, all be positives. Then the share of labels
among those is that among all positives. Where the highest are not all positives, the rate of what is missing is too
high: it is a bound. The control hides a share of the labels that are there, and has to find it again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor, nn

from mls.core import losses
from mls.eval.paired import wilson
from mls.eval.supervised import as_truth
from mls.frozen.metrics import average_precision
from mls.streams import generator, initialisation

FOLDS, EPOCHS, BATCH, LR, DECAY = 5, 30, 64, 1e-2, 1e-1
FAR = 3.0  # standard deviations
LEAST = 8  # labelled positives of a class, below which nothing is said of it
HIDDEN = 0.3  # of the labelled positives, in the control
Z, DRAWS = 1.96, 400  # of 95 % intervals; bootstrap samples
# Losses that train a linear layer; `left out` is the assumed negative's without unknown labels.
COMPARED = ("an", "left out", "wan", "em", "ll_r", "asl", "gr", "role")
Features: TypeAlias = Float[Tensor, "images dim"]
Labels: TypeAlias = Int8[Tensor, "images classes"]


def scores_of(
    name: str, features: Features, labels: Labels, asked: Features, seed: int = 0
) -> Float[Tensor, "asked classes"]:
    """Probabilities of a linear layer that was trained with the loss `name`."""
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    standard = lambda rows: ((rows - mean) / std).clamp(-FAR, FAR)  # an odd image would be of every class
    known, asked, observed = standard(features), standard(asked), labels.clone()
    loss = losses.build("an" if name == "left out" else name)
    loss.observe(observed)
    with initialisation(seed, "labels doctor"):
        head = nn.Linear(features.shape[1], labels.shape[1])
    optimizer = torch.optim.AdamW([*head.parameters(), *loss.parameters()], lr=LR, weight_decay=DECAY)
    compute = loss.annotated_only if name == "left out" else loss
    for epoch in range(1, EPOCHS + 1):
        loss.set_epoch(epoch)
        for rows in torch.randperm(len(known), generator=generator(seed, "labels doctor", epoch)).split(BATCH):
            optimizer.zero_grad()
            compute(head(known[rows]), observed[rows], None, rows).backward()
            optimizer.step()
    with torch.no_grad():
        return loss.predict(head(asked))


def out_of_fold(features: Features, labels: Labels, seed: int = 0) -> Float[Tensor, "images classes"]:
    """Of each image, by a classifier of labelled against all others that did not see it."""
    found = torch.empty(labels.shape)
    order = torch.randperm(len(labels), generator=generator(seed, "labels doctor folds"))
    for fold in order.tensor_split(FOLDS):
        rest = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, fold, False)
        found[fold] = scores_of("an", features[rest], labels[rest], features[fold], seed)
    return found


# ------------------------------------------------------------------------------------------------------------- the rate


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval."""

    value: float
    low: float
    high: float
    of: int

    @classmethod
    def wilson(cls, hits: int, of: int) -> Share:
        """
        >>> Share.wilson(5, 10)
        Share(value=0.5, low=0.236..., high=0.763..., of=10)
        """
        return cls(hits / of if of else math.nan, *wilson(hits, of), of)

    def __str__(self) -> str:
        return f"{100 * self.value:.0f} % ({100 * self.low:.0f} to {100 * self.high:.0f})"


def top_cells(labels: Labels, table: Labels, scores: Float[Tensor, "images classes"]) -> Bool[Tensor, "images classes"]:
    """Of each class with enough labels in the table the images that score highest: a tenth as many as are labelled,
    more of a few. Those that are known to be without it do not count."""
    top = torch.zeros(labels.shape, dtype=torch.bool)
    for column in range(labels.shape[1]):
        if (count := int((table[:, column] > 0).sum())) >= LEAST:
            ranked = scores[:, column].masked_fill(labels[:, column] < 0, -1)
            top[ranked.topk(min(max(LEAST, count // 10), count // 2)).indices, column] = True
    return top


def missing_of(table: Labels, top: Bool[Tensor, "images classes"]) -> Share:
    """The share of the positives that the table has not, of all classes together. The interval is a bootstrap's over
    images: labels of one image are not independent."""
    unlabelled, of = (top & (table <= 0)).sum(1).double(), top.sum(1).double()
    draws = torch.randint(len(of), (DRAWS, len(of)), generator=generator(0, "labels doctor bootstrap"))
    rates = unlabelled[draws].sum(1) / of[draws].sum(1).clamp(min=1)
    low, high = rates.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Share(float(unlabelled.sum() / of.sum().clamp(min=1)), low, high, int(of.sum()))


@dataclass(frozen=True)
class Missing:
    rate: Share
    control: Share  # the same after a share HIDDEN of the labelled positives was hidden, too
    expected: float  # what the control should say, if the rate is right
    by_class: dict[int, Share]
    alone: Share  # the rate among images in which no other class is labelled
    beside: Share  # and in which another one is
    scores: Float[Tensor, "images classes"]  # out of fold
    labelled: Float[Tensor, "classes"]  # the share of a class' positives that is labelled; NaN: too few to say


def examine(features: Features, labels: Labels, table: Labels | None = None, seed: int = 0) -> Missing:
    """`table`: the labels without answers to questions about the likeliest, which were not drawn by chance: a positive
    that was answered was missing. Default: there are none."""
    table = labels if table is None else table
    scores = out_of_fold(features, labels, seed)
    top = top_cells(labels, table, scores)
    rate = missing_of(table, top)
    hidden = (table > 0) & (torch.rand(labels.shape, generator=generator(seed, "labels doctor control")) < HIDDEN)
    fewer, fewer_in_table = labels.masked_fill(hidden, 0), table.masked_fill(hidden, 0)
    control_top = top_cells(fewer, fewer_in_table, out_of_fold(features, fewer, seed))
    control = missing_of(fewer_in_table, control_top)
    share = lambda cells: Share.wilson(int((cells & (table <= 0)).sum()), int(cells.sum()))
    columns = torch.eye(labels.shape[1], dtype=torch.bool)
    by_class = {column: share(top & columns[column]) for column in top.any(0).nonzero()[:, 0].tolist()}
    others = (table > 0).sum(1, keepdim=True) - (table > 0).int() > 0
    labelled = torch.full((labels.shape[1],), torch.nan)
    for column, of_class in by_class.items():
        wrong = of_class.of * of_class.value + LEAST * rate.value  # few cells: towards that of all classes
        labelled[column] = 1 - wrong / (of_class.of + LEAST)
    expected = 1 - (1 - rate.value) * (1 - HIDDEN)
    return Missing(rate, control, expected, by_class, share(top & ~others), share(top & others), scores, labelled)


# ------------------------------------------------------------------------------------------------------- which cells


def likelihood(missing: Missing, labels: Labels) -> Float[Tensor, "images classes"]:
    """Of each unknown cell the probability that it is a positive, P(y | x, unlabelled) = (1 - c) / c · g / (1 - g):
    c is the share of its class that is labelled, g the out-of-fold probability of being labelled (Elkan and Noto 2008).
    0 for all other cells, and for classes with too few labels to say; above 1 where g is larger than c."""
    share = missing.labelled.clamp(0.02, 0.98)
    odds = (1 - share) / share * missing.scores / (1 - missing.scores).clamp(min=1e-6)
    return odds.masked_fill(labels != 0, 0.0).nan_to_num(0.0)


def audit_chances(
    likely: Float[Tensor, "images classes"], labels: Labels, count: int
) -> Float[Tensor, "images classes"]:
    """With which chance each unknown cell is drawn into a sample of about `count`: in proportion to its likelihood, and
    none with none."""
    unknown = labels == 0
    weight = (likely.clamp(max=1.0) + 0.02) * unknown
    chances = weight * count / weight.sum().clamp(min=1e-9)
    return chances.clamp(max=1.0)


def audited(answers: Sequence[tuple[bool, float]]) -> tuple[float, float, float]:
    """From a sample with the chances it was drawn with, how many of all unknown cells are positives, and a 95 %
    interval: Horvitz and Thompson's estimate. It holds whatever the classifier is worth.

    >>> audited([(True, 0.5), (False, 0.1), (True, 1.0)])
    (3.0, 2, 5.77...)
    """
    total = sum(1 / chance for present, chance in answers if present)
    spread = Z * math.sqrt(sum((1 - chance) / chance**2 for present, chance in answers if present))
    return total, max(sum(present for present, _ in answers), total - spread), total + spread


# ---------------------------------------------------------------------------------------------------------- which loss


@dataclass(frozen=True)
class Ranked:
    name: str
    value: float  # mAP over the classes that the validation part can rank, the mean over seeds
    difference: float  # to `an`
    low: float  # of a 95 % interval of that difference: a bootstrap over validation images, paired
    high: float


def ranked(
    features: Features, labels: Labels, asked: Features, truth: Labels, seeds: int = 3, names: Sequence[str] = COMPARED
) -> list[Ranked]:
    """Losses on the labels of a validation part as they are: unknown ones do not count, or are taken for absent where
    no absence is known. The best first."""
    truth = as_truth(truth)
    usable = [name for name in names if name != "left out" or bool((labels < 0).any())]
    scores = {name: [scores_of(name, features, labels, asked, seed) for seed in range(seeds)] for name in usable}
    draws = torch.randint(len(truth), (DRAWS // 4, len(truth)), generator=generator(0, "labels doctor losses"))
    mean_of = lambda many, rows: sum(_map(one[rows], truth[rows]) for one in many) / seeds
    values = {name: mean_of(many, slice(None)) for name, many in scores.items()}
    sampled = {name: torch.tensor([mean_of(many, rows) for rows in draws]) for name, many in scores.items()}
    found = []
    for name in usable:
        low, high = (sampled[name] - sampled["an"]).nanquantile(torch.tensor([0.025, 0.975])).tolist()
        found.append(Ranked(name, values[name], values[name] - values["an"], low, high))
    return sorted(found, key=lambda one: -one.value)


def _map(scores: Tensor, truth: Labels) -> float:
    """Of classes that are present in one image and absent in another."""
    counted = (truth > 0).any(0) & (truth < 0).any(0)
    if not counted.any():
        return math.nan
    return average_precision(scores[:, counted], truth[:, counted], truth[:, counted] != 0).mean().item()
