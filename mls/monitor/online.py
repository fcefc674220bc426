"""The online kNN: while a run trains on images that happen to have labels, how well do neighbours predict them?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mls.config import AugmentConfig, Config
from mls.data import Source
from mls.features import embed
from mls.metrics import mean_average_precision, top1
from mls.probe import knn_scores
from mls.streams import generator


@dataclass
class OnlineKnn:
    """Two disjoint samples: `bank` images vote on `asked` images."""

    bank: Source
    bank_ids: Tensor
    asked: Source
    asked_ids: Tensor
    augment: AugmentConfig

    @classmethod
    def build(cls, config: Config, source: Source) -> OnlineKnn | None:
        """None where the source has no labels or monitor.knn_every_epochs is 0."""
        if source.labels is None or config.monitor.knn_every_epochs == 0:
            return None
        order = torch.randperm(len(source), generator=generator(config.run.seed, "knn"))[: config.monitor.knn_images]
        cut = int(0.8 * len(order))
        if config.data.source == "scenes":  # they have a test split of their own
            from mls.data.scenes import ScenesSource

            test = ScenesSource(replace(config.data.scenes, test_count=len(order) - cut), split="test")
            return cls(source, order[:cut], test, torch.arange(len(test)), config.augment)
        return cls(source, order[:cut], source, order[cut:], config.augment)

    def __call__(self, backbone: nn.Module, device: torch.device) -> dict[str, float]:
        assert self.bank.labels is not None and self.asked.labels is not None
        bank = embed(backbone, self.bank, self.bank_ids.tolist(), self.augment, device)
        asked = embed(backbone, self.asked, self.asked_ids.tolist(), self.augment, device)
        labels, truth = self.bank.labels[self.bank_ids], self.asked.labels[self.asked_ids]
        scores = knn_scores(bank, labels, asked)
        if bool((truth.sum(1) == 1).all()) and bool((labels.sum(1) == 1).all()):
            return {"knn/top1": float(top1(scores, truth))}
        return {"knn/map": float(mean_average_precision(scores, truth))}
