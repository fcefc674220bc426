"""The analyses of the paper on entropy maximisation, on a few embedded scenes: scores, losscurve, classwise."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mls.errors import DataError
from mls.eval.supervised import prepare
from mls.frozen.metrics import average_precision
from mls.tools.analyses import Finding, Study, distributions
from mls.tools.analyses.distributions import annotated_loss, kinds, training_kinds


@given(st.lists(st.tuples(st.sampled_from([-1, 0, 1]), st.booleans()), min_size=2, max_size=30))
def test_every_label_with_known_truth_is_of_one_kind(labels: list[tuple[int, bool]]) -> None:
    fixed = [(1, False), (-1, False)]  # without these there is nothing to look at
    truth = torch.tensor([[value for value, _ in [*fixed, *labels]]], dtype=torch.int8)
    observed = torch.tensor([[value * seen for value, seen in [*fixed, *labels]]], dtype=torch.int8)
    found = kinds(truth, observed)
    assert torch.equal(found.annotated.int() + found.missed.int() + found.absent.int(), (truth != 0).int())
    assert torch.equal(found.absent_unseen, found.absent & (observed == 0))


def test_full_labels_hide_nothing_so_there_is_nothing_to_look_at(study: Study, tmp_path: Path) -> None:
    full = Study("spml_scenes", [*study.overrides, "data.labels=full"], None, 0, tmp_path)
    for analysis in (distributions.scores, distributions.losscurve):
        with pytest.raises(DataError, match="use data.labels=single_positive"):
            analysis(full)


def test_scores_tell_the_distance_between_both_distributions(
    study: Study, picture_bytes: Callable[[Finding], int]
) -> None:
    found = distributions.scores(study)
    assert [row[0] for row in found.rows] == ["an", "em", "em_apl"]
    assert picture_bytes(found) > 20_000
    kind = training_kinds(study)
    most = int(kind.missed.sum(0).argmax())
    assert f"class {most}" in found.header[1]
    probabilities = study.trained("em").scores()
    for part, distance in ((slice(None), found.numbers["em/all"]), (slice(most, most + 1), found.numbers["em/class"])):
        positives = probabilities[:, part][kind.missed[:, part]]
        negatives = probabilities[:, part][kind.absent_unseen[:, part]]
        assert distance == pytest.approx(between_quantiles(positives, negatives), abs=1e-5)


def between_quantiles(first: torch.Tensor, second: torch.Tensor) -> float:
    """The Wasserstein distance of two samples, restated: the mean distance of equal quantiles, each value of either
    sample repeated until both have the same size."""
    many = [len(second), len(first)]
    ordered = [x.double().sort().values.repeat_interleave(n) for x, n in zip((first, second), many, strict=True)]
    return float((ordered[0] - ordered[1]).abs().mean())


def test_the_distance_of_samples_that_are_moved_apart_is_the_way() -> None:
    assert between_quantiles(torch.tensor([0.1, 0.3]), torch.tensor([0.6, 0.8, 0.6, 0.8])) == pytest.approx(0.5)


def test_the_loss_curve_has_each_epoch_and_ends_with_the_loss_of_the_last_weights(
    study: Study, picture_bytes: Callable[[Finding], int]
) -> None:
    last = Study(study.protocol, [*study.overrides, "training.select=last"], None, 0, study.root)
    found = distributions.losscurve(last)
    assert [row[0] for row in found.rows] == ["1", "2"]
    assert found.header == ["epoch", "an", "em"]
    assert picture_bytes(found) > 10_000
    training, annotated = last.trained("em"), training_kinds(last).annotated
    assert int(annotated.sum()) == len(annotated)  # a single positive each
    expected = -training.scores()[annotated].double().log().mean()
    assert found.numbers["em/epoch2"] == pytest.approx(float(expected), rel=1e-6)
    assert found.rows[1][2] == f"{float(expected):.3f}"


def test_a_certain_mistake_has_a_large_loss_and_no_infinite_one(study: Study) -> None:
    training = study.trained("an")
    with torch.no_grad():
        training.classifier.head.bias.fill_(-1e4)
    annotated = training_kinds(study).annotated
    assert training.scores()[annotated].max() == 0
    assert 50 < annotated_loss(training, annotated) < float("inf")


def test_classes_are_sorted_by_gain_and_gains_add_up(study: Study, picture_bytes: Callable[[Finding], int]) -> None:
    found = distributions.classwise(study)
    assert sorted(row[0] for row in found.rows) == [str(digit) for digit in range(10)]
    gains = [float(row[5]) for row in found.rows]
    assert gains == sorted(gains, reverse=True)
    assert picture_bytes(found) > 10_000
    test = prepare(study.load("an").data).test
    an, em = (average_precision(study.trained(loss).scores(test), test.truth) for loss in ("an", "em"))
    for name, *values in found.rows:
        column = int(name)
        assert values[:2] == [f"{100 * an[column]:.1f}", f"{100 * em[column]:.1f}"]
        assert found.numbers[f"em/{name}"] == pytest.approx(100 * float(em[column] - an[column]))


def test_of_many_classes_the_picture_shows_both_ends(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "MOST_BARS", 3)
    found = distributions.classwise(study)
    labels = [label.get_text() for label in found.figure.axes[0].get_yticklabels()]
    names = [row[0] for row in found.rows]
    assert labels == [*names[:3], *names[-3:]]


def test_imbalance_counts_the_unannotated_labels_of_each_class(
    study: Study, picture_bytes: Callable[[Finding], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLS_DATA", str(tmp_path))  # none of the paper's data sets is there
    found = distributions.imbalance(study)
    assert picture_bytes(found) > 10_000
    kind = training_kinds(study)
    positive, negative = int(kind.missed.sum()), int(kind.absent_unseen.sum())
    assert found.rows[0][:3] == ["scenes, all classes", str(positive), str(negative)]
    assert found.numbers["scenes/positive"] == pytest.approx(100 * positive / (positive + negative))
    assert [sum(int(row[i]) for row in found.rows[1:]) for i in (1, 2)] == [positive, negative]


def test_examples_show_training_images_with_what_is_not_annotated_and_test_images(
    study: Study, picture_bytes: Callable[[Finding], int]
) -> None:
    found = distributions.examples(study)
    assert picture_bytes(found) > 20_000
    assert [row[0] for row in found.rows] == [
        f"{loss}, {part} images" for part in ("training", "test") for loss in ("an", "em", "em_apl")
    ]
    assert found.numbers["em/training/there, but not annotated"] > 0
    assert found.numbers["em/test/there, but not annotated"] == 0
