"""Gradients, loss landscape and mAP over the share of labels: numbers that can be known, and runs on a few scenes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mls.core import losses
from mls.eval import supervised
from mls.eval.classifier import build_classifier
from mls.tools.analyses import Study
from mls.tools.analyses.landscape import filter_normalised, landscape, moved_loss
from mls.tools.analyses.regimes import RIVALS, SHARES, SHOWN, gradient, gradients, proportion

SMALL = ["data.scenes.count=48", "data.scenes.test_count=24"]


def study(root: Path, *overrides: str) -> Study:
    return Study("spml_scenes", [*SMALL, *overrides], None, 0, root)


def test_gradients_of_assumed_negatives_are_the_prediction_and_its_distance_from_one() -> None:
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64)
    loss = losses.build("an", reduction="sum")
    torch.testing.assert_close(gradient(loss, logits, 0), logits.sigmoid())
    torch.testing.assert_close(gradient(loss, logits, 1), logits.sigmoid() - 1)


def test_entropy_maximisation_pushes_hardest_where_its_derivative_vanishes(tmp_path: Path) -> None:
    low, high = 1.0, 2.0  # alpha x p (1 - p) is largest where x tanh(x / 2) = 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * torch.tensor(middle / 2).tanh() < 1 else (low, middle)
    p = 1 / (1 + torch.tensor(-low).exp())
    found = gradients(study(tmp_path))
    assert found.numbers["em/where"] == pytest.approx(low, abs=6e-4)  # half a step of the grid
    assert found.numbers["em/largest"] == pytest.approx(float(0.1 * low * p * (1 - p)), rel=1e-5)
    rows = {row[0]: row for row in found.rows}
    assert list(rows) == list(SHOWN)
    assert rows["em"][5] == rows["ent_min"][5] == "±1.543"
    assert rows["an"][1:4] == ["0.0180", "0.5000", "0.9820"]
    assert rows["an"][5] == "at the edge"


def test_large_loss_rejection_drops_the_top_of_its_batch_alone(tmp_path: Path) -> None:
    overrides = ["training.epochs=11", "options_of.ll_r.delta_rel=0.5"]  # 10 times 0.5 % of 12 units of logits
    finding = gradients(study(tmp_path, *overrides))
    assert finding.numbers["ll_r/where"] == pytest.approx(6 - 0.6, abs=2e-3)


def test_losses_with_the_same_gradient_share_a_line(tmp_path: Path) -> None:
    finding = gradients(study(tmp_path))
    right = finding.figure.axes[2]
    finding.figure.savefig(tmp_path / "picture.png", dpi=40)
    shared = next(text.get_text() for text in right.get_legend().get_texts() if text.get_text().startswith("an"))
    assert shared == "an, n_ls, ll_r, ent_min, em"


def test_directions_have_filters_as_long_as_the_classifiers_and_leave_normalisation_alone() -> None:
    classifier = build_classifier("resnet_tiny", classes=10)
    direction = filter_normalised(classifier, seed=0, number=1)
    for name, parameter in classifier.named_parameters():
        lengths = direction[name].flatten(1).norm(dim=1) if parameter.ndim > 1 else direction[name]
        expected = parameter.detach().flatten(1).norm(dim=1) if parameter.ndim > 1 else torch.zeros_like(parameter)
        torch.testing.assert_close(lengths, expected)
    other = filter_normalised(classifier, seed=0, number=2)
    assert not torch.equal(direction["head.weight"], other["head.weight"])
    again = filter_normalised(classifier, seed=0, number=1)
    assert torch.equal(direction["head.weight"], again["head.weight"])


def test_a_moved_classifier_is_a_classifier_with_moved_weights() -> None:
    classifier = build_classifier("resnet_tiny", classes=10).eval()
    images, truth = torch.rand(6, 3, 32, 32), torch.randint(-1, 2, (6, 10))
    direction = filter_normalised(classifier, seed=0, number=1)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    moved = moved_loss(classifier, [(images[:4], truth[:4]), (images[4:], truth[4:])], [(0.3, direction)])
    assert all(torch.equal(before[name], value) for name, value in classifier.state_dict().items())
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            parameter += 0.3 * direction[name]
        known = truth != 0
        expected = F.binary_cross_entropy_with_logits(classifier(images)[known], (truth[known] > 0).float())
    assert moved == pytest.approx(float(expected), rel=1e-5)


def test_landscape_is_centred_on_the_loss_of_the_trained_classifier(tmp_path: Path) -> None:
    small = study(tmp_path, "training.epochs=1")
    finding = landscape(small)
    finding.figure.savefig(tmp_path / "picture.png", dpi=40)
    assert [row[0] for row in finding.rows] == ["an", "em"]
    for loss in ("an", "em"):
        training = small.trained(loss)
        images = supervised.prepare(training.protocol.data).test
        expected = F.binary_cross_entropy(training.scores(images), (images.truth > 0).float())
        assert finding.numbers[f"{loss}/at_0"] == pytest.approx(float(expected), rel=1e-4)
        assert finding.numbers[f"{loss}/at_1"] > finding.numbers[f"{loss}/at_0"]


@pytest.mark.long
def test_proportion_trains_each_loss_on_each_share(tmp_path: Path) -> None:
    small = study(tmp_path, "training.epochs=2")
    finding = proportion(small)
    finding.figure.savefig(tmp_path / "picture.png", dpi=40)
    assert [row[0] for row in finding.rows] == list(RIVALS)
    assert finding.header == ["loss", *(f"{100 * share:g} %" for share in SHARES)]
    assert len(list((tmp_path / "eval").iterdir())) == len(RIVALS) * len(SHARES)
    one = small.trained("ll_r", "data.labels=partial_positives", "data.proportion=0.3")
    assert finding.numbers["ll_r/0.3"] == pytest.approx(100 * supervised.test(one)["map"])


def test_an_override_of_the_proportion_leaves_that_one(tmp_path: Path) -> None:
    finding = proportion(study(tmp_path, "training.epochs=2", "data.proportion=0.4", "data.labels=partial_labels"))
    assert finding.header == ["loss", "40 %"]
    assert "partial labels" in finding.summary
