"""What frozen features know about labels: kNN votes and a linear classifier with a chosen L2 penalty. The monitor uses
it during a run, eval/ after it. Both take features as they are and draw nothing at random but one named split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mls.errors import DataError
from mls.matching import TorchMatcher
from mls.metrics import mean_average_precision, top1
from mls.streams import generator

QUERIES = 1024  # test images at a time: bounds the scores and the gathered labels
HELD_OUT = 0.2  # of the training images, to choose the penalty on


@torch.no_grad()
def knn_scores(
    train_features: Float[Tensor, "train dim"],
    train_labels: Float[Tensor, "train classes"],
    test_features: Float[Tensor, "test dim"],
    k: int = 20,
    temperature: float = 0.1,
) -> Float[Tensor, "test classes"]:
    """The labels of the k training images of largest cosine, averaged with weights softmax(cosine / temperature).

    >>> knn_scores(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0]]), k=1)
    tensor([[1., 0.]])
    """
    matcher, labels = TorchMatcher(), train_labels.float()
    rows = F.normalize(train_features.float(), dim=1)
    scores = []
    for queries in test_features.split(QUERIES):
        matches = matcher.topk(F.normalize(queries.float(), dim=1), rows, k=min(k, len(rows)))
        weights = (matches.scores / temperature).softmax(dim=1)  # [queries, k]
        scores.append((weights[..., None] * labels[matches.indices]).sum(dim=1))
    return torch.cat(scores)


@dataclass(frozen=True)
class Probe:
    scores: Float[Tensor, "test classes"]  # logits
    l2: float  # the penalty that was chosen
    metric: Literal["map", "top1"]
    held_out: dict[float, float]  # the metric of each penalty on the held-out part of the training images
    value: float | None  # the metric on the test images, where their labels were given


def linear_probe(
    train_features: Float[Tensor, "train dim"],
    train_labels: Float[Tensor, "train classes"],
    test_features: Float[Tensor, "test dim"],
    test_labels: Float[Tensor, "test classes"] | None = None,
    l2: Sequence[float] = (1e-4, 1e-3, 1e-2),
    seed: int = 0,
    multilabel: bool | None = None,
) -> Probe:
    """Logistic regression on standardised features, fitted to convergence; the penalty is chosen on held-out training
    images (by mAP, or accuracy where every image has one label), then the fit is repeated on all of them.

    Single- or multi-label is told from the training labels unless `multilabel` says. Same arguments, same result.

    >>> x = torch.tensor([-2.0, -1.5, -1.0, -0.5, -0.2, 0.2, 0.5, 1.0, 1.5, 2.0])[:, None]
    >>> labels = torch.cat([x < 0, x > 0], dim=1).float()
    >>> linear_probe(x, labels, x, labels).value
    1.0
    """
    if multilabel is None:
        multilabel = bool((train_labels.sum(dim=1) != 1).any())
    train, test = _standardise(train_features, test_features)
    labels = train_labels.double()
    held_out = _choose(train, labels, l2, seed, multilabel)
    best = max(l2, key=lambda penalty: (_rank(held_out[penalty]), penalty))
    weight, bias = fit_linear(train, labels, [best], multilabel)
    scores = test @ weight[0] + bias[0]
    value = None if test_labels is None else _measure(scores, test_labels, multilabel)
    return Probe(scores, best, "map" if multilabel else "top1", held_out, value)


def fit_linear(
    features: Float[Tensor, "images dim"],
    labels: Float[Tensor, "images classes"],
    l2: Sequence[float],
    multilabel: bool,
    max_iterations: int = 200,
) -> tuple[Float[Tensor, "penalties dim classes"], Float[Tensor, "penalties 1 classes"]]:
    """All penalties at once by L-BFGS: loss + l2 |weight|^2 for each, where the loss is the mean over images of the
    sum over classes of binary cross-entropy, or of the softmax cross-entropy."""
    penalties = features.new_tensor(list(l2))
    weight = features.new_zeros(len(penalties), features.shape[1], labels.shape[1], requires_grad=True)
    bias = features.new_zeros(len(penalties), 1, labels.shape[1], requires_grad=True)
    stop = {"max_iter": max_iterations, "tolerance_grad": 1e-6, "tolerance_change": 1e-12}
    optimizer = torch.optim.LBFGS([weight, bias], history_size=20, line_search_fn="strong_wolfe", **stop)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = torch.einsum("nd,pdc->pnc", features, weight) + bias
        if multilabel:
            entries = F.binary_cross_entropy_with_logits(logits, labels.expand_as(logits), reduction="none")
        else:
            entries = -labels * F.log_softmax(logits, dim=2)
        loss = entries.sum() / len(features) + (penalties * weight.square().sum(dim=(1, 2))).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _choose(features: Tensor, labels: Tensor, l2: Sequence[float], seed: int, multilabel: bool) -> dict[float, float]:
    """The held-out metric of each penalty."""
    count = round(HELD_OUT * len(features))
    if count == 0:
        raise DataError(f"{len(features)} training images are too few to choose a penalty on: give the probe 3 or more")
    order = torch.randperm(len(features), generator=generator(seed, "probe split")).to(features.device)
    kept, held = order[count:], order[:count]
    weight, bias = fit_linear(features[kept], labels[kept], l2, multilabel)
    scores = features[held] @ weight + bias  # [penalties, held, classes]
    return {penalty: _measure(s, labels[held], multilabel) for penalty, s in zip(l2, scores, strict=True)}


def _measure(scores: Tensor, labels: Tensor, multilabel: bool) -> float:
    return mean_average_precision(scores, labels) if multilabel else top1(scores, labels)


def _rank(value: float) -> float:
    """NaN (no positive among the held out) is worse than anything; equal values go to the stronger penalty."""
    return value if value == value else -1.0


def _standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    # In fp32 the line search stalls a thousandth of a probability before the minimum, elsewhere on every machine.
    train, test = train.detach().double(), test.detach().double()
    std, mean = torch.std_mean(train, dim=0)
    # A feature that is constant in training would turn its rounding errors into the loudest one of the test.
    std = torch.where(std > 1e-6 * std.max(), std, torch.ones_like(std))
    return (train - mean) / std, (test - mean) / std
