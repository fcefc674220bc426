"""`task: multilabel` and `task: finetune`: a classifier trained from weak labels or from all, and tested once. The loop
is in training.py, the labels it sees in regimes.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int8, Int64
from torch import Tensor

from mls.errors import ConfigError
from mls.eval import data as data_sets
from mls.eval.classifier import build_classifier
from mls.eval.data import LabelledImages, scenes
from mls.eval.protocol import DataConfig, Supervised
from mls.eval.regimes import observe, split
from mls.eval.training import Training, build_loss
from mls.metrics import (
    average_precision,
    f1,
    frequency_groups,
    grouped,
    mean_average_precision,
    mean_average_precision_by_sample,
)
from mls.models import card, weights_file


@dataclass(frozen=True)
class Prepared:
    """A data set under one label regime."""

    train: LabelledImages
    observed: Int8[Tensor, "images classes"]  # what training sees of train.truth
    val: LabelledImages | None  # fully labelled: chooses the epoch
    test: LabelledImages


@dataclass(frozen=True)
class Outcome:
    values: dict[str, float]  # metrics on the test images, as shares
    selection: str
    seconds: float
    training: Training


@lru_cache(maxsize=1)  # the cells of a suite share it
def prepare(data: DataConfig) -> Prepared:
    """Labels are drawn on all training images, then a part is held out: the order of the published code."""
    if data.name == "scenes":
        found = scenes.read(Path(), data.scenes)
    else:
        found = data_sets.build(data.name, data.root, data.check_sizes)
    train, val = found.train, found.val
    drawn = train.observed
    if drawn is None or data.labels != "single_positive":
        drawn = observe(train.truth, data.labels, data.proportion, data.seed)
    if val is None and data.validation:
        kept, held_out = split(len(train), data.validation, data.seed)
        train, val, drawn = found.train.part(kept), found.train.part(held_out), drawn[kept]
    return Prepared(train, drawn, val, found.test)


def run(
    protocol: Supervised,
    weights: str,
    seed: int,
    folder: Path | None,
    after_epoch: Callable[[Training], None] | None = None,
    title: str = "",
    quiet: bool = False,
) -> Outcome:
    """Train, choose the epoch, test once. With a folder the same call goes on where it was stopped."""
    began = time.monotonic()
    training = prepare_training(protocol, weights, seed, folder)
    training.train(title or protocol.recipe, quiet, after_epoch)
    return Outcome(test(training), training.selection(), time.monotonic() - began, training)


def prepare_training(protocol: Supervised, weights: str, seed: int, folder: Path | None) -> Training:
    """The classifier with its data, not trained yet (or as far as the folder knows)."""
    prepared = prepare(protocol.data)
    if protocol.training.select == "best" and prepared.val is None:
        raise ConfigError("training.select=best has no validation part to choose on: raise data.validation above 0")
    protocol = with_statistics_of(weights, protocol)
    head = "cosine" if build_loss(protocol).takes == "cosines" else "linear"
    wanted = protocol.model.backbone if weights == "random" else weights
    classifier = build_classifier(wanted, len(prepared.train.class_names), head=head, seed=seed)
    return Training(protocol, classifier, prepared.train, prepared.observed, validate, seed, folder)


def with_statistics_of(weights: str, protocol: Supervised) -> Supervised:
    """Images are standardised as they were when the weights were pretrained."""
    file = weights_file(weights) if ":" not in weights else None
    if file is None:
        return protocol
    facts = card(file)
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    return replace(protocol, augment=replace(protocol.augment, mean=mean, std=std))


def validate(training: Training) -> dict[str, float]:
    """What is measured after every epoch."""
    val = prepare(training.protocol.data).val
    return {} if val is None else _measure(training, val)


def test(training: Training) -> dict[str, float]:
    return _measure(training, prepare(training.protocol.data).test)


def _measure(training: Training, images: LabelledImages) -> dict[str, float]:
    protocol = training.protocol
    counts = (prepare(protocol.data).observed > 0).sum(0)
    return metrics(training.scores(images), images.truth, protocol.groups, counts)


def metrics(
    scores: Float[Tensor, "images classes"],
    truth: Int8[Tensor, "images classes"],
    groups: int = 0,
    counts: Int64[Tensor, "classes"] | None = None,
) -> dict[str, float]:
    """All on annotated entries only.

    map: mean over all classes, one without positives counts 0 (the SPML and LL papers). map_class: such classes are
    left out (Two-way's mAP@class, OpenImages). map_sample: classes ranked within each image. f1: mean over classes at
    probability 0.5. map_g1 ...: groups of classes from rare to frequent.

    >>> scores, truth = torch.tensor([[0.9, 0.1], [0.2, 0.3]]), torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    >>> found = metrics(scores, truth)
    >>> found["map"], found["map_class"], found["map_sample"]
    (0.5, 1.0, 1.0)
    """
    known = truth != 0
    mask = None if bool(known.all()) else known
    per_class = average_precision(scores, truth, known=mask)
    values = {
        "map": mean_average_precision(scores, truth, skip_empty=False, known=mask),
        "map_class": mean_average_precision(scores, truth, known=mask),
        "map_sample": mean_average_precision_by_sample(scores, truth, known=mask),
        "f1": f1(scores, truth, known=mask),
    }
    if groups:
        assert counts is not None
        met = (truth > 0).any(0)
        means = grouped(per_class.where(met, torch.nan), frequency_groups(counts, groups), groups)
        values |= {f"map_g{number}": mean for number, mean in enumerate(means, start=1)}
    return values
