"""How flat the minimum is that a loss finds, as the paper on entropy maximisation asks
(https://arxiv.org/abs/2203.16219): the BCE around trained classifiers, along random directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from mls.tools.analyses import Finding, Study
from mls.tools.analyses.regimes import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mls.eval.training import Training

Batch = tuple[Float[Tensor, "batch 3 height width"], Num[Tensor, "batch classes"]]
Weights = Mapping[str, Tensor]
COMPARED = ("an", "em")
IMAGES = 500  # at most
LINE, GRID = 21, 9


def landscape(study: Study) -> Finding:
    """The loss around trained classifiers (https://arxiv.org/abs/1712.09913), along the same random directions."""
    line, grid = torch.linspace(-1, 1, LINE), torch.linspace(-1, 1, GRID)
    curves, surfaces, images = {}, {}, 0
    for loss in COMPARED:
        training = study.trained(loss)
        classifier, batches = training.classifier.eval(), fully_labelled(training)
        first, second = (filter_normalised(classifier, study.seed, number) for number in (1, 2))
        curves[loss] = torch.tensor([moved_loss(classifier, batches, [(float(a), first)]) for a in line])
        surfaces[loss] = torch.tensor(
            [[moved_loss(classifier, batches, [(float(a), first), (float(b), second)]) for a in grid] for b in grid]
        )
        images = sum(len(truth) for _, truth in batches)
    header = ["trained with", "BCE at 0", "at ±0.5", "at ±1", "curvature at 0"]
    rows, numbers = [], {}
    for loss, values in curves.items():
        at = {step: float(values[(line.abs() - step).abs() < 1e-4].mean()) for step in (0, 0.5, 1)}
        bend = curvature(line, values)
        rows.append([loss, *(f"{value:.4f}" for value in at.values()), f"{bend:.3f}"])
        numbers |= {f"{loss}/at_{step:g}": value for step, value in at.items()} | {f"{loss}/curvature": bend}
    summary = (
        "The wider the valley, the flatter the minimum; the paper on EM shows a flatter one for EM than for AN. Its "
        "height is another matter: what keeps unannotated labels undecided pays for it in BCE. The curvature is the "
        "second difference over the nearest two steps. Directions are random: compare seeds."
    )
    figure = _landscape_figure(line, grid, curves, surfaces)
    figure.suptitle(f"The loss around the trained classifiers: BCE with all labels of {images} test images")
    return Finding(figure, header, rows, summary, numbers)


def fully_labelled(training: Training) -> list[Batch]:
    """A fixed part of the test images, with all that is known of their labels."""
    from mls.eval.images import Batches
    from mls.eval.supervised import prepare

    test = prepare(training.protocol.data).test
    # Spread over the whole: many data sets list their images class by class.
    rows = torch.linspace(0, len(test) - 1, min(IMAGES, len(test))).long()
    batches = Batches(test, training.protocol, training.seed, training.device).plain(rows)
    return [(images, test.truth[found].to(images.device)) for found, images in batches]


def filter_normalised(classifier: nn.Module, seed: int, number: int) -> dict[str, Tensor]:
    """A random direction, each of its filters as long as the classifier's; zero for normalisation and biases."""
    from mls.streams import generator

    stream, direction = generator(seed, "landscape", number), {}
    for name, parameter in classifier.named_parameters():
        if parameter.ndim < 2:
            direction[name] = torch.zeros_like(parameter)
            continue
        drawn = torch.randn(parameter.shape, generator=stream).to(parameter).flatten(1)
        length = parameter.detach().flatten(1).norm(dim=1, keepdim=True)
        direction[name] = (drawn * length / drawn.norm(dim=1, keepdim=True)).view_as(parameter)
    return direction


@torch.no_grad()
def moved_loss(classifier: nn.Module, batches: Iterable[Batch], moves: Iterable[tuple[float, Weights]]) -> float:
    """BCE over all annotated entries, with the classifier's weights moved by the sum of step times direction."""
    from torch.func import functional_call

    from mls.core import losses

    weights: dict[str, Tensor] = dict(classifier.named_parameters())
    for step, direction in moves:
        weights = {name: weight + step * direction[name] for name, weight in weights.items()}
    bce, total, count = losses.build("iu", reduction="sum"), 0.0, 0
    for images, truth in batches:
        total += float(bce(functional_call(classifier, weights, (images,)).float(), truth))
        count += int(truth.count_nonzero())
    return total / count


def curvature(steps: Float[Tensor, "points"], values: Float[Tensor, "points"]) -> float:
    """The second difference in the middle.

    >>> steps = torch.linspace(-1, 1, 21)
    >>> round(curvature(steps, 3 * steps**2), 3)
    6.0
    """
    middle = len(steps) // 2
    width = float(steps[middle + 1] - steps[middle])
    return float(values[middle - 1] - 2 * values[middle] + values[middle + 1]) / width**2


def _landscape_figure(
    line: Tensor, grid: Tensor, curves: Mapping[str, Tensor], surfaces: Mapping[str, Tensor]
) -> Figure:
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(15, 4.8), layout=ConstrainedLayoutEngine(w_pad=0.1))
    axes, *maps = figure.subplots(1, 1 + len(surfaces))
    for loss, values in curves.items():
        axes.plot(line, values, "o-", color=COLOURS[loss], markersize=4, label=loss)
    axes.set(title="Along the first direction", xlabel="step, in norms of the filters", ylabel="BCE, all labels")
    axes.set_yscale("log")
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False, title="trained with", loc="upper center")

    every = torch.stack(list(surfaces.values()))
    low, high = float(every.min()), float(every.max())
    levels = torch.logspace(math.log10(low), math.log10(high), 14).tolist()
    for place, (loss, surface) in zip(maps, surfaces.items(), strict=True):
        drawn = place.contourf(grid, grid, surface, levels, cmap="viridis", norm=LogNorm(low, high), extend="both")
        lines = place.contour(grid, grid, surface, levels, colors="white", linewidths=0.8)
        place.clabel(lines, fmt="%.2g", fontsize=8)
        place.plot(0, 0, "+", color="white", markersize=10, markeredgewidth=2)
        place.set(title=f"Trained with {loss}", xlabel="step, first direction", ylabel="step, second direction")
        place.set(aspect="equal", xticks=[-1, -0.5, 0, 0.5, 1], yticks=[-1, -0.5, 0, 0.5, 1])
        if place is maps[-1]:
            figure.colorbar(drawn, ax=maps, label="BCE, all labels (same scale)", format="%.2g", shrink=0.85)
    return figure


ANALYSES = {"landscape": landscape}
