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
