"""What `mls labels doctor` says, on tables of which it is known what is missing, beside tables that miss nothing."""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mls.errors import ConfigError, UserError
from mls.eval import labels_doctor
from mls.eval.labels_doctor import Share, audit_chances, audited, examine, likelihood, ranked
from mls.tools.labels import doctor

HIDE = 0.4


def made(noise: float = 0.15, images: int = 450, classes: int = 6) -> tuple[Tensor, Tensor]:
    """Features that tell classes apart up to noise, and the truth: a fifth of each class is present."""
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(images, 16, generator=draws)
    scores = features @ torch.randn(16, classes, generator=draws) / 4 + noise * torch.randn(
        images, classes, generator=draws
    )
    return features, torch.where(scores > scores.quantile(0.8, dim=0), 1, -1).to(torch.int8)


def tags(truth: Tensor, share: float) -> Tensor:
    """Only positives are written, a share of them is missing."""
    hidden = torch.rand(truth.shape, generator=torch.Generator().manual_seed(1)) < share
    return torch.where((truth > 0) & ~hidden, 1, 0).to(torch.int8)


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels_doctor, "EPOCHS", 15)
        yield


@pytest.fixture(scope="module")
def examined() -> dict[float, tuple[Tensor, Tensor, Tensor, labels_doctor.Missing]]:
    found = {}
    for share in (0.0, HIDE):
        features, truth = made()
        labels = tags(truth, share)
        found[share] = (features, truth, labels, examine(features, labels))
    return found


def test_the_rate_is_the_known_one_and_none_where_nothing_is_missing(examined) -> None:
    whole, missing = examined[0.0][3], examined[HIDE][3]
    assert whole.rate.value < 0.05
    assert missing.rate.low < HIDE < missing.rate.high
    assert missing.rate.high - missing.rate.low < 0.4
    for one in (whole, missing):  # a known share is found again
        assert one.control.value == pytest.approx(one.expected, abs=0.2)
    assert whole.alone.low < 0.05 and missing.beside.low < HIDE < missing.beside.high


def test_where_classes_overlap_the_rate_is_a_bound(examined) -> None:
    features, truth = made(noise=1.0)
    assert examine(features, tags(truth, 0.0)).rate.value > examined[0.0][3].rate.value + 0.1


def test_the_likeliest_are_missing_positives_where_chance_finds_few(examined) -> None:
    _, truth, labels, missing = examined[HIDE]
    likely = likelihood(missing, labels)
    assert (likely[labels != 0] == 0).all()
    first = likely.flatten().topk(100).indices
    found, chance = (truth.flatten()[first] > 0).float().mean(), (truth[labels == 0] > 0).float().mean()
    assert found > 0.75
    assert chance < 0.15


def test_a_sample_with_chances_counts_what_is_missing_whatever_the_model_is_worth(examined) -> None:
    """Over many draws the estimate's mean is the truth, and its interval holds it about as often as it says."""
    _, truth, labels, missing = examined[HIDE]
    true = int(((truth > 0) & (labels == 0)).sum())
    for likely in (likelihood(missing, labels), torch.rand(labels.shape, generator=torch.Generator().manual_seed(3))):
        chances = audit_chances(likely, labels, 150)
        draws = torch.Generator().manual_seed(2)
        found = []
        for _ in range(100):
            drawn = (torch.rand(labels.shape, generator=draws) < chances).nonzero().tolist()
            found.append(audited([(bool(truth[i, j] > 0), float(chances[i, j])) for i, j in drawn]))
        assert sum(total for total, _, _ in found) / 100 == pytest.approx(true, rel=0.1)
        assert sum(low <= true <= high for _, low, high in found) >= 85


def test_answers_about_the_likeliest_do_not_lower_the_rate(examined) -> None:
    features, truth, labels, missing = examined[HIDE]
    answered = labels.clone().flatten()
    first = likelihood(missing, labels).flatten().topk(100).indices
    answered[first] = truth.flatten()[first]
    after = examine(features, answered.view_as(labels), labels).rate
    assert after.low < HIDE < after.high
    assert examine(features, answered.view_as(labels)).rate.value < after.value  # as if they had been in the table


def test_one_label_an_image_shows_as_a_rate_that_depends_on_other_labels() -> None:
    features, truth = made()
    first = ((truth > 0).int().cumsum(1) == 1) & (truth > 0)
    missing = examine(features, first.to(torch.int8))
    assert missing.beside.value > 0.9
    assert missing.alone.high < missing.beside.low


def test_losses_are_ranked_on_the_labels_as_they_are_and_noise_is_not_told_apart(examined, monkeypatch) -> None:
    features, truth, labels, _ = examined[HIDE]
    found = ranked(features[:300], labels[:300], features[300:], labels[300:], seeds=2, names=("an", "em", "wan"))
    assert {one.name for one in found} == {"an", "em", "wan"}
    assert {one.name: one.difference for one in found}["an"] == 0
    assert found == sorted(found, key=lambda one: -one.value)
    right = truth[300:].float()  # of `em` the second seed is as wrong as the first is right
    scores = lambda name, *rest: -right if (name, rest[-1]) == ("em", 1) else right
    monkeypatch.setattr(labels_doctor, "scores_of", scores)
    worse = ranked(features[:300], labels[:300], features[300:], truth[300:], seeds=2, names=("an", "em"))[1]
    assert worse.low <= worse.difference <= worse.high < 0  # interval and difference are of the same mean


def test_an_interval_of_no_cells_says_nothing() -> None:
    assert (Share.wilson(0, 0).low, Share.wilson(0, 0).high) == (0.0, 1.0)


def test_a_table_is_examined_answered_and_examined_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(labels_doctor, "EPOCHS", 3)
    rows = []
    for number in range(60):
        name = f"{'=' * (number == 0)}{number}.png"  # a formula to a spreadsheet
        Image.new("RGB", (16, 16), (4 * number, 255 * (number % 2), 30)).save(tmp_path / name)
        rows.append([f"./{name}", "1" if number % 2 and number % 5 else "", "1" if number > 40 else ""])
    with open(table := tmp_path / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "green", "red"], *rows])
    call = [str(table), "augment.size=16", "data.seed=1"]
    out = tmp_path / "doctor"
    doctor(call, "random:resnet_tiny", out, count=10, sample=8)
    told = capfd.readouterr().out
    assert "missing: at most" in told
    assert "control, 30% of the labels hidden" in told
    with open(out / "answers.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert 10 <= len(listed) <= 25
    assert (out / "suspects.html").read_text().count("<img") == 10
    for row in listed:
        row["value"] = str(int(int(row["image"].strip("./=png")) % 2)) if row["class"] == "green" else "0"
    with open(out / "answers.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, listed[0])
        writer.writeheader()
        writer.writerows(listed)
    doctor(call, "random:resnet_tiny", out, count=10, sample=8)
    told = capfd.readouterr().out
    assert "sampled cells are present" in told
    with open(out / "answers.csv", newline="") as file:
        again = list(csv.DictReader(file))
    assert again[: len(listed)] == listed  # kept, and nothing answered is asked again
    assert len({(row["image"], row["class"]) for row in again}) == len(again) > len(listed)
    with pytest.raises(ConfigError, match=r"data.validation=0 of \d+ training images leaves none to compare losses on"):
        doctor([*call, "data.validation=0"], "random:resnet_tiny", out, count=10, sample=8)
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match=r"holds answers for .*labels.csv: choose another --out"):
        doctor([str(shutil.copy(table, tmp_path / "b")), *call[1:]], "random:resnet_tiny", out, count=10, sample=8)
    with pytest.raises(UserError, match=r"nowhere/labels.csv"):
        doctor([str(tmp_path / "nowhere" / "labels.csv"), *call[1:]], "random:resnet_tiny", out, count=10, sample=8)
    full = tmp_path / "full.csv"
    full.write_text("image,green\n" + "".join(f"{row[0]},{int(bool(row[1]))}\n" for row in rows))
    with pytest.raises(ConfigError, match="no label is unknown, so none is missing: data.zero=unknown asks"):
        doctor([str(full), *call[1:]], "random:resnet_tiny", tmp_path / "other", count=10, sample=0)
