"""Weighted k-nearest-neighbour classification: votes have the weight exp(cosine / temperature), as in Wu et al. 2018
(https://arxiv.org/abs/1805.01978). One search serves many k."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mls.chunks import rows_within
from mls.core.matching import Matches, TorchMatcher
from mls.errors import ConfigError, DataError
from mls.frozen.index import exact_search
from mls.frozen.probe.labels import Labels, Metric, read_labels

GATHERED = 2**25  # entries of neighbours' labels that exist at once


@dataclass(frozen=True)
class Knn:
    metric: Metric
    values: dict[int, float]  # the metric of each k


@torch.no_grad()
def knn(
    train_features: Float[Tensor, "train dim"],
    train_labels: Shaped[Tensor, "train ..."],
    test_features: Float[Tensor, "test dim"] | None = None,
    test_labels: Shaped[Tensor, "test ..."] | None = None,
    k: Sequence[int] = (1, 5, 10, 20, 50, 100, 200),
    temperature: float = 0.07,
    multilabel: bool | None = None,
) -> Knn:
    """Accuracy, or mean average precision, of every k. Without a test set each training image is a query to
    the others (leave one out), to choose a k without the test set.

    A k larger than the number of neighbours uses all of them. Labels: `mls.frozen.probe.read_labels`.

    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> knn(x, torch.tensor([0, 0, 1, 1]), k=[1, 2]).values
    {1: 1.0, 2: 1.0}
    """
    labels = read_labels(train_labels.to(train_features.device), multilabel)
    leave_one_out = test_features is None
    if leave_one_out != (test_labels is None):
        raise DataError("kNN compares with the truth: give test features and test labels, or neither to leave one out")
    truth = labels if test_labels is None else read_labels(test_labels.to(train_features.device), not labels.single)
    queries = train_features if test_features is None else test_features
    ks = sorted({min(number, len(train_features) - leave_one_out) for number in k})
    if not ks or ks[0] < 1:
        raise ConfigError(f"k of {list(k)} uses no neighbours: give numbers from 1, and 2 or more training images")
    matches = nearest(train_features, queries, ks[-1], leave_one_out)
    scores: dict[int, list[Tensor]] = {number: [] for number in ks}
    for part in _chunks(matches, labels):
        for number, votes in zip(ks, _votes(part, labels, ks, temperature), strict=True):
            scores[number].append(votes.argmax(dim=1) if labels.single else votes)
    values = {number: _measure(torch.cat(parts), truth) for number, parts in scores.items()}
    return Knn(labels.metric, {number: values[min(number, ks[-1])] for number in k})


@torch.no_grad()
def knn_scores(
    train_features: Float[Tensor, "train dim"],
    train_labels: Shaped[Tensor, "train ..."],
    test_features: Float[Tensor, "test dim"],
    k: int = 20,
    temperature: float = 0.1,
) -> Float[Tensor, "test classes"]:
    """The labels of the k training images of largest cosine, averaged with weights softmax(cosine / temperature).

    >>> knn_scores(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0]]), k=1)
    tensor([[1., 0.]])
    """
    labels = read_labels(train_labels.to(train_features.device))
    matches = nearest(train_features, test_features, min(k, len(train_features)))
    ks = [matches.indices.shape[1]]
    return torch.cat([next(_votes(part, labels, ks, temperature)) for part in _chunks(matches, labels)])


@torch.no_grad()
def nearest(
    rows: Float[Tensor, "rows dim"], queries: Float[Tensor, "queries dim"], k: int, leave_one_out: bool = False
) -> Matches:
    """The k rows of largest cosine to each query. `leave_one_out`: the queries are the rows, and none is matched with
    itself. Rows may be memory-mapped."""
    matches = exact_search(rows, queries, k + leave_one_out, TorchMatcher())
    if not leave_one_out:
        return matches
    # With k + 1 duplicates a row may be missing in its own list: then the last entry is dropped.
    itself = matches.indices == torch.arange(len(rows), device=rows.device)[:, None]
    others = itself.int().argsort(dim=1, stable=True)[:, :k]
    return Matches(matches.indices.gather(1, others), matches.scores.gather(1, others))


def _chunks(matches: Matches, labels: Labels) -> Iterator[Matches]:
    """Some queries at a time. Votes need `classes` entries per query for single labels, and times k for several
    labels."""
    width = labels.classes if labels.single else labels.classes * matches.indices.shape[1]
    size = rows_within(GATHERED, width)
    for indices, scores in zip(matches.indices.split(size), matches.scores.split(size), strict=True):
        yield Matches(indices, scores)


def _votes(
    matches: Matches, labels: Labels, ks: Sequence[int], temperature: float
) -> Iterator[Float[Tensor, "queries classes"]]:
    """For each k, ascending: the weighted mean of the labels of the first k neighbours. A neighbour that is not
    annotated for a class has no vote on it."""
    weights = ((matches.scores - matches.scores[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), labels.classes)
    total = torch.zeros_like(votes) if labels.known is not None else votes.new_zeros(len(weights), 1)
    for before, k in zip([0, *ks], ks, strict=False):
        weight, rows = weights[:, before:k], matches.indices[:, before:k]
        if labels.numbers is not None:
            votes.scatter_add_(1, labels.numbers[rows], weight)
        else:
            votes += torch.einsum("qk,qkc->qc", weight, labels.matrix[rows].float())
        if labels.known is None:
            total += weight.sum(dim=1, keepdim=True)
        else:
            total += torch.einsum("qk,qkc->qc", weight, labels.known[rows].float())
        yield votes / total.clamp(min=torch.finfo(total.dtype).tiny)


def _measure(found: Tensor, truth: Labels) -> float:
    if truth.numbers is not None:
        return (found == truth.numbers).double().mean().item()
    return truth.measure(found)
