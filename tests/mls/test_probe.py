"""The probes against a plain loop (kNN) and scikit-learn (linear), on features shaped as a network's are."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mls.errors import DataError
from mls.frozen.metrics import mean_average_precision, top1
from mls.frozen.probe import ProbeOptions, fit_linear, knn_scores, linear_probe


def features_and_labels(count: int, seed: int = 0, dim: int = 24, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Rectified, correlated features of uneven scale, and several labels an image that depend on what lies beneath."""
    world = torch.Generator().manual_seed(1)
    mixing = torch.randn(8, dim, generator=world, dtype=torch.float64)
    scale = 10 ** torch.linspace(-2, 2, dim, dtype=torch.float64)
    concepts = torch.randn(8, classes, generator=world, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, dim + classes, generator=generator, dtype=torch.float64)
    labels = hidden @ concepts + 2 * noise[:, dim:] > 1
    return torch.relu(hidden @ mixing + 0.3 * noise[:, :dim]) * scale, labels.double()


def one_label(labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels.argmax(dim=1), labels.shape[1]).double()


# -------------------------------------------------------------------------------------------------------- kNN


def plain_knn(train: Tensor, labels: Tensor, test: Tensor, k: int, temperature: float) -> list[list[float]]:
    scores = []
    for query in test.tolist():
        cosines = []
        for row in train.tolist():
            lengths = math.hypot(*query) * math.hypot(*row)
            cosines.append(sum(a * b for a, b in zip(query, row, strict=True)) / lengths)
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]
        weights = [math.exp(cosines[i] / temperature) for i in nearest]
        votes = [
            sum(w * labels[i, c].item() for w, i in zip(weights, nearest, strict=True)) for c in range(labels.shape[1])
        ]
        scores.append([vote / sum(weights) for vote in votes])
    return scores


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (7, 0.1), (20, 1.0)])
def test_knn_equals_a_plain_loop(k: int, temperature: float) -> None:
    train, labels = features_and_labels(60)
    test, _ = features_and_labels(15, seed=1)
    found = knn_scores(train, labels, test, k=k, temperature=temperature)
    expected = plain_knn(train, labels, test, k, temperature)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_knn_answers_the_same_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = features_and_labels(60)
    test, _ = features_and_labels(23, seed=1)
    whole = knn_scores(train, labels, test)
    for name, size in {"index.QUERIES": 5, "index.ROWS": 7, "probe.neighbours.GATHERED": 100}.items():
        monkeypatch.setattr(f"mls.frozen.{name}", size)
    assert torch.allclose(knn_scores(train, labels, test), whole, atol=1e-6)


def test_knn_asks_all_training_images_where_there_are_fewer_than_k() -> None:
    train, labels = features_and_labels(6)
    found = knn_scores(train, labels, train[:2], k=20, temperature=1e6)
    assert torch.allclose(found, labels.float().mean(dim=0).expand(2, -1), atol=1e-4)


# ----------------------------------------------------------------------------------------------------- linear


def standardised(train: Tensor, test: Tensor) -> tuple[np.ndarray, np.ndarray]:
    mean, std = train.mean(dim=0), train.std(dim=0)
    return ((train - mean) / std).numpy(), ((test - mean) / std).numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_multi_label_probe_equals_sklearn_class_by_class(dtype: torch.dtype, l2: float) -> None:
    train, labels = features_and_labels(400)
    test, _ = features_and_labels(100, seed=1)
    found = linear_probe(train.to(dtype), labels, test.to(dtype), l2=[l2], tolerance=1e-10).scores.sigmoid()
    x, queries = standardised(train, test)
    for column in range(labels.shape[1]):
        # sklearn minimises C * sum of losses + |w|^2 / 2
        sklearn = LogisticRegression(C=1 / (2 * len(x) * l2), solver="newton-cholesky", tol=1e-10).fit(
            x, labels[:, column]
        )
        np.testing.assert_allclose(found[:, column].numpy(), sklearn.predict_proba(queries)[:, 1], atol=1e-4)


def test_single_label_probe_equals_sklearns_softmax() -> None:
    train, labels = features_and_labels(400)
    test, _ = features_and_labels(100, seed=1)
    found = linear_probe(train, one_label(labels), test, l2=[1e-3], tolerance=1e-10)
    x, queries = standardised(train, test)
    sklearn = LogisticRegression(C=1 / (2 * len(x) * 1e-3), solver="newton-cholesky", tol=1e-10).fit(
        x, labels.argmax(dim=1)
    )
    assert found.metric == "top1"
    np.testing.assert_allclose(found.scores.softmax(dim=1).numpy(), sklearn.predict_proba(queries), atol=1e-4)


@pytest.mark.parametrize("multilabel", [True, False])
def test_penalties_fitted_together_equal_penalties_fitted_alone(multilabel: bool) -> None:
    features, labels = features_and_labels(300)
    features = torch.from_numpy(standardised(features, features)[0])
    labels = labels if multilabel else one_label(labels)
    together, _ = fit_linear(features, labels, [1e-3, 1e-2, 1e-1], multilabel, tolerance=1e-10)
    for number, penalty in enumerate([1e-3, 1e-2, 1e-1]):
        alone, _ = fit_linear(features, labels, [penalty], multilabel, tolerance=1e-10)
        assert torch.allclose(together[number], alone[0], atol=1e-3)


def test_the_penalty_that_is_best_on_held_out_images_is_chosen_and_ties_go_to_the_stronger() -> None:
    train, labels = features_and_labels(60, dim=50)
    found = linear_probe(train, labels, train, l2=(1e-6, 1e-1, 1e3))
    values = {each.settings["l2"]: each.value for each in found.tried}
    assert set(values) == {1e-6, 1e-1, 1e3}
    assert values[found.chosen["l2"]] == max(values.values())
    assert len(set(values.values())) > 1
    easy = one_label(labels)
    tied = linear_probe(easy, easy, easy, l2=(1e-4, 1e-3))
    assert [each.value for each in tied.tried] == [1.0, 1.0]
    assert tied.chosen == {"l2": 1e-3}


def test_value_is_the_metric_on_the_test_images() -> None:
    train, labels = features_and_labels(200)
    test, truth = features_and_labels(100, seed=1)
    several = linear_probe(train, labels, test, truth)
    assert several.metric == "map"
    assert several.value == mean_average_precision(several.scores, truth) > 0.5
    single = linear_probe(train, one_label(labels), test, one_label(truth))
    assert single.metric == "top1"
    assert single.value == top1(single.scores, one_label(truth)) > 0.4
    assert linear_probe(train, labels, test).value is None


def test_kind_of_labels_is_inferred_and_can_be_overridden() -> None:
    train, labels = features_and_labels(100)
    assert linear_probe(train, one_label(labels), train).metric == "top1"
    assert linear_probe(train, one_label(labels), train, multilabel=True).metric == "map"


def test_probe_is_deterministic_and_leaves_the_global_stream_alone() -> None:
    train, labels = features_and_labels(100)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (linear_probe(train.float(), labels, train.float(), options=ProbeOptions(seed=3)) for _ in range(2))
    assert torch.equal(first.scores, second.scores)
    assert first.tried == second.tried
    assert torch.equal(torch.get_rng_state(), before)


def test_probe_works_where_gradients_are_switched_off() -> None:
    train, labels = features_and_labels(50)
    with torch.no_grad():
        quiet = linear_probe(train, labels, train).scores
    assert torch.equal(quiet, linear_probe(train, labels, train).scores)


def test_scale_shift_and_constant_features_change_nothing() -> None:
    train, labels = features_and_labels(100)
    test, _ = features_and_labels(50, seed=1)
    plain = linear_probe(train, labels, test, l2=[1e-2]).scores
    constant = train.new_ones(100, 1)
    moved = linear_probe(
        torch.cat([train * 7 + 3, constant], dim=1),
        labels,
        torch.cat([test * 7 + 3, 1 + 1e-9 * torch.arange(50.0).double()[:, None]], dim=1),
        l2=[1e-2],
    ).scores
    assert torch.allclose(plain, moved, atol=1e-3)


def test_a_class_nobody_has_leaves_finite_scores() -> None:
    train, labels = features_and_labels(100)
    labels[:, 2] = 0
    found = linear_probe(train, labels, train)
    assert torch.isfinite(found.scores).all()
    assert found.scores[:, 2].sigmoid().max() < 1e-2


def test_too_few_images_to_hold_any_out_is_a_users_error() -> None:
    train, labels = features_and_labels(2)
    with pytest.raises(DataError, match="leaves none to choose settings on"):
        linear_probe(train, labels, train)
