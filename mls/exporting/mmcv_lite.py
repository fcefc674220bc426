"""Lets mmsegmentation run on mmcv-lite, which pip can install, instead of mmcv, which needs a compiler: importing this
file puts a stand-in where mmcv looks for its compiled operators. PSAMask, which PSANet needs, works there; every other
operator is a sentence when it is called. Where compiled operators are there, nothing is changed."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

COLLECT, DISTRIBUTE = 0, 1
COMPILED = "mmcv._ext"


def install() -> None:
    if importlib.util.find_spec("mmcv") is not None and importlib.util.find_spec(COMPILED) is None:
        sys.modules[COMPILED] = Operators()


class Operators(ModuleType):
    """In place of mmcv's compiled module. mmcv asks for many operators when it is imported, and calls few."""

    def __init__(self) -> None:
        super().__init__(COMPILED)
        self.__spec__ = ModuleSpec(COMPILED, None)
        self.psamask_forward = psamask_forward
        self.psamask_backward = psamask_backward

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: object, **__: object) -> None:
            raise NotImplementedError(f"mmcv's {name} is compiled code, which mmcv-lite lacks: install mmcv instead")

        return missing


def psamask_forward(input: Float[Tensor, "batch mask h w"], output: Tensor, psa_type: int, **sizes: int) -> None:
    """The point-wise attention of PSANet (https://hszhao.github.io/papers/eccv18_psanet.pdf): every position brings
    weights for a window around it; here they are spread over the whole map, zero outside the window. `output` is
    [batch, h·w (the other position), h, w (this one)] for COLLECT, and the two swapped for DISTRIBUTE."""
    index, inside = _window(input, **sizes)
    attention = input.flatten(2).gather(1, index.expand(len(input), -1, -1)) * inside
    output.copy_((attention if psa_type == COLLECT else attention.transpose(1, 2)).reshape(output.shape))


def psamask_backward(grad_output: Tensor, grad_input: Tensor, psa_type: int, **sizes: int) -> None:
    index, inside = _window(grad_input, **sizes)
    gradient = grad_output.flatten(2)
    gradient = (gradient if psa_type == COLLECT else gradient.transpose(1, 2)) * inside
    spread = torch.zeros_like(grad_input).flatten(2)
    spread.scatter_add_(1, index.expand(len(grad_input), -1, -1), gradient)
    grad_input.copy_(spread.view_as(grad_input))


def _window(
    like: Tensor, h_feature: int, w_feature: int, h_mask: int, w_mask: int, **_: int
) -> tuple[Int[Tensor, "1 other this"], Bool[Tensor, "other this"]]:
    """For each pair of positions: which of the window's weights is between them, and whether any is."""
    position = torch.arange(h_feature * w_feature, device=like.device)
    row, column = position // w_feature, position % w_feature
    down = row[:, None] - row + (h_mask - 1) // 2
    right = column[:, None] - column + (w_mask - 1) // 2
    inside = (down >= 0) & (down < h_mask) & (right >= 0) & (right < w_mask)
    return (down.clamp(0, h_mask - 1) * w_mask + right.clamp(0, w_mask - 1))[None], inside


install()
