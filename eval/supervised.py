"""`task: multilabel` and `task: finetune`: a classifier trained from weak labels or from all, and tested once. The loop
is in training.py, the labels it sees in regimes.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Int8, Int64
from torch import Tensor

from mls.errors import ConfigError
from mls.eval.classifier import build_classifier
from mls.eval.data import LabelledImages
from mls.eval.outcome import Outcome, for_file, metrics
from mls.eval.protocol import Classification, Supervised, TrainingData
from mls.eval.regimes import observe, split
from mls.eval.splits import load
from mls.eval.training import Training, build_loss
from mls.frozen.probe import few_shot
from mls.models import card_of, untrained

Protocol = TypeVar("Protocol", bound=Classification)
Truth = Int8[Tensor, "images classes"] | Int64[Tensor, "images"]  # the second where every image has one label


@dataclass(frozen=True)
class Prepared:
    """A data set under one label regime."""

    train: LabelledImages
    observed: Truth  # what training sees of train.truth
    val: LabelledImages | None  # fully labelled: chooses the epoch
    test: LabelledImages


@dataclass(frozen=True, kw_only=True)
class Trained(Outcome):
    training: Training


@lru_cache(maxsize=1)  # the cells of a suite share it
def prepare(data: TrainingData, draw: int = 0) -> Prepared:
    """Labels are drawn on all training images, then a part is held out: the order of the published code. `draw` counts
    where few images a class are drawn."""
    found = load(data)
    train, val = found.train, found.val
    drawn = train.observed
    if train.single_label:
        if data.labels != "full":
            raise ConfigError(f"data.labels={data.labels} needs images with many labels: {data.name}'s have one each")
        drawn = train.truth
    elif drawn is None or data.labels != "single_positive":
        drawn = observe(train.truth, data.labels, data.proportion, data.seed)
    if val is None and data.validation:
        learnt, held_out = split(len(train), data.validation, data.seed)
        train, val, drawn = found.train.part(learnt), found.train.part(held_out), drawn[learnt]
    if data.shots:
        rows = few_shot(train.truth, data.shots, draw, multilabel=not train.single_label)
        train, drawn = train.part(rows), drawn[rows]
    return Prepared(train, drawn, val, found.test)


def run(
    protocol: Supervised,
    weights: str,
    seed: int,
    folder: Path | None,
    after_epoch: Callable[[Training], None] | None = None,
    title: str = "",
    quiet: bool = False,
) -> Trained:
    """Train, choose the epoch, test once. With a folder the same call goes on where it was stopped."""
    began = time.monotonic()
    training = prepare_training(protocol, weights, seed, folder)
    training.train(title or protocol.recipe, quiet, after_epoch)
    values, seconds = test(training), time.monotonic() - began
    tested_weights = for_file(training.weights())
    return Trained(values, training.selection(), training.best_value(), seconds, tested_weights, training=training)


def prepare_training(protocol: Supervised, weights: str, seed: int, folder: Path | None) -> Training:
    """The classifier with its data, not trained yet (or as far as the folder knows)."""
    prepared = prepare(protocol.data, seed if protocol.data.shots else 0)
    if protocol.training.select == "best" and prepared.val is None:
        raise ConfigError("training.select=best has no validation part to choose on: raise data.validation above 0")
    if protocol.training.linear_select == "best" and prepared.val is None:
        raise ConfigError("training.linear_select=best has no validation part: raise data.validation above 0")
    protocol = with_statistics_of(weights, protocol)
    head = "cosine" if build_loss(protocol).takes == "cosines" else "linear"
    wanted = untrained(protocol.model.backbone) if weights == "random" else weights
    classifier = build_classifier(wanted, len(prepared.train.class_names), head=head, seed=seed)
    return Training(protocol, classifier, prepared.train, prepared.observed, validate, seed, folder)


def with_statistics_of(weights: str, protocol: Protocol) -> Protocol:
    """Images are standardised as they were when the weights were pretrained."""
    facts = card_of(weights)
    if facts is None or "mean" not in facts:
        return protocol
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    return replace(protocol, augment=replace(protocol.augment, mean=mean, std=std))


def validate(training: Training) -> dict[str, float]:
    """What is measured after every epoch."""
    val = _prepared(training).val
    return {} if val is None else _measure(training, val)


def test(training: Training) -> dict[str, float]:
    return _measure(training, _prepared(training).test)


def _prepared(training: Training) -> Prepared:
    return prepare(training.protocol.data, training.seed if training.protocol.data.shots else 0)


def _measure(training: Training, images: LabelledImages) -> dict[str, float]:
    groups, observed = training.protocol.groups, _prepared(training).observed
    counts = (observed > 0).sum(0) if observed.ndim == 2 else torch.bincount(observed)
    return metrics(training.scores(images), images.truth, groups, counts)
