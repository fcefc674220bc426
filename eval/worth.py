"""Is pretraining worth it on one's own labelled images? Every start is fine-tuned on every share of the labels with
every seed, the same images for all starts. Cells as of any suite: what is finished is found again."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch

from mls.data import Source
from mls.errors import ConfigError
from mls.eval import splits
from mls.eval.cells import Evaluation, evaluation
from mls.eval.data import DataSet, LabelledImages
from mls.eval.paired import half_width
from mls.eval.protocol import Supervised, load_protocol
from mls.eval.supervised import prepare, prepare_training
from mls.models import card_of, card_of_name, load_backbone
from mls.progress import counting
from mls.tables import Column, Row, Table

FEWEST_STEPS = 150  # a small share of the labels is seen more often: ten steps teach nobody
TIMED = 3  # steps that are timed, after one that is not
CONTROL = "random"  # the start that all others are compared with


@dataclass(frozen=True)
class Question:
    """What is compared: `starts` by the name that the table gives them."""

    protocol: Supervised
    starts: dict[str, str]
    fractions: Sequence[float]
    seeds: int

    @cached_property
    def data(self) -> DataSet[LabelledImages]:
        return splits.load(self.protocol.data)

    def of(self, fraction: float) -> Supervised:
        data = replace(self.protocol.data, fraction=fraction)
        protocol = replace(self.protocol, data=data)
        steps = math.ceil(self.images(fraction) / protocol.training.batch_size)
        epochs = max(protocol.training.epochs, math.ceil(FEWEST_STEPS / steps))
        return replace(protocol, training=replace(protocol.training, epochs=epochs))

    def images(self, fraction: float) -> int:
        """How many labelled images are learnt from."""
        return self.counts[fraction]

    @cached_property
    def counts(self) -> dict[float, int]:
        shares = {one: replace(self.protocol.data, fraction=one) for one in (*self.fractions, 1.0)}
        return {share: len(prepare(data).train) for share, data in shares.items()}

    @cached_property
    def cells(self) -> dict[tuple[str, float], list[Evaluation]]:
        protocols = {fraction: self.of(fraction) for fraction in self.fractions}
        return {
            (name, fraction): [evaluation(protocol, weights, seed) for seed in range(self.seeds)]
            for name, weights in self.starts.items()
            for fraction, protocol in protocols.items()
        }

    def networks(self) -> set[str]:
        """The architectures of the starts: several make a comparison of networks, too."""
        named = [weights for weights in self.starts.values() if not weights.startswith("pretrain:")]
        return {architecture_of(weights, self.protocol.model.backbone) for weights in named}


def architecture_of(weights: str, backbone: str) -> str:
    if weights == "random":
        return backbone.removeprefix("random:").removeprefix("scratch:")
    return str((card_of(weights) or card_of_name(weights))["architecture"])


def question(
    overrides: Sequence[str], starts: Sequence[str], fractions: Sequence[float], seeds: int, backbone: str
) -> Question:
    """With the loss and the metric that the labels ask for."""
    if any(not 0 < fraction <= 1 for fraction in fractions):
        raise ConfigError(
            f"--fractions {','.join(f'{one:g}' for one in fractions)}: each is a share, above 0 and up to 1"
        )
    protocol = load_protocol("worth", [f"model.backbone={backbone}", *overrides])
    if protocol.data.shots or protocol.data.fraction < 1:
        raise ConfigError("data.shots and data.fraction are not for `mls worth`: --fractions says what is learnt from")
    if not splits.load(protocol.data).train.single_label:
        protocol = load_protocol("worth", ["metric=map", "training.loss=an", f"model.backbone={backbone}", *overrides])
    starts = list(dict.fromkeys(starts))
    ends = [Path(start).name for start in starts]
    named: dict[str, str] = {}
    for start, end in zip(starts, ends, strict=True):
        name = end if Path(start).exists() and ends.count(end) == 1 else start
        named[name] = start
        if start == "imagenet":
            named[name] = f"torchvision:{architecture_of('random', protocol.model.backbone)}"
            load_backbone(named[name])  # had now, or told what to download, before anything is trained
    return Question(protocol, named, sorted(set(fractions)), seeds)


# ------------------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Plan:
    cells: int
    stored: int
    seconds: float  # of those that are not stored
    pretrain: bool = False  # some of these start from a run that this command makes

    def __str__(self) -> str:
        minutes = round(self.seconds / 60)
        about = f"about {f'{minutes} minutes' if minutes > 1 else 'a minute'} at the pace of {TIMED} steps"
        told = about if self.seconds else "nothing to do"
        told += ", and the pretraining, which is not planned" if self.pretrain else ""
        return f"{self.cells} trainings, {self.stored} of them stored already: {told}"


def plan(asked: Question, root: Path) -> Plan:
    """How long the cells that are not stored will take, from a few steps with the images themselves."""
    every = [(fraction, cell) for (_, fraction), cells in asked.cells.items() for cell in cells]
    left = [(fraction, cell) for fraction, cell in every if not cell.stored(root)]
    if not left:
        return Plan(len(every), len(every), 0.0)
    training = prepare_training(asked.of(1.0), "random", 0, None)
    began, images = _time_on(training.device), 0
    for number, (rows, views) in enumerate(islice(training.batches.training(1), TIMED + 1)):
        training.step += 1
        training.train_step(rows, views)
        if number == 0 and asked.images(1.0) > len(rows):
            began, images = _time_on(training.device), 0
        else:
            images += len(rows)
    learning = (_time_on(training.device) - began) / max(1, images)
    few = asked.data.test.part(torch.arange(min(128, len(asked.data.test))))
    began = _time_on(training.device)
    training.scores(few)
    testing = (_time_on(training.device) - began) / len(few) * len(asked.data.test)
    seen = {fraction: asked.of(fraction).training.epochs * asked.images(fraction) for fraction in asked.fractions}
    seconds = sum(learning * seen[fraction] + testing for fraction, _ in left)
    pretrain = any(cell.weights.startswith("pretrain:") for _, cell in left)
    return Plan(len(every), len(every) - len(left), seconds, pretrain)


def _time_on(device: torch.device) -> float:
    """Once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


# ---------------------------------------------------------------------------------------------------------- the answer


@dataclass
class Answer:
    asked: Question
    metric: str
    values: dict[tuple[str, float], list[float]] = field(default_factory=dict)  # in per cent, a number for each seed
    seconds: dict[tuple[str, float], list[float]] = field(default_factory=dict)

    def table(self) -> Table:
        """Means with 95 % intervals; below each start its gain over the control, paired by seed."""
        columns = [Column(f"{self.asked.images(one):,} ({one:.3g})", str(one)) for one in self.asked.fractions]
        columns.append(Column("s a training", "cost"))
        rows = []
        for name in self.asked.starts:
            cells: dict[str, str] = {str(one): interval(self.values[name, one]) for one in self.asked.fractions}
            spent = [value for one in self.asked.fractions for value in self.seconds[name, one]]
            rows.append(Row([name], {**cells, "cost": f"{statistics.fmean(spent):.0f}"}))
            if name != CONTROL and CONTROL in self.asked.starts:
                gains = {str(one): interval(self.gains(name, one), sign=True) for one in self.asked.fractions}
                rows.append(Row([f"{name} − {CONTROL}"], gains))
        note = f"{self.metric} in per cent on {len(self.asked.data.test):,} test images, by labelled images learnt from"
        several = f"mean ± half of the 95 % interval over {self.asked.seeds} seeds; differences are paired by seed"
        only_one = "one seed: no interval; --seeds 3 gives one"
        return Table(["start"], columns, rows, f"{note}; {several if self.asked.seeds > 1 else only_one}.")

    def gains(self, name: str, fraction: float) -> list[float]:
        pairs = zip(self.values[name, fraction], self.values[CONTROL, fraction], strict=True)
        return [one - other for one, other in pairs]

    def verdicts(self) -> list[str]:
        """For each share of the labels what the best start gains, and whether its interval leaves out nought."""
        others = [name for name in self.asked.starts if name != CONTROL]
        if not others or CONTROL not in self.asked.starts:
            return []
        found = []
        for fraction in self.asked.fractions:
            best = max(others, key=lambda name: statistics.fmean(self.gains(name, fraction)))
            gains = self.gains(best, fraction)
            half, mean = half_width(gains), statistics.fmean(gains)
            sure = len(gains) > 1 and abs(mean) > (half or 0.0)  # no interval: of one seed, or all gain the same
            words = "worth it" if sure and mean > 0 else "a loss" if sure else "not told apart from no pretraining"
            images = f"{self.asked.images(fraction):,} labelled images"
            found.append(f"with {images}: {words} ({best}: {interval(gains, sign=True)} points)")
        return found


def answer(asked: Question, root: Path) -> Answer:
    """Train what is not stored, all starts with one seed before the next seed."""
    found, done = Answer(asked, asked.protocol.metric), 0
    with counting("trainings", len(asked.cells) * asked.seeds) as progress:
        for seed in range(asked.seeds):
            for key, cells in asked.cells.items():
                measured = cells[seed].finish(root, quiet=True)
                found.values.setdefault(key, []).append(100 * measured.values[found.metric])
                found.seconds.setdefault(key, []).append(float(measured.row["duration"]))
                progress(done := done + 1)
    return found


def interval(values: Sequence[float], sign: bool = False) -> str:
    """
    >>> interval([1.0, 2.0, 3.0], sign=True), interval([40.25])
    ('+2.0 ± 2.5', '40.2')
    """
    half, mean = half_width(values), f"{statistics.fmean(values):{'+' if sign else ''}.1f}"
    return mean if half is None else f"{mean} ± {half:.1f}"


# ------------------------------------------------------------------------------------------------------- the leak check


@dataclass(frozen=True)
class PartOf:
    """Some images of a source, as a source."""

    images: Source
    rows: Sequence[int]
    name: str
    class_names = None
    labels = None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> object:
        return self.images.read(self.rows[index])

    def describe(self, index: int) -> str:
        return self.images.describe(self.rows[index])

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        return torch.arange(len(self.rows))


def leaks(seen: Source, data: DataSet[LabelledImages]) -> tuple[int, float]:
    """How many test images have a near-duplicate among images that were seen before, by thumbnails; and the share of
    those that have another image as near, which says how often that is wrong."""
    from mls.frozen.neighbours import EmbeddedSource, Embedder, calibrate, near_duplicates

    test = PartOf(data.test.images, data.test.numbers(), f"{data.name} test")
    first = EmbeddedSource(seen, Embedder.of(None))
    calibration = calibrate(first)
    found = near_duplicates(first, EmbeddedSource(test, first.embedder), calibration.threshold)  # pyright: ignore[reportArgumentType]
    return len(found), calibration.alarms(calibration.threshold)
