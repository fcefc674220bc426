"""The batched classifiers against scikit-learn and PyTorch, one setting at a time, and the rules about labels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.svm import LinearSVC
from torch import Tensor

from mls.errors import CheckpointError, ConfigError, DataError
from mls.frozen.metrics import mean_average_precision
from mls.frozen.probe import (
    ProbeOptions,
    Sgd,
    few_shot,
    fit_linear,
    held_out_split,
    knn,
    linear_probe,
    nearest,
    read_labels,
    sgd_probe,
    svm_probe,
)
from mls.frozen.probe.design import LEADING, LeadingAxes, axes_for, leading_axes, principal_axes, standardised
from mls.frozen.probe.linear import objective
from mls.frozen.probe.solve import minimise
from mls.streams import generator


def drawn(count: int, seed: int = 0, dim: int = 30, classes: int = 4) -> tuple[Tensor, Tensor]:
    """fp32 features, rectified and correlated, and the class of each image, which overlaps with the others."""
    world = torch.Generator().manual_seed(1)
    centres, mixing = torch.randn(classes, 8, generator=world), torch.randn(8, dim, generator=world)
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randint(classes, (count,), generator=draw)
    hidden = centres[numbers] + 1.5 * torch.randn(count, 8, generator=draw)
    return torch.relu(hidden @ mixing + 0.5 * torch.randn(count, dim, generator=draw)), numbers


def annotated(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features and annotations of three classes, +1, -1 or 0: a tenth is not known."""
    features, numbers = drawn(count, seed)
    signs = torch.stack([numbers == 0, numbers % 2 == 0, numbers > 1], dim=1).to(torch.int8) * 2 - 1
    unknown = torch.rand(signs.shape, generator=torch.Generator().manual_seed(seed + 50)) < 0.1
    return features, signs.masked_fill(unknown, 0)


# ----------------------------------------------------------------------------------------------------- labels


def test_integers_leave_out_what_is_not_annotated_and_floats_call_it_absent() -> None:
    assert read_labels(torch.tensor([[1, 0], [-1, 1]])).known.tolist() == [[True, False], [True, True]]
    assert read_labels(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).known is None
    assert read_labels(torch.tensor([[True, False], [False, True]])).numbers.tolist() == [0, 1]
    with pytest.raises(DataError, match="without any -1"):
        read_labels(torch.tensor([[1, 0], [0, 1]]))
    with pytest.raises(DataError, match="give integers from 0"):
        read_labels(torch.tensor([0, -1]))


def test_a_fifth_of_every_class_is_held_out() -> None:
    numbers = torch.arange(10).repeat_interleave(15)
    fitted, held = held_out_split(read_labels(numbers), 0.2, seed=1)
    assert numbers[held].bincount().tolist() == [3] * 10
    assert torch.cat([fitted, held]).sort().values.tolist() == list(range(150))
    assert not torch.equal(held, held_out_split(read_labels(numbers), 0.2, seed=2)[1])


def test_few_shot_draws_k_of_each_class_and_nests() -> None:
    _, numbers = drawn(200)
    few, more = few_shot(numbers, 2, draw=3), few_shot(numbers, 5, draw=3)
    assert numbers[few].bincount().tolist() == [2, 2, 2, 2]
    assert set(few.tolist()) < set(more.tolist())
    assert not torch.equal(few, few_shot(numbers, 2, draw=4))
    assert torch.equal(few, few_shot(numbers, 2, draw=3))


def test_few_shot_of_several_labels_holds_k_positives_of_each_class() -> None:
    _, signs = annotated(200)
    rows = few_shot(signs, 6)
    counts = (signs[rows] > 0).sum(dim=0)
    assert (counts >= 6).all() and len(rows) <= 18
    with pytest.raises(DataError, match="lower k"):
        few_shot(signs, 150)


# -------------------------------------------------------------------------------------------------------- kNN


def voting(temperature: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda distances: np.exp((1 - distances) / temperature)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_knn_accuracy_equals_sklearns(k: int) -> None:
    (train, numbers), (test, truth) = drawn(200), drawn(101, seed=1)
    found = knn(train, numbers, test, truth, k=[1, 7, 40], temperature=0.05)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=voting(0.05), algorithm="brute").fit(train, numbers)
    assert found.metric == "top1"
    assert found.values[k] == pytest.approx(theirs.score(test, truth), abs=1e-9)


def test_multi_label_knn_equals_sklearns_weighted_mean() -> None:
    (train, numbers), (test, truth) = drawn(200), drawn(101, seed=1)
    labels, wanted = ((torch.stack([n == 0, n > 1, n > 0], dim=1)).double() for n in (numbers, truth))
    theirs = KNeighborsRegressor(9, metric="cosine", weights=voting(0.1), algorithm="brute").fit(train, labels)
    expected = mean_average_precision(torch.from_numpy(theirs.predict(test.numpy())), wanted)
    assert knn(train, labels, test, wanted, k=[9, 3], temperature=0.1).values[9] == pytest.approx(expected, abs=1e-6)


def test_leave_one_out_equals_asking_about_each_image_with_the_others() -> None:
    features, numbers = drawn(60)
    right = 0.0
    for i in range(60):
        others = torch.arange(60) != i
        one = slice(i, i + 1)
        right += knn(features[others], numbers[others], features[one], numbers[one], k=[5]).values[5]
    assert knn(features, numbers, k=[5]).values[5] == pytest.approx(right / 60, abs=1e-9)


def test_a_row_never_votes_for_itself_among_its_duplicates() -> None:
    rows = torch.ones(9, 4)
    indices = nearest(rows, rows, 3, leave_one_out=True).indices
    assert indices.shape == (9, 3)
    assert not (indices == torch.arange(9)[:, None]).any()


def test_neighbours_without_an_annotation_do_not_vote() -> None:
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    labels = torch.tensor([[0], [1], [-1], [0]], dtype=torch.int8)
    found = knn(train, labels, train[[0, 2]], torch.tensor([[1], [-1]], dtype=torch.int8), k=[2])
    assert found.values == {2: 1.0}


def test_knn_needs_the_truth() -> None:
    features, numbers = drawn(20)
    with pytest.raises(DataError, match="test labels"):
        knn(features, numbers, features)
    with pytest.raises(ConfigError, match="uses no neighbours"):
        knn(features, numbers, k=[0])


# ------------------------------------------------------------------------------------------- logistic regression


def test_wide_features_of_few_images_equal_sklearn() -> None:
    features, numbers = drawn(40, dim=120)
    weight, bias = fit_linear(features, numbers, [1e-2], tolerance=1e-10)
    theirs = LogisticRegression(C=1 / (2 * 40 * 1e-2), tol=1e-9, max_iter=5000).fit(features.double(), numbers)
    ours = torch.cat([weight[0], bias[0]]).T.double()
    expected = torch.from_numpy(np.c_[theirs.coef_, theirs.intercept_])
    difference = (ours - ours.mean(0)) - (expected - expected.mean(0))
    assert difference[:, :-1].abs().max() < 1e-4
    assert difference[:, -1].abs().max() < 1e-3


def test_entries_that_are_not_annotated_are_left_out_of_their_class() -> None:
    (features, signs), (test, truth) = annotated(300), annotated(100, seed=1)
    found = linear_probe(features, signs, test, truth, l2=[1e-2], tolerance=1e-10)
    design = standardised(features)
    x = ((features.double() - design.mean) * design.scale).numpy()
    queries = ((test.double() - design.mean) * design.scale).numpy()
    precisions = []
    for column in range(3):
        known, known_test = (labels[:, column].numpy() != 0 for labels in (signs, truth))
        cost = 1 / (2 * known.sum() * 1e-2)
        theirs = LogisticRegression(C=cost, tol=1e-9, max_iter=5000).fit(x[known], signs[:, column].numpy()[known])
        scores = theirs.decision_function(queries)
        np.testing.assert_allclose(found.scores[:, column].numpy(), scores, atol=2e-3)
        precisions.append(average_precision_score(truth[:, column].numpy()[known_test] > 0, scores[known_test]))
    assert found.value == pytest.approx(np.mean(precisions), abs=2e-3)


def test_weight_and_bias_belong_to_the_features_as_they_are() -> None:
    (train, numbers), (test, truth) = drawn(200), drawn(50, seed=1)
    for found in (
        linear_probe(train * 3 + 1, numbers, test * 3 + 1, truth),
        sgd_probe(train * 3 + 1, numbers, test * 3 + 1, truth, Sgd(lr=[0.1], epochs=3)),
    ):
        assert torch.allclose((test * 3 + 1) @ found.weight + found.bias, found.scores, atol=1e-5)


def test_a_validation_set_chooses_and_is_not_trained_on() -> None:
    (train, numbers), (test, truth) = drawn(80), drawn(100, seed=1)
    grid = (1e-5, 1e-2, 10.0)
    found = linear_probe(train, numbers, test, truth, l2=grid, options=ProbeOptions(validation=(test, truth)))
    alone = [linear_probe(train, numbers, test, truth, l2=[l2]).value for l2 in grid]
    assert [each.value for each in found.tried] == pytest.approx(alone, abs=0.011)
    assert found.value == max(each.value for each in found.tried)


def test_without_a_refit_only_the_part_that_is_not_held_out_is_fitted() -> None:
    train, numbers = drawn(100)
    labels = torch.nn.functional.one_hot(numbers).float()
    _, held = held_out_split(read_labels(labels, multilabel=True), 0.2, seed=0)
    wrong = labels.clone()
    wrong[held] = 1 - labels[held]
    first, second, refitted = (
        linear_probe(train, given, train, l2=[1e-2], options=ProbeOptions(multilabel=True, refit=refit)).weight
        for given, refit in [(labels, False), (wrong, False), (wrong, True)]
    )
    assert torch.equal(first, second)
    assert not torch.allclose(refitted, first, atol=1e-2)


@pytest.mark.parametrize("multilabel", [False, True])
def test_each_of_several_penalties_has_the_minimum_that_it_has_alone(multilabel: bool) -> None:
    features, numbers = drawn(300)
    features, grid = features.double(), [1e-3, 1.0, 1e-2, 3e-3, 0.1]
    design, labels = standardised(features), read_labels(numbers, multilabel)
    axes = principal_axes(design)
    together = minimise(design, objective(labels, design), grid, axes, tolerance=1e-11)
    for fit, l2 in zip(together, grid, strict=True):
        alone = minimise(design, objective(labels, design), [l2], axes, tolerance=1e-11)[0]
        assert torch.allclose(fit.loss, alone.loss, rtol=1e-7)
        assert torch.allclose(fit.weight, alone.weight, atol=1e-3 * float(alone.weight.abs().max()))


@pytest.mark.parametrize("images", [80, 300])  # fewer than features, and more
def test_leading_axes_lead_to_the_same_minimum(images: int) -> None:
    features, numbers = drawn(images, dim=100)
    design, labels = standardised(features.double()), read_labels(numbers)
    some, every = leading_axes(design), principal_axes(design)
    assert torch.allclose(some.squares[LEADING - 5 : LEADING], every.squares[-5:], rtol=1e-2)
    identity = torch.eye(100, dtype=torch.float64)
    assert torch.allclose(some.to_features(identity) @ (some.to_features(identity) / design.scale**2).T, identity)
    assert torch.allclose(some.from_features(identity), some.to_features(identity).T)
    fits = [minimise(design, objective(labels, design), [1e-2], axes, tolerance=1e-12)[0] for axes in (some, every)]
    assert torch.allclose(fits[0].loss, fits[1].loss, rtol=1e-9)
    assert torch.allclose(fits[0].weight, fits[1].weight, atol=1e-4 * float(fits[1].weight.abs().max()))


def test_axes_are_all_worked_out_only_where_that_pays() -> None:
    design = standardised(torch.randn(1100, 1100))
    assert isinstance(axes_for(design, columns=20, penalties=1), LeadingAxes)
    assert not isinstance(axes_for(design, columns=20, penalties=100), LeadingAxes)
    assert not isinstance(axes_for(standardised(torch.randn(1100, 64)), columns=20, penalties=1), LeadingAxes)


def test_gap_says_how_far_the_loss_is_above_its_minimum() -> None:
    features, signs = annotated(300)
    design, labels = standardised(features.double()), read_labels(signs)
    rough, exact = (minimise(design, objective(labels, design), [1e-3], tolerance=t)[0] for t in (1e-2, 1e-12))
    gaps = rough.loss - exact.loss
    assert (gaps > 1e-9).all() and (gaps < 10 * rough.gap).all() and (rough.gap < 10 * gaps).all()
    assert rough.rounds < exact.rounds


@pytest.mark.parametrize("dim", [10, 100])
def test_features_that_are_not_finite_are_a_users_error(dim: int) -> None:
    features, numbers = drawn(50, dim=dim)
    features[3, 2] = torch.nan
    with pytest.raises(CheckpointError, match="hold NaN"):
        linear_probe(features, numbers, features)


def test_a_penalty_of_nothing_is_a_users_error() -> None:
    features, numbers = drawn(50)
    with pytest.raises(ConfigError, match="all above 0"):
        linear_probe(features, numbers, features, l2=[0.0])


# ------------------------------------------------------------------------------------------------------------ SGD


@pytest.mark.parametrize("multilabel", [False, True])
def test_sgd_equals_torch(multilabel: bool) -> None:
    features, numbers = drawn(50)
    labels = torch.stack([numbers == c for c in (0, 1, 2, 3)], dim=1).float()
    labels[:, 0] = (numbers > 1).float()
    if not multilabel:
        labels = torch.nn.functional.one_hot(numbers).float()
    options = ProbeOptions(seed=3, refit=False, validation=(features, labels), multilabel=multilabel)
    for lr, decay in [(3.0, 1e-2), (0.1, 0.0)]:
        found = sgd_probe(features, labels, features, sgd=Sgd([lr], [decay], epochs=5, batch_size=16), options=options)
        layer = torch.nn.Linear(30, 4)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1, momentum=0.9, weight_decay=decay)
        for epoch in range(5):
            optimizer.param_groups[0]["lr"] = lr * 16 / 256 * (1, 1, 1, 0.1, 0.01)[epoch]
            for batch in torch.randperm(50, generator=generator(3, "probe order", epoch)).split(16):
                optimizer.zero_grad()
                logits = layer(features[batch])
                if multilabel:
                    entries = torch.nn.functional.binary_cross_entropy_with_logits(
                        logits, labels[batch], reduction="none"
                    )
                    entries.sum(dim=1).mean().backward()
                else:
                    torch.nn.functional.cross_entropy(logits, numbers[batch]).backward()
                optimizer.step()
        assert torch.allclose(found.weight, layer.weight.T.detach(), atol=1e-4)
        assert torch.allclose(found.bias, layer.bias.detach(), atol=1e-4)


def test_candidates_of_sgd_do_not_touch_one_another_and_one_that_diverges_is_not_chosen() -> None:
    (train, numbers), (test, truth) = drawn(100), drawn(60, seed=1)
    options = ProbeOptions(validation=(test, truth))
    sgd = lambda *lr: Sgd(lr, weight_decay=[0.0], epochs=40, schedule="cosine")
    alone = sgd_probe(train, numbers, test, truth, sgd(0.1), options)
    found = sgd_probe(train, numbers, test, truth, sgd(1e38, 0.1, 1e-9), options)
    assert found.chosen == {"lr": 0.1, "weight_decay": 0.0}
    assert found.tried[0].value != found.tried[0].value
    assert torch.allclose(found.weight, alone.weight, atol=1e-5)


def test_after_a_first_comparison_the_best_pairs_of_the_best_rates_are_trained_as_if_alone() -> None:
    (train, numbers), (test, truth) = drawn(100), drawn(60, seed=1)
    options = ProbeOptions(validation=(test, truth))
    sgd = Sgd([0.001, 0.01, 0.1, 1.0], [0.0, 1e-2], epochs=12, schedule="cosine", batch_size=16)
    short = sgd_probe(train, numbers, test, sgd=replace(sgd, epochs=2), options=options).tried
    value = {(one.settings["lr"], one.settings["weight_decay"]): one.value for one in short}
    ranked = sorted(sgd.lr, key=lambda lr: (-max(value[lr, 0.0], value[lr, 1e-2]), lr))
    expected = [(lr, 0.0 if value[lr, 0.0] >= value[lr, 1e-2] else 1e-2) for lr in ranked[:2]]
    found = sgd_probe(train, numbers, test, truth, replace(sgd, first=2), options)
    assert [(one.settings["lr"], one.settings["weight_decay"]) for one in found.tried] == expected
    alone = replace(sgd, lr=[found.chosen["lr"]], weight_decay=[found.chosen["weight_decay"]])
    torch.testing.assert_close(found.weight, sgd_probe(train, numbers, test, truth, alone, options).weight)
    assert found.chosen == max(found.tried, key=lambda one: one.value).settings


def test_sgd_reads_features_mapped_into_memory(tmp_path: Path) -> None:
    features, numbers = drawn(64)
    np.save(tmp_path / "features.npy", features.numpy().astype(np.float16))
    mapped = torch.from_numpy(np.load(tmp_path / "features.npy", mmap_mode="r+"))
    calls: list[tuple[int, int]] = []
    options = ProbeOptions(progress=lambda *call: calls.append(call))
    found = sgd_probe(mapped, numbers, mapped, numbers, Sgd(lr=[0.3], epochs=4), options)
    assert found.value is not None and found.value > 0.4
    assert calls == [(epoch, 4) for epoch in (1, 2, 3, 4)] * 2


# ------------------------------------------------------------------------------------------------------------ SVM


def theirs_svm(x: Tensor, signs: np.ndarray, cost: float) -> LinearSVC:
    weights = {1: 2.0, -1: 1.0}
    return LinearSVC(C=cost, class_weight=weights, dual=False, tol=1e-9, max_iter=20000).fit(x.numpy(), signs)


@pytest.mark.parametrize("dim", [30, 400])
def test_machines_equal_sklearns_and_so_does_the_chosen_cost(dim: int) -> None:
    features, numbers = drawn(150, dim=dim)
    test, truth = drawn(80, seed=1, dim=dim)
    signs, wanted = (torch.stack([n == 0, n > 1], dim=1).to(torch.int8) * 2 - 1 for n in (numbers, truth))
    signs[:20, 1] = 0
    found = svm_probe(features, signs, test, wanted, costs=(0.01, 1.0, 100.0))
    x, queries = (torch.nn.functional.normalize(f, dim=1) for f in (features, test))
    for column in range(2):
        known = signs[:, column] != 0
        here, labels = x[known], signs[known, column].numpy()
        tried = [
            cross_val_score(theirs_svm(here, labels, c), here, labels, cv=3, scoring="average_precision").mean()
            for c in (0.01, 1.0, 100.0)
        ]
        np.testing.assert_allclose(found.tried[:, column].numpy(), tried, atol=2e-3)
        assert found.cost[column] == (0.01, 1.0, 100.0)[int(np.argmax(tried))]
        machine = theirs_svm(here, labels, float(found.cost[column]))
        scale = np.abs(machine.coef_).max()
        np.testing.assert_allclose(found.weight[:, column].numpy(), machine.coef_[0], atol=5e-3 * scale)
        np.testing.assert_allclose(found.bias[column].item(), machine.intercept_[0], atol=5e-3 * scale)
        expected = average_precision_score(wanted[:, column], machine.decision_function(queries))
        assert found.average_precision[column].item() == pytest.approx(expected, abs=2e-3)


def test_machines_of_single_labels_are_one_against_the_rest() -> None:
    (train, numbers), (test, truth) = drawn(150), drawn(80, seed=1)
    found = svm_probe(train, numbers, test, truth, costs=(0.1, 1.0))
    assert found.weight.shape == (30, 4)
    assert found.value == (found.scores.argmax(dim=1) == truth).double().mean().item() > 0.4


def test_a_class_that_cannot_be_cross_validated_is_a_users_error() -> None:
    features, signs = annotated(60)
    signs[:, 1] = -1
    with pytest.raises(DataError, match="cannot be cross-validated"):
        svm_probe(features, signs, features)
