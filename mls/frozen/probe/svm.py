"""Linear support vector machines, as the literature uses them on VOC 2007 (Goyal et al. 2019,
https://arxiv.org/abs/1905.01235): one per class, the cost chosen by cross-validation. Equal to scikit-learn's
LinearSVC."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int8, Shaped
from torch import Tensor

from mls.chunks import chunks
from mls.errors import DataError
from mls.frozen.metrics import average_precision
from mls.frozen.probe.design import Axes, Design, principal_axes, unscaled
from mls.frozen.probe.labels import Labels, read_labels
from mls.frozen.probe.linear import SCORED, Progress, quiet
from mls.frozen.probe.objectives import SquaredHinge
from mls.frozen.probe.solve import minimise
from mls.models.finite import finite

COSTS = (*(10.0**power for power in range(-7, 3)), *(2.0**-power for power in range(4, 20)))  # the paper's
POSITIVE_WEIGHT = 2.0
CLASSES = 256  # that are fitted together
NO_FOLD = -2  # the fold of no image
TOLERANCE = 1e-6  # of the loss: with few images in a fold, small errors of the scores change their ranking


@dataclass(frozen=True)
class Svm:
    """`F.normalize(test_features) @ weight + bias` are its scores."""

    scores: Float[Tensor, "test classes"]
    weight: Float[Tensor, "dim classes"]
    bias: Float[Tensor, "classes"]
    cost: Float64[Tensor, "classes"]  # the chosen one of each class
    tried: Float64[Tensor, "costs classes"]  # average precision of each cost, mean over the folds
    average_precision: Float64[Tensor, "classes"] | None  # on the test images, where their labels were given
    value: float | None  # mean average precision, or accuracy where every image has one class


@torch.no_grad()
def svm_probe(
    train_features: Float[Tensor, "train dim"],
    train_labels: Shaped[Tensor, "train ..."],
    test_features: Float[Tensor, "test dim"],
    test_labels: Shaped[Tensor, "test ..."] | None = None,
    costs: Sequence[float] = COSTS,
    folds: int = 3,
    multilabel: bool | None = None,
    progress: Progress = quiet,
) -> Svm:
    """One machine per class on L2-normalised features: squared hinge loss, positives have weight 2, the bias is
    penalised like a weight. The cost of each class has the best average precision over stratified folds of consecutive
    images. `progress` is called with (classes done, classes).

    Entries that are not annotated are left out of their class. Single labels make one class against the rest.
    Memory: a normalised fp32 copy of the features, and that of `mls.frozen.probe.solve` for 4 columns a class,
    and of all costs' weights.
    """
    labels = read_labels(train_labels.to(train_features.device), multilabel)
    signs, device = _signs(labels), train_features.device
    fold_of = torch.from_numpy(np.stack([_folds(sign, folds) for sign in signs.cpu().numpy()])).to(device)
    design = unscaled(_prepared(train_features))
    axes = principal_axes(design)
    weights, tried = [], []
    for chunk in chunks(labels.classes, CLASSES):
        some, left_out = signs[chunk], fold_of[chunk]
        fitted = fit_svm(design, axes, some, left_out, folds, costs)  # [costs, folds and all, classes, dim]
        tried.append(_validated(design, fitted[:, :folds], some, left_out))
        weights.append(fitted[tried[-1].argmax(dim=0), folds, torch.arange(len(some), device=device)])
        progress(chunk.stop, labels.classes)
    weight, found = torch.cat(weights).T, torch.cat(tried, dim=1)
    chosen = torch.tensor(list(costs), dtype=torch.float64, device=device)[found.argmax(dim=0)]
    scores = _prepared(test_features).to(weight) @ weight
    precision = value = None
    if test_labels is not None:
        truth = read_labels(test_labels.to(scores.device), not labels.single)
        signed = _signs(truth, labels.classes).T
        precision = average_precision(scores, signed, signed != 0)
        value = truth.measure(scores)
    return Svm(scores, weight[:-1], weight[-1], chosen, found, precision, value)


def fit_svm(
    design: Design,
    axes: Axes,
    signs: Int8[Tensor, "classes images"],
    fold_of: Int8[Tensor, "classes images"],
    folds: int,
    costs: Sequence[float],
) -> Float[Tensor, "costs folds_and_all classes dim"]:
    """Minimises |weight|^2 / 2 + cost * sum of weighted squared hinges, for each cost without each fold, and on all
    images. Divided by cost and images this is a mean loss and a penalty."""
    shape = folds + 1, len(signs)
    row = torch.arange(shape[1], device=signs.device).expand(shape).flatten()
    fold = torch.tensor([*range(folds), NO_FOLD], device=signs.device)[:, None].expand(shape).flatten()
    hinge = SquaredHinge(signs, fold_of, POSITIVE_WEIGHT, row, fold)
    fits = minimise(design, hinge, [1 / (2 * cost * len(design)) for cost in costs], axes, TOLERANCE)
    return torch.stack([fit.weight.view(*shape, -1) for fit in fits])


def _validated(
    design: Design, weight: Float[Tensor, "costs folds classes dim"], signs: Tensor, fold_of: Tensor
) -> Float64[Tensor, "costs classes"]:
    """The average precision on the images of the fold that was left out, averaged over the folds."""
    found = []
    for number, fitted in enumerate(weight.unbind(dim=1)):
        scores = torch.cat([x @ fitted.flatten(0, 1).T for x, _ in design.parts(SCORED)]).view(-1, *fitted.shape[:2])
        held = ((fold_of == number) & (signs != 0)).T[:, None].expand(scores.shape)
        found.append(average_precision(scores, signs.T[:, None].expand(scores.shape), held))
    return torch.stack(found).mean(dim=0)


def _signs(labels: Labels, classes: int | None = None) -> Int8[Tensor, "classes images"]:
    """+1 positive, -1 negative, 0 not annotated."""
    if labels.numbers is not None:
        positive = labels.numbers == torch.arange(classes or labels.classes, device=labels.numbers.device)[:, None]
    else:
        positive = labels.matrix.T
    signs = 2 * positive.to(torch.int8) - 1
    return signs if labels.known is None else signs * labels.known.T


def _folds(signs: np.ndarray, folds: int) -> np.ndarray:
    """The fold of each image for one class; -1 if the class is not annotated in it."""
    from sklearn.model_selection import StratifiedKFold

    known = np.flatnonzero(signs)
    fold_of = np.full(len(signs), -1, dtype=np.int8)
    if len(np.unique(signs[known])) < 2 or len(known) < 2 * folds:
        raise DataError(
            f"a class has no positives, no negatives or fewer than {2 * folds} annotated images: its machine cannot be "
            "cross-validated, leave the class out"
        )
    with warnings.catch_warnings():  # about classes with fewer positives than folds
        warnings.simplefilter("ignore", UserWarning)
        for number, (_, held) in enumerate(StratifiedKFold(folds).split(known, signs[known])):
            fold_of[known[held]] = number
    return fold_of


def _prepared(features: Tensor) -> Float[Tensor, "images dim_and_one"]:
    x = finite(features.detach() if features.dtype == torch.float64 else features.detach().float())
    return F.pad(F.normalize(x, dim=1), (0, 1), value=1.0)
