"""`mls bench probe`: the batched probes beside scikit-learn on the same features: how long, and whether they agree. The
features are drawn here; what a backbone's features are worth is another question (`mls eval`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mls.probe import Labels

PENALTIES = tuple(10 ** (-0.5 * step) for step in range(1, 11))  # strong to weak: scikit-learn starts from the last fit
NEIGHBOURS = (1, 5, 20, 200)
SVM_COSTS, SVM_CLASSES = (0.01, 0.1, 1.0), 4
TOLERANCE = 1e-6  # scikit-learn's, of the gradient; its default of 1e-4 leaves weak penalties far from their minimum
NOTE = """seconds of the whole
grid. apart: the largest difference of any setting, in points of the metric. gap: the worst of any setting's loss, ours
and scikit-learn's, above the lower of the two."""
Row = list[str]


def probe(
    images: Annotated[int, typer.Option(min=200, help="Training images. A fifth as many are tested.")] = 10_000,
    dim: Annotated[int, typer.Option(min=8)] = 2048,
    classes: Annotated[int, typer.Option(min=SVM_CLASSES)] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Of both libraries. Default: all cores.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="500 images of 64 features and 5 classes: seconds.")] = False,
) -> None:
    """Fit a grid of 10 penalties, single- and multi-label, and compare time, loss and metric with scikit-learn's.

    scikit-learn fits one penalty after another, strong to weak, each from the last solution, on standardised fp32
    features. It takes minutes at full size. kNN and the support vector machines (on a fifth of the images, four classes
    and three costs, since LinearSVC is slow) are compared too.

    Examples:

        mls bench probe

        mls bench probe --threads 1 --classes 100
    """
    import torch
    from threadpoolctl import threadpool_limits

    from mls.tools.studies import markdown_table

    if quick:
        images, dim, classes = 500, 64, 5
    before, threads = torch.get_num_threads(), threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    rows: list[Row] = []
    with threadpool_limits(threads):
        for compare in (single_label, multi_label, neighbours, machines):
            rows.append(compare(images, dim, classes))
            typer.echo(f"— {rows[-1][0]}", err=True)
    torch.set_num_threads(before)
    header = ["probe", "ours, s", "scikit-learn, s", "ratio", "metric, ours", "scikit-learn's", "apart at most", "gap"]
    print(markdown_table(header, rows))
    print(f"\n{images} × {dim} features, {classes} classes, {threads} threads, {len(PENALTIES)} penalties; {NOTE}")


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


def single_label(images: int, dim: int, classes: int) -> Row:
    """All penalties of softmax regression."""
    return logistic("softmax, top-1", *drawn(images, dim, classes, several=False))


def multi_label(images: int, dim: int, classes: int) -> Row:
    """All penalties of one logistic regression a class."""
    return logistic("logistic a class, mAP", *drawn(images, dim, classes, several=True))


def logistic(name: str, features: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> Row:
    import torch

    from mls.probe import fit_linear, read_labels

    kind, x = read_labels(labels), features.numpy()
    (weight, bias), ours = timed(lambda: fit_linear(features, labels, PENALTIES))
    fits, theirs = timed(lambda: sklearn_grid(x, labels.numpy()))
    again = timed(lambda: fit_linear(features, labels, PENALTIES))[1]
    answers = (
        [(w, b[0]) for w, b in zip(weight, bias, strict=True)],
        [tuple(map(torch.from_numpy, fit)) for fit in fits],
    )
    losses = torch.tensor(
        [[_loss(features, kind, w, b, l2) for (w, b), l2 in zip(of, PENALTIES, strict=True)] for of in answers]
    )
    gaps = (losses / losses.amin(dim=0) - 1).amax(dim=1)
    metrics = [[read_labels(truth).measure(test @ w.float() + b.float()) for w, b in of] for of in answers]
    return row(name, (ours + again) / 2, theirs, metrics[0], metrics[1], " / ".join(f"{gap:.0e}" for gap in gaps))


def sklearn_grid(x: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight [dim, classes] and bias [classes] of every penalty."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    columns = [labels] if labels.ndim == 1 else list(labels.T)
    found: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for column in columns:
        model = LogisticRegression(tol=TOLERANCE, max_iter=10_000, warm_start=True)
        found.append([])
        for l2 in PENALTIES:  # scikit-learn minimises C * sum of losses + |w|^2 / 2
            model.set_params(C=1 / (2 * len(x) * l2)).fit(x, column)
            found[-1].append((model.coef_.T.copy(), model.intercept_.copy()))
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


def neighbours(images: int, dim: int, classes: int) -> Row:
    """Four k from one search, beside scikit-learn's four."""
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    from mls.probe import knn

    features, labels, test, truth = drawn(images, dim, classes, several=False)
    vote = lambda distances: np.exp((1 - distances) / 0.07)

    def theirs() -> list[float]:
        model = KNeighborsClassifier(metric="cosine", weights=vote, algorithm="brute").fit(features, labels)
        return [model.set_params(n_neighbors=k).score(test, truth) for k in NEIGHBOURS]

    mine, ours = timed(lambda: list(knn(features, labels, test, truth, k=NEIGHBOURS).values.values()))
    others, took = timed(theirs)
    return row(f"kNN, top-1, {len(NEIGHBOURS)} k", ours, took, mine, others, "")


def machines(images: int, dim: int, classes: int) -> Row:
    """Cross-validated linear support vector machines."""
    from mls.probe import svm_probe

    features, labels, test, truth = drawn(images // 5, dim, classes, several=True)
    chosen = slice(classes - SVM_CLASSES, classes)  # the most frequent
    labels, truth = labels[:, chosen], truth[:, chosen]
    found, ours = timed(lambda: svm_probe(features, labels, test, truth, costs=SVM_COSTS, multilabel=True))
    others, theirs = timed(lambda: sklearn_machines(features, labels, test, truth))
    assert found.average_precision is not None
    mine = [*found.tried.T.flatten().tolist(), *found.average_precision.tolist()]
    return row("SVM, AP", ours, theirs, mine, others, "")


def sklearn_machines(features: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> list[float]:
    """The cross-validated average precision of every class and cost, then that of every class on the test images."""
    import numpy as np
    import torch.nn.functional as F
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import cross_val_score
    from sklearn.svm import LinearSVC

    x, asked = (F.normalize(part, dim=1).double().numpy() for part in (features, test))
    tried, tested = [], []
    for column, wanted in zip(labels.T.numpy(), truth.T.numpy(), strict=True):
        model = LinearSVC(class_weight={True: 2.0, False: 1.0}, dual=False, tol=1e-6, max_iter=10_000)
        means = []
        for cost in SVM_COSTS:
            model.set_params(C=cost)
            means.append(float(cross_val_score(model, x, column, cv=3, scoring="average_precision").mean()))
        tried += means
        model.set_params(C=SVM_COSTS[int(np.argmax(means))]).fit(x, column)
        tested.append(float(average_precision_score(wanted, model.decision_function(asked))))
    return tried + tested


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def row(name: str, ours: float, theirs: float, mine: Sequence[float], others: Sequence[float], gap: str) -> Row:
    apart = max(abs(a - b) for a, b in zip(mine, others, strict=True))
    best = [f"{100 * max(values):.2f}" for values in (mine, others)]
    return [name, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.1f}", *best, f"{100 * apart:.2f}", gap]
