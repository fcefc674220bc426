"""Patches of frozen maps and their labels: pixels for a linear probe, a labelled memory for segmentation in context
(https://arxiv.org/abs/2306.01667, as open-hummingbird-eval publishes it), clusters. Maps come from
mls/models/spatial.py; here are plain tensors."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from mls.core.matching import Matcher
from mls.data.pictures import VOID

PAIRS = 2**25  # scores of queries and rows that exist at once


def patch_labels(
    labels: UInt8[Tensor, "images height width"], grid: tuple[int, int], classes: int
) -> Float[Tensor, "images rows columns classes"]:
    """The share of each class among the pixels of each patch; void pixels belong to none.

    >>> patch_labels(torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8), (1, 1), 2)
    tensor([[[[0.2500, 0.5000]]]])
    """
    shares = [F.adaptive_avg_pool2d((labels == one).float(), grid) for one in range(classes)]
    return torch.stack(shares, dim=-1)


def pixels_of(
    maps: Float[Tensor, "images dim rows columns"],
    labels: UInt8[Tensor, "images height width"],
    count: int,
    draws: torch.Generator,
) -> tuple[Float[Tensor, "pixels dim"], Int64[Tensor, "pixels"]]:
    """`count` annotated pixels of each image: the map, interpolated there as F.interpolate does bilinearly, and the
    class."""
    features, numbers = [], []
    height, width = labels.shape[1:]
    for one, truth in zip(maps, labels, strict=True):
        known = (truth.flatten() != VOID).nonzero()[:, 0]
        if not len(known):
            continue
        places = known[torch.randint(len(known), (count,), generator=draws)]
        x, y = (places % width + 0.5) * 2 / width - 1, (places // width + 0.5) * 2 / height - 1
        grid = torch.stack([x, y], dim=1)[None, None].to(one)
        found = F.grid_sample(one[None], grid, padding_mode="border", align_corners=False)
        features.append(found[0, :, 0].T)
        numbers.append(truth.flatten()[places].long())
    if not features:
        return maps.new_zeros(0, maps.shape[1]), torch.zeros(0, dtype=torch.int64)
    return torch.cat(features), torch.cat(numbers)


# ------------------------------------------------------------------------------------------- segmentation in context


def drawn_patches(
    shares: Float[Tensor, "patches classes"], count: int, draws: torch.Generator
) -> Int64[Tensor, "drawn"]:
    """The patches of one image that enter a bounded memory. A patch's score is the number of patches that hold its
    classes, times a uniform number; the lowest are taken, so that rare classes are kept.

    >>> shares = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    >>> drawn_patches(shares, 1, torch.Generator().manual_seed(0))
    tensor([3])
    """
    present = (shares > 0).float()
    score = present @ present.sum(0) * torch.rand(len(shares), generator=draws)
    score[present.sum(1) == 0] = torch.inf  # patches without any label
    return score.topk(min(count, len(shares)), largest=False).indices


def in_context(
    queries: Float[Tensor, "queries dim"],
    memory: Float[Tensor, "patches dim"],
    shares: Float[Tensor, "patches classes"],
    k: list[int],
    temperature: list[float],
    matcher: Matcher,
) -> dict[tuple[int, float], Float[Tensor, "queries classes"]]:
    """For each k and temperature: the labels of the k nearest patches of the memory, weighted by a softmax over their
    cosines. Queries and memory are of unit length; all are answered by one search."""
    most, step = max(k), max(1, PAIRS // min(len(memory), 16384))
    found = [matcher.topk(part, memory, most) for part in queries.split(step)]
    indices, scores = (torch.cat([getattr(one, name) for one in found]) for name in ("indices", "scores"))
    votes = {}
    for few in k:
        labels = shares[indices[:, :few]].float()  # [queries, k, classes]
        for degree in temperature:
            weights = (scores[:, :few] / degree).softmax(dim=1)
            votes[few, degree] = torch.einsum("qk,qkc->qc", weights, labels)
    return votes


# --------------------------------------------------------------------------------------------------------- clusters


def assignment(
    counts: Int64[Tensor, "classes clusters"], how: Literal["hungarian", "majority"]
) -> Int64[Tensor, "clusters"]:
    """The class of each cluster. hungarian: one cluster for a class at most, so that the sum of IoUs is the largest;
    the others have none (their number is that of the classes). majority: the class of most of its pixels.

    >>> counts = torch.tensor([[5, 4, 0], [1, 0, 3]])
    >>> assignment(counts, "hungarian"), assignment(counts, "majority")
    (tensor([0, 2, 1]), tensor([0, 0, 1]))
    """
    if how == "majority":
        return counts.argmax(dim=0)
    from scipy.optimize import linear_sum_assignment

    inside = counts.double()
    iou = inside / (inside.sum(0, keepdim=True) + inside.sum(1, keepdim=True) - inside).clamp(min=1)
    classes, clusters = linear_sum_assignment(iou.numpy(), maximize=True)
    found = torch.full((counts.shape[1],), len(counts))
    found[torch.from_numpy(clusters)] = torch.from_numpy(classes)
    return found


def merged(
    counts: Int64[Tensor, "classes clusters"], classes_of: Int64[Tensor, "clusters"]
) -> Int64[Tensor, "classes found"]:
    """The confusion of classes behind that of clusters; the last column is of clusters without a class."""
    return counts.new_zeros(len(counts), len(counts) + 1).index_add_(1, classes_of, counts)


def centres(features: Float[Tensor, "patches dim"], count: int, rounds: int, seed: int) -> Float[Tensor, "count dim"]:
    """Of k-means, by scikit-learn."""
    from sklearn.cluster import KMeans

    means = KMeans(count, n_init=1, max_iter=rounds, random_state=seed)  # pyright: ignore[reportArgumentType]
    found = means.fit(features.float().numpy())
    return torch.from_numpy(np.asarray(found.cluster_centers_, np.float32))
