"""Runs mmsegmentation on mmcv-lite, which pip can install, instead of mmcv, which needs a compiler: importing this file
registers a replacement of mmcv's compiled operators. PSAMask, which PSANet needs, is implemented; every other operator
raises an error when it is called. If compiled operators are installed, nothing is changed."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mls.frameworks.psamask import gathered, spread

COLLECT, DISTRIBUTE = 0, 1
COMPILED = "mmcv._ext"


def install() -> None:
    if importlib.util.find_spec("mmcv") is not None and importlib.util.find_spec(COMPILED) is None:
        sys.modules[COMPILED] = Operators()


class Operators(ModuleType):
    """In place of mmcv's compiled module. At import mmcv looks up many operators, of which few are called."""

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
    """`output` is [batch, h·w (the other position), h, w (this one)] for COLLECT, and transposed for DISTRIBUTE."""
    attention = spread(input, (sizes["h_mask"], sizes["w_mask"]))
    output.copy_((attention if psa_type == COLLECT else attention.transpose(1, 2)).reshape(output.shape))


def psamask_backward(grad_output: Tensor, grad_input: Tensor, psa_type: int, **sizes: int) -> None:
    gradient = grad_output.flatten(2)
    gradient = gradient if psa_type == COLLECT else gradient.transpose(1, 2)
    window = sizes["h_mask"], sizes["w_mask"]
    grad_input.copy_(gathered(gradient, sizes["h_feature"], sizes["w_feature"], window))


install()
