"""The analyses of the paper on large losses, on a few embedded scenes: memorisation, cam, evolution."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mls.data.listing import FileSource
from mls.data.scenes import ScenesSource
from mls.errors import DataError
from mls.eval.data import LabelledImages, Located, boxes
from mls.eval.supervised import prepare
from mls.eval.training import Training
from mls.tools.analyses import Finding, Study, large_loss
from mls.tools.analyses.distributions import training_kinds
from mls.tools.analyses.large_loss import (
    Peaks,
    Target,
    activation_maps,
    covered,
    hit,
    pointing_game,
    target_maps,
    targets_of,
)

# ------------------------------------------------------------------------------------------------------ memorisation


def test_the_epoch_of_the_highest_loss_is_kept_and_of_equal_ones_the_first() -> None:
    peaks, everything = Peaks.none(torch.Size([1, 3])), torch.ones(1, 3, dtype=torch.bool)
    for losses in ([0.5, 0.1, 0.3], [0.2, 0.9, 0.3], [0.4, 0.4, 0.3]):
        peaks.add(torch.tensor([losses]), [everything])
    assert peaks.epoch.tolist() == [[1, 2, 1]]
    assert peaks.shares(everything) == pytest.approx([200 / 3, 100 / 3, 0])
    assert [mean for [mean] in peaks.means] == pytest.approx([0.3, 1.4 / 3, 1.1 / 3])


def test_the_shares_of_each_kind_of_label_add_up(study: Study, picture_bytes: Callable[[Finding], int]) -> None:
    found = large_loss.memorisation(study)
    assert picture_bytes(found) > 10_000
    warmup, regular = ([float(cell) for cell in row[1:]] for row in found.rows)
    sums = [a + b for a, b in zip(warmup, regular, strict=True)]
    assert sums[:3] == pytest.approx([100] * 3, abs=0.11)  # rounded cells
    assert sums[3:] == pytest.approx([100, 100, 96, 100, 100, 100])  # the paper's, with its slip
    assert "96.0" in found.summary


def test_the_losses_are_those_of_assumed_negatives(study: Study) -> None:
    """Two epochs, looked at again: the label's loss is higher in the second or it is not."""
    losses = []
    observed = prepare(study.load("an").data).observed
    given_labels = (observed > 0).float()
    study.watched(lambda now: losses.append(F.binary_cross_entropy(now.scores(), given_labels, reduction="none")), "an")
    kind = training_kinds(study)
    first = losses[0] >= losses[1]
    expected = {"TP": kind.annotated, "TN": kind.absent, "FN": kind.missed}
    found = large_loss.memorisation(study)
    for short, mask in expected.items():
        assert found.numbers[f"{short}/warmup"] == pytest.approx(100 * float(first[mask].float().mean()))


# --------------------------------------------------------------------------------------------------------------- cam


@given(st.integers(0, 15), st.integers(0, 15))
def test_a_planted_maximum_is_a_hit_exactly_inside_the_boxes(x: int, y: int) -> None:
    activation = torch.zeros(16, 16)
    activation[y, x] = 1
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.0, 1.0, 0.25]])
    assert hit(activation, boxes) == ((4 <= x < 8 and y >= 8) or (x >= 12 and y < 4))


def test_covered_pixels_of_a_scene_are_those_of_its_boxes(study: Study) -> None:
    test = prepare(study.load("an").data).test
    source = test.images
    assert isinstance(source, ScenesSource)
    for target in targets_of(test, places(test))[:20]:
        expected = torch.zeros(32, 32, dtype=torch.bool)
        for place, column in enumerate(source.scenes.classes[target.row].tolist()):
            x0, y0, x1, y1 = source.scenes.boxes[target.row, place].tolist()
            if column == target.column:
                expected[y0:y1, x0:x1] = True
        assert torch.equal(covered(target.boxes, 32), expected)


def test_targets_are_the_present_classes_of_a_part_too(study: Study) -> None:
    test = prepare(study.load("an").data).test
    part = test.part(torch.tensor([7, 3]))
    for images in (test, part):
        found = torch.zeros_like(images.truth, dtype=torch.bool)
        for target in targets_of(images, places(images)):
            found[target.row, target.column] = True
        assert torch.equal(found, images.truth > 0)


def test_a_map_averages_to_the_logit_without_its_bias(study: Study) -> None:
    training = study.trained("an")
    test = prepare(study.load("an").data).test
    logits = training.scores(test).logit() - training.classifier.head.bias.detach()
    assert torch.allclose(all_maps(training, test).mean((2, 3)), logits, atol=1e-3)


def test_maps_are_of_the_whole_image_whatever_crop_the_test_takes(study: Study) -> None:
    training = study.trained("an")
    test = prepare(study.load("an").data).test
    whole = all_maps(training, test)
    overrides = [*study.overrides, "data.test_crop=centre", "data.test_resize=1.5"]
    cropped = Study(study.protocol, overrides, None, 0, study.root).trained("an")
    cropped.load_weights(training.weights())
    assert not torch.allclose(cropped.scores(test), training.scores(test), atol=1e-3)
    assert torch.equal(all_maps(cropped, test), whole)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_the_pointing_game_is_the_share_of_maps_that_point_at_a_box(pointing: list[bool]) -> None:
    maps, targets = torch.zeros(len(pointing), 4, 4), []
    for row, right in enumerate(pointing):
        place = 7 * row % 16
        maps[row].view(-1)[place] = 1
        y, x = divmod(place if right else (place + 5) % 16, 4)
        targets.append(Target(row, row % 3, torch.tensor([[x, y, x + 1, y + 1]]) / 4))
    assert pointing_game(maps, targets) == pytest.approx(100 * sum(pointing) / len(pointing))


def test_cam_compares_the_eight_methods_of_the_paper_with_chance(
    study: Study, picture_bytes: Callable[[Finding], int]
) -> None:
    found = large_loss.cam(study)
    methods = ["an", "wan", "an_ls", "epr", "role", "ll_r", "ll_ct", "ll_cp"]
    assert [row[0] for row in found.rows] == ["a random place", *methods]
    assert [row[2:] for row in found.rows[1:]][::5] == [["78.9", "46.4"], ["83.7", "54.0"]]
    assert picture_bytes(found) > 50_000
    test = prepare(study.load("an").data).test
    targets = targets_of(test, places(test))
    maps = target_maps(study.trained("ll_r"), test, targets)
    assert torch.equal(
        maps, all_maps(study.trained("ll_r"), test)[[t.row for t in targets], [t.column for t in targets]]
    )
    assert found.rows[6][1] == f"{pointing_game(maps, targets):.1f}"
    areas = [float(covered(target.boxes, 32).float().mean()) for target in targets]
    assert found.numbers["chance"] == pytest.approx(100 * sum(areas) / len(areas), rel=1e-5)


def places(images: LabelledImages) -> list[Located]:
    return boxes("scenes", None, images)


def all_maps(training: Training, images: LabelledImages) -> torch.Tensor:
    return torch.cat([maps for _, maps in activation_maps(training, images)])


def test_a_class_that_the_labels_call_absent_is_no_target() -> None:
    images = LabelledImages(FileSource("voc", Path(), [b"a.jpg"]), torch.tensor([[1, -1]]).char(), ["cat", "dog"])
    (target,) = targets_of(images, [(torch.rand(3, 4), torch.tensor([0, 1, 0]))])
    assert target.column == 0 and len(target.boxes) == 2


def test_a_data_set_without_boxes_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"cub_attributes says which .* not where: use a data set with boxes \(coco2014, scenes, voc"
    ):
        cam = Study("spml_cub", [], None, 0, tmp_path).load("an").data
        boxes(cam.name, cam.root, LabelledImages(FileSource("cub", tmp_path, [b"a.jpg"]), torch.ones(1, 2).char(), []))


# --------------------------------------------------------------------------------------------------------- evolution


def test_evolution_counts_what_ll_cp_wrote_and_how_much_of_it_is_true(
    study: Study, tmp_path: Path, picture_bytes: Callable[[Finding], int]
) -> None:
    overrides = [*study.overrides, "training.epochs=3", "training.options={delta_rel: 3.0}", "training.select=last"]
    longer = Study("spml_scenes", overrides, None, 0, tmp_path)
    found = large_loss.evolution(longer)
    assert picture_bytes(found) > 20_000
    rows = [row for row in found.rows if row[0].startswith("ll_cp")]
    assert rows[0][1:4] == ["1", "0", "0"]  # the first epoch is plain AN
    assert rows[0][4:] == ["", "0.0"]
    prepared = prepare(longer.load("ll_cp").data)
    written = (longer.watched(lambda now: None, "ll_cp").observed > 0) & (prepared.observed == 0)
    missed = (prepared.train.truth > 0) & (prepared.observed == 0)
    right = int((written & missed).sum())
    added = [int(row[2]) for row in rows]
    assert int(rows[-1][3]) == sum(added) == int(written.sum()) > 0
    assert found.numbers["ll_cp/precision/epoch3"] == pytest.approx(100 * right / sum(added))
    assert found.numbers["ll_cp/recall/epoch3"] == pytest.approx(100 * right / int(missed.sum()))
    for loss in ("ll_r", "ll_ct"):
        counts = [int(row[3]) for row in found.rows if row[0].startswith(loss)]
        assert counts == [0, *(steps_of(longer, epoch) for epoch in (2, 3))]


def steps_of(study: Study, epoch: int) -> int:
    """How many labels the steps of an epoch modify: the published share of each batch, the last one smaller."""
    protocol = study.load("ll_r")
    images, batch = len(prepare(protocol.data).train), protocol.training.batch_size
    sizes = [min(batch, images - first) for first in range(0, images, batch)]
    return sum(math.ceil(3 * (epoch - 1) * 10 * size / 100) for size in sizes)


def test_full_labels_hide_nothing_that_could_be_corrected(study: Study, tmp_path: Path) -> None:
    full = Study("spml_scenes", [*study.overrides, "data.labels=full"], None, 0, tmp_path)
    for analysis in (large_loss.memorisation, large_loss.evolution):
        with pytest.raises(DataError, match="use data.labels=single_positive"):
            analysis(full)
