"""Logistic regression on frozen features: all penalties together, to convergence, and the selection among them.
Stochastic gradient descent is in sgd.py, the support vector machine in svm.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mls.chunks import chunks
from mls.frozen.probe.design import Axes, Design, axes_for, centred, standardised
from mls.frozen.probe.labels import Labels, Metric, held_out_split, read_labels
from mls.frozen.probe.objectives import Logistic, Softmax
from mls.frozen.probe.solve import TOLERANCE, minimise
from mls.models.finite import finite

HELD_OUT = 0.2  # share of the training images on which settings are chosen
SCORED = 8192  # images that are scored together
Progress = Callable[[int, int], None]  # called with (done, total)
quiet: Progress = lambda done, of: None


@dataclass(frozen=True)
class Candidate:
    settings: dict[str, float]
    value: float  # the metric on the held-out images; NaN if the fit diverged or no class has a positive


@dataclass(frozen=True)
class Probe:
    """A chosen linear classifier. `test_features @ weight + bias` are its scores."""

    scores: Float[Tensor, "test classes"]  # logits
    weight: Float[Tensor, "dim classes"]
    bias: Float[Tensor, "classes"]
    chosen: dict[str, float]  # settings
    tried: list[Candidate]
    metric: Metric
    value: float | None  # the metric on the test images, where their labels were given


Validation = tuple[Float[Tensor, "validation dim"], Shaped[Tensor, "validation ..."]]


@dataclass(frozen=True)
class ProbeOptions:
    """How a probe reads labels and chooses its settings."""

    seed: int = 0
    multilabel: bool | None = None  # None: `read_labels` decides
    validation: Validation | None = None  # settings are chosen on it
    held_out: float = HELD_OUT  # without a validation set: on this share of the training images
    refit: bool = True  # with the chosen settings, on all training images
    progress: Progress = quiet


def linear_probe(
    train_features: Float[Tensor, "train dim"],
    train_labels: Shaped[Tensor, "train ..."],
    test_features: Float[Tensor, "test dim"],
    test_labels: Shaped[Tensor, "test ..."] | None = None,
    l2: Sequence[float] = (1e-4, 1e-3, 1e-2),
    tolerance: float = TOLERANCE,
    options: ProbeOptions = ProbeOptions(),
    **more: Any,
) -> Probe:
    """Logistic regression on standardised features: a softmax if images have one label, else one classifier per class.

    The penalty is chosen by the metric on the held-out share of the training images, or on a validation set; of equal
    values the stronger penalty is taken. Then, as in Kornblith et al. 2019 (https://arxiv.org/abs/1805.08974), the fit
    is repeated on all training images, unless `refit` is off. A validation set is never trained on. `progress` is
    called with (penalties done, penalties) for each of the two fits. Labels: `read_labels`. The result is
    deterministic. Memory: `mls.frozen.probe.solve`. Each of the options may be given by its own name as well:
    `linear_probe(..., seed=1, validation=(features, labels))`.

    >>> x = torch.tensor([-2.0, -1.5, -1.0, -0.5, -0.2, 0.2, 0.5, 1.0, 1.5, 2.0])[:, None]
    >>> labels = torch.cat([x < 0, x > 0], dim=1)
    >>> linear_probe(x, labels, x, labels).value
    1.0
    """
    options = replace(options, **more)
    labels = read_labels(train_labels.to(train_features.device), options.multilabel)
    design = standardised(train_features.detach())
    axes = axes_for(design, labels.classes, len(l2))

    def fit(penalties: Sequence[float], rows: Tensor | None) -> tuple[Tensor, Tensor]:
        part = design if rows is None else Design(design.features, design.mean, design.scale, rows)
        return _fit(part, labels, penalties, axes, tolerance, options.progress)

    selection = Selection(train_features, labels, options)
    weight, bias = fit(l2, selection.rows)
    fits = zip(l2, weight, bias[:, 0], strict=True)
    tried = [Candidate({"l2": penalty}, selection.measure(w, b)) for penalty, w, b in fits]
    best = max(range(len(l2)), key=lambda i: (nan_lowest(tried[i].value), l2[i]))
    if options.refit and selection.rows is not None:
        path = [l2[best], *(penalty for penalty in l2 if penalty > l2[best])]  # the stronger ones are warm starts
        weight, bias = fit(path, None)
        return build_probe(weight[0], bias[0, 0], tried, best, labels, test_features, test_labels)
    return build_probe(weight[best], bias[best, 0], tried, best, labels, test_features, test_labels)


@torch.no_grad()
def fit_linear(
    features: Float[Tensor, "images dim"],
    labels: Shaped[Tensor, "images ..."],
    l2: Sequence[float],
    multilabel: bool | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress = quiet,
) -> tuple[Float[Tensor, "penalties dim classes"], Float[Tensor, "penalties 1 classes"]]:
    """Minimises loss + l2 |weight|^2 for all penalties together. The loss is the mean over images of the softmax
    cross-entropy, or of the sum over classes of the binary cross-entropy. The features are not standardised."""
    design, known = centred(features.detach()), read_labels(labels, multilabel)
    return _fit(design, known, l2, axes_for(design, known.classes, len(l2)), tolerance, progress)


def _fit(
    design: Design, labels: Labels, l2: Sequence[float], axes: Axes, tolerance: float, progress: Progress
) -> tuple[Tensor, Tensor]:
    fits = minimise(design, objective(labels, design), l2, axes, tolerance, progress=progress)
    weight = torch.stack([fit.weight.flatten(0, 1).T for fit in fits])
    return weight, torch.stack([fit.bias.view(1, -1) for fit in fits])


def objective(labels: Labels, design: Design, copies: int = 1) -> Softmax | Logistic:
    """The loss of the design's images, for `copies` classifiers side by side."""
    device = design.features.device
    fitted = labels if design.rows is None else labels.take(design.rows)
    if labels.numbers is not None:
        assert fitted.numbers is not None
        # Laplace smoothing: the initial bias, log share, of a class without images would be minus infinity.
        counts = torch.bincount(fitted.numbers, minlength=labels.classes).double() + 0.5
        return Softmax(labels.numbers.to(device), (counts / counts.sum()).to(device), copies)
    known = torch.full((labels.classes,), len(fitted)) if fitted.known is None else fitted.known.sum(dim=0)
    positives = (fitted.matrix if fitted.known is None else fitted.matrix & fitted.known).sum(dim=0).double()
    weight = (len(fitted) / known.clamp(min=1)).to(device, design.dtype)
    return Logistic(
        labels.matrix.T.to(device).contiguous(),
        None if labels.known is None else labels.known.T.to(device).contiguous(),
        ((positives + 0.5) / (known + 1)).to(device).repeat(copies),
        weight.repeat(copies),
        torch.arange(labels.classes, device=device).repeat(copies),
    )


class Selection:
    """The images on which settings are chosen: a validation set, or the training images that are held out."""

    def __init__(self, features: Tensor, labels: Labels, options: ProbeOptions) -> None:
        if options.validation is not None:
            self.rows = self.held = None  # all images of both sets are used
            self.features = options.validation[0]
            self.labels = read_labels(options.validation[1].to(features.device), not labels.single)
            return
        split = held_out_split(labels, options.held_out, options.seed)
        self.rows, self.held = (rows.to(features.device) for rows in split)
        self.features, self.labels = features, labels.take(self.held)

    def measure(self, weight: Tensor, bias: Tensor) -> float:
        return self.labels.measure(_scores(self.features, weight, bias, self.held))


def nan_lowest(value: float) -> float:
    """For comparing: NaN (no positive among the held-out images, or a fit that diverged) is below every metric."""
    return value if value == value else -1.0


def build_probe(
    weight: Tensor,
    bias: Tensor,
    tried: list[Candidate],
    best: int,
    labels: Labels,
    test_features: Tensor,
    test_labels: Tensor | None,
) -> Probe:
    scores = _scores(test_features, weight, bias)
    value = (
        None if test_labels is None else read_labels(test_labels.to(scores.device), not labels.single).measure(scores)
    )
    return Probe(scores, weight, bias, tried[best].settings, tried, labels.metric, value)


def _scores(
    features: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None = None
) -> Float[Tensor, "images classes"]:
    count = len(features) if rows is None else len(rows)
    parts = (finite(features[chunk if rows is None else rows[chunk]]) for chunk in chunks(count, SCORED))
    return torch.cat([part.detach().to(weight) @ weight + bias for part in parts])
