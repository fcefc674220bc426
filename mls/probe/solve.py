"""Many penalised linear classifiers at once: L-BFGS in coordinates in which all of them are easy. What is minimised is
in objectives.py, what for in linear.py and svm.py.

A column is one weight vector: of one class, under one penalty. The product of the features with all columns is one
matrix product a portion of images, so a pass reads the features once however many candidates there are. The coordinates
are the principal axes of the features, each scaled by what curvature and penalty make of it there: the Hessian of every
candidate is then near the identity, and tens of passes do what takes hundreds otherwise.

Memory beyond the features: about 25 times the columns, and a few portions of logits. Products are in fp32 (fp64 where
the features are), losses are summed in fp64."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

HISTORY = 10  # pairs of steps and gradient changes that L-BFGS remembers
LOGITS = 2**21  # that exist at once, and
ROWS = 2048  # images at most
TOLERANCE = 1e-5  # of the loss
FLOOR = 1e-3  # of the loss at the start: below that a smaller loss needs no smaller gap
SHORTEST = 1e-4  # step that is tried


@runtime_checkable
class Objective(Protocol):
    """Losses of `groups` independent problems of `size` columns each, as means over the images."""

    l2: Float[Tensor, "groups"]  # the penalty is l2 |weight|^2
    free_bias: bool  # False: the bias stays where it starts

    def start(self) -> tuple[Float[Tensor, "groups size"], Float[Tensor, "groups size"]]:
        """The bias to start from, and the second derivative of the loss by the logit there, meant over the images."""
        ...

    def losses(
        self, logits: Float[Tensor, "groups size some"], rows: Int64[Tensor, "some"] | slice
    ) -> tuple[Float64[Tensor, "groups"], Float[Tensor, "groups size some"]]:
        """What these images add to the loss of each group, and its derivative by the logits."""
        ...

    def keep(self, groups: Bool[Tensor, "groups"]) -> Objective:
        """Only these groups."""
        ...


@dataclass
class Design:
    """Features minus `mean`, times `scale`; `rows` of them, or all. Neither is done to the features themselves: weights
    and gradients are corrected for it, so that nothing is copied."""

    features: Float[Tensor, "images dim"]
    mean: Float64[Tensor, "dim"]
    scale: Float64[Tensor, "dim"]
    rows: Int64[Tensor, "rows"] | None = None

    def __len__(self) -> int:
        return len(self.features if self.rows is None else self.rows)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.features.dtype == torch.float64 else torch.float32

    def parts(self, step: int) -> Iterator[tuple[Float[Tensor, "some dim"], Int64[Tensor, "some"] | slice]]:
        """Features as they are, and the images they belong to."""
        for start in range(0, len(self), step):
            images = slice(start, start + step) if self.rows is None else self.rows[start : start + step]
            yield self.features[images].to(self.dtype), images


def plain(features: Float[Tensor, "images dim"]) -> Design:
    """Features as they are."""
    like = {"dtype": torch.float64, "device": features.device}
    return Design(features, torch.zeros(features.shape[1], **like), torch.ones(features.shape[1], **like))


def centred(features: Float[Tensor, "images dim"]) -> Design:
    """Mean 0. It changes no weight where the bias is free, and makes minimising easier."""
    design = plain(features)
    for x, _ in design.parts(ROWS):
        design.mean += x.sum(dim=0, dtype=torch.float64) / len(features)
    return design


def standardised(features: Float[Tensor, "images dim"]) -> Design:
    """Mean 0 and variance 1, in every feature that is not constant; those that are count for nothing."""
    design = centred(features)
    squares = torch.zeros_like(design.mean)
    for x, _ in design.parts(ROWS):
        squares += (x.double() - design.mean).square().sum(dim=0)
    std = (squares / max(1, len(features) - 1)).sqrt()
    # A feature that is constant in training would turn its rounding errors into the loudest one of the test.
    design.scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0.0)
    return design


@dataclass
class Axes:
    """The principal axes of a design, in the features' own scale, and the mean square of the images along each."""

    vectors: Float[Tensor, "dim axes"]
    squares: Float[Tensor, "axes"]


def principal_axes(design: Design) -> Axes:
    """From the features' second moments, or from the images' inner products where there are fewer images: the penalty
    keeps every weight in the space that the images span."""
    (count, dim), scale, mean = (len(design), design.features.shape[1]), design.scale, design.mean.to(design.dtype)
    if count < dim:
        x = torch.cat([x.double() - design.mean for x, _ in design.parts(ROWS)]) * scale
        squares, within = torch.linalg.eigh(x @ x.T / count)
        spanned = squares > 1e-10 * squares[-1]
        squares, within = squares[spanned], within[:, spanned]
        vectors = (x.T @ within) / (squares * count).sqrt()
    else:
        moments = torch.zeros(dim, dim, dtype=design.dtype, device=scale.device)
        for x, _ in design.parts(ROWS):
            x = x - mean
            moments.addmm_(x.T, x)
        squares, vectors = torch.linalg.eigh(moments * (scale * scale[:, None] / count).to(design.dtype))
    return Axes((vectors * scale[:, None]).to(design.dtype), squares.clamp(min=0).to(design.dtype))


@dataclass
class Fit:
    weight: Float[Tensor, "groups size dim"]  # for the features as they are
    bias: Float[Tensor, "groups size"]
    loss: Float64[Tensor, "groups"]  # with the penalty
    gap: Float64[Tensor, "groups"]  # an estimate of how far the loss is above its minimum
    rounds: int


@torch.no_grad()
def minimise(
    design: Design,
    objective: Objective,
    axes: Axes | None = None,
    tolerance: float = TOLERANCE,
    max_rounds: int = 500,
    progress: Callable[[int, int], None] = lambda rounds, unfinished: None,
) -> Fit:
    """All groups until the estimated gap to the minimum is less than `tolerance` of the loss, or as small as rounding
    lets it be. A group that has arrived leaves the product. Each round is one pass over the features, and `progress` is
    told of it."""
    whole = problem = _Problem.build(design, objective, axes or principal_axes(design))
    point = torch.zeros_like(whole.stretch)
    loss, gradient = problem.evaluate(point)
    floor = FLOOR * loss
    search = _Search(gradient)
    final, losses, gaps = point.clone(), loss.clone(), torch.full_like(loss, torch.inf)
    active = torch.arange(len(loss), device=loss.device)
    for rounds in range(1, max_rounds + 1):
        move = search.step * search.direction
        new_loss, new_gradient = problem.evaluate(point + move)
        accepted = search.accepts(loss, new_loss)
        point = torch.where(_wide(accepted), point + move, point)
        loss = torch.where(accepted, new_loss, loss)
        gradient = search.turn(accepted, move, gradient, new_gradient)
        final[active], losses[active], gaps[active] = point, loss, search.gap()
        left = (search.gap() > tolerance * torch.maximum(loss, floor)) & search.moves()
        if not bool(left.all()):
            active, point, loss, gradient, floor = (tensor[left] for tensor in (active, point, loss, gradient, floor))
            problem = problem.keep(left)
            search.keep(left)
        progress(rounds, len(active))
        if len(active) == 0:
            break
    weight, bias = whole.weights(final)
    return Fit(weight.view(*final.shape[:2], -1), bias.view(final.shape[:2]), losses, gaps, rounds)


@dataclass
class _Problem:
    """The losses in the coordinates of the axes. The last coordinate is the bias."""

    design: Design
    mean: Float[Tensor, "dim"]
    axes: Axes
    objective: Objective
    bias: Float[Tensor, "groups size"]  # at the origin
    stretch: Float[Tensor, "groups size coordinates"]  # what one unit of a coordinate is worth
    l2: Float[Tensor, "groups 1 coordinates"]

    @classmethod
    def build(cls, design: Design, objective: Objective, axes: Axes) -> _Problem:
        bias, curvature = (value.to(design.dtype) for value in objective.start())
        l2 = objective.l2[:, None, None].to(design.dtype)
        stretch = (curvature[..., None] * axes.squares + 2 * l2).rsqrt()
        last = curvature.rsqrt() if objective.free_bias else torch.zeros_like(curvature)
        l2 = torch.cat([l2.expand(-1, 1, len(axes.squares)), torch.zeros_like(l2)], dim=2)
        stretch = torch.cat([stretch, last[..., None]], dim=2)
        return cls(design, design.mean.to(design.dtype), axes, objective, bias, stretch, l2)

    def keep(self, groups: Tensor) -> _Problem:
        parts = {name: getattr(self, name)[groups] for name in ("bias", "stretch", "l2")}
        return replace(self, objective=self.objective.keep(groups), **parts)

    def weights(self, point: Tensor) -> tuple[Float[Tensor, "columns dim"], Float[Tensor, "columns"]]:
        """For the features as they are."""
        at = (point * self.stretch).flatten(0, 1)
        weight = at[:, :-1] @ self.axes.vectors.T
        return weight, self.bias.flatten() + at[:, -1] - weight @ self.mean

    def evaluate(self, point: Tensor) -> tuple[Float64[Tensor, "groups"], Float[Tensor, "groups size coordinates"]]:
        """The loss of each group and its gradient."""
        weight, bias = self.weights(point)
        slope, bias_slope = torch.zeros_like(weight), torch.zeros_like(bias)
        loss = torch.zeros(len(point), dtype=torch.float64, device=point.device)
        # Columns before images: with few columns the other order takes many times as long on a CPU.
        for x, images in self.design.parts(step=max(64, min(ROWS, LOGITS // len(bias)))):
            logits = torch.addmm(bias[:, None], weight, x.T)
            added, slopes = self.objective.losses(logits.view(*point.shape[:2], -1), images)
            loss += added
            slopes = slopes.flatten(0, 1)
            slope.addmm_(slopes, x)
            bias_slope += slopes.sum(dim=1)
        slope -= torch.outer(bias_slope, self.mean)
        slope = torch.cat([slope @ self.axes.vectors, bias_slope[:, None]], dim=1).view_as(point) / len(self.design)
        at = point * self.stretch
        penalty = (self.l2 * at.square()).sum(dim=(1, 2), dtype=torch.float64)
        return loss / len(self.design) + penalty, self.stretch * (slope + 2 * self.l2 * at)


class _Search:
    """L-BFGS of every group for itself (Nocedal and Wright, algorithm 7.4). A step that does not lower a group's loss
    is shortened in the next round, while the other groups go on."""

    def __init__(self, gradient: Tensor) -> None:
        self.pairs: deque[tuple[Tensor, ...]] = deque(maxlen=HISTORY)  # of move, change of gradient, 1 / their product
        self.direction = -gradient
        self.slope = _dot(gradient, self.direction)
        self.scale = torch.ones_like(self.slope)
        self.step = torch.ones_like(self.slope)

    def accepts(self, loss: Tensor, new_loss: Tensor) -> Bool[Tensor, "groups"]:
        rounding = 4 * torch.finfo(self.slope.dtype).eps * loss.abs()
        return new_loss <= loss + 1e-4 * (self.step * self.slope).flatten() + rounding

    def turn(self, accepted: Tensor, move: Tensor, gradient: Tensor, new_gradient: Tensor) -> Tensor:
        """The gradient to go on with; direction and step follow."""
        accepted = _wide(accepted)
        # Where the gradient would vanish along the direction, were it to change evenly.
        ahead = _dot(new_gradient, self.direction)
        shorter = self.step * (self.slope / (self.slope - ahead)).nan_to_num(0.0).clamp(0.1, 0.7)
        self.step = torch.where(accepted, 1.0, shorter)
        change = torch.where(accepted, new_gradient - gradient, 0.0)
        move = torch.where(accepted, move, 0.0)
        product = _dot(move, change)
        useful = product > 0
        self.pairs.append((move, change, torch.where(useful, 1 / product, 0.0)))
        self.scale = torch.where(useful, product / _dot(change, change), self.scale)
        gradient = torch.where(accepted, new_gradient, gradient)
        self.direction = torch.where(accepted, -self._newton(gradient), self.direction)
        self.slope = _dot(gradient, self.direction)
        return gradient

    def _newton(self, gradient: Tensor) -> Tensor:
        """The gradient divided by the curvature that the pairs tell of."""
        rest, shares = gradient.clone(), []
        for move, change, inverse in reversed(self.pairs):
            shares.append(inverse * _dot(move, rest))
            rest -= shares[-1] * change
        rest *= self.scale
        for (move, change, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            rest += move * (share - inverse * _dot(change, rest))
        return rest

    def gap(self) -> Float64[Tensor, "groups"]:
        """Half of Newton's decrement: what a quadratic would still fall by."""
        return -self.slope.flatten().double() / 2

    def moves(self) -> Bool[Tensor, "groups"]:
        """False once steps had to be so short that rounding hides what they change."""
        return self.step.flatten() > SHORTEST

    def keep(self, groups: Tensor) -> None:
        self.pairs = deque((tuple(part[groups] for part in pair) for pair in self.pairs), maxlen=HISTORY)
        for name in ("direction", "slope", "scale", "step"):
            setattr(self, name, getattr(self, name)[groups])


def _dot(first: Tensor, second: Tensor) -> Float[Tensor, "groups 1 1"]:
    return (first * second).sum(dim=(1, 2), keepdim=True)


def _wide(groups: Tensor) -> Bool[Tensor, "groups 1 1"]:
    return groups[:, None, None]
