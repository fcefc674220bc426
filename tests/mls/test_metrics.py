"""The metrics against scikit-learn, with as many ties as possible."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import accuracy_score, average_precision_score

from mls.errors import DataError
from mls.metrics import average_precision, mean_average_precision, top1

few_values = st.sampled_from([-1e30, -1.0, 0.0, 1e-30, 0.25, 0.5, 1.0, 3.0])
any_values = st.floats(-1e6, 1e6)


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores and targets of at least one class; some classes may be empty."""
    shape = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    scores = draw(arrays.arrays(np.float64, shape, elements=draw(st.sampled_from([few_values, any_values]))))
    return scores, draw(arrays.arrays(np.int64, shape, elements=st.integers(0, 1)))


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
