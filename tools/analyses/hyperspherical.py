"""What the paper on hyperspherical margins shows (HML, ECCV 2022): correlation of the label embeddings, fixed and
adaptive margins with the gradients they give, top-5 predictions. The loss is in mls/core/losses, the cosine
head in eval."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
MANY = 40  # classes: of more, the figure grows so that names can be read when it is enlarged
INCH = 0.085  # of a name beside a heat map of many classes


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
    count = STRONGEST if len(learnt) <= MANY else 3 * STRONGEST
    for pair in cosines.argsort(descending=True)[:count].tolist():
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

    order, ends = clustered(learnt)
    many = len(names) > MANY
    side = max(6.0, INCH * len(names) + 1.5)
    figure = Figure(figsize=(2 * side + 1.5, side), layout=ConstrainedLayoutEngine(w_pad=0.15))
    titles = ("Label embeddings: cosine", "True labels of the training images: phi coefficient")
    for axes, values, title in zip(figure.subplots(1, 2), (learnt, true), titles, strict=True):
        image = values[order][:, order].fill_diagonal_(torch.nan)  # always 1: it would pale all others
        reach = float(image.nan_to_num().abs().max()) or 1.0
        drawn = axes.imshow(image.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach)
        axes.set(title=title, xlabel="class", ylabel="class", facecolor="#DDDDDD")
        shown = [str(names[column]) for column in order.tolist()]
        small = {"fontsize": 5} if many else {}
        axes.set_xticks(range(len(shown)), shown, rotation=90 if max(map(len, shown)) > 3 else 0, **small)
        axes.set_yticks(range(len(shown)), shown, **small)
        for end in ends if many else ():
            axes.axhline(end - 0.5, color="black", linewidth=0.5)
            axes.axvline(end - 0.5, color="black", linewidth=0.5)
        figure.colorbar(drawn, ax=axes, shrink=0.8)
    lines = "; lines part the clusters" if many else ""
    figure.suptitle(f"Label correlation as learnt ({source}) and as it is; classes in the same order{lines}")
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


def clustered(similarity: Float[Tensor, "classes classes"]) -> tuple[Int64[Tensor, "classes"], list[int]]:
    """An order with similar classes beside each other (average linkage, its leaves ordered), and where its clusters
    end: about as many as the square root of the classes."""
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = (1 - similarity).clamp(min=0).fill_diagonal_(0)
    tree = linkage(squareform((distance + distance.T).numpy() / 2, checks=False), "average", optimal_ordering=True)
    order = torch.from_numpy(leaves_list(tree).astype("int64"))
    members = torch.from_numpy(fcluster(tree, max(2, round(len(similarity) ** 0.5)), "maxclust"))[order]
    return order, (members.diff().nonzero()[:, 0] + 1).tolist()


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
FOUND = 2  # in `marked`: there, but training does not see it
MARKS = {
    1: ("✓", "#009E73", "right"),
    -1: ("✗", "#D55E00", "wrong"),
    FOUND: ("✓", "#F0E442", "there, but not annotated"),
    0: ("?", "#BBBBBB", "not annotated"),
}


def top5(study: Study) -> Finding:
    """The most probable classes under AN (BCE) and HML, where the two differ most."""
    from mls.eval.supervised import prepare

    prepared = prepare(study.load("an").data)
    trained = {loss: study.trained(loss) for loss in ("an", "hml")}
    parts = {"test": (prepared.test, prepared.test.truth)}
    seen = marked(prepared.train.truth, prepared.observed)
    if (seen == FOUND).any():
        parts["training"] = (prepared.train, seen)
    rows, numbers, shown = [], {}, []
    for part, (images, marks) in parts.items():
        scores = {loss: one.scores(images) for loss, one in trained.items()}
        for loss, values in scores.items():
            shares = verdicts(values, marks)
            rows.append([f"{loss}, {part} images", *(f"{100 * share:.1f}" for share in shares.values())])
            numbers |= {
                f"{loss}/{name}" if part == "test" else f"{loss}/{part}/{name}": v for name, v in shares.items()
            }
        chosen = most_different(*scores.values())[: SHOWN // len(parts)]
        shown += [Example(part, images, int(row), scores, marks) for row in chosen]
    summary = (
        f"The {BEST} most probable classes of every image; the picture shows images where the two differ most, so it "
        "is no measure of either. Yellow: classes of training images that are there although the training does not see "
        "them. The paper shows HML with fewer wrong labels above the right ones, and with such labels."
    )
    header = ["loss", *(f"{name}, %" for name in verdicts(torch.rand(1, 2), torch.ones(1, 2)))]
    title = f"The {BEST} most probable classes, where AN and HML differ most"
    return Finding(sheet(shown, title), header, rows, summary, numbers)


def marked(
    truth: Num[Tensor, "images classes"], observed: Num[Tensor, "images classes"]
) -> Num[Tensor, "images classes"]:
    """The truth, with FOUND for what is there and not annotated.

    >>> marked(torch.tensor([[1, 1, -1]]), torch.tensor([[1, 0, 0]]))
    tensor([[ 1,  2, -1]])
    """
    return truth.masked_fill((truth > 0) & (observed == 0), FOUND)


def verdicts(scores: Float[Tensor, "images classes"], marks: Num[Tensor, "images classes"]) -> dict[str, float]:
    """Of the most probable classes, the shares of each mark; of the images, that whose first class is right; of what
    is there, that which is among them.

    >>> verdicts(torch.tensor([[0.9, 0.1, 0.2]]), torch.tensor([[1, -1, 0]]))["not annotated"]
    0.3333333333333333
    """
    best = marks.gather(1, scores.topk(min(BEST, scores.shape[1])).indices)
    shares = {name: float((best == mark).double().mean()) for mark, (_, _, name) in MARKS.items()}
    found = float((best > 0).sum() / (marks > 0).sum())
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


@dataclass(frozen=True)
class Example:
    """An image of a sheet, and what it shows of it."""

    part: str  # training or test
    images: LabelledImages
    row: int
    scores: Mapping[str, Float[Tensor, "images classes"]]  # of each loss
    marks: Num[Tensor, "images classes"]


def sheet(examples: Sequence[Example], title: str) -> Figure:
    """Two images a line, each with a bar chart for each loss."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lines, losses = -(-len(examples) // 2), len(examples[0].scores)
    figure = Figure(figsize=(2 * (2 + 2.8 * losses), 2.1 * lines + 0.9), layout="constrained")
    ratios = [1, *[1.25] * losses] * 2
    cells = figure.subplots(lines, len(ratios), squeeze=False, width_ratios=ratios).reshape(-1, 1 + losses)
    drawn: set[int] = set()
    for one, (picture, *charts) in zip(examples, cells, strict=False):
        marks, names = one.marks[one.row], one.images.class_names
        picture.imshow(one.images.pixels(one.row).permute(1, 2, 0).numpy())
        kinds = {"annotated" if bool((one.marks == FOUND).any()) else "present": 1, "not annotated": FOUND}
        lists = {
            kind: [str(names[i]) for i in (marks == mark).nonzero()[:, 0].tolist()] for kind, mark in kinds.items()
        }
        told = [f"{kind}: {', '.join(found)}" for kind, found in lists.items() if found] or ["present: none"]
        picture.set_title("\n".join([f"{one.part} image", *map(_lines, told)]), fontsize=9)
        picture.axis("off")
        for axes, (loss, values) in zip(charts, one.scores.items(), strict=True):
            drawn |= _bars(axes, loss, values[one.row], marks, names)
    for axes in cells[len(examples) :].flat:
        axes.axis("off")
    legend = [
        Patch(color=colour, label=f"{mark}  {name}") for key, (mark, colour, name) in MARKS.items() if key in drawn
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.suptitle(title)
    return figure


def _lines(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 28))


def _bars(axes: Axes, title: str, scores: Tensor, marks: Tensor, names: Sequence[str]) -> set[int]:
    """The marks that were drawn."""
    values, columns = scores.topk(min(BEST, len(scores)))
    found = marks[columns].tolist()
    bars = axes.barh(range(len(values)), values.tolist(), color=[MARKS[mark][1] for mark in found])
    axes.bar_label(bars, [f"{v:.2f} {MARKS[mark][0]}" for v, mark in zip(values, found, strict=True)], padding=2)
    axes.set_yticks(range(len(values)), [str(names[column]) for column in columns.tolist()])
    axes.set(xlim=(0, 1.3), xticks=[0, 0.5, 1], title=title)
    axes.set_xlabel("probability", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.title.set_fontsize(10)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return set(map(int, found))


ANALYSES = {"correlation": correlation, "margins": margins, "top5": top5}
