"""Scenes composed of photographs in class folders."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mls.config import ScenesConfig
from mls.data.photographs import SIDE, photographs
from mls.data.scenes import ScenesSource, make_scenes, scenes_of
from mls.engine.images import accept_other_images, hash_of_names
from mls.errors import CheckpointError, DataError
from mls.eval.cells import _images_of, config_hash
from mls.eval.protocol import scenes_identity
from mls.recipes import load_config

COLOURS = {"blue": (20, 20, 250), "green": (20, 250, 20), "red": (250, 20, 20)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of one colour each, five photographs that differ a little."""
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(5):
            pixels = tuple(min(255, value + number) for value in colour)
            Image.new("RGB", (40, 30 + number), pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_scenes_of_photographs_have_their_boxes_labels_and_classes(folder: Path) -> None:
    source = ScenesSource(ScenesConfig(count=40, test_count=8, size=64, objects=str(folder)), masks=True)
    assert source.class_names == list(COLOURS) and source.labels.shape == (40, 3)
    scenes = source.scenes
    assert scenes.masks is not None
    for number in range(40):
        seen = scenes.classes[number] >= 0
        assert 1 <= int(seen.sum()) <= 3
        assert set(scenes.classes[number][seen].tolist()) == set(source.labels[number].nonzero().flatten().tolist())
        for label, mask in zip(scenes.classes[number][seen].tolist(), scenes.masks[number][seen], strict=True):
            inside = scenes.images[number][:, mask].float().mean(1)
            assert int(inside.argmax()) == 2 - label  # blue, green, red
    again = ScenesSource(ScenesConfig(count=40, size=64, objects=str(folder)))
    assert torch.equal(again.scenes.images, scenes.images)


def test_no_photograph_is_in_both_splits_and_a_folder_s_own_splits_are_kept(folder: Path) -> None:
    train, test = (photographs(str(folder), split) for split in ("train", "test"))
    assert not set(train.numbers.tolist()) & set(test.numbers.tolist())
    assert (train.counts.tolist(), test.counts.tolist()) == ([3] * 3, [2] * 3)
    assert train.glyphs.shape[1:] == (3, SIDE, SIDE)
    own = folder.parent / "own"
    for split in ("train", "test"):
        own.mkdir(exist_ok=True)
        (own / split).symlink_to(folder)
    assert photographs(str(own), "test").counts.tolist() == [5] * 3


def test_the_ground_does_not_tell_the_classes(folder: Path) -> None:
    scenes, _ = scenes_of(ScenesConfig(count=600, size=32, objects=str(folder)), "train")
    shares = torch.stack([scenes.labels[scenes.types == kind].mean(0) for kind in range(8)])
    assert shares.std(0).max() < 0.12  # of about 75 scenes each
    hard, _ = scenes_of(ScenesConfig(count=600, size=64, style="hard"), "train")
    shares = torch.stack([hard.labels[hard.types == kind].mean(0) for kind in range(8)])
    assert (
        shares.std(0).max()
        < 0.12
        < torch.stack([scene.labels[scene.types == kind].mean(0) for scene in [make_scenes(600)] for kind in range(8)])
        .std(0)
        .max()
    )


def test_a_resume_on_scenes_of_other_photographs_is_refused(folder: Path, tmp_path: Path) -> None:
    config = ScenesConfig(count=8, size=32, objects=str(folder))
    state = {"images": 8, "names": hash_of_names(ScenesSource(config))}
    (tmp_path / "moved").symlink_to(folder)
    elsewhere = replace(config, objects=str(tmp_path / "moved"))
    assert accept_other_images(tmp_path, state, ScenesSource(elsewhere), accept=False) == ""
    used = int(photographs(str(folder), "train").numbers[0])
    sorted(folder.glob("*/*.png"))[used].rename(folder / "blue" / "9.png")
    photographs.cache_clear()
    for accept in (False, True):
        with pytest.raises(CheckpointError, match="scenes of other photographs|none can be mapped: start a new run"):
            accept_other_images(tmp_path, state, ScenesSource(config), accept)
    assert hash_of_names(ScenesSource(ScenesConfig(count=8))) is None  # digits are the same everywhere
    with pytest.raises(DataError, match=r"data.scenes.style=hard is a style of digits.*: leave it out"):
        ScenesSource(replace(config, style="hard"))


def test_folders_that_cannot_be_composed_are_one_sentence(folder: Path) -> None:
    def refused(words: str, name: str = str(folder)) -> None:
        photographs.cache_clear()
        with pytest.raises(DataError, match=words):
            [photographs(name, split) for split in ("train", "test")]

    refused("data.scenes.objects .*nowhere does not exist", str(folder / "nowhere"))
    refused("has no class folders", str(folder / "red"))
    (folder / "empty").mkdir()
    refused("the class folder .*empty has no images: fill it, or take it away")
    (folder / "empty" / "one.png").write_bytes((folder / "red" / "0.png").read_bytes())
    refused("class empty has a single photograph")
    (folder / "empty" / "two.jpg").write_bytes(b"no picture")
    refused(r"cannot read .*two.jpg \(.*\): mend it, or take it away")
    for split, names in (("train", ["red", "blue"]), ("test", ["red", "green"])):
        for name in names:
            (folder.parent / "other" / split).mkdir(parents=True, exist_ok=True)
            (folder.parent / "other" / split / name).symlink_to(folder / name)
    refused("has other classes in train than in test", str(folder.parent / "other"))


def test_other_photographs_are_another_cell_and_the_digits_keep_their_identity(folder: Path) -> None:
    few = ["data.scenes.count=8", "data.scenes.test_count=8"]
    hashed = lambda *overrides: config_hash(load_config("mls_scenes_tiny", [*few, *overrides]))
    plain = hashed()
    assert plain == hashed("data.scenes.style=standard") != hashed("data.scenes.style=hard")
    first, train = hashed(f"data.scenes.objects={folder}"), photographs(str(folder), "train").glyphs
    other = folder.with_name("moved")
    folder.rename(other)
    assert hashed(f"data.scenes.objects={other}") == first != plain
    tested = int(photographs(str(other), "test").numbers[0])
    Image.new("RGB", (40, 30), (99, 99, 99)).save(sorted(other.glob("*/*.png"))[tested])
    for kept in (_images_of, photographs):
        kept.cache_clear()
    assert torch.equal(photographs(str(other), "train").glyphs, train)
    assert hashed(f"data.scenes.objects={other}") != first
    assert scenes_identity({"size": 32, "style": "standard", "objects": "x"}) == {"size": 32, "objects": True}
