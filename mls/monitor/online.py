"""The online probes: while a run trains on images that happen to have labels, how well do neighbours and a linear
classifier predict them from its features? The same probes as eval/ uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mls import distributed
from mls.config import AugmentConfig, Config
from mls.data import Source
from mls.data.loader import in_workers, worker_count
from mls.data.sources import labels_of
from mls.errors import DataError
from mls.frozen.features import WholeImages, embed_pixels
from mls.frozen.metrics import mean_average_precision, top1
from mls.frozen.probe import knn_scores, linear_probe
from mls.models.finite import NonFiniteError
from mls.streams import generator

BATCH = 250  # images that a process embeds together
DECODED = 25  # images that a worker decodes together
Features = tuple[Float[Tensor, "images dim"], Tensor]  # and labels


@dataclass
class Sample:
    """Images of a source with their labels. The processes share the batches: number n is of rank n modulo their count.
    The pixels of a process' own are kept, since the images are always the same."""

    source: Source
    ids: Tensor
    labels: Tensor
    own: list[UInt8[Tensor, "batch 3 size size"]] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)  # of its own images the places of those that cannot be read

    @classmethod
    def of(cls, source: Source, ids: Tensor) -> Sample | None:
        labels = labels_of(source, ids)
        return None if labels is None else cls(source, ids, labels)

    def read(self, size: int, workers: int) -> None:
        batches = self.ids.split(BATCH)[distributed.rank() :: distributed.world()]
        ids = [number for batch in batches for number in batch.tolist()]
        parts = []
        for images, broken in in_workers(
            WholeImages(self.source, ids, size, DECODED, skip=True), workers if ids else 0
        ):
            self.broken += [DECODED * len(parts) + row for row, _, _ in broken]
            parts.append(images)
        self.own = list(torch.cat(parts).split(BATCH)) if parts else []


@dataclass
class OnlineProbes:
    """Two disjoint samples: what is learnt from `bank` images is asked of `asked` images."""

    bank: Sample
    asked: Sample
    augment: AugmentConfig
    knn_every: int  # epochs; 0: never
    linear_every: int
    workers: int  # processes that decode, once
    say: Callable[[str], None]

    @classmethod
    def build(
        cls, config: Config, source: Source, say: Callable[[str], None] = lambda text: None
    ) -> OnlineProbes | None:
        """None where the source has no labels, or nothing is to be measured."""
        monitor, made = config.monitor, config.data.source == "scenes"
        every = (monitor.knn_every_epochs, monitor.linear_every_epochs)
        if source.class_names is None or not any(every):
            return None
        order = torch.randperm(len(source), generator=generator(config.run.seed, "knn"))[: monitor.knn_images]
        bank, asked = order.tensor_split([int(0.8 * len(order))])
        where = source
        if made:  # they have a test split of their own
            from mls.data.scenes import ScenesSource

            where = ScenesSource(replace(config.data.scenes, test_count=len(asked)), split="test")
            asked = torch.arange(len(where))
        known, held = Sample.of(source, bank), Sample.of(where, asked)
        if known is None or held is None:
            return None
        workers = 0 if made else worker_count(config.data.workers)
        return cls(known, held, config.augment, *every, workers, lru_cache(maxsize=None)(say))  # once

    def __call__(self, backbone: nn.Module, epoch: int, device: torch.device) -> dict[str, float]:
        """What is due at the end of this epoch. All processes embed, and the first one measures."""
        probes = {"knn": (self.knn_every, knn_scores), "linear": (self.linear_every, _linear_scores)}
        due = {name: scores for name, (every, scores) in probes.items() if every and epoch % every == 0}
        if not due:
            return {}
        with statistics_of_main(backbone):
            bank, asked = (
                features_of(backbone, sample, self.augment, self.workers, device) for sample in (self.bank, self.asked)
            )
        if bank is None or asked is None:
            return {}
        (bank, labels), (asked, truth) = bank, asked
        metric, measure = metric_of(torch.cat([labels, truth]))
        found = {}
        for name, scores in due.items():
            try:
                found[f"{name}/{metric}"] = float(measure(scores(bank, labels, asked), truth))
            except DataError as error:  # too few images of a class to choose settings on
                self.say(f"there is no {name} probe of these images: {error}")
        return found


def features_of(
    backbone: nn.Module, sample: Sample, augment: AugmentConfig, workers: int, device: torch.device
) -> Features | None:
    """With the labels, of all images that can be read (those that cannot, training lists). None where they are not
    finite (the training itself judges whether it goes on), and for all but rank 0."""
    if not sample.own:
        sample.read(augment.size, workers)
    own: list[Tensor] | None = None
    with contextlib.suppress(NonFiniteError):
        own = list(embed_pixels(backbone, sample.own, augment, device, sample.source.name))
        for place in sample.broken:
            own[place // BATCH][place % BATCH] = torch.nan
    of_all = distributed.objects(own)
    if distributed.rank() != 0 or any(one is None for one in of_all):
        return None
    world, count = len(of_all), sum(map(len, of_all))
    features = torch.cat([of_all[number % world][number // world] for number in range(count)])
    readable = ~features.isnan().any(1)
    return features[readable], sample.labels[readable]


@contextlib.contextmanager
def statistics_of_main(backbone: nn.Module) -> Iterator[None]:
    """Each process has batch statistics of its own; what is probed has rank 0's, as what is exported."""
    if distributed.world() == 1:
        yield
        return
    buffers = list(backbone.buffers())
    own = [buffer.cpu().clone() for buffer in buffers]
    try:
        for buffer, of_main in zip(buffers, distributed.from_main(own), strict=True):
            buffer.copy_(of_main)
        yield
    finally:
        for buffer, before in zip(buffers, own, strict=True):
            buffer.copy_(before)


def metric_of(labels: Tensor) -> tuple[str, Callable[[Tensor, Tensor], Any]]:
    """Top-1 where every image has one label, else mAP."""
    return ("top1", top1) if bool((labels.sum(1) == 1).all()) else ("map", mean_average_precision)


def _linear_scores(bank: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    return linear_probe(bank, labels, asked).scores
