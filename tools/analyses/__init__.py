"""The analyses that the papers on noisy multi-labels show, each one picture and one table. `mls bench analyse NAME` is
the command; a file here holds those of one paper. What a loss or a metric is stands in mls/, not here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mls.eval.protocol import Supervised
    from mls.eval.training import Training


@dataclass(frozen=True)
class Study:
    """What an analysis may train: one protocol, with other losses."""

    protocol: str
    overrides: Sequence[str]
    weights: str | None
    seed: int
    root: Path  # trained classifiers are kept here, and found again

    def load(self, loss: str, *overrides: str) -> Supervised:
        from mls.eval import load_protocol

        return load_protocol(self.protocol, [f"training.loss={loss}", *overrides, *self.overrides])

    def trained(self, loss: str, *overrides: str) -> Training:
        """The classifier that this loss gives, with its data: trained now, or found."""
        from mls.eval.cells import trained

        return trained(self.load(loss, *overrides), self.weights, self.seed, self.root)

    def watched(self, after_epoch: Callable[[Training], None], loss: str, *overrides: str) -> Training:
        """The same, trained from the start, with a look at it after every epoch."""
        from mls.eval import supervised

        protocol = self.load(loss, *overrides)
        weights = self.weights or protocol.model.weights
        title = f"{protocol.recipe}, {loss}, watched"
        return supervised.run(protocol, weights, self.seed, None, after_epoch, title).training


@dataclass(frozen=True)
class Finding:
    """What an analysis shows."""

    figure: Figure
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: str  # one or two sentences: what to look at, and what the paper found
    numbers: dict[str, float] = field(default_factory=dict)  # the measured values, for programs


Analysis = Callable[[Study], Finding]


def analyses() -> dict[str, Analysis]:
    from mls.tools.analyses import distributions, hyperspherical, landscape, large_loss, regimes

    files = (regimes, landscape, hyperspherical, distributions, large_loss)
    return {name: analysis for file in files for name, analysis in file.ANALYSES.items()}
