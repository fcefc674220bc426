"""Is the representation collapsing? Measured on features of many images, such as a dictionary's rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SAMPLE = 1024  # rows: enough for a stable rank, cheap enough for a laptop


@torch.no_grad()
def collapse_measures(name: str, rows: Float[Tensor, "rows dim"]) -> dict[str, float]:
    """Spread of a coordinate (1 is uniform on the sphere, 0 collapsed), mean cosine, RankMe."""
    sample = rows[:SAMPLE].float()
    if len(sample) < 2:
        return {}
    return {
        f"health/{name}_std": float(spread(sample)),
        f"health/{name}_cosine": mean_cosine(sample),
        f"health/{name}_rank": rank_me(sample),
    }


def spread(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
    """The standard deviation of a coordinate, in units of that of unit vectors in all directions."""
    return rows.std(dim=0).mean() * rows.shape[1] ** 0.5


def mean_cosine(rows: Float[Tensor, "rows dim"]) -> float:
    """The mean cosine of two different rows, from the length of their sum."""
    count = len(rows)
    return float((rows.sum(0).square().sum() - rows.square().sum()) / (count * (count - 1)))


def rank_me(rows: Float[Tensor, "rows dim"]) -> float:
    """RankMe (https://arxiv.org/abs/2210.02885): the exponential of the entropy of the singular values.

    >>> round(rank_me(torch.eye(8)), 3)
    8.0
    """
    gram = rows.T @ rows if rows.shape[1] < len(rows) else rows @ rows.T
    singular = torch.linalg.eigvalsh(gram.double()).clamp(min=0).sqrt()
    share = singular / singular.sum() + 1e-12
    return float(torch.exp(-(share * share.log()).sum()))
