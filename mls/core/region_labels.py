"""Pseudo-labels from regions in a run (`objective.labels_from=regions`): the neighbour lists in use, found anew now and
then with the run's own key encoder, or read from a file. A memory of the method: lists that the run found are part of
its checkpoints, of a file only what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int64
from torch import Tensor

from mls.config import Config, MLSOptions
from mls.core.matching import Matches
from mls.core.neighbour_lists import NeighbourLists
from mls.core.regions import RegionEncoder, Tell, due, most_alike, neighbours_of_all
from mls.data import Source
from mls.data.loader import whole_batches, worker_count
from mls.data.sources import hash_of_images
from mls.errors import CheckpointError, DataError
from mls.models import Backbone, Precision


class RegionLabels:
    def __init__(self, config: Config, precision: Precision) -> None:
        self.config = config
        self.precision: Precision = precision
        self.objective = cast(MLSOptions, config.objective)
        self.options = self.objective.regions
        self.file = Path(self.options.lists).expanduser() if self.options.lists else None
        self.lists = NeighbourLists.open(self.file) if self.file else None
        self.least: float | None = None  # the score from which on a neighbour counts; None: the nearest k count
        self.images = ""  # hash of the data, once it is known
        self.device = torch.device("cpu")

    def among(self, queries: Int64[Tensor, "batch"], rows: Int64[Tensor, "rows"]) -> Matches:
        """Which rows are a query's positives, by the images that they belong to."""
        assert self.lists is not None, "`refresh` was not called"
        if self.options.choose == "threshold" and self.least is None:  # k of the dictionary's rows on average
            average = self.objective.k * len(self.lists.ids) / self.config.dictionary.size
            self.least = self.lists.least(average)
        epoch = max(1, whole_batches(len(self.lists.ids), self.config)) * self.config.data.batch_size
        return self.lists.among(queries, rows, self.objective.k, self.least, epoch)

    def refresh(
        self, backbone: Backbone, source: Source, step: int, steps_per_epoch: int, tell: Tell
    ) -> dict[str, float]:
        self.check(source)
        warmup, every = self.objective.warmup_epochs, self.options.every_epochs
        wanting = self.lists is None and step > warmup * steps_per_epoch  # a branch ended the warm-up behind it
        if self.file is not None or not (wanting or due(step, steps_per_epoch, warmup, every)):
            return {}
        augment, workers = self.config.augment, worker_count(self.config.data.workers)
        encoder = RegionEncoder.fitted(backbone, source, augment, self.options, self.device, self.precision, workers)
        found, features = neighbours_of_all([encoder], source, self.options, tell)
        before, self.least = self.lists, None
        identity = {"step": step, "images": self.images}
        self.lists = NeighbourLists.of(found, identity, most_alike(features, found.indices))
        values = {"regions/score": float(found.scores[:, 0].mean())}
        if before is not None:
            new, old = (lists.ids[:, : self.objective.k] for lists in (self.lists, before))
            values["regions/kept"] = float((new[:, :, None] == old[:, None]).any(dim=2).float().mean())
        return values

    def check(self, source: Source) -> None:
        """Lists are of these images and of no others. Asked once, when a run starts or is resumed."""
        if self.images:
            return
        self.images = hash_of_images(source)
        if self.lists is not None and self.lists.identity.get("images") != self.images:
            raise DataError(
                f"the neighbour lists in {self.file or 'the checkpoint'} are not of the images in {source.name}: "
                "bring back the images that they were made of, or make new ones with `mls regions`"
            )

    # ------------------------------------------------------------------------------------------ a memory of the method

    def to(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.lists = self.lists.to(device) if self.lists is not None else None

    def state_dict(self) -> dict[str, Any]:
        if self.lists is None:
            return {}
        return {"identity": self.lists.identity, **({} if self.file else self.lists.tensors)}  # never written to

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.least = None
        if self.file is None:
            self.lists = NeighbourLists(**state).to(self.device) if state else None
        elif self.lists is None or state.get("identity") != self.lists.identity:
            raise CheckpointError(
                f"{self.file} holds other neighbour lists than those that the run began with: bring these back, or "
                "start a new run"
            )
