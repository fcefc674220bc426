"""Label correlation, margins and top-5 predictions: numbers that can be known, and runs on a few scenes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mls.eval.supervised import prepare
from mls.tools.analyses import Study
from mls.tools.analyses.hyperspherical import (
    ANALYSES,
    FIXED,
    STRONGEST,
    _correlation_figure,
    clustered,
    correlation,
    margins,
    marked,
    most_different,
    phi,
    top5,
    total_gradients,
    verdicts,
)

SMALL = ["data.scenes.count=128", "data.scenes.test_count=64", "data.validation=0.1", "training.epochs=1"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study("spml_scenes", SMALL, None, 0, tmp_path_factory.mktemp("analyses"))


def labels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_phi_is_the_correlation_of_the_columns() -> None:
    truth = labels(50, 6)
    np.testing.assert_allclose(phi(truth), np.corrcoef(truth.T.numpy()), atol=1e-12)


def test_phi_counts_images_where_both_labels_are_known_and_is_nan_for_a_constant_class() -> None:
    truth = labels(60, 3)
    truth[:20, 0] = 0
    truth[:, 2] = 1
    found = phi(truth)
    assert float(found[0, 1]) == pytest.approx(np.corrcoef(truth[20:, :2].T.numpy())[0, 1])
    assert found[2].isnan().all()


def test_similar_classes_stand_beside_each_other() -> None:
    group = torch.tensor([0, 1, 0, 1, 1, 0])
    similarity = torch.where(group[:, None] == group, 0.9, -0.5).double().fill_diagonal_(1)
    order, ends = clustered(similarity)
    assert group[order].tolist() in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    assert ends == [3]


@pytest.mark.parametrize("classes", [80, 312])
def test_names_of_many_classes_can_be_read_when_the_picture_is_enlarged(classes: int) -> None:
    embeddings = torch.nn.functional.normalize(torch.randn(classes, 16, generator=torch.Generator().manual_seed(0)))
    names = [f"class {number}" for number in range(classes)]
    figure = _correlation_figure(embeddings @ embeddings.T, embeddings @ embeddings.T, names, "")
    left, right = figure.axes[:2]
    assert {label.get_text() for label in left.get_yticklabels()} == set(names)
    assert figure.get_size_inches()[1] / classes > left.get_yticklabels()[0].get_fontsize() / 72  # names do not overlap
    assert len(left.lines) == len(right.lines) > 10  # borders of clusters


@given(st.integers(0, 1000), st.floats(0, 0.8), st.floats(0.01, 0.2))
def test_a_larger_margin_gives_positives_more_and_negatives_less(seed: int, margin: float, more: float) -> None:
    stream = torch.Generator().manual_seed(seed)
    cosines = torch.rand(8, 5, generator=stream) * 1.2 - 0.4  # angle and margin stay below pi: the loss falls there
    truth = torch.randint(0, 2, (8, 5), generator=stream) * 2 - 1
    observed = truth.clamp(min=0) * torch.randint(0, 2, (8, 5), generator=stream)
    small = total_gradients(cosines, observed, truth, margin, scale=20.0)
    large = total_gradients(cosines, observed, truth, margin + more, scale=20.0)
    assert large["positives"] >= small["positives"]
    assert large["negatives"] <= small["negatives"]
    assert large["of which false negatives"] <= small["of which false negatives"]
    assert small["of which false negatives"] <= small["negatives"]


@pytest.mark.parametrize("analysis", ANALYSES)
def test_the_picture_can_be_written(study: Study, analysis: str, tmp_path: Path) -> None:
    finding = ANALYSES[analysis](study)  # a glyph that is missing, or a layout that fails, warns and so is an error
    finding.figure.savefig(tmp_path / "picture.png", dpi=40)
    assert all(len(row) == len(finding.header) for row in finding.rows)


def test_correlation_lists_the_closest_embeddings_first(study: Study) -> None:
    finding = correlation(study)
    cosines = [float(row[1]) for row in finding.rows]
    assert len(cosines) == STRONGEST
    assert cosines == sorted(cosines, reverse=True)
    truth = phi(prepare(study.load("hml").data).train.truth)
    one, other = (int(name) for name in finding.rows[0][0].split(" and "))
    assert finding.rows[0][2] == f"{truth[one, other]:.3f}"
    assert -1 <= finding.numbers["spearman"] <= 1


def test_margins_compares_fixed_ones_with_the_learnt_one(study: Study) -> None:
    finding = margins(study)
    assert [row[0].split(",")[0] for row in finding.rows[:-1]] == [f"{margin:g}" for margin in FIXED]
    assert "adaptive" in finding.rows[-1][0]
    by_margin = sorted(finding.rows, key=lambda row: float(row[0].split(",")[0]))
    positives = [float(row[2]) for row in by_margin]
    assert positives == sorted(positives)
    for margin in FIXED:
        options = f"training.options={{margin: {margin}, learn: false, adaptive: false}}"
        assert float(study.trained("hml", options).loss.margin) == pytest.approx(margin)


def test_top5_shows_both_losses_and_no_unannotated_label_where_all_are_annotated(study: Study) -> None:
    finding = top5(study)
    parts = ["an, test images", "hml, test images", "an, training images", "hml, training images"]
    assert [row[0] for row in finding.rows] == parts
    for loss in ("an", "hml"):
        assert finding.numbers[f"{loss}/not annotated"] == 0
        assert finding.numbers[f"{loss}/right"] + finding.numbers[f"{loss}/wrong"] == pytest.approx(1)
        assert finding.numbers[f"{loss}/training/there, but not annotated"] > 0


def test_verdicts_on_the_most_probable_classes() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.1], [0.9, 0.8, 0.7, 0.6, 0.5, 0.1]])
    found = verdicts(scores, torch.tensor([[-1, 1, 0, -1, -1, 1], [1, 1, 0, -1, -1, -1]]))
    assert found["right"] == pytest.approx(3 / 10)
    assert found["wrong"] == pytest.approx(5 / 10)
    assert found["not annotated"] == pytest.approx(2 / 10)
    assert found["first one right"] == 0.5
    assert found["positives found"] == 3 / 4


def test_what_is_there_but_not_annotated_is_told_apart_and_found() -> None:
    truth, observed = torch.tensor([[1, 1, -1]]), torch.tensor([[0, 1, 0]])
    found = verdicts(torch.tensor([[0.9, 0.8, 0.1]]), marked(truth, observed))
    assert found["there, but not annotated"] == found["right"] == found["wrong"] == pytest.approx(1 / 3)
    assert found["first one right"] == found["positives found"] == 1


def test_images_are_shown_first_where_the_two_share_fewest_classes() -> None:
    first = torch.tensor([[9, 8, 7, 6, 5, 0, 0], [9, 8, 7, 6, 5, 0, 0], [9, 8, 7, 6, 5, 0, 0]]) / 10
    second = torch.tensor([[9, 8, 7, 6, 5, 1, 1], [0, 0, 7, 6, 5, 9, 9], [5, 6, 7, 8, 9, 0, 0]]) / 10
    assert most_different(first, second).tolist() == [1, 2, 0]
