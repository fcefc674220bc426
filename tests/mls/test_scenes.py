"""The embedded scenes: the same ones every time, and their annotations are what they show."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from mls.config import ScenesConfig
from mls.data import scenes as scenes_module
from mls.data.scenes import (
    CHUNK,
    CLASS_NAMES,
    EASY,
    STANDARD,
    ScenesSource,
    SceneStyle,
    _pixels_and_classes,
    digits,
    make_scenes,
    type_classes,
)
from mls.errors import ConfigError, DataError
from mls.tools.scenes import app

# More objects than there is room for: some are hidden by later ones, a few of them wholly.
CROWDED = SceneStyle(cells=3, objects=(1, 9), extent=(0.15, 0.9))
STYLES = pytest.mark.parametrize("style", [STANDARD, EASY, CROWDED], ids=["standard", "easy", "crowded"])


def same(first, second) -> bool:
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("images", "labels", "boxes", "classes", "types", "masks")
    )


def test_the_same_arguments_give_the_same_scenes():
    assert same(make_scenes(100, seed=3, masks=True), make_scenes(100, seed=3, masks=True))


def test_the_number_of_threads_changes_neither_the_scenes_nor_itself():
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(make_scenes(70, size=96, masks=True))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert same(made[0], made[1])
    assert same(made[0], made[2])


def test_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = make_scenes(10, masks=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first, make_scenes(10, masks=True))


@settings(max_examples=10, deadline=None)
@given(few=st.integers(1, 3 * CHUNK), more=st.integers(0, CHUNK + 1))
def test_a_larger_set_begins_with_the_smaller_one(few, more):
    small, large = make_scenes(few, masks=True), make_scenes(few + more, masks=True)
    assert (len(small), len(large)) == (few, few + more)
    assert same(small, large.first(few))


def test_another_seed_or_split_makes_other_scenes():
    images = [make_scenes(50, split, seed=seed).images for split in ("train", "test") for seed in (0, 1)]
    for i in range(4):
        for j in range(i):
            assert (images[i] != images[j]).flatten(1).any(1).all()


def test_no_scene_occurs_twice():
    scenes = make_scenes(4 * CHUNK)
    assert len({image.numpy().tobytes() for image in scenes.images}) == len(scenes)


def test_a_scene_has_the_same_objects_at_every_size():
    small, large = make_scenes(60, size=32), make_scenes(60, size=128)
    assert torch.equal(small.classes, large.classes)
    assert torch.equal(small.types, large.types)
    assert (small.boxes * 4 - large.boxes).abs().max() <= 8  # two small pixels


def test_train_and_test_share_no_handwritten_digit():
    train, test = (set(digits(split).numbers.tolist()) for split in ("train", "test"))
    assert not train & test
    assert (len(train), len(test)) == (1078, 719)
    assert train | test == set(range(1797))


def test_the_digits_are_sklearns_wherever_they_are_read_from(monkeypatch):
    from sklearn.datasets import load_digits

    images, numbers = load_digits(return_X_y=True)
    for file_is_found in (True, False):
        if not file_is_found:
            monkeypatch.setattr(scenes_module, "find_spec", lambda name: None)
        found = _pixels_and_classes()
        assert np.array_equal(found[0], images) and np.array_equal(found[1], numbers)


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_split_draws_a_class_from_its_own_digits(split):
    from sklearn.datasets import load_digits

    truth = torch.from_numpy(load_digits().target)
    part = digits(split)
    for digit in range(10):
        rows = part.numbers[part.starts[digit] : part.starts[digit] + part.counts[digit]]
        assert (truth[rows] == digit).all()
        assert len(rows) > 50


@STYLES
def test_boxes_are_tight_around_what_is_seen(style):
    scenes = make_scenes(130, style=style, masks=True)
    for masks, boxes, classes in zip(scenes.masks, scenes.boxes.tolist(), scenes.classes.tolist(), strict=True):
        for mask, box, digit in zip(masks, boxes, classes, strict=True):
            if digit < 0:
                assert box == [0, 0, 0, 0]
                assert not mask.any()
            else:
                rows, columns = mask.nonzero(as_tuple=True)
                tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert box == [int(value) for value in tight]


@STYLES
def test_labels_are_the_classes_that_are_seen(style):
    scenes = make_scenes(130, style=style, masks=True)
    for labels, masks, classes in zip(scenes.labels, scenes.masks, scenes.classes.tolist(), strict=True):
        visible = {digit for digit, mask in zip(classes, masks, strict=True) if mask.any()}
        assert {i for i, label in enumerate(labels.tolist()) if label == 1} == visible
        assert labels.sum() == len(visible)


@STYLES
def test_a_pixel_belongs_to_one_object_at_most(style):
    assert make_scenes(130, style=style, masks=True).masks.sum(1).max() == 1


def test_objects_hidden_by_others_are_left_out_and_padding_comes_last():
    style = replace(CROWDED, objects=(9, 9))
    scenes = make_scenes(300, size=16, style=style, masks=True)
    visible = scenes.classes >= 0
    assert 0 < (~visible).sum() < visible.sum()  # nine were painted in every scene
    assert not (~visible[:, :-1] & visible[:, 1:]).any()


def test_what_is_drawn_looks_like_its_class():
    """Nearest mean digit, by shape alone: right for 7 of 10 where chance is 1."""
    plain = SceneStyle(objects=(1, 1), cells=1, extent=(1.0, 1.0), tilt=0, stretch=0, texture=0, clutter=0, noise=0)
    scenes, part = make_scenes(300, style=plain, masks=True), digits("train")
    classes = torch.repeat_interleave(torch.arange(10), part.counts)
    prototypes = torch.stack([part.glyphs[classes == digit, 0].mean(0) for digit in range(10)]).flatten(1)
    ink = scenes.masks[:, 0].float()
    centred = torch.stack(
        [
            torch.roll(mask, (16 - int(box[1] + box[3]) // 2, 16 - int(box[0] + box[2]) // 2), (0, 1))
            for mask, box in zip(ink, scenes.boxes[:, 0], strict=True)
        ]
    )
    scores = torch.nn.functional.normalize(centred.flatten(1)) @ torch.nn.functional.normalize(prototypes).T
    assert (scores.argmax(1) == scenes.classes[:, 0]).float().mean() > 0.7


def test_digits_stand_out_from_their_ground():
    scenes = make_scenes(200, masks=True)
    luminance = (scenes.images.float() / 255 * torch.tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1)
    ground = luminance[~scenes.masks.any(1)].mean()
    objects = torch.stack([luminance[i][m].mean() for i, row in enumerate(scenes.masks) for m in row if m.any()])
    assert (objects > ground + 0.2).float().mean() > 0.98


@pytest.mark.parametrize(("style", "fewest"), [(STANDARD, 8), (EASY, 4)], ids=["standard", "easy"])
def test_the_scene_type_alone_leaves_the_labels_open(style, fewest):
    scenes = make_scenes(4000, style=style)
    for scene_type in range(style.types):
        labels = scenes.labels[scenes.types == scene_type]
        assert len(labels) > 300
        assert (labels.mean(0) > 0).sum() >= fewest  # classes that occur
        assert labels.mean(0).max() < 0.65  # no class is certain
        _, counts = labels.unique(dim=0, return_counts=True)
        assert counts.max() < 0.25 * len(labels)  # nor is a guess of the whole label set often right


def test_the_scene_type_is_a_hint_all_the_same():
    scenes = make_scenes(4000)
    own = torch.zeros(8, 10).scatter_(1, type_classes(), 1.0)[scenes.types]
    inside = (scenes.labels * own).sum() / scenes.labels.sum()
    assert 0.85 < inside < 0.97
    easy = make_scenes(500, style=EASY)
    assert ((easy.classes < 0) | (easy.classes[..., None] == type_classes(EASY)[easy.types][:, None]).any(2)).all()


@pytest.mark.parametrize("style", [STANDARD, EASY], ids=["standard", "easy"])
def test_every_class_belongs_to_a_type(style):
    table = type_classes(style)
    assert table.shape == (style.types, 4)
    assert set(table.flatten().tolist()) == set(range(10))
    assert all(len(set(row)) == 4 for row in table.tolist())


def test_masks_are_given_on_demand():
    assert make_scenes(5).masks is None
    assert make_scenes(5, masks=True).masks.shape == (5, 3, 32, 32)


def test_the_source_reads_numbers_and_orders_as_others_do():
    source = ScenesSource(ScenesConfig(count=90, test_count=40, size=48, seed=5))
    assert (source.name, source.class_names, len(source)) == ("scenes", CLASS_NAMES, 90)
    assert source.labels.shape == (90, 10)
    assert source.read(17).shape == (3, 48, 48)
    assert torch.equal(source.read(17), make_scenes(90, size=48, seed=5).images[17])
    assert source.describe(17) == "scene 17 of the train split"
    order = source.order(0, 1)
    assert sorted(order.tolist()) == list(range(90))
    assert np.array_equal(order, source.order(0, 1))
    assert not np.array_equal(order, source.order(0, 2))
    assert not np.array_equal(order, source.order(1, 1))


def test_the_test_source_has_its_own_count_and_masks_on_demand():
    source = ScenesSource(ScenesConfig(count=90, test_count=40), split="test", masks=True)
    assert len(source) == 40
    assert source.describe(0) == "scene 0 of the test split"
    assert same(source.scenes, make_scenes(40, "test", masks=True))


def test_the_boxes_of_a_source_are_shares_of_the_image():
    source = ScenesSource(ScenesConfig(count=20, size=64))
    for i in range(20):
        boxes, classes = source.boxes(i)
        assert len(boxes) == len(classes) >= 2
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert torch.equal((boxes * 64).long(), source.scenes.boxes[i, : len(boxes)])
        assert torch.equal(source.labels[i].nonzero()[:, 0], classes.unique())


def test_impossible_scenes_are_refused_with_a_sentence():
    with pytest.raises(DataError, match="0 train scenes cannot be made: ask for 1 or more"):
        make_scenes(0)
    with pytest.raises(DataError, match="scenes of 8 pixels are too small to show digits: ask for 16 or more"):
        make_scenes(1, size=8)
    with pytest.raises(DataError, match="unknown split of the scenes 'tset': did you mean 'test'"):
        make_scenes(1, split="tset")
    with pytest.raises(DataError, match="objects 2 to 5 do not fit a grid of 2 x 2 cells"):
        SceneStyle(objects=(2, 5))
    with pytest.raises(DataError, match="3 types of 11 classes cannot be drawn from ten digits"):
        SceneStyle(types=3, classes_per_type=11)


def test_the_preview_is_a_picture_of_the_scenes_with_boxes(tmp_path):
    out = tmp_path / "new" / "scenes.png"
    result = CliRunner().invoke(app, ["preview", "--out", str(out), "--count", "10"])
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (2 * 132, 8 * 132, 3)
    (x0, y0, x1, y1), scene = make_scenes(1).boxes[0, 0].tolist(), make_scenes(1).images[0]
    yellow = (pixels == (255, 255, 0)).all(2)
    assert yellow[2 + 4 * y0, 2 + 4 * x0 : 2 + 4 * x1].all()
    assert yellow[2 + 4 * y0 : 2 + 4 * y1, 2 + 4 * x1 - 1].all()
    assert pixels[2 + 4 * 31, 2 + 4 * 31].tolist() == scene[:, 31, 31].tolist()


def test_a_preview_that_cannot_be_written_says_so(tmp_path):
    result = CliRunner().invoke(app, ["preview", "--out", str(tmp_path / "scenes.foo"), "--count", "1"])
    assert isinstance(result.exception, ConfigError)
    assert "choose another name that ends in .png or .jpg" in str(result.exception)
