"""The contract between a pretraining method and all that trains, watches, saves and shows it: the trainer, the
monitors, the checkpoint and the gallery use what stands here and nothing else. `forward` has no side effects; state
moves in `after_step` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mls.config import Config
from mls.data import Source, ViewPlan, Views

if TYPE_CHECKING:
    from mls.models import Backbone, Encoder, EncoderPair, Precision


@dataclass
class StepOutput:
    """What `forward` gives. Only `loss` must be there."""

    loss: Float[Tensor, ""]
    scalars: dict[str, Tensor] = field(default_factory=dict)  # detached, for the log
    parts: dict[str, Tensor] = field(default_factory=dict)  # the loss' parts, with gradient
    outputs: list[Tensor] = field(default_factory=list)  # where the gradient of a part is measured: z1 (and g1)
    keys: Any = None  # what `after_step` needs
    matched_ids: Int64[Tensor, "batch k"] | None = None  # images taken as positives (-1: none), for label monitors
    query_ids: Int64[Tensor, "batch"] | None = None  # for whom
    candidate_ids: Int64[Tensor, "rows"] | None = None  # out of which images they were chosen: the level of chance
    measure: Callable[[], dict[str, Tensor]] = dict  # more for the log, worked out only where a line of it is due


@dataclass(frozen=True)
class Nearest:
    """The rows nearest to each query in one memory, nearest first, without those of the query's own image."""

    slots: Int64[Tensor, "batch count"]
    scores: Float[Tensor, "batch count"]  # -inf: no row was left
    all_scores: Float[Tensor, "some"]  # of all rows with all queries, sorted; of very many an even sample
    own: float = 0.0  # share of the query's own image among as many nearest rows, where training lets these match
    # Of lists found by regions the numbers of the query's region and of the match's that are most alike; -1: not known.
    regions: Int64[Tensor, "batch count 2"] | None = None


@dataclass(frozen=True)
class MatchedRows:
    """What a method holds that can match, and what does. Each row is a crop of an image."""

    ids: Int64[Tensor, "rows"]
    boxes: Float[Tensor, "rows 4"]  # x0 y0 x1 y1 as shares of width and height; NaN: unknown
    ages: Int64[Tensor, "rows"]  # steps since the row came
    nearest: dict[str, Nearest]  # by "features" (g), "projections" (z) or "regions"; what gives labels comes first


@dataclass(frozen=True)
class OwnRate:
    """Parameters that learn at another rate than the network, without weight decay."""

    parameters: list[nn.Parameter]
    multiplier: float  # of the network's rate


@runtime_checkable
class Memory(Protocol):
    """State outside the modules: a dictionary of past keys. DDP would broadcast it at every forward if it were a
    buffer. Its `state_dict` does not depend on the number of processes, and is a copy on the CPU: it is written while
    training goes on."""

    def to(self, device: torch.device | str) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Method(nn.Module):
    """A pretraining method. A subclass must give `backbone` and `forward`; all else has an answer here.

    >>> from mls.core.methods import names
    >>> names()
    ['byol', 'densecl', 'knn_moco', 'mls', 'mls_words', 'moco_v2', 'moco_v3', 'simsiam', 'slotcon', 'supervised']
    """

    momentum = 1.0  # of a key encoder, the configuration's; set before each step where it is scheduled

    def __init__(
        self,
        config: Config,
        precision: Precision = "fp32",
        image_labels: Float[Tensor, "images classes"] | None = None,
    ) -> None:
        """`image_labels` are for controls that are no methods (supervised training, oracle pseudo-labels)."""
        super().__init__()
        self.config = config
        self.momentum = config.model.momentum

    @property
    def backbone(self) -> Backbone:
        """What is exported and probed."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its backbone is")

    def refuse(self, source: Source) -> None:
        """Called once before the run counts as begun: images that the method cannot work with, in a sentence."""

    def views(self) -> ViewPlan:
        """The views of an image that `forward` gets: by default two crops, and the small crops of multi-crop."""
        return ViewPlan.crops(self.config.augment)

    def forward(self, views: Views) -> StepOutput:
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def after_step(self, outputs: list[StepOutput]) -> None:
        """Called once after the optimizer's step, with the output of each micro-batch: moving averages, memories."""

    def set_progress(self, step: int, epoch: int, steps_per_epoch: int) -> None:
        """Called before each step; step and epoch count from 1. What it sets follows from its arguments and the
        configuration alone, so a resume needs nothing else."""

    def refresh(self, source: Source, tell: Callable[[str, int, int], None]) -> dict[str, float]:
        """Called before each step, after `set_progress`, on all processes: the place for what a method works out from
        the whole data set now and then, such as lists of neighbours. What it finds must follow from its state and the
        step, and be part of its state. `tell(what, done, of)` shows how far it is; what it gives is logged."""
        return {}

    def decide(self, decided: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Called once before the first step: settles what the configuration leaves to measurement. `decided` is what
        was decided when the run began, if it is a resume; what is returned is kept in the checkpoint."""
        return {}

    def own_rates(self) -> list[OwnRate]:
        """Parameters with a learning rate of their own, such as those of a loss."""
        return []

    # ---------------------------------------------------------------------------------------------------------- logging

    def introduction(self) -> list[str]:
        """Sentences for the start of a run, after `decide` and `set_progress`."""
        return []

    def measurements(self) -> dict[str, float]:
        """Cheap numbers for every line of the log."""
        return {}

    def health(self) -> dict[str, float]:
        """Measures of collapse and the like, every `monitor.health_every` steps."""
        return {}

    def matches(self, views: Views, most: int) -> MatchedRows | None:
        """The rows nearest to the first view of each image, as many as are positives, up to `most`. Asked in evaluation
        mode, now and then; None: it has no such thing."""
        return None

    # ------------------------------------------------------------------------------------------ state beside modules

    def memories(self) -> Mapping[str, Memory]:
        """By name. They move with `to`, and are part of `state_dict`, which is not saved where a number in it is not
        finite (`boxes` may be unknown)."""
        return {}

    @property
    def saves_together(self) -> bool:
        """Do `state_dict` and `matches` exchange data, so that all processes must call them at once?"""
        return False

    def get_extra_state(self) -> dict[str, Any]:
        return {name: memory.state_dict() for name, memory in self.memories().items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, memory in self.memories().items():
            memory.load_state_dict(state[name])

    def _apply(self, fn: Any, recurse: bool = True) -> Method:
        super()._apply(fn, recurse)
        for memory in self.memories().values():
            memory.to(next(self.parameters()).device)
        return self


class MomentumMethod(Method):
    """A method whose key encoder is the moving average of its query encoder."""

    pair: EncoderPair[Encoder]

    @property
    def backbone(self) -> Backbone:
        return self.pair.query.backbone

    def after_step(self, outputs: list[StepOutput]) -> None:
        self.pair.update(self.momentum)


def gradient_norms(out: StepOutput) -> dict[str, float]:
    """The norm of each loss part's gradient at the network's outputs: how hard each part pulls."""
    norms = {}
    for name, part in out.parts.items():
        if not part.requires_grad:
            continue
        grads = torch.autograd.grad(part, out.outputs, retain_graph=True, allow_unused=True)
        norms[name] = sum((g.float().square().sum().item() for g in grads if g is not None), 0.0) ** 0.5
    return norms
