"""Label regimes: what a training sees of the truth, and the published way to hold out a validation part. Labels are +1
present, -1 absent, 0 unknown. The losses that learn from them are in mls/core/losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int8, Int64
from torch import Tensor

from mls.errors import unknown_name

Truth: TypeAlias = Int8[np.ndarray, "images classes"]
Mask: TypeAlias = Bool[np.ndarray, "images classes"]


def observe(
    truth: Int8[Tensor, "images classes"], regime: str, proportion: float, seed: int = 1200
) -> Int8[Tensor, "images classes"]:
    """The labels that `regime` leaves of the truth; all others are 0. What is 0 in the truth stays 0.

    - `full`: all.
    - `single_positive`: one positive an image (https://arxiv.org/abs/2106.09708).
    - `one_positive_all_negatives`: the same positive, and every negative.
    - `partial_positives`: each positive with probability `proportion`, at least one an image; no negatives.
    - `partial_labels`: each label, positive or negative, with probability `proportion`.

    The one positive is the one that the published generator draws with this seed, if `truth` holds *all* training rows
    in the published order. So draw first, then `split` the rows. A larger proportion keeps all that a smaller one does.

    >>> truth = torch.tensor([[1, 1, -1], [-1, 1, 1]], dtype=torch.int8)
    >>> observe(truth, "single_positive", 0).tolist()
    [[1, 0, 0], [0, 1, 0]]
    >>> observe(truth, "one_positive_all_negatives", 0).tolist()
    [[1, 0, -1], [-1, 1, 0]]
    """
    if regime not in REGIMES:
        raise unknown_name("label regime", regime, REGIMES)
    labels = truth.numpy()
    return torch.from_numpy(labels * REGIMES[regime](labels, proportion, np.random.RandomState(seed)))


def split(count: int, share: float = 0.2, seed: int = 1200) -> tuple[Int64[Tensor, "train"], Int64[Tensor, "val"]]:
    """Rows to train on and rows to validate on, both sorted, as the code of the papers on single positive labels draws
    them from the official training images.

    >>> split(10)
    (tensor([0, 1, 2, 4, 5, 6, 8, 9]), tensor([3, 7]))
    """
    order = torch.from_numpy(np.random.RandomState(seed).permutation(count))
    train = count - round(share * count)
    return order[:train].sort().values, order[train:].sort().values


def _all(truth: Truth, proportion: float, rng: np.random.RandomState) -> Mask:
    return np.ones(truth.shape, bool)


def _one_positive(truth: Truth, proportion: float, rng: np.random.RandomState) -> Mask:
    observed = np.zeros(truth.shape, bool)
    for row, labels in enumerate(truth):
        positives = np.flatnonzero(labels == 1)
        rng.shuffle(positives)
        observed[row, positives[:1]] = True
        # The published generator also shuffles the negatives, of which it keeps none: what it draws for the rows
        # after this one depends on it.
        rng.shuffle(np.flatnonzero(labels == -1))
    return observed


def _one_positive_all_negatives(truth: Truth, proportion: float, rng: np.random.RandomState) -> Mask:
    return _one_positive(truth, proportion, rng) | (truth == -1)


def _partial_positives(truth: Truth, proportion: float, rng: np.random.RandomState) -> Mask:
    draws = np.where(truth == 1, rng.random_sample(truth.shape), np.inf)
    lowest = draws == draws.min(axis=1, keepdims=True)
    return (truth == 1) & ((draws < proportion) | lowest)


def _partial_labels(truth: Truth, proportion: float, rng: np.random.RandomState) -> Mask:
    return rng.random_sample(truth.shape) < proportion


REGIMES: dict[str, Callable[[Truth, float, np.random.RandomState], Mask]] = {
    "full": _all,
    "single_positive": _one_positive,
    "one_positive_all_negatives": _one_positive_all_negatives,
    "partial_positives": _partial_positives,
    "partial_labels": _partial_labels,
}
