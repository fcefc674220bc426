"""The forgetting guard of a run that starts from weights: RankMe and, where there are labels, kNN of the start on a
fixed sample of the run's own images, measured again while it trains. A start has something to lose."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from mls import distributed
from mls.config import AugmentConfig, Config
from mls.core.health import rank_me
from mls.data import Source
from mls.data.loader import worker_count
from mls.data.sources import labels_of
from mls.frozen.probe import knn_scores
from mls.monitor.online import Sample, features_of, metric_of, statistics_of_main
from mls.streams import generator


@dataclass
class Guard:
    sample: Sample
    augment: AugmentConfig
    fall: float  # share of the start's number that may be lost
    workers: int
    start: dict[str, float] = field(default_factory=dict)

    @classmethod
    def build(cls, config: Config, source: Source) -> Guard | None:
        if config.monitor.guard == "off":
            return None
        order = torch.randperm(len(source), generator=generator(config.run.seed, "guard"))
        # In this order: the last are asked of the others, and in folders the images of a class follow each other.
        ids = order[: config.monitor.guard_images]
        labels = labels_of(source, ids) if source.class_names is not None else None
        sample = Sample(source, ids, torch.zeros(len(ids), 0) if labels is None else labels)
        workers = 0 if config.data.source == "scenes" else worker_count(config.data.workers)
        return cls(sample, config.augment, config.monitor.guard_fall, workers)

    def measure(self, backbone: nn.Module, device: torch.device) -> dict[str, float]:
        """By all processes together, and the same for all: they stop together."""
        with statistics_of_main(backbone):
            found = features_of(backbone, self.sample, self.augment, self.workers, device)
        values: dict[str, float] = {}
        if found is not None:
            features, labels = nn.functional.normalize(found[0], dim=1), found[1]
            values["guard/rankme"] = rank_me(features)
            bank = int(0.8 * len(features))
            if labels.shape[1]:
                metric, measure = metric_of(labels)
                scores = knn_scores(features[:bank], labels[:bank], features[bank:])
                values[f"guard/knn_{metric}"] = float(measure(scores, labels[bank:]))
        return distributed.from_main(values)

    def fallen(self, values: dict[str, float]) -> str:
        """What has fallen by more than the bound, in words.

        >>> guard = Guard(None, AugmentConfig(), 0.1, 0, {"guard/rankme": 50.0, "guard/knn_top1": 0.5})
        >>> guard.fallen({"guard/rankme": 46.0, "guard/knn_top1": 0.4})
        'kNN top-1 on fixed images is 0.4, 20 % below the 0.5 of the start'
        """
        lost = {name: 1 - values[name] / old for name, old in self.start.items() if name in values and old > 0}
        told = [
            f"{NAMES[name]} on fixed images is {values[name]:.3g}, {100 * share:.0f} % below the "
            f"{self.start[name]:.3g} of the start"
            for name, share in lost.items()
            if share > self.fall
        ]
        return ", and ".join(told)

    @staticmethod
    def told(values: dict[str, float]) -> str:
        return ", ".join(f"{NAMES[name]} {value:.3g}" for name, value in values.items())


NAMES = {"guard/rankme": "RankMe", "guard/knn_top1": "kNN top-1", "guard/knn_map": "kNN mAP"}
