"""The equations of the MLS supplement (https://arxiv.org/abs/2308.03286) and what of them holds: Eq. 11 is not the kNN
softmax, Eq. 14 is; and its gradient does not fluctuate as the text says, it asks for equal shares."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mls.core import losses

TEMPERATURE = 0.2

cosines = st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=4, max_size=12)


def similarity(p: float) -> float:
    return math.exp(p / TEMPERATURE)


def equation_10(p: list[float], positives: list[int]) -> float:
    """Its second line, the one that sums over the whole queue."""
    whole = sum(map(similarity, p))
    return -sum(math.log(similarity(p[i]) / whole) for i in positives) / len(positives)


def equation_11(p: list[float], first: int, second: int) -> float:
    whole = sum(map(similarity, p))
    return -0.5 * math.log(similarity(p[first]) / whole + similarity(p[second]) / whole)


def equation_14(p: list[float], first: int, second: int) -> float:
    negatives = sum(similarity(x) for i, x in enumerate(p) if i not in (first, second))
    one, two = similarity(p[first]), similarity(p[second])
    return -0.5 * math.log(one / (one + two + negatives)) - 0.5 * math.log(two / (two + one + negatives))


def labels_at(positives: list[int], classes: int) -> torch.Tensor:
    labels = torch.zeros(1, classes)
    labels[0, positives] = 1
    return labels


@settings(deadline=None)
@given(p=cosines)
def test_equation_10_equals_14_and_exceeds_11(p: list[float]) -> None:
    assert equation_10(p, [0, 1]) == pytest.approx(equation_14(p, 0, 1), rel=1e-12)
    # -log of each share is more than -log of their sum, and 11 halves even that.
    assert equation_11(p, 0, 1) < equation_10(p, [0, 1]) - 0.3


@settings(deadline=None)
@given(p=cosines, data=st.data())
def test_softmax_loss_is_equation_10(p: list[float], data: st.DataObject) -> None:
    positives = data.draw(st.lists(st.integers(0, len(p) - 1), min_size=1, max_size=4, unique=True))
    logits = torch.tensor([p], dtype=torch.float64) / TEMPERATURE
    value = losses.build("softmax")(logits, labels_at(positives, len(p)))
    assert value.item() == pytest.approx(equation_10(p, positives), rel=1e-10)


@settings(deadline=None)
@given(p=cosines, data=st.data())
def test_softmax_gradient_is_share_minus_equal_share(p: list[float], data: st.DataObject) -> None:
    """dL/dp_i = (P_i - 1/N_pos) / tau on a positive, P_i / tau on the rest: a positive is pushed away only once its
    share exceeds 1/N_pos."""
    positives = data.draw(st.lists(st.integers(0, len(p) - 1), min_size=1, max_size=4, unique=True))
    cosine = torch.tensor([p], dtype=torch.float64, requires_grad=True)
    losses.build("softmax")(cosine / TEMPERATURE, labels_at(positives, len(p))).backward()
    whole = sum(map(similarity, p))
    for i, x in enumerate(p):
        wanted = 1 / len(positives) if i in positives else 0.0
        expected = (similarity(x) / whole - wanted) / TEMPERATURE
        assert cosine.grad[0, i].item() == pytest.approx(expected, abs=1e-10)


def test_equal_shares_are_where_the_softmax_loss_rests() -> None:
    logits = torch.tensor([[3.0, 3.0, -200.0, -200.0]], dtype=torch.float64, requires_grad=True)
    losses.build("softmax")(logits, labels_at([0, 1], 4)).backward()
    assert logits.grad.abs().max().item() < 1e-12


def test_bce_pos_is_equation_15_and_a_negative_gets_no_gradient() -> None:
    p = [0.9, 0.1, -0.4, 0.3, -1.0]
    cosine = torch.tensor([p], dtype=torch.float64, requires_grad=True)
    value = losses.build("bce_pos")(cosine / TEMPERATURE, labels_at([0, 2], 5))
    value.backward()
    sigmoid = lambda x: 1 / (1 + math.exp(-x / TEMPERATURE))
    assert value.item() == pytest.approx(-(math.log(sigmoid(p[0])) + math.log(sigmoid(p[2]))) / 5, rel=1e-12)
    assert cosine.grad[0, [1, 3, 4]].tolist() == [0.0, 0.0, 0.0]
