"""Fits penalised linear classifiers of many classes and penalties together, by L-BFGS. The losses are in objectives.py,
the callers are linear.py and svm.py.

A column is one weight vector; a group is the columns that share one loss (all classes of a softmax, one class of a
logistic loss). For each chunk of images there is one matrix product of the features with all columns. Three things
reduce thousands of passes over the features to tens:
- preconditioning: coordinates are the principal axes of the features, each divided by the square root of its curvature
  (loss and penalty), so that every Hessian is near the identity;
- warm starts: penalties are fitted from strong to weak, each starts from an extrapolation of the last two minima, and
  L-BFGS keeps its pairs;
- active sets: a group that has converged leaves the product.

Memory beyond the features: about 50 times the columns, and a few chunks of logits; the columns of one penalty exist at
a time. Products are in fp32 (fp64 if the features are), losses are summed in fp64."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from mls.chunks import rows_within
from mls.errors import ConfigError
from mls.frozen.probe.design import ROWS, Axes, Design, principal_axes

HISTORY = 10  # pairs of steps and gradient changes that L-BFGS remembers
LOGITS = 2**21  # that exist at once
MIN_ROWS = 64  # images in a chunk, even if their logits are more than that
TOLERANCE = 1e-5  # of the gap to the minimum, as a share of the loss
FLOOR = 1e-3  # share of the initial loss: the tolerance is not taken of a smaller loss
MIN_STEP = 1e-4  # step lengths below it are not tried


@runtime_checkable
class Objective(Protocol):
    """Losses of `groups` independent problems of `size` columns each, as means over the images."""

    free_bias: bool  # False: the bias is not fitted

    def start(self) -> tuple[Float[Tensor, "groups size"], Float[Tensor, "groups size"]]:
        """The initial bias, and the second derivative of the loss by the logit there, averaged over the images."""
        ...

    def losses(
        self, logits: Float[Tensor, "groups size some"], rows: Int64[Tensor, "some"] | slice
    ) -> tuple[Float64[Tensor, "groups"], Float[Tensor, "groups size some"]]:
        """The sum of the loss over these images for each group, and its derivative by the logits."""
        ...

    def select(self, groups: Bool[Tensor, "groups"]) -> Objective:
        """Only these groups."""
        ...


@dataclass
class Fit:
    weight: Float[Tensor, "groups size dim"]  # for the unscaled features
    bias: Float[Tensor, "groups size"]
    loss: Float64[Tensor, "groups"]  # with the penalty
    gap: Float64[Tensor, "groups"]  # an estimate of how far the loss is above its minimum
    rounds: int


@torch.no_grad()
def minimise(
    design: Design,
    objective: Objective,
    l2: Sequence[float],
    axes: Axes | None = None,
    tolerance: float = TOLERANCE,
    max_rounds: int = 500,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Fit]:
    """A fit for each penalty `l2`: loss + l2 |weight|^2 of all groups, until the estimated gap to the minimum is less
    than `tolerance` of the loss, or until rounding stops further progress. Each round is one pass over the features.
    `progress` is called with (penalties done, penalties)."""
    if not l2 or min(l2) <= 0:
        raise ConfigError(f"penalties of {list(l2)} cannot be fitted: give one or more, all above 0")
    axes = axes or principal_axes(design)
    warm, fits = _WarmStart(), dict[float, Fit]()
    for penalty in sorted(set(l2), reverse=True):
        problem = _Problem.build(design, objective, axes, penalty)
        fits[penalty] = _descend(problem, warm, tolerance, max_rounds)
        progress(len(fits), len(set(l2)))
    return [fits[penalty] for penalty in l2]


def _descend(problem: _Problem, warm: _WarmStart, tolerance: float, max_rounds: int) -> Fit:
    whole, point = problem, warm.start(problem)
    loss, gradient = problem.evaluate(point)
    warm.floor = floor = FLOOR * loss if warm.floor is None else warm.floor
    search = _Search(gradient, warm.pairs(problem))
    final, losses, gaps = point.clone(), loss.clone(), torch.full_like(loss, torch.inf)
    active, rounds = torch.arange(len(loss), device=loss.device), 0
    while len(active):
        rounds += 1
        move = search.step * search.direction
        new_loss, new_gradient = problem.evaluate(point + move)
        accepted = search.accepts(loss, new_loss)
        point = torch.where(_wide(accepted), point + move, point)
        loss = torch.where(accepted, new_loss, loss)
        gradient = search.turn(accepted, move, gradient, new_gradient)
        final[active], losses[active], gaps[active] = point, loss, search.gap()
        left = (search.gap() > tolerance * torch.maximum(loss, floor)) & search.moves() & (rounds < max_rounds)
        if not bool(left.all()):
            warm.remember(active, search, problem)
            active, point, loss, gradient, floor = (tensor[left] for tensor in (active, point, loss, gradient, floor))
            problem = problem.select(left)
            search.select(left)
    warm.store_minimum(whole, final)
    weight, bias = whole.weights(final)
    return Fit(weight.view(*final.shape[:2], -1), bias.view(final.shape[:2]), losses, gaps, rounds)


@dataclass
class _Problem:
    """The losses with one penalty, in the preconditioned coordinates; a free bias is the last coordinate."""

    design: Design
    mean: Float[Tensor, "dim"]
    axes: Axes
    objective: Objective
    bias: Float[Tensor, "groups size"]  # at the origin
    stretch: Float[Tensor, "groups size coordinates"]  # from preconditioned coordinates to those of the axes
    penalty: float
    l2: Float[Tensor, "coordinates"]  # the penalty; 0 of a bias

    @classmethod
    def build(cls, design: Design, objective: Objective, axes: Axes, penalty: float) -> _Problem:
        bias, curvature = (value.to(design.dtype)[..., None] for value in objective.start())
        along = curvature * axes.squares + 2 * penalty
        l2 = torch.full_like(axes.squares, penalty)
        if objective.free_bias:
            along, l2 = torch.cat([along, curvature], dim=2), torch.cat([l2, l2.new_zeros(1)])
        mean = design.mean.to(design.dtype)
        return cls(design, mean, axes, objective, bias[..., 0], along.rsqrt(), penalty, l2)

    def select(self, groups: Tensor) -> _Problem:
        objective = self.objective.select(groups)
        return replace(self, objective=objective, bias=self.bias[groups], stretch=self.stretch[groups])

    def weights(self, point: Tensor) -> tuple[Float[Tensor, "columns dim"], Float[Tensor, "columns"]]:
        """Weights and biases for the unscaled features."""
        at, count = (point * self.stretch).flatten(0, 1), len(self.axes.squares)
        weight = self.axes.to_features(at[:, :count])
        return weight, self.bias.flatten() + at[:, count:].sum(dim=1) - weight @ self.mean

    def evaluate(self, point: Tensor) -> tuple[Float64[Tensor, "groups"], Float[Tensor, "groups size coordinates"]]:
        """The loss of each group and its gradient."""
        weight, bias = self.weights(point)
        slope, bias_slope = torch.zeros_like(weight), torch.zeros_like(bias)
        loss = torch.zeros(len(point), dtype=torch.float64, device=point.device)
        # [columns, images]: with few columns the transposed product takes many times as long on a CPU.
        for x, images in self.design.parts(step=max(MIN_ROWS, min(ROWS, rows_within(LOGITS, len(bias))))):
            logits = torch.addmm(bias[:, None], weight, x.T)
            added, slopes = self.objective.losses(logits.view(*point.shape[:2], -1), images)
            loss += added
            slopes = slopes.flatten(0, 1)
            slope.addmm_(slopes, x)
            bias_slope += slopes.sum(dim=1)
        slope -= torch.outer(bias_slope, self.mean)
        parts = [self.axes.from_features(slope), bias_slope[:, None]]
        slope = torch.cat(parts[: 1 + self.objective.free_bias], dim=1).view_as(point) / len(self.design)
        at = point * self.stretch
        penalty = (self.l2 * at.square()).sum(dim=(1, 2), dtype=torch.float64)
        return loss / len(self.design) + penalty, self.stretch * (slope + 2 * self.l2 * at)


Pair = tuple[Tensor, Tensor, Tensor]  # a move, the change of the gradient over it, one over their product


class _WarmStart:
    """Warm starts: the minima and the curvature pairs of the penalties that are fitted, for the next one."""

    def __init__(self) -> None:
        self.floor: Tensor | None = None
        self.solved: list[tuple[float, Tensor]] = []  # (log of the penalty, minimum along the axes) of the last two
        self.moves: list[tuple[Tensor, Tensor]] = []  # and gradient changes along the axes, of all groups
        self.penalty = 0.0

    def start(self, problem: _Problem) -> Tensor:
        """Linear extrapolation of the last two minima over the logarithm of the penalty."""
        if not self.solved:
            self.origin = torch.zeros_like(problem.stretch)
            return self.origin
        (last, at), (before, earlier) = self.solved[-1], self.solved[0]
        share = (math.log(problem.penalty) - last) / (last - before) if last != before else 0.0
        return (at + share * (at - earlier)) / problem.stretch

    def pairs(self, problem: _Problem) -> list[Pair]:
        """The pairs of the last penalty, with the known difference that the new penalty makes to their gradient
        changes."""
        found = []
        for move, change in self.moves:
            more = 2 * torch.where(problem.l2 > 0, problem.penalty - self.penalty, 0.0)
            found.append(_pair(move / problem.stretch, (change + more * move) * problem.stretch))
        return found

    def remember(self, active: Tensor, search: _Search, problem: _Problem) -> None:
        while len(self.moves) < len(search.pairs):
            self.moves.append((torch.zeros_like(self.origin), torch.zeros_like(self.origin)))
        for (moves, changes), (move, change, _) in zip(self.moves, search.pairs, strict=True):
            moves[active], changes[active] = move * problem.stretch, change / problem.stretch

    def store_minimum(self, problem: _Problem, point: Tensor) -> None:
        self.penalty = problem.penalty
        self.solved = [*self.solved[-1:], (math.log(problem.penalty), point * problem.stretch)]


class _Search:
    """L-BFGS for every group separately (Nocedal and Wright, algorithm 7.4). If a step does not lower a group's loss it
    is shortened in the next round, while the other groups continue."""

    def __init__(self, gradient: Tensor, pairs: Sequence[Pair]) -> None:
        self.pairs = deque(pairs, maxlen=HISTORY)
        self.scale = torch.ones_like(_dot(gradient, gradient))
        for _, change, inverse in pairs:
            self._rescale(change, inverse)
        self.step = torch.ones_like(self.scale)
        self.direction = -self._newton(gradient)
        self.slope = _dot(gradient, self.direction)

    def accepts(self, loss: Tensor, new_loss: Tensor) -> Bool[Tensor, "groups"]:
        rounding = 4 * torch.finfo(self.slope.dtype).eps * loss.abs()
        return new_loss <= loss + 1e-4 * (self.step * self.slope).flatten() + rounding

    def turn(self, accepted: Tensor, move: Tensor, gradient: Tensor, new_gradient: Tensor) -> Tensor:
        """The next gradient; sets direction and step."""
        accepted = _wide(accepted)
        # The step at which the slope along the direction is 0, by linear interpolation.
        ahead = _dot(new_gradient, self.direction)
        shorter = self.step * (self.slope / (self.slope - ahead)).nan_to_num(0.0).clamp(0.1, 0.7)
        self.step = torch.where(accepted, 1.0, shorter)
        change = torch.where(accepted, new_gradient - gradient, 0.0)
        move = torch.where(accepted, move, 0.0)
        self.pairs.append(_pair(move, change))
        self._rescale(*self.pairs[-1][1:])
        gradient = torch.where(accepted, new_gradient, gradient)
        self.direction = torch.where(accepted, -self._newton(gradient), self.direction)
        self.slope = _dot(gradient, self.direction)
        return gradient

    def _rescale(self, change: Tensor, inverse: Tensor) -> None:
        self.scale = torch.where(inverse > 0, 1 / (inverse * _dot(change, change)), self.scale)

    def _newton(self, gradient: Tensor) -> Tensor:
        """The gradient times the inverse Hessian that the pairs approximate."""
        rest, shares = gradient.clone(), []
        for move, change, inverse in reversed(self.pairs):
            shares.append(inverse * _dot(move, rest))
            rest -= shares[-1] * change
        rest *= self.scale
        for (move, change, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            rest += move * (share - inverse * _dot(change, rest))
        return rest

    def gap(self) -> Float64[Tensor, "groups"]:
        """Half the squared Newton decrement: the distance to the minimum of a quadratic."""
        return -self.slope.flatten().double() / 2

    def moves(self) -> Bool[Tensor, "groups"]:
        """False once steps are so short that rounding hides their effect."""
        return self.step.flatten() > MIN_STEP

    def select(self, groups: Tensor) -> None:
        self.pairs = deque(((m[groups], c[groups], i[groups]) for m, c, i in self.pairs), maxlen=HISTORY)
        for name in ("direction", "slope", "scale", "step"):
            setattr(self, name, getattr(self, name)[groups])


def _pair(move: Tensor, change: Tensor) -> Pair:
    product = _dot(move, change)
    return move, change, torch.where(product > 0, 1 / product, 0.0)


def _dot(first: Tensor, second: Tensor) -> Float[Tensor, "groups 1 1"]:
    return (first * second).sum(dim=(1, 2), keepdim=True)


def _wide(groups: Tensor) -> Bool[Tensor, "groups 1 1"]:
    return groups[:, None, None]
