"""Losses by name, one file a family. A family's file defines classes with `@register(name)`; naming the file in the
last lines here is all it takes to add one. Every loss serves both ends: labels from neighbours or from annotations.

What a loss does with the labels 0 (unknown) and -1 (known negative):

    name                0                               -1
    an (bce)            negative                        negative
    bce_pos             not used                        not used
    softmax             negative                        negative
    iu                  not used                        negative
    wan                 negative of weight 1/(C-1)      the same
    dw                  negative of weight alpha        the same
    an_ls               negative, smoothed              the same
    n_ls                negative, smoothed              negative
    epr                 only in the expected count      negative, and in the expected count
    role                estimated, in the count         negative, estimated from a sure start, in the count
    pairwise_rank       negative                        negative
    ent_min             its entropy is minimised        negative
    em                  its entropy is maximised        negative
    em_apl              as em; its soft label, if any   negative
    focal               negative                        negative
    asl                 negative                        negative
    ll_r                negative, large losses dropped  negative
    ll_ct               negative, large losses flipped  negative
    ll_cp               as ll_ct                        negative
    two_way             negative (unless ignore_unknown) negative
    hml                 negative                        negative
    symmetric_ce        negative                        negative
    gr                  soft target and weight by score negative
    crisp               only in its class's share       the same as 0, but negative in the warm-up
    vlpl                as em; its soft label, if any   negative
    curriculum          not used, or its predicted label negative
    co_teaching         negative, large losses dropped  the same
    jocor               negative, large losses dropped  the same

`annotated_only`, which `training.ignore_unknown` takes in the place of `forward`, leaves 0 out of element-wise losses,
softmax, two_way and hml. docs/losses.md tells which to choose.
"""

import inspect
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, Num
from torch import Tensor, nn

from mls.errors import ConfigError, unknown_name
from mls.plugins import Registry

Matrix = Float[Tensor, "batch classes"]
Labels = Num[Tensor, "batch classes"]  # +1 positive, 0 unknown, -1 known negative
Index = Int64[Tensor, "batch"] | None  # the samples' row numbers
Takes = Literal["logits", "cosines"]
REDUCTIONS = ("mean", "sum", "none")


class Loss(nn.Module):
    """What all losses share. An element-wise loss defines `entries`, its formula for each (sample, class); another
    kind says `elementwise = False` and defines `forward`. Each parameter is kept in an attribute of its name."""

    takes: Takes = "logits"  # the caller applies its temperature to logits, never to cosines
    elementwise: bool = True  # reduction="none" gives the matrix [batch, classes]
    separable: bool = False  # an entry depends on its own logit and label alone: the classes may come in parts
    needs_index: bool = False  # `forward` needs the samples' row numbers, and `observe` all their labels
    networks: int = 1  # that learn at once: with several, `forward` takes logits [batch, networks, classes]
    takes_scores: bool = False  # `labelled_by` makes soft labels of class scores that the user has
    only_supervised: bool = False  # it needs more than pretraining has, whose labels are new rows at every step
    lr_multiplier: float = 1.0  # what the loss learns takes this many times the network's learning rate
    summed_gradient: bool = False  # its gradient sums over the batch: lr_multiplier is SGD's, with RATED_FOR labels
    relabels: Literal["never", "step", "epoch"] = "never"  # when `relabel` completes the training labels

    def __init__(self, temperature: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        require(temperature > 0, "temperature", temperature, "a number above 0")
        if reduction not in REDUCTIONS:
            raise unknown_name("reduction", reduction, REDUCTIONS)
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None) -> Tensor:
        entries = self.entries(self.scaled(logits), labels, pseudo, index)
        if self.reduction == "none":
            return entries
        return entries.mean() if self.reduction == "mean" else entries.sum()

    def annotated_only(
        self, logits: Matrix, labels: Labels, pseudo: Matrix | None = None, index: Index = None
    ) -> Tensor:
        """`forward` as if the labels 0 were not there, neither as negatives nor in a mean's count; "none" gives 0 for
        them. A loss that is not element-wise defines it, or cannot."""
        if not self.elementwise:
            raise NotImplementedError(f"{type(self).__name__} has no form without unknown labels")
        unknown = labels == 0
        entries = self.entries(self.scaled(logits), labels, pseudo, index).masked_fill(unknown, 0.0)
        if self.reduction == "none":
            return entries
        return entries.sum() / ((~unknown).sum().clamp(min=1) if self.reduction == "mean" else 1)

    @classmethod
    def can_leave_out_unknown(cls) -> bool:
        return cls.elementwise or cls.annotated_only is not Loss.annotated_only

    def predict(self, outputs: Matrix) -> Matrix:
        """Probabilities, each class by itself, as the loss trained them."""
        return torch.sigmoid(self.scaled(outputs))

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, counted from 1, for losses that have a schedule."""

    def observe(self, labels: Num[Tensor, "samples classes"]) -> None:
        """Called once with the labels of all training samples, before the optimizer is built."""

    def relabel(
        self,
        labels: Num[Tensor, "samples classes"],
        pseudo: Float[Tensor, "samples classes"] | None,
        outputs: Float[Tensor, "samples classes"],
        share: float = 0.0,
        rounds: int = 1,
    ) -> tuple[Num[Tensor, "samples classes"], Float[Tensor, "samples classes"] | None]:
        """What becomes of the labels and soft labels that training goes on with: `relabels="step"` with the outputs of
        the step that was just taken, for its samples; `relabels="epoch"` with the probabilities of all samples, `share`
        of whose unknown labels get soft ones in `rounds` rounds together."""
        return labels, pseudo

    def labelled_by(
        self, scores: Float[Tensor, "samples classes"], labels: Num[Tensor, "samples classes"]
    ) -> Float[Tensor, "samples classes"]:
        """`takes_scores`: the soft labels that training starts with, NaN where there is none."""
        raise NotImplementedError

    @classmethod
    def defaults_for(cls, positives: float) -> dict[str, Any]:
        """Options whose default follows from how many positive labels a sample has."""
        return {}

    def entries(self, logits: Matrix, labels: Labels, pseudo: Matrix | None, index: Index) -> Matrix:
        raise NotImplementedError

    def scaled(self, logits: Float[Tensor, "batch *networks classes"]) -> Float[Tensor, "batch *networks classes"]:
        """Divided by the loss's own temperature, in fp32 or better whatever precision they came in."""
        return at_least_fp32(logits) / self.temperature

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        shown = {name: f"{value.item():g}" if isinstance(value, Tensor) else value for name, value in options.items()}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def require(right: bool, option: str, value: object, wanted: str) -> None:
    """Refuse a value that a loss cannot work with."""
    if not right:
        raise ConfigError(f"a loss cannot use {option} {value}: give {wanted}")


def at_least_fp32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


LOSSES = Registry[type[Loss]]("loss")
# Class decorator: `build(name)` makes this loss, and so do its aliases. Its options are its parameters.
register = LOSSES.register
names = LOSSES.names  # every loss once, without its aliases


def build(name: str, **options: Any) -> Loss:
    """
    >>> build("an", temperature=0.2)
    AssumedNegative(temperature=0.2, reduction=mean)
    """
    return LOSSES[name](**_checked(LOSSES.aliases.get(name, name), options))


def defaults(name: str, positives: float) -> dict[str, Any]:
    """Options of a loss that follow from the number of positive labels a sample has."""
    return LOSSES[name].defaults_for(positives)


RATED_FOR = 64 * 80  # labels of a downstream batch: lr_multiplier under a summed gradient is chosen for these


def own_rate(loss: Loss, entries: int, adaptive: bool) -> float:
    """The rate of what a loss learns itself, times the network's, with a batch of this many entries. hml's scale and
    margin are pulled by a sum over all entries; the step of an adaptive optimizer (Adam) does not depend on the
    gradient's size."""
    if not loss.summed_gradient:
        return loss.lr_multiplier
    return 1.0 if adaptive else loss.lr_multiplier * RATED_FOR / entries


def _checked(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options as YAML gives them, in the types of the loss's defaults, or the error that says which is wrong."""
    known, checked = inspect.signature(LOSSES[name]).parameters, {}
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
from mls.core.losses import (  # noqa: E402
    assumed_negative,
    asymmetric,
    class_priors,
    contrastive,
    curriculum,
    entropy,
    generalised_robust,
    hyperspherical,
    large_loss,
    prior_scores,
    ranking,
    robust,
    role,
    two_networks,
    two_way,
)
from mls.core.losses.contrastive import info_nce  # noqa: E402

__all__ = [
    "Loss",
    "assumed_negative",
    "asymmetric",
    "at_least_fp32",
    "build",
    "class_priors",
    "contrastive",
    "curriculum",
    "entropy",
    "generalised_robust",
    "hyperspherical",
    "info_nce",
    "large_loss",
    "names",
    "prior_scores",
    "ranking",
    "register",
    "require",
    "robust",
    "role",
    "two_networks",
    "two_way",
]
