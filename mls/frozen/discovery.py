"""Object discovery in the map of one image, without training: LOST (https://arxiv.org/abs/2109.14279) and TokenCut
(https://arxiv.org/abs/2202.11539). Published, both read the keys of DINO's last attention; here any map of features."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mls.errors import ConfigError

EPSILON = 1e-5  # TokenCut: the weight of two patches that are not alike
BETA_SQUARED = 0.3


def lost(maps: Float[Tensor, "dim rows columns"], seeds: int = 100) -> Bool[Tensor, "rows columns"]:
    """The patch that is alike to the fewest others is a part of an object; those that are alike to it among the `seeds`
    patches of lowest degree are others, and so is what is alike to them on the whole. Of that the seed's piece.

    >>> image = torch.zeros(2, 4, 4)
    >>> image[0], image[:, 1:3, 1:3] = 1, torch.tensor([-1.0, 0.5]).view(2, 1, 1)
    >>> lost(image, seeds=4).int().sum()
    tensor(4)
    """
    features = maps.flatten(1).T
    alike = features @ features.T
    degree = (alike >= 0).sum(1)
    order = degree.argsort(stable=True)
    seed = int(order[0])
    few = order[:seeds]
    grown = few[alike[seed, few] > 0]
    mask = alike[grown].sum(0) > 0
    return _piece(mask.view(maps.shape[1:]), seed)


def tokencut(maps: Float[Tensor, "dim rows columns"], threshold: float = 0.2) -> Bool[Tensor, "rows columns"]:
    """A normalised cut of the graph of alike patches in two; the object is the side with the largest entry of the
    second eigenvector, of that the piece that holds this entry."""
    from scipy.linalg import eigh

    features = F.normalize(maps.flatten(1).T, dim=1)
    if len(features) < 2:
        raise ConfigError("TokenCut cuts maps of two places or more, this one has one: give larger images")
    weights = torch.where(features @ features.T > threshold, 1.0, EPSILON).double().numpy()
    degrees = np.diag(weights.sum(1))
    _, vectors = eigh(degrees - weights, degrees, subset_by_index=[1, 1])
    second = torch.from_numpy(vectors[:, 0].copy())
    seed = int(second.abs().argmax())
    mask = second > second.mean()
    mask = mask if mask[seed] else ~mask
    return _piece(mask.view(maps.shape[1:]), seed)


def box_of(mask: Bool[Tensor, "rows columns"]) -> Float[Tensor, "4"]:
    """x0 y0 x1 y1, as shares of the image.

    >>> box_of(torch.tensor([[False, True], [False, True]])).tolist()
    [0.5, 0.0, 1.0, 1.0]
    """
    rows, columns = mask.nonzero().T
    height, width = mask.shape
    ends = [columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height]
    return torch.stack(ends)


def overlap(mask: Bool[Tensor, "pixels"], truth: Bool[Tensor, "pixels"]) -> dict[str, float]:
    """As unsupervised saliency is judged: intersection over union, share of pixels that are right, and F with
    beta² = 0.3, which values precision above recall.

    >>> mask, truth = torch.tensor([True, True, False, False]), torch.tensor([True, False, False, False])
    >>> {name: round(value, 3) for name, value in overlap(mask, truth).items()}
    {'iou': 0.5, 'accuracy': 0.75, 'f_beta': 0.565}
    """
    both, found, true = (int(one.sum()) for one in (mask & truth, mask, truth))
    f_beta = (1 + BETA_SQUARED) * both / max(1.0, BETA_SQUARED * true + found)
    return {
        "iou": both / max(1, found + true - both),
        "accuracy": float((mask == truth).float().mean()),
        "f_beta": f_beta,
    }


def _piece(mask: Bool[Tensor, "rows columns"], seed: int) -> Bool[Tensor, "rows columns"]:
    """What is connected with the seed, which belongs to it in any case."""
    from scipy.ndimage import label

    mask = mask.clone()
    mask.view(-1)[seed] = True
    numbers = torch.from_numpy(np.empty(mask.shape, np.int32))
    label(mask.numpy(), output=numbers.numpy())
    return numbers == numbers.view(-1)[seed]
