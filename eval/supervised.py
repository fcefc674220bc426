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
from mls.eval import prior_scores
from mls.eval.boosted import BoostedClassifier
from mls.eval.classifier import Classifier, Several, build_classifier
from mls.eval.data import LabelledImages
from mls.eval.data.table import OwnLabels, refuse_unmeasurable
from mls.eval.outcome import Outcome, for_file, metrics
from mls.eval.protocol import Classification, DataConfig, Supervised, TrainingData
from mls.eval.regimes import observe, split
from mls.eval.splits import load, own_labels
from mls.eval.training import Training, build_loss
from mls.frozen.probe import few_shot, share_of
from mls.models import card_of, untrained
from mls.streams import derive

Protocol = TypeVar("Protocol", bound=Classification)
Truth = Int8[Tensor, "images classes"] | Int64[Tensor, "images"]  # the second where every image has one label


@dataclass(frozen=True)
class Prepared:
    """A data set under one label regime."""

    train: LabelledImages
    observed: Truth  # what training sees of train.truth
    val: LabelledImages | None  # fully labelled: chooses the epoch
    test: LabelledImages
    weak: Tensor | None  # what of val.truth is as weak as `observed`
    rows: Int64[Tensor, "images"]  # of `train` among the training images before any was held out


@dataclass(frozen=True, kw_only=True)
class Trained(Outcome):
    training: Training


def prepare(data: TrainingData, draw: int = 0) -> Prepared:
    """Labels are drawn on all training images, then a part is held out: the order of the published code. `draw` counts
    where few images a class are drawn."""
    return _prepare(data, draw, own_labels(data))


@lru_cache(maxsize=1)  # the cells of a suite share it
def _prepare(data: TrainingData, draw: int, own: OwnLabels | None) -> Prepared:
    found = load(data)
    refuse_unmeasurable(found)
    train, val, rows, weak = found.train, found.val, torch.arange(len(found.train)), None
    drawn = train.observed
    if train.single_label:
        if data.labels != "full":
            raise ConfigError(f"data.labels={data.labels} needs images with many labels: {data.name}'s have one each")
        drawn = train.truth
    elif drawn is None or data.labels != "single_positive":
        drawn = observe(train.truth, data.labels, data.proportion, data.seed)
    if val is not None and not train.single_label:
        weak = observe(val.truth, data.labels, data.proportion, data.seed)
    elif val is None and data.validation:
        rows, held_out = split(len(train), data.validation, data.seed)
        train, val, drawn, weak = found.train.part(rows), found.train.part(held_out), drawn[rows], drawn[held_out]
    if is_drawn(data):
        few = few_of(data, train.truth, draw)
        train, drawn, rows = train.part(few), drawn[few], rows[few]
    return Prepared(train, drawn, val, found.test, weak, rows)


def is_drawn(data: DataConfig) -> bool:
    """Whether some of the images are learnt from, drawn by the seed."""
    return data.shots is not None or data.fraction < 1


def few_of(data: DataConfig, truth: Truth, draw: int) -> Int64[Tensor, "rows"]:
    """The rows that are learnt from."""
    if data.shots:
        return few_shot(truth, data.shots, draw, multilabel=truth.ndim == 2)
    return share_of(truth, data.fraction, draw)


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
    prepared = prepare(protocol.data, seed if is_drawn(protocol.data) else 0)
    select = protocol.training.select
    if select != "last" and prepared.val is None:
        raise ConfigError(f"training.select={select} has no validation part: raise data.validation above 0")
    if select == "weak" and protocol.data.labels == "full":
        raise ConfigError("training.select=weak is for labels that are drawn, but data.labels=full: use best")
    if protocol.training.linear_select == "best" and prepared.val is None:
        raise ConfigError("training.linear_select=best has no validation part: raise data.validation above 0")
    single = prepared.train.single_label
    if prepared.val is not None and single != protocol.metric.startswith("top"):
        have = "one class" if single else "several classes"
        raise ConfigError(
            f"metric={protocol.metric} is not of images with {have} each, as in {protocol.data.name}: set "
            f"metric={'top1' if single else 'map'}"
        )
    protocol = with_statistics_of(weights, protocol)
    networks = build_networks(protocol, weights, len(prepared.train.class_names), seed)
    training = Training(protocol, networks, prepared.train, prepared.observed, validate, seed, folder)
    if protocol.training.prior_scores:
        images, classes = len(load(protocol.data).train), prepared.observed.shape[1]
        scores = prior_scores.read(protocol.training.prior_scores, images, classes)[prepared.rows]
        training.pseudo = training.loss.labelled_by(scores, prepared.observed)
    return training


def build_networks(protocol: Supervised, weights: str, classes: int, seed: int) -> Classifier | Several:
    """One classifier, or as many as the loss trains at once, which start with different heads."""
    loss, boost = build_loss(protocol), protocol.training.boost
    head = "cosine" if loss.takes == "cosines" else "linear"
    wanted = untrained(protocol.model.backbone) if weights == "random" else weights
    seeds = [seed, *(derive(seed, "network", number) for number in range(1, loss.networks))]
    networks = [build_classifier(wanted, classes, head=head, seed=one) for one in seeds]
    if boost != 1:
        networks = [BoostedClassifier(network, boost) for network in networks]
    return networks[0] if len(networks) == 1 else Several(networks)


def with_statistics_of(weights: str, protocol: Protocol) -> Protocol:
    """Images are standardised as they were when the weights were pretrained."""
    facts = card_of(weights)
    if facts is None or "mean" not in facts:
        return protocol
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    return replace(protocol, augment=replace(protocol.augment, mean=mean, std=std))


def validate(training: Training) -> dict[str, float]:
    """What is measured after every epoch."""
    prepared = _prepared(training)
    if prepared.val is None:
        return {}
    weakly = training.protocol.training.select == "weak"
    return _measure(training, prepared.val, as_truth(prepared.weak) if weakly else prepared.val.truth)


def as_truth(weak: Tensor | None) -> Int8[Tensor, "images classes"]:
    """Weak labels to measure on. Where no negative is known, every unknown label is taken for one, as in the published
    code on single positive labels; else unknown ones do not count.

    >>> as_truth(torch.tensor([[1, 0]])).tolist(), as_truth(torch.tensor([[1, 0, -1]])).tolist()
    ([[1, -1]], [[1, 0, -1]])
    """
    assert weak is not None
    return weak if bool((weak < 0).any()) else weak.masked_fill(weak == 0, -1)


def test(training: Training) -> dict[str, float]:
    images = _prepared(training).test
    return _measure(training, images, images.truth)


def _prepared(training: Training) -> Prepared:
    data = training.protocol.data
    return prepare(data, training.seed if is_drawn(data) else 0)


def _measure(training: Training, images: LabelledImages, truth: Truth) -> dict[str, float]:
    groups, observed = training.protocol.groups, _prepared(training).observed
    counts = (observed > 0).sum(0) if observed.ndim == 2 else torch.bincount(observed)
    return metrics(training.scores(images), truth, groups, counts)
