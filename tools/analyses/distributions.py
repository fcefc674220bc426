"""What the paper on entropy maximisation (https://arxiv.org/abs/2203.16219) shows of labels and predictions: `scores`
of what is not annotated, `losscurve` of what is, `classwise` gains, `imbalance` of what is not annotated, `examples` of
predictions. Its gradients and its loss landscape are in regimes.py and landscape.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int8
from torch import Tensor

from mls.errors import DataError
from mls.tools.analyses import Finding, Study
from mls.tools.analyses.hyperspherical import BEST, Example, marked, most_different, sheet, verdicts
from mls.tools.analyses.regimes import COLOURS, apl_in_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mls.eval.training import Training

POSITIVE, NEGATIVE = "#0072B2", "#E69F00"
WHOLE = ("training.patience=null", "training.drop=null")  # curves over the epochs: none ends early
MOST_BARS = 30  # classes drawn from each end of the order
BINS = 25
EXAMPLES = 4  # images of each part


@dataclass(frozen=True)
class Kinds:
    """The labels of the training images, by what is true and what training sees. Unknown truth is none of them."""

    annotated: Bool[Tensor, "images classes"]  # present, and training sees it
    missed: Bool[Tensor, "images classes"]  # present, but not annotated: AN's false negatives
    absent: Bool[Tensor, "images classes"]
    absent_unseen: Bool[Tensor, "images classes"]  # absent and not annotated


def kinds(truth: Int8[Tensor, "images classes"], observed: Int8[Tensor, "images classes"]) -> Kinds:
    """
    >>> found = kinds(torch.tensor([[1, 1, -1]], dtype=torch.int8), torch.tensor([[1, 0, 0]], dtype=torch.int8))
    >>> found.missed.tolist()
    [[False, True, False]]
    """
    unseen = observed == 0
    found = Kinds(observed > 0, (truth > 0) & unseen, truth < 0, (truth < 0) & unseen)
    if not found.missed.any() or not found.absent_unseen.any():
        raise DataError(
            "this analysis is about labels that training does not see, and it sees all positives or all negatives: "
            "use data.labels=single_positive"
        )
    return found


def training_kinds(study: Study) -> Kinds:
    from mls.eval.supervised import prepare

    prepared = prepare(study.load("an").data)
    return kinds(prepared.train.truth, prepared.observed)


# ---------------------------------------------------------------------------------------------------------- analyses


def scores(study: Study) -> Finding:
    from scipy.stats import wasserstein_distance

    from mls.eval.supervised import prepare

    kind = training_kinds(study)
    column = int((kind.missed.sum(0) * kind.absent_unseen.any(0)).argmax())
    name = prepare(study.load("an").data).train.class_names[column]
    figure, grid = panels(rows=2, columns=3)
    rows, numbers = [], {}
    for i, loss in enumerate(("an", "em", "em_apl")):
        found = study.trained(loss, *apl_in_time(study, loss)).scores()
        one, distances = slice(column, column + 1), []
        for part, axes, title in ((one, grid[0][i], f"class “{name}”"), (slice(None), grid[1][i], "all classes")):
            positives = found[:, part][kind.missed[:, part]].numpy()
            negatives = found[:, part][kind.absent_unseen[:, part]].numpy()
            distances.append(wasserstein_distance(positives, negatives))
            _histogram(axes, positives, negatives)
            axes.set_title(f"{loss}, {title}: distance {distances[-1]:.3f}", fontsize=10)
        means = [float(found[mask].mean()) for mask in (kind.missed, kind.absent_unseen)]
        rows.append([loss, *(f"{value:.3f}" for value in (*distances, *means))])
        numbers |= {f"{loss}/class": distances[0], f"{loss}/all": distances[1]}
    for row in grid:
        row[0].set_ylabel("share of labels (%)")
    for axes in grid[1]:
        axes.set_xlabel("predicted probability")
    grid[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle("Can the model tell unannotated positives from unannotated negatives? (training images)")
    header = ["loss", f"distance, class {name}", "distance, all", "mean of positives", "mean of negatives"]
    summary = (
        "Wasserstein distance between the probabilities of unannotated positives and unannotated negatives: the "
        f"larger, the better both are told apart. Class {name} has the most unannotated positives. The paper finds "
        "larger distances with EM than with AN."
    )
    return Finding(figure, header, rows, summary, numbers)


def losscurve(study: Study) -> Finding:
    from matplotlib.ticker import MaxNLocator

    kind = training_kinds(study)
    curves: dict[str, list[float]] = {"an": [], "em": []}
    for loss, curve in curves.items():
        study.watched(lambda now, curve=curve: curve.append(annotated_loss(now, kind.annotated)), loss, *WHOLE)
    figure, [[axes]] = panels(rows=1, columns=1, width=6.4, height=4)
    for loss, curve in curves.items():
        epochs = range(1, len(curve) + 1)
        axes.plot(epochs, curve, color=COLOURS[loss], marker="o", markersize=4, label=loss)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="mean −log p of annotated labels", title="Loss of the annotated (positive) labels")
    axes.legend(frameon=False)
    rows = [
        [str(epoch), *(f"{value:.3f}" for value in values)]
        for epoch, values in enumerate(zip(*curves.values(), strict=True), 1)
    ]
    summary = (
        "The loss of the annotated labels after each epoch, on the training images without augmentation. The paper's "
        "EM learns from annotated labels first, so its curve lies below AN's."
    )
    numbers = {f"{loss}/epoch{i}": value for loss, curve in curves.items() for i, value in enumerate(curve, 1)}
    return Finding(figure, ["epoch", *curves], rows, summary, numbers)


def classwise(study: Study) -> Finding:
    from mls.eval.supervised import prepare

    test = prepare(study.load("an").data).test
    precision = {loss: class_precision(study, loss) for loss in ("an", "em", "em_apl")}
    met = (test.truth > 0).any(0).nonzero()[:, 0]  # a class without positives has no average precision
    gains = {loss: precision[loss] - precision["an"] for loss in ("em", "em_apl")}
    order: list[int] = met[gains["em_apl"][met].argsort(descending=True, stable=True)].tolist()
    drawn = order if len(order) <= 2 * MOST_BARS else [*order[:MOST_BARS], *order[-MOST_BARS:]]
    figure, [[axes]] = panels(rows=1, columns=1, width=6.4, height=1.4 + 0.32 * len(drawn))
    for loss, shift in (("em", -0.2), ("em_apl", 0.2)):
        places = [place + shift for place in range(len(drawn))]
        axes.barh(places, gains[loss][drawn].tolist(), 0.38, color=COLOURS[loss], label=loss)
    axes.set_yticks(range(len(drawn)), [test.class_names[column] for column in drawn])
    axes.set_ylim(len(drawn) - 0.4, -0.6)  # the largest gain on top
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(False, axis="y")
    title = "Gain of each class over AN"
    axes.set_title(title if drawn == order else f"{title}: the {MOST_BARS} largest and the {MOST_BARS} smallest")
    axes.set(xlabel="average precision over AN's (points)", ylabel="class")
    axes.legend(frameon=False)
    columns = [precision["an"], precision["em"], precision["em_apl"], gains["em"], gains["em_apl"]]
    rows = [
        [test.class_names[column], *(f"{value[column]:.1f}" for value in columns[:3])]
        + [f"{value[column]:+.1f}" for value in columns[3:]]
        for column in order
    ]
    better = {loss: sum(bool(gains[loss][column] > 0) for column in order) for loss in gains}
    summary = (
        f"Average precision of each class on the test images, in per cent. EM is above AN in {better['em']} of "
        f"{len(order)} classes, EM with APL in {better['em_apl']}."
    )
    numbers = {f"{loss}/{test.class_names[column]}": float(gains[loss][column]) for loss in gains for column in order}
    return Finding(figure, ["class", "an", "em", "em_apl", "em − an", "em_apl − an"], rows, summary, numbers)


BENCHMARKS = ("spml_voc2012", "spml_coco2014", "spml_nuswide", "spml_cub")  # the paper's


def imbalance(study: Study) -> Finding:
    """How many of the unannotated labels are positive: in each data set that is there, and class by class."""
    from mls.eval import load_protocol
    from mls.eval.supervised import prepare

    kind, data = training_kinds(study), study.load("an").data
    names = prepare(data).train.class_names
    found = {data.name: kind}
    for protocol in BENCHMARKS:
        other = load_protocol(protocol).data
        if other.name not in found:
            try:
                prepared = prepare(other)
            except DataError:
                continue  # the paper's data sets are shown beside as far as they are there
            found[other.name] = kinds(prepared.train.truth, prepared.observed)
    shares = {
        name: 100 * float(one.missed.sum() / (one.missed.sum() + one.absent_unseen.sum()))
        for name, one in found.items()
    }
    missed, absent = kind.missed.sum(0), kind.absent_unseen.sum(0)
    of_class = 100 * missed / (missed + absent).clamp(min=1)
    order: list[int] = of_class.argsort(descending=True, stable=True).tolist()
    drawn = order if len(order) <= 2 * MOST_BARS else [*order[:MOST_BARS], *order[-MOST_BARS:]]
    title = (
        f"Each class of {data.name}" if drawn == order else f"{data.name}: the {MOST_BARS} highest and lowest classes"
    )
    figure = _imbalance_figure(shares, title, [str(names[i]) for i in drawn], of_class[drawn].tolist())
    rows = [
        [f"{name}, all classes", *_counts(one.missed.sum(), one.absent_unseen.sum())] for name, one in found.items()
    ]
    rows += [[str(names[i]), *_counts(missed[i], absent[i])] for i in order]
    summary = (
        "Of the labels that the training does not see, how many are positive in truth. For this imbalance the paper "
        "makes pseudo-labels for negatives alone (APL)."
    )
    numbers = {f"{name}/positive": share for name, share in shares.items()}
    return Finding(figure, ["unannotated labels of", "positive", "negative", "positive, %"], rows, summary, numbers)


def _counts(positive: Tensor, negative: Tensor) -> list[str]:
    share = 100 * float(positive) / max(1.0, float(positive + negative))
    return [f"{int(positive)}", f"{int(negative)}", f"{share:.1f}"]


def _imbalance_figure(shares: dict[str, float], title: str, classes: list[str], values: list[float]) -> Figure:
    figure, [[left, right]] = panels(rows=1, columns=2, height=max(4, 1.4 + 0.22 * len(classes)), shared=False)
    for axes, labels, positive in ((left, list(shares), list(shares.values())), (right, classes, values)):
        places = range(len(labels))
        axes.barh(places, positive, 0.7, color=POSITIVE, label="positive")
        axes.barh(places, [100 - value for value in positive], 0.7, left=positive, color=NEGATIVE, label="negative")
        axes.set_yticks(places, labels, fontsize=10 if len(labels) <= 20 else 8)
        bars = max(len(shares), len(classes))  # as thick on both sides
        axes.set(xlim=(0, 100), ylim=(bars - 0.4, -0.6), xlabel="unannotated labels (%)")
        axes.grid(False, axis="y")
        for place, value in zip(places, positive, strict=True):
            axes.annotate(f"{value:.1f} %", (max(value, 1) + 1, place), va="center", fontsize=9)
    left.set_title("All classes")
    right.set_title(title)
    handles = left.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Unannotated labels: few are positive")
    return figure


def examples(study: Study) -> Finding:
    """The paper's qualitative results: predictions for training and test images under AN, EM and EM with APL."""
    from mls.eval.supervised import prepare

    prepared = prepare(study.load("an").data)
    trained = {loss: study.trained(loss, *apl_in_time(study, loss)) for loss in ("an", "em", "em_apl")}
    marks = {"training": marked(prepared.train.truth, prepared.observed), "test": prepared.test.truth}
    rows, numbers, shown = [], {}, []
    for part, images in (("training", prepared.train), ("test", prepared.test)):
        scores = {loss: one.scores(images) for loss, one in trained.items()}
        chosen = most_different(scores["an"], scores["em_apl"])[:EXAMPLES]
        shown += [Example(part, images, int(row), scores, marks[part]) for row in chosen]
        for loss, values in scores.items():
            found = verdicts(values, marks[part])
            rows.append([f"{loss}, {part} images", *(f"{100 * share:.1f}" for share in found.values())])
            numbers |= {f"{loss}/{part}/{name}": share for name, share in found.items()}
    header = ["loss", *(f"{name}, %" for name in found)]
    summary = (
        f"The {BEST} most probable classes of every image; the picture shows images where AN and EM with APL differ "
        "most, so it is no measure of either. Yellow: there, but not annotated. The paper's qualitative results are "
        "such pictures, without numbers."
    )
    title = "The most probable classes, where AN and EM with APL differ most"
    return Finding(sheet(shown, title), header, rows, summary, numbers)


# ------------------------------------------------------------------------------------------------------------- parts


def annotated_loss(training: Training, annotated: Bool[Tensor, "images classes"]) -> float:
    """Mean −log p of the annotated positives."""
    probabilities = training.scores()[annotated].double()
    return float(F.binary_cross_entropy(probabilities, torch.ones_like(probabilities)))


def class_precision(study: Study, loss: str) -> Float64[Tensor, "classes"]:
    """The test's average precision of each class, in per cent."""
    from mls.eval.supervised import prepare
    from mls.frozen.metrics import average_precision

    training = study.trained(loss, *apl_in_time(study, loss))
    test = prepare(training.protocol.data).test
    return 100 * average_precision(training.scores(test), test.truth, known=test.truth != 0)


def _histogram(axes: Axes, positives: Float[np.ndarray, "some"], negatives: Float[np.ndarray, "others"]) -> None:
    edges = [i / BINS for i in range(BINS + 1)]
    for values, colour, label in ((negatives, NEGATIVE, "negatives"), (positives, POSITIVE, "positives")):
        share = [100 / len(values)] * len(values)
        axes.hist(values, edges, weights=share, color=colour, alpha=0.3)
        label = f"unannotated {label}"
        axes.hist(values, edges, weights=share, color=colour, histtype="step", linewidth=1.5, label=label)


def panels(
    rows: int, columns: int, width: float = 10.5, height: float = 6, shared: bool = True
) -> tuple[Figure, list[list[Axes]]]:
    """An empty figure of so many inches; its panels are on the same scales where `shared`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, grid.tolist()


ANALYSES = {
    "scores": scores,
    "losscurve": losscurve,
    "classwise": classwise,
    "imbalance": imbalance,
    "examples": examples,
}
