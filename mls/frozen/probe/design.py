"""The design matrix of the solver: features, centred and scaled without a copy, and their principal axes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from mls.chunks import chunks
from mls.models.finite import finite

ROWS = 2048  # images at a time
LEADING = 64  # axes that are worked out where all would take longer than the fits
FEW = 1024  # features or images whose axes are always worked out
BLOCK = 512  # columns of the matrix of second moments that are computed together


@dataclass
class Design:
    """(Features - `mean`) * `scale`, of all images or of `rows`. The features themselves are not changed or copied:
    weights and gradients are corrected for mean and scale instead."""

    features: Float[Tensor, "images dim"]
    mean: Float64[Tensor, "dim"]
    scale: Float64[Tensor, "dim"]
    rows: Int64[Tensor, "some"] | None = None

    def __len__(self) -> int:
        return len(self.features if self.rows is None else self.rows)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.features.dtype == torch.float64 else torch.float32

    def parts(self, step: int) -> Iterator[tuple[Float[Tensor, "some dim"], Int64[Tensor, "some"] | slice]]:
        """Unchanged features, and which images they belong to."""
        for chunk in chunks(len(self), step):
            images = chunk if self.rows is None else self.rows[chunk]
            yield self.features[images].to(self.dtype), images


def unscaled(features: Float[Tensor, "images dim"]) -> Design:
    """Unchanged features."""
    like = {"dtype": torch.float64, "device": features.device}
    return Design(features, torch.zeros(features.shape[1], **like), torch.ones(features.shape[1], **like))


def centred(features: Float[Tensor, "images dim"]) -> Design:
    """Mean 0. With a free bias this changes no weight, and it makes the minimisation converge faster."""
    design = unscaled(features)
    for x, _ in design.parts(ROWS):
        design.mean += x.sum(dim=0, dtype=torch.float64) / len(features)
    finite(design.mean)
    return design


def standardised(features: Float[Tensor, "images dim"]) -> Design:
    """Mean 0 and variance 1 for every feature that is not constant; constant ones are set to 0."""
    design = centred(features)
    squares = torch.zeros_like(design.mean)
    for x, _ in design.parts(ROWS):
        squares += (x.double() - design.mean).square().sum(dim=0)
    std = (squares / max(1, len(features) - 1)).sqrt()
    # Divided by its tiny standard deviation, a constant feature's rounding errors would dominate the test scores.
    design.scale = torch.where(std > 1e-6 * std.max(), 1 / std, 0.0)
    return design


@dataclass
class Axes:
    """The principal axes of a design, in the features' own scale, and the mean square of the images along each."""

    vectors: Float[Tensor, "dim axes"]
    squares: Float[Tensor, "axes"]

    def to_features(self, at: Float[Tensor, "columns axes"]) -> Float[Tensor, "columns dim"]:
        return at @ self.vectors.T

    def from_features(self, slope: Float[Tensor, "columns dim"]) -> Float[Tensor, "columns axes"]:
        return slope @ self.vectors


@dataclass
class LeadingAxes(Axes):
    """Orthonormal axes of which only the first few are principal ones. `vectors` and `factors` are the Householder
    reflections whose product the axes are (torch.geqrf), so the others cost nothing; along all of them the images are
    taken to have the same mean square."""

    vectors: Float[Tensor, "dim leading"]
    factors: Float[Tensor, "leading"]
    scale: Float[Tensor, "dim"]

    def to_features(self, at: Float[Tensor, "columns dim"]) -> Float[Tensor, "columns dim"]:
        return torch.ormqr(self.vectors, self.factors, at.contiguous(), left=False, transpose=True) * self.scale

    def from_features(self, slope: Float[Tensor, "columns dim"]) -> Float[Tensor, "columns dim"]:
        return torch.ormqr(self.vectors, self.factors, slope * self.scale, left=False)


def axes_for(design: Design, columns: int, penalties: int) -> Axes:
    """Principal axes cost about 10 min(images, dim)^3 operations and save each penalty some ten passes over the
    features, compared with leading axes. Those are taken where that is cheaper; up to 1,024 features or images, whose
    axes take less than a second, get all of them."""
    count, dim = len(design), design.features.shape[1]
    small = min(count, dim)
    passes = 10 * penalties * 4 * count * dim * columns
    return leading_axes(design) if small > FEW and 10 * small**3 > passes else principal_axes(design)


def leading_axes(design: Design) -> LeadingAxes:
    """By subspace iteration from fixed random directions."""
    count, dim = len(design), design.features.shape[1]
    scale, mean = design.scale.to(design.dtype), design.mean.to(design.dtype)
    directions = torch.randn(dim, LEADING, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(scale)
    images, total = directions, torch.zeros((), dtype=torch.float64, device=scale.device)
    for last in (False, False, True):
        directions = torch.linalg.qr(finite(images)).Q
        images = torch.zeros_like(directions)
        for x, _ in design.parts(ROWS):
            x = (x - mean) * scale
            images.addmm_(x.T, x @ directions)
            total += last * x.square().sum(dtype=torch.float64)
    squares, within = torch.linalg.eigh(directions.T @ images / count)
    squares = squares.clamp(min=0)
    rest = ((total / count - squares.sum()) / (dim - LEADING)).clamp(min=0).to(squares)
    vectors, factors = torch.geqrf(directions @ within)
    return LeadingAxes(vectors, torch.cat([squares, rest.expand(dim - LEADING)]), factors, scale)


def principal_axes(design: Design) -> Axes:
    """From the features' second moments, or with fewer images than features from the images' inner products: because of
    the penalty every solution lies in the space that the images span."""
    count, dim = len(design), design.features.shape[1]
    scale, mean = design.scale, design.mean.to(design.dtype)
    if count < dim:
        x = torch.cat([x.double() - design.mean for x, _ in design.parts(ROWS)]) * scale
        squares, within = torch.linalg.eigh(finite(x @ x.T / count))
        spanned = squares > 1e-10 * squares[-1]
        squares, within = squares[spanned], within[:, spanned]
        vectors = (x.T @ within) / (squares * count).sqrt()
    else:
        moments = torch.zeros(dim, dim, dtype=design.dtype, device=scale.device)
        for x, _ in design.parts(ROWS):
            x = x - mean
            for at in range(0, dim, BLOCK):  # the lower triangle is all that eigh reads
                moments[at:, at : at + BLOCK].addmm_(x[:, at:].T, x[:, at : at + BLOCK])
        squares, vectors = torch.linalg.eigh(finite(moments * (scale * scale[:, None] / count).to(design.dtype)))
    return Axes((vectors * scale[:, None]).to(design.dtype), squares.clamp(min=0).to(design.dtype))
