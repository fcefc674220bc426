"""Losses by name, one file a family. A family's file defines classes with `@register(name)`; naming the file in the
last lines here is all it takes to add one. Every loss serves both ends: labels from neighbours or from annotations.

What a loss does with the labels 0 (unknown) and -1 (known negative):

    name                0                    -1
    an (bce)            negative             negative
    bce_pos             not used             not used
    softmax             negative             negative
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor, nn

from mls.errors import ConfigError, unknown_name

Takes = Literal["logits", "cosines"]
REDUCTIONS = ("mean", "sum", "none")


class Loss(nn.Module):
    """What all losses share. An element-wise loss defines `entries`, its formula for each (sample, class); another
    kind says `elementwise = False` and defines `forward`."""

    takes: Takes = "logits"  # the caller applies its temperature to logits, never to cosines
    elementwise: bool = True  # reduction="none" gives the matrix [batch, classes]

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        if not temperature > 0:
            raise ConfigError(f"a loss cannot use temperature {temperature:g}: give a number above 0")
        if reduction not in REDUCTIONS:
            raise unknown_name("reduction", reduction, REDUCTIONS)
        self.temperature = temperature
        self.reduction = reduction

    def forward(
        self,
        logits: Float[Tensor, "batch classes"],
        labels: Num[Tensor, "batch classes"],
        pseudo: Float[Tensor, "batch classes"] | None = None,
        index: Int64[Tensor, "batch"] | None = None,
    ) -> Tensor:
        entries = self.entries(self.scaled(logits), labels, pseudo, index)
        if self.reduction == "none":
            return entries
        return entries.mean() if self.reduction == "mean" else entries.sum()

    def entries(
        self,
        logits: Float[Tensor, "batch classes"],
        labels: Num[Tensor, "batch classes"],
        pseudo: Float[Tensor, "batch classes"] | None,
        index: Int64[Tensor, "batch"] | None,
    ) -> Float[Tensor, "batch classes"]:
        raise NotImplementedError

    def scaled(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Divided by the loss's own temperature, in fp32 or better whatever precision they came in."""
        return at_least_fp32(logits) / self.temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction}"


def at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


_LOSSES: dict[str, type[nn.Module]] = {}
_ALIASES: dict[str, str] = {}

LossClass = TypeVar("LossClass", bound=type[nn.Module])


def register(name: str, aliases: Sequence[str] = ()) -> Callable[[LossClass], LossClass]:
    """Class decorator: `build(name)` makes this loss, and so do its aliases. Its options are its parameters."""

    def enter(loss: LossClass) -> LossClass:
        for word in (name, *aliases):
            if word in _LOSSES or word in _ALIASES:
                raise ValueError(f"two losses are called '{word}': give one of them another name")
        _LOSSES[name] = loss
        _ALIASES.update(dict.fromkeys(aliases, name))
        return loss

    return enter


def names() -> list[str]:
    """Every loss once, without its aliases."""
    return sorted(_LOSSES)


def build(name: str, **options: Any) -> nn.Module:
    """
    >>> build("an", temperature=0.2)
    AssumedNegative(temperature=0.2, reduction=mean)
    """
    name = _ALIASES.get(name, name)
    if name not in _LOSSES:
        raise unknown_name("loss", name, [*_LOSSES, *_ALIASES])
    return _LOSSES[name](**_checked(name, options))


def _checked(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options as YAML gives them, in the types of the loss's defaults, or the error that says which is wrong."""
    known, checked = inspect.signature(_LOSSES[name]).parameters, {}
    for option, value in options.items():
        if option not in known:
            raise unknown_name(f"option of loss {name}", option, known)
        default = known[option].default
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if default not in (None, inspect.Parameter.empty) and type(value) is not type(default):
            raise ConfigError(f"option {option} of loss {name} cannot be {value!r}: give a value such as {default!r}")
        checked[option] = value
    return checked


# After `register`, which these files use.
from mls.losses import assumed_negative, contrastive  # noqa: E402
from mls.losses.contrastive import info_nce  # noqa: E402

__all__ = ["Loss", "assumed_negative", "at_least_fp32", "build", "contrastive", "info_nce", "names", "register"]
