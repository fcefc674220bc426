"""`task: linear`, `knn` and `svm` on frozen features. Features come from extraction.py, the solvers from
mls/frozen/probe; here is which images each fit is trained on, and on which its settings are chosen."""

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
from mls.eval.data.table import refuse_unmeasurable
from mls.eval.extraction import Features, features_of
from mls.eval.images import Batches
from mls.eval.outcome import Outcome, metrics
from mls.eval.protocol import Frozen
from mls.eval.splits import load
from mls.eval.supervised import few_of, is_drawn, with_statistics_of
from mls.frozen import probe
from mls.frozen.probe.linear import Progress
from mls.frozen.untrained import STATISTICS_IMAGES, with_batch_statistics
from mls.models import is_untrained, load_backbone, untrained
from mls.progress import counting
from mls.streams import generator, initialisation

LEAVE_ONE_OUT_UP_TO = 20000  # training images: then kNN's k is chosen by leaving one out
CHOICE_QUERIES = 10000  # with more training images, these are queries and the others are their neighbours


@dataclass(frozen=True)
class ProbeResult:
    """A probe's scores of the test images, and how its settings were chosen."""

    scores: Float[Tensor, "test classes"]  # probabilities
    selection: str
    validation: float | None
    values: dict[str, float] = field(default_factory=dict)  # metrics that do not follow from the scores
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """The features of a protocol. `val` chooses where there is one; else a part of `train` does."""

    train: Features
    test: Features
    val: Features | None
    passes: int  # augmented ones; their rows of `train` follow those without augmentation

    @property
    def multilabel(self) -> bool:
        return self.train.labels.ndim == 2


def run(
    protocol: Frozen, weights: str, seed: int, folder: Path | None, title: str = "", quiet: bool = False
) -> Outcome:
    """Embed, choose, fit, test once. After a stop the same call continues with the features that are cached."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(f"task {protocol.task} runs in one process: start it without torchrun")
    began = time.monotonic()
    protocol = with_statistics_of(weights, protocol)
    data = load(protocol.data)
    refuse_unmeasurable(data)
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
    """The network; an untrained one gets the batch statistics of the training images (mls/frozen/untrained.py)."""
    wanted = untrained(protocol.model.backbone) if weights == "random" else weights
    with initialisation(seed):
        backbone = load_backbone(wanted)
    if not is_untrained(wanted):
        return backbone
    device = start(protocol.features.device).device
    batches = Batches(train, protocol, seed, device)
    rows = torch.arange(min(STATISTICS_IMAGES, len(train)))
    return with_batch_statistics(backbone.to(device), (images for _, images in batches.plain(rows)))


def training_features(
    backbone: nn.Module, images: LabelledImages, protocol: Frozen, seed: int, quiet: bool
) -> Features:
    """Features without augmentation, followed by the rows of the augmented passes; of all images, or of a few of each
    class."""
    passes = [
        features_of(backbone, images, protocol, f"of {protocol.data.name} train, pass {number}", number, seed, quiet)
        for number in range(1 + protocol.features.passes)
    ]
    first, labels, parts = passes[0], passes[0].labels, [one.features for one in passes]
    if is_drawn(protocol.data):
        rows = few_of(protocol.data, labels, seed)
        labels, parts = labels[rows], [features[rows] for features in parts]
    if len(parts) == 1:  # still memory-mapped, unless few images were chosen
        return replace(first, features=parts[0], labels=labels)
    return replace(first, features=torch.cat(parts), labels=labels.repeat(len(parts), *[1] * (labels.ndim - 1)))


def _knn(protocol: Frozen, split: Split, seed: int, progress: Progress) -> ProbeResult:
    """Reports every k. The table's k is the best one on the validation images, or else among the training images, each
    of which is a query to the others."""
    settings, train, test = protocol.probe, split.train, split.test
    options = {"k": settings.k, "temperature": settings.temperature, "multilabel": split.multilabel}
    known = (train.features, train.labels)
    plain = len(train.features) // (1 + split.passes)  # rows; a view of a query's own image would be its neighbour
    if split.val is not None:
        chosen = probe.knn(*known, split.val.features, split.val.labels, **options)
    elif plain <= LEAVE_ONE_OUT_UP_TO:
        chosen = probe.knn(train.features[:plain], train.labels[:plain], **options)
    else:  # comparing all pairs of a large set would take longer than the test itself
        order = torch.randperm(plain, generator=generator(seed, "knn choice"))
        part = lambda rows: (train.features[rows], train.labels[rows])
        others, queries = order[CHOICE_QUERIES:].sort().values, order[:CHOICE_QUERIES].sort().values
        chosen = probe.knn(*part(others), *part(queries), **options)
    best = max(chosen.values, key=lambda k: chosen.values[k])
    found = probe.knn(*known, test.features, test.labels, **options)
    scores = probe.knn_scores(*known, test.features, best, settings.temperature)
    values = {f"{found.metric}_k{k}": value for k, value in found.values.items()}
    chosen_on = "training images" if split.val is None else "validation images"
    return ProbeResult(scores, f"k = {best}, best on the {chosen_on}", chosen.values[best], values)


def _linear(protocol: Frozen, split: Split, seed: int, progress: Progress) -> ProbeResult:
    settings, features, labels = protocol.probe, split.train.features, split.train.labels
    validation = None if split.val is None else (split.val.features, split.val.labels)
    if validation is None and split.passes:  # no view of a held-out image may be trained on
        rows = torch.arange(len(features)).view(1 + split.passes, -1)
        plain = probe.read_labels(labels[rows[0]], split.multilabel)
        fitted, held = probe.held_out_split(plain, protocol.data.validation, seed)
        validation = (features[held], labels[held])
        features, labels = features[rows[:, fitted].flatten()], labels[rows[:, fitted].flatten()]
    options = probe.ProbeOptions(
        seed, split.multilabel, validation, held_out=protocol.data.validation, progress=progress
    )
    if settings.solver == "lbfgs":
        found = probe.linear_probe(features, labels, split.test.features, l2=settings.l2, options=options)
    else:
        sgd = probe.Sgd(settings.lr, settings.weight_decay, settings.epochs, settings.batch_size, settings.schedule)
        found = probe.sgd_probe(features, labels, split.test.features, sgd=sgd, options=options)
    chosen = ", ".join(f"{name} = {value:g}" for name, value in found.chosen.items())
    best = max(candidate.value for candidate in found.tried if candidate.value == candidate.value)
    scores = found.scores.sigmoid() if split.multilabel else found.scores
    return ProbeResult(scores, f"{chosen}, best on held-out images", best, weights=_as_linear(found))


def _svm(protocol: Frozen, split: Split, seed: int, progress: Progress) -> ProbeResult:
    settings, train = protocol.probe, split.train
    found = probe.svm_probe(
        train.features,
        train.labels,
        split.test.features,
        costs=settings.costs,
        folds=settings.folds,
        multilabel=split.multilabel,
        progress=progress,
    )
    scores = found.scores.sigmoid() if split.multilabel else found.scores
    best = found.tried.max(dim=0).values.mean().item()
    how = f"the cost of each class best in {settings.folds}-fold cross-validation"
    return ProbeResult(scores, how, best, weights=_as_linear(found))


def _as_linear(found: probe.Probe | probe.Svm) -> dict[str, Tensor]:
    """Weights under the names of nn.Linear."""
    return {"weight": found.weight.T.float().contiguous(), "bias": found.bias.float().contiguous()}


PROBES: dict[str, Callable[[Frozen, Split, int, Progress], ProbeResult]] = {"linear": _linear, "knn": _knn, "svm": _svm}
