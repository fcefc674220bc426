"""Features and weights must be finite. Everything that makes features, loads weights or is given features asks here, so
that no number is ever measured on NaN, whichever probe it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mls.errors import CheckpointError


class NonFiniteError(CheckpointError):
    """Weights, or what they make of images, hold NaN or infinity."""


def finite(values: Tensor, of: str = "the features") -> Tensor:
    """The same values.

    >>> finite(torch.tensor([1.0]))
    tensor([1.])
    """
    # NaN comes through aminmax, which makes no copy of the values.
    if values.numel() and not bool(torch.stack(torch.aminmax(values)).isfinite().all()):
        raise NonFiniteError(
            f"{of} hold NaN or infinity, so nothing is measured with them: use weights from before their training "
            "diverged, or precision fp32 where a lower one overflowed"
        )
    return values


def refuse_non_finite(network: nn.Module, name: str) -> None:
    """Its parameters and the statistics of its normalisation layers; other buffers may well hold an infinity."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    for tensor in (*network.parameters(), *(buffer for norm in norms for buffer in norm.buffers())):
        if not tensor.is_meta:  # of a network of which only the shapes are wanted
            finite(tensor, f"the weights of {name}")
