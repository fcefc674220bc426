"""Every row of every suite trains with the optimizer, rate and schedule that it ships with: not `--tiny`'s, and no
images: a last layer on synthetic features."""

import functools
import json
import math
from dataclasses import asdict

import pytest
import torch

from mls.core import losses
from mls.errors import ConfigError
from mls.eval import load_protocol, load_suite, protocols, suites
from mls.eval.classifier import HEADS, Classifier, Several
from mls.eval.optimizer import build, set_lr
from mls.eval.protocol import Supervised
from mls.eval.training import build_loss

CLASSES, DIM, STEPS, STEPS_PER_EPOCH = 80, 64, 12, 6
NORM = 27.0  # of a ResNet-50's pooled features


@functools.lru_cache
def trained_in(name: str) -> dict[str, Supervised]:
    """The protocols of a suite's cells, each training once, named by the first row and column that has it."""
    suite = load_suite(name)
    cells: dict[tuple[str, ...], str] = {}
    for row in suite.rows:
        for column in suite.columns:
            cells.setdefault((column.protocol, *column.set, *row.set), f"{row.name}, {column.name}")
    found: dict[str, tuple[str, Supervised]] = {}
    for (file, *overrides), cell in cells.items():
        protocol = load_protocol(file, overrides)
        if isinstance(protocol, Supervised):
            same = json.dumps([asdict(protocol.training), protocol.loss_options(), protocol.data.labels])
            found.setdefault(same, (cell, protocol))
    return dict(found.values())


def features_and_labels(count: int, single: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Separable: a class is present where its own direction is strong, one class in thirty or exactly one an image."""
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(count, DIM, generator=draws)
    evidence = features @ torch.randn(DIM, CLASSES, generator=draws) / math.sqrt(DIM)
    present = torch.zeros(count, CLASSES, dtype=torch.bool).scatter_(1, evidence.argmax(1, keepdim=True), True)
    if not single:
        present |= evidence > 1.9
    return features * (NORM / math.sqrt(DIM)), torch.where(present, 1, -1).to(torch.int8)


def losses_of_steps(protocol: Supervised) -> list[float]:
    """The loss of one batch before each of its steps, and after the last."""
    torch.manual_seed(0)
    training, loss = protocol.training, build_loss(protocol)
    features, truth = features_and_labels(training.batch_size, single=protocol.task == "finetune")
    labels = truth if protocol.data.labels == "full" else truth.clamp(min=0)
    if training.ignore_unknown:
        labels = truth.masked_fill(torch.rand(truth.shape) < 0.5, 0)
    loss.observe(labels)
    head = HEADS["cosine" if loss.takes == "cosines" else "linear"]
    networks = [Classifier(torch.nn.Identity(), head(DIM, CLASSES)) for _ in range(loss.networks)]
    classifier = networks[0] if loss.networks == 1 else Several(networks)
    optimizer = build(training, classifier, loss)
    loss.set_epoch(1)
    found = []
    for step in range(1, STEPS + 2):
        set_lr(optimizer, training, min(step, STEPS), STEPS_PER_EPOCH)
        compute = loss.annotated_only if training.ignore_unknown else loss
        value = compute(classifier(features), labels, None, torch.arange(len(labels)))
        found.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return found


@pytest.mark.parametrize("name", suites())
def test_every_row_of_a_suite_learns_with_its_own_optimizer(name: str) -> None:
    wrong = {}
    for row, protocol in trained_in(name).items():
        values = losses_of_steps(protocol)
        start, room = values[0], 0.1 * abs(values[0])
        if not all(math.isfinite(value) and value <= start + room for value in values) or values[-1] >= start:
            wrong[row] = values
    assert not wrong


def test_protocols_outside_the_suites_learn_with_their_own_optimizer() -> None:
    in_suites = {column.protocol for name in suites() for column in load_suite(name).columns}
    wrong = {}
    for name in set(protocols()) - in_suites:
        protocol = load_protocol(name)
        if not isinstance(protocol, Supervised):
            continue
        if protocol.training.loss == "hml":  # whose adaptive term moves scale and margin, not the network
            protocol = load_protocol(name, ["training.options.adaptive=false"])
        values = losses_of_steps(protocol)
        if not all(map(math.isfinite, values)) or values[-1] >= values[0]:
            wrong[name] = values
    assert wrong == {}


@pytest.mark.parametrize("name", ["two_way_vaw", "two_way_wider"])
def test_every_loss_of_a_table_leaves_out_what_nobody_annotated(name: str) -> None:
    for row in load_suite("paper_two_way").rows:
        protocol = load_protocol(name, row.set)
        assert protocol.training.ignore_unknown and build_loss(protocol).can_leave_out_unknown(), row.name


def test_suites_are_walked() -> None:
    rows = {row for name in suites() for row in trained_in(name)}
    assert {"ASL, ResNet50, COCO class", "HML, COCO", "EM + APL, CUB", "supervised, CUB"} & rows
    assert len(rows) > 50


def test_a_sum_over_batch_and_classes_is_refused_under_sgd() -> None:
    sums = ["training.loss=asl", "training.options.reduction=sum"]
    with pytest.raises(ConfigError, match="training.loss=asl sums .* set training.options.reduction=mean"):
        build_loss(load_protocol("two_way_coco2014", sums))
    assert build_loss(load_protocol("two_way_coco2014", ["training.optimizer=adam", *sums])).reduction == "sum"


def share_of_the_loss(protocol: Supervised) -> float:
    """The learning rate of what the loss learns, times the network's."""
    classifier, loss = Classifier(torch.nn.Identity(), torch.nn.Linear(DIM, CLASSES)), build_loss(protocol)
    loss.observe(torch.ones(4, CLASSES))
    return build(protocol.training, classifier, loss).param_groups[-1]["share"]


@pytest.mark.parametrize("name", [name for name in protocols() if name.startswith(("spml", "ll", "hml", "partial"))])
def test_what_a_loss_learns_moves_with_the_optimizer_of_every_weak_label_protocol(name: str) -> None:
    """Adam steps by the rate itself: one of 1e-10 leaves HML's margin where it starts."""
    assert 1.0 <= share_of_the_loss(load_protocol(name, ["training.loss=hml"])) <= 10.0
    assert share_of_the_loss(load_protocol(name, ["training.loss=role"])) == 10.0


def test_under_sgd_a_summed_gradient_takes_a_rate_for_the_size_of_its_batch() -> None:
    overrides = ["training.optimizer=sgd", "training.loss=hml", "training.batch_size=128", "training.loss_lr=null"]
    share = losses.build("hml").lr_multiplier * 64 * 80 / (128 * CLASSES)
    assert share_of_the_loss(load_protocol("spml_coco2014", overrides)) == pytest.approx(share)
    assert share_of_the_loss(load_protocol("spml_coco2014", [*overrides, "training.loss=role"])) == 10.0
