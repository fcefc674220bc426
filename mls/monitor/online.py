"""The online probes: while a run trains on images that happen to have labels, how well do neighbours and a linear
classifier predict them from its features? The same probes as eval/ uses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mls.config import AugmentConfig, Config
from mls.data import Source
from mls.frozen.features import embed
from mls.frozen.metrics import mean_average_precision, top1
from mls.frozen.probe import knn_scores, linear_probe
from mls.models.finite import NonFiniteError
from mls.streams import generator


@dataclass
class OnlineProbes:
    """Two disjoint samples: what is learnt from `bank` images is asked of `asked` images."""

    bank: Source
    bank_ids: Tensor
    asked: Source
    asked_ids: Tensor
    augment: AugmentConfig
    knn_every: int  # epochs; 0: never
    linear_every: int

    @classmethod
    def build(cls, config: Config, source: Source) -> OnlineProbes | None:
        """None where the source has no labels, or nothing is to be measured."""
        monitor = config.monitor
        every = (monitor.knn_every_epochs, monitor.linear_every_epochs)
        if source.labels is None or not any(every):
            return None
        order = torch.randperm(len(source), generator=generator(config.run.seed, "knn"))[: monitor.knn_images]
        cut = int(0.8 * len(order))
        if config.data.source == "scenes":  # they have a test split of their own
            from mls.data.scenes import ScenesSource

            test = ScenesSource(replace(config.data.scenes, test_count=len(order) - cut), split="test")
            return cls(source, order[:cut], test, torch.arange(len(test)), config.augment, *every)
        return cls(source, order[:cut], source, order[cut:], config.augment, *every)

    def __call__(self, backbone: nn.Module, epoch: int, device: torch.device) -> dict[str, float]:
        """What is due at the end of this epoch."""
        probes = {"knn": (self.knn_every, knn_scores), "linear": (self.linear_every, _linear_scores)}
        due = {name: scores for name, (every, scores) in probes.items() if every and epoch % every == 0}
        if not due:
            return {}
        assert self.bank.labels is not None and self.asked.labels is not None
        try:
            bank = embed(backbone, self.bank, self.bank_ids.tolist(), self.augment, device)
            asked = embed(backbone, self.asked, self.asked_ids.tolist(), self.augment, device)
        except NonFiniteError:  # the training itself judges whether it goes on
            return {}
        labels, truth = self.bank.labels[self.bank_ids], self.asked.labels[self.asked_ids]
        one_each = bool((truth.sum(1) == 1).all()) and bool((labels.sum(1) == 1).all())
        metric, measure = ("top1", top1) if one_each else ("map", mean_average_precision)
        return {f"{name}/{metric}": float(measure(scores(bank, labels, asked), truth)) for name, scores in due.items()}


def _linear_scores(bank: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    return linear_probe(bank, labels, asked).scores
