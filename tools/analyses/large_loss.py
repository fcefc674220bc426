"""What the paper on large losses (https://arxiv.org/abs/2206.03740) shows: `memorisation` of wrong negatives, `cam`
(class activation maps and the pointing game), `evolution` of an image's labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mls.tools.analyses import Finding, Study
from mls.tools.analyses.distributions import POSITIVE, WHOLE, panels, training_kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mls.eval.data import LabelledImages, Located
    from mls.eval.training import Training

# Table 1 of the paper: per cent of true positives, true negatives and false negatives, on VOC 2012 and on COCO 2014.
# VOC's false negatives add up to 96.0 there.
PAPER_PHASES = ((88.3, 90.7, 23.8, 64.0, 82.6, 17.3), (11.7, 9.3, 72.2, 36.0, 17.4, 82.7))
PAPER_POINTING = {  # the pointing game on VOC 2012 and COCO 2014
    "an": (78.9, 46.4),
    "wan": (79.8, 47.7),
    "an_ls": (79.5, 49.1),
    "epr": (80.2, 48.1),
    "role": (82.5, 51.5),
    "ll_r": (83.7, 54.0),
    "ll_ct": (83.7, 54.1),
    "ll_cp": (83.5, 53.3),
}
KINDS = {"TP": "true positives", "TN": "true negatives", "FN": "false negatives (unannotated positives)"}
GIVEN, WRONG = "#333333", "#D55E00"
KIND_COLOURS = {"TP": POSITIVE, "TN": "#777777", "FN": WRONG}
SHOWN = 6  # images in a picture
MOST_WRONG = 6  # classes of an image that are not there, in its history


# ------------------------------------------------------------------------------------------------------ memorisation


@dataclass
class Peaks:
    """For every label, the epoch in which its loss was highest so far."""

    highest: Float[Tensor, "images classes"]
    epoch: Int64[Tensor, "images classes"]
    means: list[list[float]] = field(default_factory=list)  # of each epoch and kind of label

    @classmethod
    def none(cls, shape: torch.Size) -> Peaks:
        return cls(torch.full(shape, -torch.inf), torch.zeros(shape, dtype=torch.int64))

    def add(self, losses: Float[Tensor, "images classes"], masks: list[Bool[Tensor, "images classes"]]) -> None:
        higher = losses > self.highest  # of equal epochs the first
        self.means.append([float(losses[mask].mean()) for mask in masks])
        self.highest[higher] = losses[higher]
        self.epoch[higher] = len(self.means)

    def shares(self, mask: Bool[Tensor, "images classes"]) -> list[float]:
        """Per cent of these labels whose loss was highest in each epoch."""
        counts = self.epoch[mask].bincount(minlength=len(self.means) + 1)[1:]
        return (100 * counts / counts.sum()).tolist()


def memorisation(study: Study) -> Finding:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    kind = training_kinds(study)
    masks = [kind.annotated, kind.absent, kind.missed]
    peaks = Peaks.none(kind.absent.shape)

    def record(now: Training) -> None:
        annotated = (now.observed > 0).float()
        peaks.add(F.binary_cross_entropy(now.scores(), annotated, reduction="none"), masks)

    study.watched(record, "an", *WHOLE)
    shares = dict(zip(KINDS, (peaks.shares(mask) for mask in masks), strict=True))
    phases = [[share[0] for share in shares.values()], [sum(share[1:]) for share in shares.values()]]
    rows = [
        [name, *(f"{value:.1f}" for value in (*here, *paper))]
        for name, here, paper in zip(("epoch 1 (warm-up)", "later (regular)"), phases, PAPER_PHASES, strict=True)
    ]
    figure, [[left, right]] = panels(rows=1, columns=2, height=4, shared=False)
    epochs = range(1, len(peaks.means) + 1)
    for i, (short, name) in enumerate(KINDS.items()):
        means = [epoch[i] for epoch in peaks.means]
        left.plot(epochs, means, color=KIND_COLOURS[short], marker="o", markersize=4, label=name)
        places = [epoch + 0.27 * (i - 1) for epoch in epochs]
        right.bar(places, shares[short], 0.25, color=KIND_COLOURS[short], label=name)
    left.set(ylabel="mean loss after the epoch", title="Mean loss of each kind of label", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(NullLocator())
    right.set(ylabel="labels of the kind (%)", title="Epoch of a label's highest loss")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(frameon=False, fontsize=9)
    figure.suptitle("Training with AN: when is each kind of label learnt?")
    header = ["highest loss in", *KINDS, *(f"paper, {data} {short}" for data in ("VOC", "COCO") for short in KINDS)]
    summary = (
        "Per cent of the true positives, true negatives and false negatives of the training images, by when their loss "
        "under AN was highest; losses are taken after each epoch, without augmentation. The paper finds most false "
        "negatives in the regular phase: clean labels are learnt first, wrong ones memorised later. Its false "
        "negatives on VOC add up to 96.0, not to 100."
    )
    numbers = {f"{short}/warmup": share[0] for short, share in shares.items()}
    return Finding(figure, header, rows, summary, numbers)


# --------------------------------------------------------------------------------------------------------------- cam


@dataclass(frozen=True)
class Target:
    """A class that is present in an image, and where: x0 y0 x1 y1 as shares of the image."""

    row: int
    column: int
    boxes: Float[Tensor, "boxes 4"]


def cam(study: Study) -> Finding:
    from mls.eval import data
    from mls.eval.supervised import prepare

    protocol = study.load("an")
    test, size = prepare(protocol.data).test, protocol.augment.size
    targets = targets_of(test, data.boxes(protocol.data.name, protocol.data.root, test))
    chance = 100 * sum(float(covered(target.boxes, size).float().mean()) for target in targets) / len(targets)
    rows, numbers, maps = [["a random place", f"{chance:.1f}", "", ""]], {"chance": chance}, []
    step = -(-len(targets) // SHOWN)
    titles = ["image and boxes"]
    for loss, paper in PAPER_POINTING.items():
        found = target_maps(study.trained(loss), test, targets)
        maps.append(found[::step])
        numbers[loss] = pointing_game(found, targets)
        titles.append(f"{loss}\n{numbers[loss]:.1f} % hits")
        rows.append([loss, *(f"{value:.1f}" for value in (numbers[loss], *paper))])
    figure = _draw_maps(test, targets[::step], titles, maps)
    summary = (
        f"The pointing game: per cent of {len(targets)} (test image, present class) whose class activation map has its "
        "maximum inside a box of the class, difficult and crowd boxes included. The paper finds AN behind its methods; "
        "its numbers are for ResNet-50 on VOC 2012 and COCO 2014."
    )
    return Finding(figure, ["loss", "pointing game", "paper, VOC", "paper, COCO"], rows, summary, numbers)


def targets_of(images: LabelledImages, boxes: Sequence[Located]) -> list[Target]:
    """Every (image, present class), in order. `boxes`: of each image."""
    found = []
    for row, (places, classes) in enumerate(boxes):
        for column in classes.unique().tolist():
            if images.truth[row, column] > 0:  # VOC counts a class that has difficult objects alone as absent
                found.append(Target(row, column, places[classes == column]))
    return found


def covered(boxes: Float[Tensor, "boxes 4"], size: int) -> Bool[Tensor, "size size"]:
    """The cells of a grid over the image whose centres lie in a box.

    >>> covered(torch.tensor([[0.5, 0.0, 1.0, 0.5]]), size=2)
    tensor([[False,  True],
            [False, False]])
    """
    centres = (torch.arange(size) + 0.5) / size
    x0, y0, x1, y1 = boxes.T[..., None]
    across, down = (x0 <= centres) & (centres < x1), (y0 <= centres) & (centres < y1)  # [boxes, size]
    return (down[:, :, None] & across[:, None, :]).any(0)


@torch.no_grad()
def activation_maps(
    training: Training, images: LabelledImages
) -> Iterator[tuple[list[int], Float[Tensor, "batch classes size size"]]]:
    """Rows, and the maps of every class, as coarse as the network makes them; a batch at a time."""
    from mls.eval.classifier import last_map
    from mls.eval.images import Batches

    classifier = training.classifier.eval()
    # The whole image, whatever crop the test takes: boxes are shares of the whole image.
    data = replace(training.protocol.data, test_crop="squash")
    batches = Batches(images, replace(training.protocol, data=data), training.seed, training.device)
    for rows, views in batches.plain():
        maps = torch.einsum("cd,ndhw->nchw", classifier.head.weight, last_map(classifier.backbone, views))
        yield rows.tolist(), maps.cpu()


def target_maps(
    training: Training, images: LabelledImages, targets: Sequence[Target]
) -> Float[Tensor, "targets size size"]:
    """The map of each target's class: of 40,000 images the maps of all classes would take gigabytes."""
    columns: dict[int, list[int]] = {}
    for target in targets:
        columns.setdefault(target.row, []).append(target.column)
    batches = activation_maps(training, images)
    found = [maps[i, columns.get(row, [])] for rows, maps in batches for i, row in enumerate(rows)]
    return torch.cat(found)


def pointing_game(maps: Float[Tensor, "targets size size"], targets: Sequence[Target]) -> float:
    """Per cent of the targets in whose boxes the maximum of their map lies."""
    hits = [hit(one, target.boxes) for one, target in zip(maps, targets, strict=True)]
    return 100 * sum(hits) / len(hits)


def hit(activation: Float[Tensor, "size size"], boxes: Float[Tensor, "boxes 4"]) -> bool:
    """Is the maximum in a box? That of a map scaled up bilinearly is the centre of its highest cell; taken from the
    pixels, it would slip to the corner of the flat rim that scaling up gives to an outer cell.

    >>> hit(torch.tensor([[0.1, 0.9], [0.2, 0.3]]), torch.tensor([[0.5, 0.0, 1.0, 0.5]]))
    True
    """
    return bool(covered(boxes, len(activation)).flatten()[activation.argmax()])


def _draw_maps(
    images: LabelledImages, targets: list[Target], titles: list[str], maps: list[Float[Tensor, "targets size size"]]
) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(2 * len(titles), 0.8 + 2 * len(targets)), layout="constrained")
    grid = figure.subplots(len(targets), len(titles), squeeze=False)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=11)
    for i, (target, line) in enumerate(zip(targets, grid, strict=True)):
        line[0].set_ylabel(f"class “{images.class_names[target.column]}”", fontsize=11)
        pixels = images.pixels(target.row).permute(1, 2, 0).numpy()
        for axes, found in zip(line, [None, *maps], strict=True):
            axes.set(xticks=[], yticks=[])
            axes.imshow(pixels, extent=(0, 1, 1, 0))
            for x0, y0, x1, y1 in target.boxes.tolist():
                axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white", linewidth=1.5))
            if found is not None:
                _draw_activation(axes, found[i], target.boxes)
            axes.set_aspect(
                pixels.shape[0] / pixels.shape[1]
            )  # a share of the height is another length than of the width
    figure.suptitle("Class activation maps, bright is high; ○ the maximum is in a box of the class, × it is not")
    return figure


def _draw_activation(axes: Axes, activation: Float[Tensor, "size size"], boxes: Float[Tensor, "boxes 4"]) -> None:
    size = len(activation)
    axes.imshow(activation.numpy(), cmap="inferno", alpha=0.6, extent=(0, 1, 1, 0), interpolation="bilinear")
    y, x = divmod(int(activation.argmax()), size)
    marker, place = "o" if hit(activation, boxes) else "x", ((x + 0.5) / size, (y + 0.5) / size)
    axes.plot(*place, marker, color="white", markersize=9, markeredgewidth=2, fillstyle="none")


# --------------------------------------------------------------------------------------------------------- evolution


SCHEMES = {"ll_r": "left out", "ll_ct": "positive", "ll_cp": "positive, for good"}  # what becomes of large losses

State = Bool[Tensor, "images classes"]


def evolution(study: Study) -> Finding:
    from mls.eval.supervised import prepare

    kind = training_kinds(study)
    train = prepare(study.load("ll_cp").data).train
    histories, rows, numbers = {}, [], {}
    for loss, what in SCHEMES.items():
        modified = histories[loss] = modified_labels(study, loss)
        for epoch, now in enumerate(modified, 1):
            new = now & ~modified[epoch - 2] if epoch > 1 else now
            precision, recall = quality(now & (train.truth != 0), kind.missed)
            counts = [str(int(new.sum())), str(int(now.sum()))]
            shares = ["" if math.isnan(precision) else f"{precision:.1f}", f"{recall:.1f}"]
            rows.append([f"{loss}: {what}", str(epoch), *counts, *shares])
            numbers |= {f"{loss}/precision/epoch{epoch}": precision, f"{loss}/recall/epoch{epoch}": recall}
    changes = sum(one[-1].sum(1) for one in histories.values())
    assert isinstance(changes, Tensor)
    shown = changes.argsort(descending=True, stable=True)[:SHOWN].tolist()
    header = ["scheme", "epoch", "new", "modified", "precision (%)", "recall (%)"]
    summary = (
        "Unannotated labels whose loss was large, as each epoch's steps treated them: LL-R leaves them out, LL-Ct takes"
        " them for positive in that step, LL-Cp for good. Precision: the share that is true; recall: the share of the "
        f"unannotated positives. Drawn are the training images with the most of them, with the {MOST_WRONG} wrong "
        "labels that were there most often. The first epoch is plain AN."
    )
    return Finding(_draw_histories(train, kind.annotated, histories, shown), header, rows, summary, numbers)


def modified_labels(study: Study, loss: str) -> list[State]:
    """After each epoch: which labels its steps left out or took for positive, or which are positive for good."""
    from mls.eval.supervised import prepare

    states: list[State] = []
    begun: list[State] = []  # of the epoch that is going on

    def look(module: Any, inputs: tuple[Tensor, ...]) -> None:
        outputs, labels, _, index = inputs
        begun[-1][index.cpu()] = module.large(module.scaled(outputs.detach()), labels).cpu()

    def after_epoch(now: Training) -> None:
        annotated = prepared.observed > 0
        states.append((now.observed > 0) & ~annotated if now.loss.relabels == "step" else begun[-1])
        begun.append(torch.zeros_like(annotated))
        if len(states) == 1:  # the first epoch modifies nothing
            now.loss.register_forward_pre_hook(look)

    prepared = prepare(study.load(loss).data)
    begun.append(torch.zeros_like(prepared.observed > 0))
    study.watched(after_epoch, loss, *WHOLE)
    return states


def quality(added: Bool[Tensor, "images classes"], missed: Bool[Tensor, "images classes"]) -> tuple[float, float]:
    """Precision (NaN where nothing was added) and recall, in per cent, of labels made positive; `missed` should be.

    >>> quality(torch.tensor([[True, True, False, False]]), torch.tensor([[True, False, False, True]]))
    (50.0, 50.0)
    """
    right = float((added & missed).sum())
    return 100 * right / (float(added.sum()) or math.nan), 100 * right / float(missed.sum())


def _draw_histories(
    images: LabelledImages, annotated: State, histories: dict[str, list[State]], shown: list[int]
) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    epochs = len(next(iter(histories.values())))
    wide = 0.9 + 0.28 * epochs
    columns = {row: _drawn_columns(images.truth[row], histories, row) for row in shown}
    heights = [max(1.5, 0.5 + 0.2 * len(columns[row])) for row in shown]
    figure = Figure(figsize=(2.2 + wide * len(histories), 1.2 + sum(heights)), layout="constrained")
    ratios = {"width_ratios": [2.0, *[wide] * len(histories)], "height_ratios": heights}
    grid = figure.subplots(len(shown), 1 + len(histories), squeeze=False, gridspec_kw=ratios)
    for row, (left, *rest) in zip(shown, grid, strict=True):
        left.imshow(images.pixels(row).permute(1, 2, 0).numpy())
        left.set_axis_off()
        truth, given = images.truth[row] > 0, annotated[row]
        for axes, states in zip(rest, histories.values(), strict=True):
            _draw_history(axes, given, [one[row] for one in states], truth, columns[row], images.class_names)
            if axes is not rest[0]:
                axes.tick_params(labelleft=False)
    for axes, (loss, what) in zip(grid[0][1:], SCHEMES.items(), strict=True):
        axes.set_title(f"{loss}: {what}", fontsize=10)
    for axes in grid[-1][1:]:
        axes.set_xlabel("epoch")
    handles = [
        Line2D([], [], marker="s", linestyle="", markersize=9, color=colour, label=label, markerfacecolor=face)
        for label, colour, face in (
            ("annotated", GIVEN, GIVEN),
            ("large loss, and there", POSITIVE, POSITIVE),
            ("large loss, and not in the truth", WRONG, WRONG),
            ("truth", GIVEN, "none"),
        )
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("Labels whose loss was large: given → each epoch → truth")
    return figure


def _drawn_columns(truth: Tensor, histories: dict[str, list[State]], row: int) -> list[int]:
    """The classes that are there, and of those that are not the ones that were modified most often."""
    often = torch.stack([one[row].long() for states in histories.values() for one in states]).sum(0)
    wrong = often.masked_fill(truth > 0, 0)
    order = wrong.argsort(descending=True, stable=True)[:MOST_WRONG]
    return sorted([*(truth > 0).nonzero()[:, 0].tolist(), *order[wrong[order] > 0].tolist()])


def _draw_history(
    axes: Axes,
    given: Bool[Tensor, "classes"],
    states: Sequence[Bool[Tensor, "classes"]],
    truth: Bool[Tensor, "classes"],
    columns: Sequence[int],
    names: Sequence[str],
) -> None:
    end = len(states) + 1
    for place, column in enumerate(columns):
        colour = GIVEN if given[column] else POSITIVE if truth[column] else WRONG
        marked = [epoch for epoch in range(end) if given[column] or (epoch and states[epoch - 1][column])]
        axes.plot(marked, [place] * len(marked), "s", color=colour, markersize=8)
        if truth[column]:
            axes.plot(end, place, "s", color=GIVEN, markersize=8, fillstyle="none", markeredgewidth=1.5)
    axes.set_xticks(range(end + 1), ["given", *map(str, range(1, end)), "truth"], fontsize=8)
    for label in (axes.get_xticklabels()[0], axes.get_xticklabels()[-1]):
        label.set_rotation(40)
    axes.set_yticks(range(len(columns)), [str(names[column]) for column in columns], fontsize=9)
    axes.set_xlim(-0.6, end + 0.6)
    axes.set_ylim(len(columns) - 0.4, -0.6)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


ANALYSES = {"memorisation": memorisation, "cam": cam, "evolution": evolution}
