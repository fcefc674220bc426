"""The metrics against scikit-learn, with as many ties as possible."""

import math
from itertools import pairwise

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import accuracy_score, average_precision_score, f1_score

from mls.errors import DataError
from mls.frozen import metrics
from mls.frozen.metrics import (
    average_precision,
    f1,
    frequency_groups,
    grouped,
    mean_average_precision,
    mean_average_precision_by_sample,
    top1,
    voc_11_point,
)

few_values = st.sampled_from([-1e30, -1.0, 0.0, 1e-30, 0.25, 0.5, 1.0, 3.0])
any_values = st.floats(-1e6, 1e6)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores and targets of at least one class; some classes may be empty."""
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    scores = draw(arrays.arrays(np.float64, shape, elements=draw(st.sampled_from([few_values, any_values]))))
    return scores, draw(arrays.arrays(np.int64, shape, elements=st.integers(0, 1)))


@st.composite
def partly_known(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, targets, and which entries are annotated: some classes not at all."""
    scores, targets = draw(scored())
    return scores, targets, draw(arrays.arrays(np.bool_, scores.shape))


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


@settings(deadline=None, max_examples=200)
@given(scored())
def test_average_precision_equals_sklearn_in_every_class_with_positives(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, targets = case
    found = average_precision(torch.from_numpy(scores), torch.from_numpy(targets))
    assert found.dtype == torch.float64
    for column in range(scores.shape[1]):
        if targets[:, column].any():
            expected = average_precision_score(targets[:, column], scores[:, column])
            assert found[column].item() == pytest.approx(expected, abs=1e-9)
            alone = average_precision(torch.from_numpy(scores[:, column]), torch.from_numpy(targets[:, column]))
            assert alone.item() == pytest.approx(expected, abs=1e-9)
        else:
            assert found[column].item() == 0.0


@settings(deadline=None, max_examples=100)
@given(scored())
def test_mean_average_precision_skips_or_counts_empty_classes(case: tuple[np.ndarray, np.ndarray]) -> None:
    scores, targets = case
    full = [c for c in range(scores.shape[1]) if targets[:, c].any()]
    each = [average_precision_score(targets[:, c], scores[:, c]) for c in full]
    skipping = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(targets))
    counting = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(targets), skip_empty=False)
    assert counting == pytest.approx(sum(each) / scores.shape[1], abs=1e-9)
    if full:
        assert skipping == pytest.approx(np.mean(each), abs=1e-9)
    else:
        assert math.isnan(skipping)


@settings(max_examples=200)
@given(partly_known())
def test_entries_that_are_not_known_are_as_if_they_were_not_there(case: tuple[np.ndarray, ...]) -> None:
    scores, targets, known = case
    found = average_precision(*tensors(scores, targets, known))
    points = voc_11_point(*tensors(scores, targets, known))
    expected = {}
    for c in range(scores.shape[1]):
        known_scores, known_targets = scores[known[:, c], c], targets[known[:, c], c]
        if known_targets.any():
            expected[c] = average_precision_score(known_targets, known_scores)
            assert points[c].item() == pytest.approx(
                voc_11_point(*tensors(known_scores, known_targets)).item(), abs=1e-9
            )
        elif known_targets.size:
            expected[c] = 0.0
        assert found[c].item() == pytest.approx(expected.get(c, 0.0), abs=1e-9)
    counting = mean_average_precision(*tensors(scores, targets), skip_empty=False, known=torch.from_numpy(known))
    skipping = mean_average_precision(*tensors(scores, targets), known=torch.from_numpy(known))
    full = [c for c in expected if (targets[:, c] & known[:, c]).any()]
    mean = np.mean(list(expected.values())) if expected else np.nan
    assert counting == pytest.approx(mean, abs=1e-9, nan_ok=True)
    mean = np.mean([expected[c] for c in full]) if full else np.nan
    assert skipping == pytest.approx(mean, abs=1e-9, nan_ok=True)


def test_an_unknown_entry_does_not_join_the_tie_of_a_known_one() -> None:
    scores, targets = torch.tensor([0.5, 0.5, float("-inf"), float("-inf")]), torch.tensor([1, -1, 1, -1])
    known = torch.tensor([True, False, True, False])
    assert average_precision(scores, targets, known).item() == 1.0


@settings(max_examples=100)
@given(partly_known())
def test_mean_average_precision_by_sample_equals_sklearn_in_every_row(case: tuple[np.ndarray, ...]) -> None:
    scores, targets, known = case
    rows = [(y[k], x[k]) for x, y, k in zip(scores, targets, known, strict=True) if y[k].any()]
    expected = np.mean([average_precision_score(*row) for row in rows]) if rows else np.nan
    found = mean_average_precision_by_sample(*tensors(scores, targets, known))
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


def voc_devkit(scores: np.ndarray, truth: np.ndarray) -> float:
    """VOCevalcls.m of VOC 2007, restated with numpy's 0:0.1:1; for scores without ties."""
    order = np.argsort(-scores)
    tp = np.cumsum(truth[order] > 0)
    fp = np.cumsum(truth[order] < 0)
    recall, precision = tp / np.sum(truth > 0), tp / (fp + tp)
    best = [precision[recall >= threshold] for threshold in np.arange(0.0, 1.1, 0.1)]
    return sum(part.max() if part.size else 0.0 for part in best) / 11


@settings(max_examples=200)
@given(seed=st.integers(0, 2**31), items=st.integers(1, 60), classes=st.integers(1, 4))
def test_voc_11_point_equals_the_devkit(seed: int, items: int, classes: int) -> None:
    draws = np.random.default_rng(seed)
    scores = draws.permutation(items * classes).reshape(items, classes).astype(np.float64)
    truth = np.where(draws.random((items, classes)) < 0.4, 1, -1)
    truth[0] = 1
    found = voc_11_point(*tensors(scores, truth))
    assert found.tolist() == pytest.approx([voc_devkit(scores[:, c], truth[:, c]) for c in range(classes)], abs=1e-9)


def test_a_recall_of_three_tenths_does_not_reach_the_devkits_threshold() -> None:
    truth = np.array([1, 1, 1, *[-1] * 10, *[1] * 7])[:, None]  # recall 3 / 10 at precision 1, then lower
    scores = np.linspace(1.0, 0.0, 20)[:, None]
    assert 3 * 0.1 > 3 / 10
    assert voc_11_point(*tensors(scores, truth)).item() == pytest.approx((3 * 1.0 + 8 * 0.5) / 11)
    assert voc_devkit(scores[:, 0], truth[:, 0]) == pytest.approx((3 * 1.0 + 8 * 0.5) / 11)


def test_voc_11_point_of_a_class_without_positives_is_0() -> None:
    assert voc_11_point(torch.rand(5, 2), torch.tensor([[1, 0]] * 5)).tolist() == [1.0, 0.0]


def test_ranking_some_classes_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, targets = torch.rand(30, 7), torch.randint(2, (30, 7))
    known = torch.rand(30, 7) < 0.7
    together = [measure(scores, targets, known) for measure in (average_precision, voc_11_point)]
    for at_once in (1, 65):  # a class at a time; two, and one that is left over
        monkeypatch.setattr(metrics, "RANKED", at_once)
        apart = [measure(scores, targets, known) for measure in (average_precision, voc_11_point)]
        torch.testing.assert_close(apart, together, rtol=0, atol=1e-12)


@settings(max_examples=100)
@given(partly_known(), st.sampled_from(["macro", "micro", "sample"]))
def test_f1_equals_sklearn(case: tuple[np.ndarray, ...], average: str) -> None:
    scores, targets, known = case
    predicted = (scores > 0.5).astype(int)
    words = {"macro": "macro", "micro": "micro", "sample": "samples"}
    kind = words[average]

    def expected(targets: np.ndarray, predicted: np.ndarray) -> float:
        if targets.shape[1] > 1:
            return float(f1_score(targets, predicted, average=kind, zero_division=0))
        if kind == "samples":  # scikit-learn takes a single column for a two-class problem
            return float(((targets == 1) & (predicted == 1)).mean())
        return float(f1_score(targets[:, 0], predicted[:, 0], zero_division=0))

    assert f1(*tensors(scores, targets), average=average) == pytest.approx(expected(targets, predicted), abs=1e-9)
    masked = f1(*tensors(scores, targets), average=average, known=torch.from_numpy(known))
    assert masked == pytest.approx(expected(targets * known, predicted * known), abs=1e-9)


@given(counts=st.lists(st.integers(0, 5), min_size=5, max_size=40), groups=st.integers(1, 5))
def test_frequency_groups_are_equal_parts_from_rare_to_frequent(counts: list[int], groups: int) -> None:
    found = frequency_groups(torch.tensor(counts), groups)
    sizes = found.bincount(minlength=groups)
    assert sizes.sum() == len(counts) and len(sizes) == groups and sizes.max() - sizes.min() <= 1
    members = [torch.tensor(counts)[found == group] for group in range(groups)]
    assert all(rare.max() <= frequent.min() for rare, frequent in pairwise(members))


def test_grouped_leaves_classes_without_a_value_out() -> None:
    per_class = torch.tensor([0.5, torch.nan, 0.25, 0.75, torch.nan], dtype=torch.float64)
    rare, frequent, none = grouped(per_class, torch.tensor([0, 0, 1, 1, 2]), groups=3)
    assert (rare, frequent) == (0.5, 0.5) and math.isnan(none)


def test_bf16_scores_tie_where_bf16_cannot_tell_them_apart() -> None:
    scores = torch.tensor([1.0, 1.0001, 0.5, 2.0]).bfloat16()
    targets = torch.tensor([1, 0, 0, 0])
    assert average_precision(scores, targets).item() == average_precision_score(targets, scores.float()) == 1 / 3


def test_known_negatives_are_negatives() -> None:
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert average_precision(scores, torch.tensor([1, -1, 0, 1])) == average_precision(
        scores, torch.tensor([1, 0, 0, 1])
    )


def test_scores_without_order_are_refused() -> None:
    with pytest.raises(DataError, match="NaN"):
        average_precision(torch.tensor([0.1, float("nan")]), torch.tensor([1, 0]))


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="no items were scored"):
        average_precision(torch.zeros(0, 3), torch.zeros(0, 3))


@pytest.mark.parametrize("known", [None, torch.ones(3, dtype=torch.bool)])
def test_tensors_of_different_shapes_are_refused(known: torch.Tensor | None) -> None:
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        average_precision(torch.rand(4), torch.ones(4 if known is not None else 3), known)


def test_infinite_scores_have_an_order() -> None:
    scores = torch.tensor([float("inf"), float("-inf"), 0.0, float("-inf")])
    assert average_precision(scores, torch.tensor([0, 1, 1, 0])).item() == pytest.approx(0.5 * (1 / 2) + 0.5 * (2 / 4))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**31), items=st.integers(1, 20), classes=st.integers(2, 6))
def test_top1_equals_sklearn_for_numbers_and_for_one_hot_rows(seed: int, items: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(items, classes, generator=generator)
    truth = torch.randint(classes, (items,), generator=generator)
    expected = accuracy_score(truth.numpy(), scores.argmax(dim=1).numpy())
    assert top1(scores, truth) == pytest.approx(expected)
    assert top1(scores, torch.nn.functional.one_hot(truth, classes).float()) == pytest.approx(expected)
