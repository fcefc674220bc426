"""`task: linear`, `knn` and `svm`: what frozen features know. Features come from extraction.py, the solvers from
mls/frozen/probe; here is which images are learnt from, and what is chosen on which."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mls.distributed import start
from mls.errors import ConfigError
from mls.eval.data import LabelledImages
from mls.eval.extraction import Features, features_of
from mls.eval.images import Batches
from mls.eval.outcome import Outcome, metrics
from mls.eval.protocol import Frozen
from mls.eval.splits import load
from mls.eval.supervised import with_statistics_of
from mls.frozen import probe
from mls.frozen.probe.linear import Progress
from mls.frozen.untrained import IMAGES, calibrated
from mls.models import load_backbone, weights_file
from mls.monitor.progress import counting
from mls.streams import derive, generator

ALL_ASKED = 20000  # training images up to which kNN's k is chosen by leaving one out; above that
ASKED = 10000  # so many are asked of the others


@dataclass(frozen=True)
class Found:
    """What a probe says of the test images."""

    scores: Float[Tensor, "test classes"]  # probabilities
    selection: str
    validation: float | None
    values: dict[str, float] = field(default_factory=dict)  # beside what is measured of the scores
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """The features of a protocol. `val` chooses where there is one; else a part of `train` does."""

    train: Features
    test: Features
    val: Features | None
    passes: int  # augmented ones, in train below the plain one

    @property
    def many(self) -> bool:
        return self.train.labels.ndim == 2


def run(
    protocol: Frozen, weights: str, seed: int, folder: Path | None, title: str = "", quiet: bool = False
) -> Outcome:
    """Embed, choose, fit, test once. Stopped, the same call goes on with the features that are there."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(f"task {protocol.task} runs in one process: start it without torchrun")
    began = time.monotonic()
    protocol = with_statistics_of(weights, protocol)
    data = load(protocol.data)
    backbone = build_backbone(protocol, weights, seed, data.train)
    embed = lambda part, images: features_of(backbone, images, protocol, f"of {data.name} {part}", quiet=quiet)
    train = training_features(backbone, data.train, protocol, seed, quiet)
    val = None if data.val is None else embed("val", data.val)
    split = Split(train, embed("test", data.test), val, protocol.features.passes)
    with counting(title or protocol.recipe, 1, not quiet) as progress:
        found = PROBES[protocol.task](protocol, split, seed, progress)
    values = metrics(found.scores, split.test.labels) | found.values
    return Outcome(values, found.selection, found.validation, time.monotonic() - began, found.weights)


def build_backbone(protocol: Frozen, weights: str, seed: int, train: LabelledImages) -> nn.Module:
    """The network, an untrained one with batch statistics of the training images: else it is compared with noise."""
    wanted = protocol.model.backbone if weights == "random" else weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init"))
        backbone = load_backbone(wanted)
    if weights_file(wanted) is not None or wanted.startswith("torchvision:"):
        return backbone
    device = start(protocol.features.device).device
    batches = Batches(train, protocol, seed, device)
    rows = torch.arange(min(IMAGES, len(train)))
    return calibrated(backbone.to(device), (images for _, images in batches.plain(rows)))


def training_features(
    backbone: nn.Module, images: LabelledImages, protocol: Frozen, seed: int, quiet: bool
) -> Features:
    """As they are, then the augmented passes, one below the other; of all images, or of a few of each class."""
    passes = [
        features_of(backbone, images, protocol, f"of {protocol.data.name} train, pass {number}", number, seed, quiet)
        for number in range(1 + protocol.features.passes)
    ]
    first, labels, parts = passes[0], passes[0].labels, [one.features for one in passes]
    if protocol.data.shots:
        rows = probe.few_shot(labels, protocol.data.shots, draw=seed, multilabel=labels.ndim == 2)
        labels, parts = labels[rows], [features[rows] for features in parts]
    if len(parts) == 1:  # still a file mapped into memory, unless few were picked
        return replace(first, features=parts[0], labels=labels)
    return replace(first, features=torch.cat(parts), labels=labels.repeat(len(parts), *[1] * (labels.ndim - 1)))


def _knn(protocol: Frozen, split: Split, seed: int, progress: Progress) -> Found:
    """Every k is told; the one in the table is the best when each training image is asked of the others."""
    settings, train, test = protocol.probe, split.train, split.test
    options = {"k": settings.k, "temperature": settings.temperature, "multilabel": split.many}
    known = (train.features, train.labels)
    if split.val is not None:
        chosen = probe.knn(*known, split.val.features, split.val.labels, **options)
    elif len(train.features) <= ALL_ASKED:
        chosen = probe.knn(*known, **options)
    else:  # all pairs of a large set would take longer than the test itself
        order = torch.randperm(len(train.features), generator=generator(seed, "knn choice"))
        ask = lambda rows: (train.features[rows], train.labels[rows])
        chosen = probe.knn(*ask(order[ASKED:].sort().values), *ask(order[:ASKED].sort().values), **options)
    best = max(chosen.values, key=lambda k: chosen.values[k])
    found = probe.knn(*known, test.features, test.labels, **options)
    scores = probe.knn_scores(*known, test.features, best, settings.temperature)
    values = {f"{found.metric}_k{k}": value for k, value in found.values.items()}
    chosen_on = "training images" if split.val is None else "validation images"
    return Found(scores, f"k = {best}, best on the {chosen_on}", chosen.values[best], values)


def _linear(protocol: Frozen, split: Split, seed: int, progress: Progress) -> Found:
    settings, features, labels = protocol.probe, split.train.features, split.train.labels
    validation = None if split.val is None else (split.val.features, split.val.labels)
    if validation is None and split.passes:  # no other view of an image may be learnt from when it chooses
        rows = torch.arange(len(features)).view(1 + split.passes, -1)
        plain = probe.read_labels(labels[rows[0]], split.many)
        kept, held = probe.held_out_split(plain, protocol.data.validation, seed)
        validation = (features[held], labels[held])
        features, labels = features[rows[:, kept].flatten()], labels[rows[:, kept].flatten()]
    common = {"seed": seed, "multilabel": split.many, "validation": validation, "progress": progress}
    common["held_out"] = protocol.data.validation
    if settings.solver == "lbfgs":
        found = probe.linear_probe(features, labels, split.test.features, l2=settings.l2, **common)
    else:
        found = probe.sgd_probe(
            features,
            labels,
            split.test.features,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            schedule=settings.schedule,
            **common,
        )
    chosen = ", ".join(f"{name} = {value:g}" for name, value in found.chosen.items())
    best = max(tried.value for tried in found.tried if tried.value == tried.value)
    scores = found.scores.sigmoid() if split.many else found.scores
    return Found(scores, f"{chosen}, best on held-out images", best, weights=_kept(found))


def _svm(protocol: Frozen, split: Split, seed: int, progress: Progress) -> Found:
    settings, train = protocol.probe, split.train
    found = probe.svm_probe(
        train.features,
        train.labels,
        split.test.features,
        costs=settings.costs,
        folds=settings.folds,
        multilabel=split.many,
        progress=progress,
    )
    scores = found.scores.sigmoid() if split.many else found.scores
    best = found.tried.max(dim=0).values.mean().item()
    how = f"the cost of each class best in {settings.folds}-fold cross-validation"
    return Found(scores, how, best, weights=_kept(found))


def _kept(found: probe.Probe | probe.Svm) -> dict[str, Tensor]:
    """As nn.Linear names them."""
    return {"weight": found.weight.T.float().contiguous(), "bias": found.bias.float().contiguous()}


PROBES: dict[str, Callable[[Frozen, Split, int, Progress], Found]] = {
    "linear": _linear,
    "knn": _knn,
    "svm": _svm,
}
