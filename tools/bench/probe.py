"""`mls bench probe`: the batched probes beside scikit-learn on the same features: how long, and whether they agree. The
features are drawn here; what a backbone's features are worth is another question (`mls eval`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mls.frozen.probe import Labels

STRONG, WEAK = -0.5, -5.0  # decades between which the penalties lie
FEW = (1, 3)  # penalties, beside the whole grid: where a single fit decides
MANY = 10  # penalties where images have many labels: scikit-learn takes a minute for each
NEIGHBOURS = (1, 5, 20, 200)
SVM_COSTS, SVM_CLASSES = (0.01, 0.1, 1.0), 4
ROUNDS = 3  # in which what takes seconds is measured in turns
TOLERANCE = 1e-6  # scikit-learn's, of the gradient; its default of 1e-4 leaves weak penalties far from their minimum
NOTE = """Seconds of the whole
grid by the clock, and how many times as many scikit-learn takes: by the clock, and in CPU seconds, which other work on
the machine does not move. apart: the largest difference of any setting, in points of the metric. gap: the worst of any
setting's loss, ours and scikit-learn's, above the lower of the two."""


@dataclass(frozen=True)
class Time:
    wall: float
    cpu: float


@dataclass(frozen=True)
class Row:
    name: str
    ours: Time
    theirs: Time
    mine: Sequence[float]  # the metric of every setting
    others: Sequence[float]  # scikit-learn's
    gap: str = ""

    def cells(self) -> list[str]:
        ratios = [f"{getattr(self.theirs, kind) / getattr(self.ours, kind):.1f}" for kind in ("wall", "cpu")]
        best = [f"{100 * max(values):.2f}" for values in (self.mine, self.others)]
        apart = max(abs(a - b) for a, b in zip(self.mine, self.others, strict=True))
        seconds = [f"{time.wall:.2f}" for time in (self.ours, self.theirs)]
        return [self.name, *seconds, *ratios, *best, f"{100 * apart:.2f}", self.gap]


def probe(
    images: Annotated[int, typer.Option(min=200, help="Training images. A fifth as many are tested.")] = 10_000,
    penalties: Annotated[int, typer.Option(min=2, help=f"Of softmax regression; {MANY} at most for many labels.")] = 45,
    dim: Annotated[int, typer.Option(min=8)] = 2048,
    classes: Annotated[int, typer.Option(min=SVM_CLASSES)] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Of both libraries. Default: all cores.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="1,500 images of 64 features and 5 classes: seconds.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also keep the rows, as JSON.")] = None,
) -> None:
    """Fit a grid of penalties, single- and multi-label, and compare time, loss and metric with scikit-learn's.

    45 penalties are the literature's number for a linear evaluation (Kornblith et al. 2019). scikit-learn fits one
    after another, strong to weak, on standardised fp32 features: each from zero, or each from the last solution. It
    takes minutes at full size. kNN and the support vector machines (on a fifth of the images, four classes
    and three costs, since LinearSVC is slow) are compared too.

    Examples:

        mls bench probe

        mls bench probe --threads 1 --classes 100
    """
    import torch
    from threadpoolctl import threadpool_limits

    from mls.tables import print_table
    from mls.tools.bench.results import write_results

    if quick:
        images, dim, classes, penalties = 1500, 64, 5, 5
    before, threads = torch.get_num_threads(), threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    rows: list[Row] = []
    with threadpool_limits(threads):
        for compare in (single_label, multi_label, rates, neighbours, machines):
            rows += compare(images, dim, classes, penalties)
            typer.echo(f"— {rows[-1].name}", err=True)
    torch.set_num_threads(before)
    header = ["probe", "ours, s", "scikit-learn, s", "ratio", "in CPU", "ours", "scikit-learn's", "apart", "gap"]
    print_table(header, [row.cells() for row in rows])
    print(f"\n{images} × {dim} features, {classes} classes, {threads} threads. {NOTE}")
    if out is not None:
        write_results(out, [asdict(row) for row in rows])


def drawn(images: int, dim: int, classes: int, several: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train features and labels, test features and labels: rectified features of uneven scale whose spectrum decays as
    trained networks' do, about as the axis' number to the power -1.5, and classes that overlap. Standardised."""
    import torch

    generator = torch.Generator().manual_seed(0)
    total = images + images // 5
    strength = torch.arange(1, dim + 1) ** -0.75
    centres, mixing = (torch.randn(rows, dim, generator=generator) for rows in (classes, dim))
    if several:
        shares = torch.logspace(-1.7, -0.5, classes)
        labels = torch.rand(total, classes, generator=generator) < shares
        hidden = labels.float() @ centres
    else:
        labels = torch.randint(classes, (total,), generator=generator)
        hidden = centres[labels]
    hidden = (hidden + (4 if several else 5) * torch.randn(total, dim, generator=generator)) * strength
    seen = hidden @ mixing
    seen = seen / seen.std() + 0.05 * torch.randn(total, dim, generator=generator)
    seen = torch.relu(seen - torch.rand(dim, generator=generator)) * torch.randn(dim, generator=generator).exp()
    std, mean = torch.std_mean(seen[:images], dim=0)
    seen = (seen - mean) / torch.where(std > 0, std, 1.0)
    return seen[:images].clone(), labels[:images], seen[images:].clone(), labels[images:]


def single_label(images: int, dim: int, classes: int, penalties: int) -> list[Row]:
    """All penalties of softmax regression, and few of them, also on a fifth of the images."""
    name, rows = "softmax, top-1", []
    for count in (images, images // 5):
        data = drawn(count, dim, classes, several=False)
        for few in FEW:
            rows += logistic(f"{name}, {count:,} images", few, *data, starts=(True,))
    print(break_even(rows))
    return rows + logistic(name, penalties, *drawn(images, dim, classes, several=False))


def break_even(rows: Sequence[Row]) -> str:
    """
    >>> fast, slow = Time(1.0, 1.0), Time(2.0, 2.0)
    >>> break_even([Row("1 penalty", fast, slow, [], []), Row("3 penalties", slow, fast, [], [])])
    'scikit-learn is faster (CPU seconds) with: 3 penalties'
    """
    slower = [row.name for row in rows if row.ours.cpu > row.theirs.cpu]
    return "scikit-learn is faster (CPU seconds) with: " + ("; ".join(slower) or f"none of {len(rows)} small grids")


def multi_label(images: int, dim: int, classes: int, penalties: int) -> list[Row]:
    """All penalties of one logistic regression a class."""
    return logistic("logistic a class, mAP", min(MANY, penalties), *drawn(images, dim, classes, several=True))


def logistic(
    name: str,
    penalties: int,
    features: Tensor,
    labels: Tensor,
    test: Tensor,
    truth: Tensor,
    starts: Sequence[bool] = (False, True),
) -> list[Row]:
    """Beside scikit-learn from zero each time, then beside scikit-learn from the last solution."""
    import torch

    from mls.frozen.probe import fit_linear, read_labels

    grid = torch.logspace(STRONG, WEAK, penalties, dtype=torch.float64).tolist()
    kind, known, found = read_labels(labels), read_labels(truth), []
    for warm in starts:
        (weight, bias), ours = timed(lambda: fit_linear(features, labels, grid))
        fits, theirs = timed(lambda: sklearn_grid(features.numpy(), labels.numpy(), grid, warm))  # noqa: B023 (at once)
        mine = [(w, b[0]) for w, b in zip(weight, bias, strict=True)]
        answers = mine, [tuple(map(torch.from_numpy, fit)) for fit in fits]
        losses = torch.tensor(
            [[_loss(features, kind, w, b, l2) for (w, b), l2 in zip(of, grid, strict=True)] for of in answers]
        )
        gaps = (losses / losses.amin(dim=0) - 1).amax(dim=1)
        ours_reach, theirs_reach = ([known.measure(test @ w.float() + b.float()) for w, b in of] for of in answers)
        grids = f"{penalties} {'penalty' if penalties == 1 else 'penalties'}"
        title = f"{name}, {grids}, scikit-learn from {'the last one' if warm else 'zero'}"
        found.append(Row(title, ours, theirs, ours_reach, theirs_reach, " / ".join(f"{gap:.0e}" for gap in gaps)))
        typer.echo(f"— {title}", err=True)
    return found


def rates(images: int, dim: int, classes: int, _: int) -> list[Row]:
    """SGD with 18 pairs of a rate and a decay beside 18 single fits, in turns, medians of three: all pairs in the
    same products, and so that most of them are left out after the first epoch, as `dense_linear` does."""
    from mls.eval.dense.schema import DenseProbeConfig
    from mls.frozen import probe

    features, labels, test, truth = drawn(images, dim, classes, several=False)
    settings, options = DenseProbeConfig(), probe.ProbeOptions(validation=(test, truth))

    def fit(lr: Sequence[float], decay: Sequence[float], first: int | None = None) -> float:
        sgd = probe.Sgd(lr, decay, settings.epochs, settings.batch_size, "cosine", first)
        found = probe.sgd_probe(features, labels, features[:1], sgd=sgd, options=options)
        return max(one.value for one in found.tried)

    works: dict[str, Callable[[], float]] = {
        "single fits": lambda: max(fit([lr], [decay]) for lr in settings.lr for decay in settings.weight_decay),
        "all": lambda: fit(settings.lr, settings.weight_decay),
        "few after an epoch": lambda: fit(settings.lr, settings.weight_decay, settings.first),
    }
    took: dict[str, list[tuple[float, Time]]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            took[name].append(timed(work))
    middle = {
        name: Time(*(statistics.median(getattr(one, kind) for _, one in of) for kind in ("wall", "cpu")))
        for name, of in took.items()
    }
    best = {name: [of[0][0]] for name, of in took.items()}
    single, *grids = works
    title = "SGD, top-1, 18 pairs beside 18 single fits"
    return [Row(f"{title}, {name}", middle[name], middle[single], best[name], best[single]) for name in grids]


def sklearn_grid(
    x: np.ndarray, labels: np.ndarray, grid: Sequence[float], warm: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight [dim, classes] and bias [classes] of every penalty."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    columns = [labels] if labels.ndim == 1 else list(labels.T)
    found: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for column in columns:
        model = LogisticRegression(tol=TOLERANCE, max_iter=10_000, warm_start=warm)
        found.append([])
        for l2 in grid:  # scikit-learn minimises C * sum of losses + |w|^2 / 2
            model.set_params(C=1 / (2 * len(x) * l2)).fit(x, column)
            found[-1].append((np.array(model.coef_.T), np.array(model.intercept_)))
    return [
        (np.concatenate([w for w, _ in fits], axis=1), np.concatenate([b for _, b in fits]))
        for fits in zip(*found, strict=True)
    ]


def _loss(features: Tensor, labels: Labels, weight: Tensor, bias: Tensor, l2: float) -> float:
    """In fp64, with the penalty."""
    import torch.nn.functional as F

    weight = weight.double()
    logits = features.double() @ weight + bias.double()
    if labels.numbers is not None:
        loss = F.cross_entropy(logits, labels.numbers)
    else:
        loss = F.binary_cross_entropy_with_logits(logits, labels.matrix.double(), reduction="none").sum(dim=1).mean()
    return float(loss + l2 * weight.square().sum())


def neighbours(images: int, dim: int, classes: int, _: int) -> list[Row]:
    """Four k from one search, beside scikit-learn's four."""
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    from mls.frozen.probe import knn

    features, labels, test, truth = drawn(images, dim, classes, several=False)
    vote = lambda distances: np.exp((1 - distances) / 0.07)

    def theirs() -> list[float]:
        model = KNeighborsClassifier(metric="cosine", weights=vote, algorithm="brute").fit(features, labels)  # pyright: ignore[reportArgumentType]
        return [model.set_params(n_neighbors=k).score(test, truth) for k in NEIGHBOURS]

    mine, ours = timed(lambda: list(knn(features, labels, test, truth, k=NEIGHBOURS).values.values()))
    others, took = timed(theirs)
    return [Row(f"kNN, top-1, {len(NEIGHBOURS)} k", ours, took, mine, others)]


def machines(images: int, dim: int, classes: int, _: int) -> list[Row]:
    """Cross-validated linear support vector machines."""
    from mls.frozen.probe import svm_probe

    features, labels, test, truth = drawn(images // 5, dim, classes, several=True)
    chosen = slice(classes - SVM_CLASSES, classes)  # the most frequent
    labels, truth = labels[:, chosen], truth[:, chosen]
    found, ours = timed(lambda: svm_probe(features, labels, test, truth, costs=SVM_COSTS, multilabel=True))
    others, theirs = timed(lambda: sklearn_machines(features, labels, test, truth))
    assert found.average_precision is not None
    mine = [*found.tried.T.flatten().tolist(), *found.average_precision.tolist()]
    return [Row("SVM, AP", ours, theirs, mine, others)]


def sklearn_machines(features: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> list[float]:
    """The cross-validated average precision of every class and cost, then that of every class on the test images."""
    import numpy as np
    import torch.nn.functional as F
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import LinearSVC

    x, queries = (F.normalize(part, dim=1).double().numpy() for part in (features, test))
    tried, tested = [], []
    for column, wanted in zip(labels.T.numpy(), truth.T.numpy(), strict=True):
        model = LinearSVC(class_weight={True: 2.0, False: 1.0}, dual=False, tol=1e-6, max_iter=10_000)  # pyright: ignore[reportArgumentType]
        means = []
        for cost in SVM_COSTS:
            model.set_params(C=cost)
            means.append(float(cross_val_score(model, x, column, cv=3, scoring="average_precision").mean()))
        tried += means
        model.set_params(C=SVM_COSTS[int(np.argmax(means))]).fit(x, column)
        tested.append(float(average_precision_score(wanted, model.decision_function(queries))))
    return tried + tested


def timed(call: Callable[[], Any]) -> tuple[Any, Time]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, Time(time.perf_counter() - wall, time.process_time() - cpu)
