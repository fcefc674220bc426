"""Losses that train two networks, estimate class priors, or get labels from outside, against plain restatements of
their papers' formulas. The element-wise ones are in test_loss_references.py."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mls.core import losses
from mls.core.losses.class_priors import class_prior
from mls.errors import ConfigError


def batch_of_two(seed: int, images: int = 10, classes: int = 4) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, 2, classes, generator=draws, dtype=torch.float64) * 2
    return logits, torch.randint(-1, 2, (images, classes), generator=draws)


def bce(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.where(labels > 0, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits)))


def kept(costs: np.ndarray, forget_rate: float, gradual: int, epoch: int) -> list[int]:
    """R(t) = 1 - min(t / T_k tau, tau) of the items, those with the smallest costs."""
    remember = 1 - min(epoch / gradual * forget_rate, forget_rate)
    return np.argsort(costs)[: max(1, int(remember * len(costs) + 1e-9))].tolist()


def co_teaching(first: np.ndarray, second: np.ndarray, schedule: tuple[float, int, int]) -> float:
    return first[kept(second, *schedule)].mean() + second[kept(first, *schedule)].mean()


@pytest.mark.parametrize("schedule", [(0.2, 10, 1), (0.5, 4, 2), (0.5, 4, 40), (0.9, 1, 1)])
@pytest.mark.parametrize("items", ["images", "labels"])
def test_each_of_two_networks_learns_from_what_costs_the_other_least(
    items: str, schedule: tuple[float, int, int]
) -> None:
    (forget_rate, gradual, epoch), (logits, labels) = schedule, batch_of_two(1)
    loss = losses.build("co_teaching", forget_rate=forget_rate, gradual=gradual, items=items)
    loss.set_epoch(epoch)
    costs = [bce(logits[:, network].numpy(), labels.numpy()) for network in (0, 1)]
    costs = [cost.mean(1) if items == "images" else cost.ravel() for cost in costs]
    assert loss(logits, labels).item() == pytest.approx(co_teaching(*costs, schedule), rel=1e-12)


def test_what_one_network_is_taught_by_the_other_moves_only_itself() -> None:
    logits, labels = batch_of_two(2)
    logits.requires_grad_()
    losses.build("co_teaching", forget_rate=0.5, gradual=1)(logits, labels).backward()
    costs = torch.from_numpy(np.stack([bce(logits[:, n].detach().numpy(), labels.numpy()).mean(1) for n in (0, 1)]))
    for network, other in ((0, 1), (1, 0)):
        moved = logits.grad[:, network].abs().sum(1) > 0
        assert sorted(moved.nonzero()[:, 0].tolist()) == sorted(costs[other].argsort()[:5].tolist())


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.9])
def test_jocor_counts_disagreement_in_what_it_selects_and_in_what_it_learns(weight: float) -> None:
    logits, labels = batch_of_two(3)
    one, two = logits[:, 0].numpy(), logits[:, 1].numpy()
    p, q = 1 / (1 + np.exp(-one)), 1 / (1 + np.exp(-two))
    kl = lambda a, b: a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))
    supervised = bce(one, labels.numpy()) + bce(two, labels.numpy())
    joint = ((1 - weight) * supervised + weight * (kl(p, q) + kl(q, p))).mean(1)
    loss = losses.build("jocor", weight=weight, forget_rate=0.4, gradual=2)
    loss.set_epoch(2)
    assert loss(logits, labels).item() == pytest.approx(joint[kept(joint, 0.4, 2, 2)].mean(), rel=1e-10)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())


@pytest.mark.parametrize("name", ["co_teaching", "jocor"])
def test_losses_of_two_networks_say_what_they_cannot_do(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown items 'image': did you mean 'images'"):
        losses.build(name, items="image")
    with pytest.raises(ConfigError, match="forget_rate 1.0"):
        losses.build(name, forget_rate=1.0)
    assert losses.LOSSES[name].only_supervised and losses.LOSSES[name].networks == 2
    documentation = losses.LOSSES[name].__doc__ or ""
    assert "https://arxiv.org/abs/" in documentation and "[batch, 2, classes]" in documentation


# ------------------------------------------------------------------------------------------------------------ CRISP


def bound_of(scores: list[float], positive: list[bool], z: float, delta: float, tau: float) -> tuple[float, float]:
    """Eq. 2's bound at a threshold z, and the prior it would give."""
    own = [score for score, labelled in zip(scores, positive, strict=True) if labelled]
    q = sum(score >= z for score in scores) / len(scores)
    qp = sum(score >= z for score in own) / len(own)
    if qp == 0:
        return math.inf, math.inf
    room = sum(math.sqrt(math.log(4 / delta) / (2 * count)) for count in (len(scores), len(own)))
    return q / qp + (1 + tau) / qp * room, q / qp


@pytest.mark.parametrize("seed", range(6))
def test_a_class_prior_is_that_of_the_threshold_with_the_lowest_bound(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    scores = torch.rand(40, generator=draws).mul(20).round() / 20  # with ties
    positive = (torch.rand(40, generator=draws) < 0.2) & (scores > 0.3)
    positive[0] = True
    plain = [bound_of(scores.tolist(), positive.tolist(), z, 0.01, 0.1) for z in scores.unique().tolist()]
    lowest = min(bound for bound, _ in plain)
    allowed = [min(1.0, prior) for bound, prior in plain if bound < lowest + 1e-6]
    assert any(class_prior(scores, positive, 0.01, 0.1) == pytest.approx(prior, abs=1e-6) for prior in allowed)


def test_a_class_prior_finds_the_share_of_positives_of_which_a_third_is_labelled() -> None:
    draws = torch.Generator().manual_seed(0)
    present = torch.rand(4000, generator=draws) < 0.15
    chance = torch.rand(4000, generator=draws)
    scores = torch.where(present, 0.6 + 0.4 * chance, 0.55 * chance)
    labelled = present & (torch.rand(4000, generator=draws) < 1 / 3)
    assert class_prior(scores, labelled, 0.01, 0.01) == pytest.approx(float(present.float().mean()), rel=0.05)
    assert class_prior(scores, torch.zeros(4000, dtype=torch.bool), 0.01, 0.01) == 0.0


def test_crisp_is_its_risk_once_it_has_class_priors_and_an_before() -> None:
    draws = torch.Generator().manual_seed(4)
    logits = torch.randn(8, 3, generator=draws, dtype=torch.float64)
    labels = torch.zeros(8, 3, dtype=torch.int64)
    labels[range(8), [0, 1, 0, 1, 1, 0, 0, 0]] = 1  # no positive of the last class in this batch
    loss = losses.build("crisp")
    loss.observe(labels)
    assert loss(logits, labels).item() == losses.build("an")(logits, labels).item()

    same, nothing = loss.relabel(labels, None, torch.rand(8, 3, generator=draws))
    assert same is labels and nothing is None
    f, risk = 1 / (1 + np.exp(-logits.numpy())), 0.0
    for column, prior in enumerate(loss.priors.tolist()):
        positives = [f[row, column] for row in range(8) if labels[row, column] == 1]
        risk += 2 * prior * float(np.mean([1 - one for one in positives])) if positives else 0.0
        risk += abs(float(np.mean([one - prior for one in f[:, column]])))
    assert loss(logits, labels).item() == pytest.approx(risk / 3, rel=1e-6)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())
    fresh = losses.build("crisp")
    fresh.observe(labels)
    fresh.load_state_dict(loss.state_dict())
    assert torch.equal(fresh.priors, loss.priors)


# ----------------------------------------------------------------------------------------- labels that are not given


def test_scores_above_the_threshold_make_smoothed_positives_of_unknown_labels_alone() -> None:
    labels = torch.tensor([[1, 0, 0, -1, 0]])
    scores = torch.tensor([[0.9, 0.31, 0.3, 0.8, 0.0]])
    pseudo = losses.build("vlpl", smoothing=0.2).labelled_by(scores, labels)
    assert pseudo[0].nan_to_num(-1).tolist() == pytest.approx([-1, 0.8, -1, -1, -1])


def test_a_curriculum_takes_over_what_the_network_is_sure_of_and_gives_it_up_again() -> None:
    labels = torch.tensor([[1, 0, 0, 0, -1]])
    loss = losses.build("curriculum", theta=1.5)
    logits = torch.tensor([[-3.0, 1.6, -1.6, 1.4, 3.0]])
    same, pseudo = loss.relabel(labels, None, torch.sigmoid(logits))
    assert torch.equal(same, labels)
    assert pseudo[0].nan_to_num(-1).tolist() == [-1, 1, 0, -1, -1]
    _, pseudo = loss.relabel(labels, pseudo, torch.sigmoid(logits / 2))
    assert pseudo.isnan().all()


def test_the_two_way_loss_of_parts_is_the_mean_of_the_parts_losses() -> None:
    draws = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(10, 4, generator=draws), torch.randint(-1, 2, (10, 4), generator=draws)
    whole, parts = losses.build("two_way"), losses.build("two_way", gpu_batch=4)
    expected = sum(whole(logits[start : start + 4], labels[start : start + 4]) for start in (0, 4, 8)) / 3
    torch.testing.assert_close(parts(logits, labels), expected)
    assert parts(logits, labels) != whole(logits, labels)
    torch.testing.assert_close(losses.build("two_way", gpu_batch=10)(logits, labels), whole(logits, labels))
    with pytest.raises(ConfigError, match="use it with reduction mean"):
        losses.build("two_way", gpu_batch=4, reduction="sum")
