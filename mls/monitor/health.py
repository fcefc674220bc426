"""Is the representation collapsing? Measured on the dictionary's rows: they are there anyway."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mls.core.dictionary import Rows

SAMPLE = 1024  # rows: enough for a stable rank, cheap enough for a laptop


@torch.no_grad()
def health(rows: Rows) -> dict[str, float]:
    """For both memories: spread of a coordinate (1 is uniform on the sphere, 0 collapsed), mean cosine, RankMe."""
    measures: dict[str, float] = {}
    for name, memory in (("backbone", rows.backbone), ("projection", rows.projection)):
        sample = memory[:SAMPLE].float()
        if len(sample) < 2:
            continue
        measures[f"health/{name}_std"] = float(sample.std(dim=0).mean() * sample.shape[1] ** 0.5)
        measures[f"health/{name}_cosine"] = mean_cosine(sample)
        measures[f"health/{name}_rank"] = rank_me(sample)
    return measures


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
