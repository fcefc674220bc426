"""What the paper on hyperspherical margins shows (HML, ECCV 2022): correlation of the label embeddings, fixed and
adaptive margins with the gradients they give, top-5 predictions. The loss is in mls/core/losses, the cosine
head in eval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Num
from torch import Tensor

from mls.tools.analyses import Finding, Study
from mls.tools.analyses.regimes import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mls.eval.data import LabelledImages

# -------------------------------------------------------------------------------------------------------- correlation

STRONGEST = 10
MOST_NAMES = 40  # of classes beside a heat map; more cannot be read


def correlation(study: Study) -> Finding:
    """Which labels the classifier puts near each other, beside which labels do occur together."""
    from scipy.stats import spearmanr

    from mls.eval.supervised import prepare

    training = study.trained("hml")
    train = prepare(training.protocol.data).train
    weight = cast(Tensor, training.classifier.head.weight)
    embeddings = F.normalize(weight.detach().double().cpu())
    learnt, true = embeddings @ embeddings.T, phi(train.truth)
    one, other = torch.triu_indices(len(learnt), len(learnt), offset=1)
    cosines, phis = learnt[one, other], true[one, other]
    known = ~phis.isnan()
    agreement = float(cast(Any, spearmanr(cosines[known], phis[known])).statistic)
    rows = []
    for pair in cosines.argsort(descending=True)[:STRONGEST].tolist():
        names = f"{train.class_names[int(one[pair])]} and {train.class_names[int(other[pair])]}"
        rows.append([names, f"{cosines[pair]:.3f}", f"{phis[pair]:.3f}"])
    summary = (
        f"Spearman's correlation between the two, over all pairs of classes: {agreement:.3f}. The paper finds that "
        "labels which occur together get embeddings that lie close together."
    )
    labels = training.protocol.data.labels.replace("_", " ")
    figure = _correlation_figure(learnt, true, train.class_names, f"HML, labels: {labels}")
    header = ["closest label embeddings", "cosine", "phi of the true labels"]
    return Finding(figure, header, rows, summary, {"spearman": agreement})


def _correlation_figure(learnt: Tensor, true: Tensor, names: Sequence[str], source: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    order = neighbouring(learnt)
    figure = Figure(figsize=(13.5, 6), layout=ConstrainedLayoutEngine(w_pad=0.15))
    titles = ("Label embeddings: cosine", "True labels of the training images: phi coefficient")
    for axes, values, title in zip(figure.subplots(1, 2), (learnt, true), titles, strict=True):
        image = values[order][:, order].fill_diagonal_(torch.nan)  # always 1: it would pale all others
        reach = float(image.nan_to_num().abs().max()) or 1.0
        drawn = axes.imshow(image.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach)
        axes.set(title=title, xlabel="class", ylabel="class", facecolor="#DDDDDD")
        if len(names) <= MOST_NAMES:
            shown = [names[column] for column in order.tolist()]
            axes.set_xticks(range(len(shown)), shown, rotation=90 if max(map(len, shown)) > 3 else 0)
            axes.set_yticks(range(len(shown)), shown)
        figure.colorbar(drawn, ax=axes, shrink=0.8)
    figure.suptitle(f"Label correlation as learnt ({source}) and as it is; classes in the same order")
    return figure


def phi(truth: Num[Tensor, "images classes"]) -> Float[Tensor, "classes classes"]:
    """The correlation of each two classes' presence, over the images where both are annotated; NaN where one of them
    is always there or never.

    >>> phi(torch.tensor([[1, -1], [-1, 1]])).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    present, absent = (truth > 0).double(), (truth < 0).double()
    both, neither = present.T @ present, absent.T @ absent
    only_row, only_column = present.T @ absent, absent.T @ present
    margins = (both + only_row) * (only_column + neither) * (both + only_column) * (only_row + neither)
    return (both * neither - only_row * only_column) / margins.sqrt()


def neighbouring(similarity: Float[Tensor, "classes classes"]) -> Int64[Tensor, "classes"]:
    """Spectral order: similar classes beside each other (the Fiedler vector of the graph of similarities)."""
    weights = (similarity + 1) / 2
    scaling = weights.sum(1).rsqrt()
    _, vectors = torch.linalg.eigh(torch.eye(len(weights)).to(weights) - scaling[:, None] * weights * scaling)
    return (vectors[:, 1] * scaling).argsort()


# ------------------------------------------------------------------------------------------------------------ margins

FIXED = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0, 1.3, math.pi / 2)
STEPS = [n / 60 * math.pi / 2 for n in range(61)]  # margins of the gradient curves
GRADIENTS = {  # whose, and how it is drawn
    "positives": ("#0072B2", "-"),
    "negatives": ("#E69F00", "-"),
    "of which false negatives": ("#D55E00", "--"),
}


def margins(study: Study) -> Finding:
    """mAP with fixed margins and with the adaptive one, and what gradient a margin gives to whom."""
    from mls.eval.supervised import prepare, test

    metric, found = study.load("hml").metric, {}
    for margin in FIXED:
        fixed = f"training.options={{margin: {margin}, learn: false, adaptive: false}}"
        found[margin] = 100 * test(study.trained("hml", fixed))[metric]
    training = study.trained("hml")
    adaptive = 100 * test(training)[metric]
    margin, scale = (training.loss.state_dict()[name].item() for name in ("margin", "scale"))
    learnt = min(max(margin, 0.0), math.pi / 2)  # where it acts
    with torch.no_grad():
        cosines = training.classifier.head(training.features().to(training.device)).cpu()
    truth = prepare(training.protocol.data).train.truth
    totals = lambda margin: total_gradients(cosines, training.observed, truth, margin, scale)
    rows = []
    for margin, value in (*found.items(), (learnt, adaptive)):
        name = f"{margin:g}, fixed" if len(rows) < len(found) else f"{margin:.3f}, adaptive (scale {scale:.1f})"
        rows.append([name, f"{value:.2f}", *(f"{total:.3f}" for total in totals(margin).values())])
    summary = (
        "Gradients are sums over an image's labels in the mean over the training images, at the adaptive classifier's "
        "cosines and scale. A larger margin gives positives more and negatives, false ones included, less; the paper "
        "finds that no fixed margin is the best everywhere, and that the adaptive one needs no search."
    )
    figure = _margin_figure(found, adaptive, learnt, {step: totals(step) for step in STEPS}, f"test {metric}, %")
    figure.suptitle(f"Hyperspherical margins, {training.protocol.recipe}")
    header = ["margin", f"test {metric}, %", *(f"gradient: {who}" for who in GRADIENTS)]
    numbers = {f"fixed/{m:g}": v for m, v in found.items()} | {"adaptive": adaptive, "margin": learnt, "scale": scale}
    return Finding(figure, header, rows, summary, numbers)


def total_gradients(
    cosines: Float[Tensor, "images classes"],
    observed: Num[Tensor, "images classes"],
    truth: Num[Tensor, "images classes"],
    margin: float,
    scale: float,
) -> dict[str, float]:
    """The size of BCE's gradients on the logits of an image's labels, summed, in the mean over the images: 1 - p of
    each positive, p of each label taken for negative, and of those among them which are positives in truth.

    >>> flat = torch.zeros(1, 3)  # probabilities of one half
    >>> total_gradients(flat, torch.tensor([[1, 0, 0]]), torch.tensor([[1, 1, -1]]), margin=0.0, scale=20.0)
    {'positives': 0.5, 'negatives': 1.0, 'of which false negatives': 0.5}
    """
    from mls.core import losses

    loss = losses.build("hml", scale=scale, margin=margin, learn=False, adaptive=False)
    assert isinstance(loss, losses.Loss)
    p, positive = loss.predict(cosines), observed > 0
    parts = ((1 - p) * positive, p * ~positive, p * (~positive & (truth > 0)))
    return {who: float(part.sum(1).mean()) for who, part in zip(GRADIENTS, parts, strict=True)}


def _margin_figure(
    found: Mapping[float, float], adaptive: float, learnt: float, curves: Mapping[float, dict[str, float]], unit: str
) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(13, 5), layout=ConstrainedLayoutEngine(w_pad=0.12))
    left, right = figure.subplots(1, 2)
    left.plot(list(found), list(found.values()), "o-", color="#777777", markersize=7, label="fixed")
    left.axhline(adaptive, color=COLOURS["hml"], linestyle="--", linewidth=1.2)
    left.plot(learnt, adaptive, "*", color=COLOURS["hml"], markersize=18, label=f"adaptive, ends at {learnt:.2f}")
    left.set(title="Metric over the margin", xlabel="margin, radians", ylabel=unit)
    left.legend(frameon=False, title="margin")
    for who, (colour, style) in GRADIENTS.items():
        right.plot(list(curves), [sums[who] for sums in curves.values()], style, color=colour, linewidth=2, label=who)
    right.axvline(learnt, color=COLOURS["hml"], linewidth=1.2, linestyle="--", label="learnt margin")
    right.set(title="Gradient over the margin", xlabel="margin, radians", ylabel="total gradient of an image's labels")
    right.legend(frameon=False)
    return figure


# --------------------------------------------------------------------------------------------------------------- top5

BEST = 5
SHOWN = 8  # images
MARKS = {1: ("✓", "#009E73", "right"), -1: ("✗", "#D55E00", "wrong"), 0: ("?", "#F0E442", "not annotated")}


def top5(study: Study) -> Finding:
    """The most probable classes of test images under AN (BCE) and HML, where the two differ most."""
    from mls.eval.supervised import prepare

    test = prepare(study.load("an").data).test
    scores = {loss: study.trained(loss).scores(test) for loss in ("an", "hml")}
    shares = {loss: verdicts(values, test.truth) for loss, values in scores.items()}
    rows = [[loss, *(f"{100 * share:.1f}" for share in found.values())] for loss, found in shares.items()]
    numbers = {f"{loss}/{name}": share for loss, found in shares.items() for name, share in found.items()}
    summary = (
        f"The {BEST} most probable classes of every test image; the picture shows images where the two differ most, so "
        "it is no measure of either. The paper shows HML with fewer wrong labels above the right ones, and with labels "
        "that are there but not annotated."
    )
    header = ["loss", *(f"{name}, %" for name in shares["an"])]
    figure = _sheet(test, scores, most_different(*scores.values())[:SHOWN])
    return Finding(figure, header, rows, summary, numbers)


def verdicts(scores: Float[Tensor, "images classes"], truth: Num[Tensor, "images classes"]) -> dict[str, float]:
    """Of the most probable classes, the shares that are right, wrong and not annotated; of the images, that whose first
    class is right; of the positives, that which is among them.

    >>> verdicts(torch.tensor([[0.9, 0.1, 0.2]]), torch.tensor([[1, -1, 0]]))["not annotated"]
    0.3333333333333333
    """
    best = truth.gather(1, scores.topk(min(BEST, scores.shape[1])).indices)
    shares = {name: float((best == verdict).double().mean()) for verdict, (_, _, name) in MARKS.items()}
    found = float((best > 0).sum() / (truth > 0).sum())
    return {**shares, "first one right": float((best[:, 0] > 0).double().mean()), "positives found": found}


def most_different(
    first: Float[Tensor, "images classes"], second: Float[Tensor, "images classes"]
) -> Int64[Tensor, "images"]:
    """The images, those first whose most probable classes have least in common; ties by how far the scores differ.

    >>> one, other = torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([[0.8, 0.1], [0.1, 0.9]])
    >>> most_different(one, other)
    tensor([1, 0])
    """
    count = min(BEST, first.shape[1])
    chosen = [torch.zeros_like(s).scatter(1, s.topk(count).indices, 1.0) for s in (first, second)]
    common = (chosen[0] * chosen[1]).sum(1)
    distance = (first - second).abs().sum(1) / first.shape[1]  # below 1, so it settles ties alone
    return (common - distance).argsort(stable=True)


def _sheet(test: LabelledImages, scores: dict[str, Tensor], rows: Int64[Tensor, "shown"]) -> Figure:
    """Two images a line, each with a bar chart for each loss."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines = -(-len(rows) // 2)
    figure = Figure(figsize=(15, 2.1 * lines + 0.9), layout="constrained")
    cells = figure.subplots(lines, 6, squeeze=False, width_ratios=[1, 1.25, 1.25] * 2).reshape(-1, 3)
    for row, (picture, *charts) in zip(rows.tolist(), cells, strict=False):
        picture.imshow(test.pixels(row).permute(1, 2, 0).numpy())
        present = [name for name, truth in zip(test.class_names, test.truth[row].tolist(), strict=True) if truth > 0]
        picture.set_title(f"present: {', '.join(present) or 'none'}", fontsize=10)
        picture.axis("off")
        for axes, (loss, values) in zip(charts, scores.items(), strict=True):
            _bars(axes, loss, values[row], test.truth[row], test.class_names)
    for axes in cells[len(rows) :].flat:
        axes.axis("off")
    legend = [Patch(color=colour, label=f"{mark}  {name}") for mark, colour, name in MARKS.values()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.suptitle(f"The {BEST} most probable classes of test images, where AN and HML differ most")
    return figure


def _bars(axes: Axes, title: str, scores: Tensor, truth: Tensor, names: Sequence[str]) -> None:
    values, columns = scores.topk(min(BEST, len(scores)))
    looks = [MARKS[int(truth[column])] for column in columns.tolist()]
    bars = axes.barh(range(len(values)), values.tolist(), color=[colour for _, colour, _ in looks])
    axes.bar_label(bars, [f"{value:.2f} {mark}" for value, (mark, _, _) in zip(values, looks, strict=True)], padding=2)
    axes.set_yticks(range(len(values)), [str(names[column]) for column in columns.tolist()])
    axes.set(xlim=(0, 1.3), xticks=[0, 0.5, 1], title=title)
    axes.set_xlabel("probability", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.title.set_fontsize(10)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


ANALYSES = {"correlation": correlation, "margins": margins, "top5": top5}
