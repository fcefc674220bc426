"""How good the pseudo-labels are, where true labels exist: measured beside chance, never used for training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


@torch.no_grad()
def label_quality(
    labels: Float[Tensor, "images classes"],
    query_ids: Int64[Tensor, batch],
    matched_ids: Int64[Tensor, "batch k"],
    row_ids: Int64[Tensor, rows],
) -> dict[str, float]:
    """overlap: mean cosine of a query's true labels and its matches'; precision: the share of matches that share a
    class with the query. `…_chance`: the same over all rows of the dictionary. A query may have fewer matches than
    others: -1 stands for none."""
    found = matched_ids >= 0
    if not found.any():
        return {}
    query = labels[query_ids]
    rows = labels[row_ids]
    unit_query, unit_rows = F.normalize(query, dim=1), F.normalize(rows, dim=1)
    matched = labels[matched_ids.clamp(min=0)]  # [batch, k, classes]
    cosines = (F.normalize(matched, dim=2) * unit_query[:, None]).sum(2)
    shared = (matched * query[:, None]).sum(2) > 0
    return {
        "labels/overlap": float(cosines[found].mean()),
        "labels/overlap_chance": float((unit_query @ unit_rows.T).mean()),
        "labels/precision": float(shared[found].float().mean()),
        "labels/precision_chance": float(((query @ rows.T) > 0).float().mean()),
    }
