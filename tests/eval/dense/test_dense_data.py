"""Readers of COCO, VOC, Cityscapes, VOC12aug and ADE20K, on the embedded scenes written out in their layouts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mls.config import ScenesConfig
from mls.data.layouts import write
from mls.data.scenes import make_scenes
from mls.errors import DataError
from mls.eval import data
from mls.eval.data import DataSet, coco_stuff, objects, regions
from mls.eval.data.objects import ObjectImages
from mls.eval.dense.prepare import load_images
from mls.eval.protocol import load_protocol

COUNT = {"train": 12, "test": 8}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    for layout in ("coco", "voc", "cityscapes"):
        write(layout, root / layout, **COUNT, size=48, seed=3)
    return root


@pytest.fixture(scope="module")
def truth() -> DataSet[ObjectImages]:
    return objects.scenes(ScenesConfig(count=12, test_count=8, size=48, seed=3))


def test_coco_gives_the_scenes_boxes_and_masks_back(written: Path, truth: DataSet[ObjectImages]) -> None:
    found = data.build("coco2017", written / "coco", check_sizes=False)
    for part, true in ((found.train, truth.train), (found.test, truth.test)):
        assert len(part) == len(true) and part.class_names == true.class_names
        for row in range(len(part)):
            one, other = part.objects(row), true.objects(row)
            assert torch.equal(one.boxes, other.boxes) and torch.equal(one.classes, other.classes)
            assert torch.equal(one.masks(), other.masks()) and torch.equal(one.areas, other.areas)
            assert part.pixels(row).shape[1:] == tuple(part.sizes[row])


def test_cocos_crowds_are_read_and_its_empty_boxes_are_not(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "coco", tmp_path / "coco")
    file = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    first = [one for one in content["annotations"] if one["image_id"] == 1]
    first[0] |= {"iscrowd": 1, "segmentation": {"size": [48, 48], "counts": [0, 48, 48 * 47]}}
    first[1]["bbox"][2] = 0
    content["annotations"] = first[:2]
    file.write_text(json.dumps(content))
    found = data.build("coco2017", tmp_path / "coco", check_sizes=False).train
    assert found.objects(0).crowd.tolist() == [True]
    assert int(found.objects(0).masks().sum()) == 48
    assert len(found.with_objects()) == 0


def test_what_is_odd_is_said_once_or_refused(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(written / "coco", tmp_path / "my coco")
    file = tmp_path / "my coco" / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [1, 2, -3, 4]
    file.write_text(json.dumps(content))
    protocol = lambda *changes: load_protocol(
        "coco_fpn_1x", [f"data.root={tmp_path / 'my coco'}", "data.check_sizes=false", *changes]
    )
    for _ in range(2):
        assert len(load_images(protocol()).train.everything) == len(content["annotations"]) - 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "1 negative size (annotation 1 of " in said[0] and "bbox 1, 2, -3, 4" in said[0]
    assert f"`mls data check --dataset coco2017 '{tmp_path}/my coco'` lists all" in said[0]
    for change in ("data.odd=refuse", "backend=detectron2"):
        with pytest.raises(DataError, match="1 odd entry of .*: repair them"):
            load_images(protocol(change))


def test_voc_gives_the_scenes_boxes_back_over_both_years(written: Path, truth: DataSet[ObjectImages]) -> None:
    found = data.build("voc0712", written / "voc", check_sizes=False)
    assert (len(found.train), len(found.test), found.train.metric) == (12, 8, "voc07")
    for row in range(8):
        one, other = found.test.objects(row), truth.test.objects(row)
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.classes % 10, other.classes)
        assert torch.equal(one.difficult, other.areas < 0.05 * 48 * 48)


def test_cityscapes_has_nineteen_classes_and_a_void_border(written: Path) -> None:
    found = data.build("cityscapes", written / "cityscapes", check_sizes=False)
    assert len(found.train.class_names) == 19 and found.train.class_names[0] == "road"
    labels = found.test.labels(0)
    assert (labels[0] == 255).all() and (labels[1:-1, 1:-1] < 19).all()


def test_the_scenes_regions_are_their_masks() -> None:
    made = make_scenes(4, "test", 32, seed=5, masks=True)
    found = regions.scenes(ScenesConfig(count=1, test_count=4, seed=5)).test
    assert made.masks is not None
    for row in range(4):
        for digit, mask in zip(made.classes[row].tolist(), made.masks[row], strict=True):
            assert digit < 0 or (found.labels(row)[mask] == digit + 1).all()
        assert torch.equal(found.labels(row) == 0, ~made.masks[row].any(0))


def test_voc12aug_trains_on_both_lists_once_each(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "voc" / "VOCdevkit" / "VOC2012", tmp_path / "VOC2012")
    year = tmp_path / "VOC2012"
    shutil.copytree(year / "SegmentationClass", year / "SegmentationClassAug")
    stems = (year / "ImageSets" / "Segmentation" / "train.txt").read_text().split()
    (year / "ImageSets" / "Segmentation" / "aug.txt").write_text("\n".join(stems[:1]))
    found = data.build("voc12aug", tmp_path, check_sizes=False)
    assert len(found.train) == len(stems) and len(found.train.class_names) == 21
    assert set(found.train.labels(0).unique().tolist()) <= {0, *range(1, 21), 255}


def test_ade20ks_nought_is_void_and_its_first_class_nought(tmp_path: Path) -> None:
    root = tmp_path / "ADEChallengeData2016"
    for phase in ("training", "validation"):
        for kind, suffix in (("images", "jpg"), ("annotations", "png")):
            (root / kind / phase).mkdir(parents=True)
            pixels = np.array([[0, 1], [2, 150]], np.uint8)
            Image.fromarray(pixels).save(root / kind / phase / f"ADE_1.{suffix}")
    names = [f"{i}\t0.1\t1\t1\tname {i}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *names]))
    found = data.build("ade20k", tmp_path, check_sizes=False)
    assert found.test.labels(0).tolist() == [[255, 0], [1, 149]]
    assert found.test.class_names[0] == "name 1"


# The published map of COCO-Stuff's 182 categories to 27 super-categories (PiCIE, STEGO).
PUBLISHED = [
    *map(
        int,
        """
        9 11 11 11 11 11 11 11 11 8 8 8 8 8 8 7 7 7 7 7 7 7 7 7 7 6 6 6 6 6 6 6 6 10 10 10 10 10 10 10 10 10 10 5 5
        5 5 5 5 5 5 2 2 2 2 2 2 2 2 2 2 3 3 3 3 3 3 3 3 3 3 0 0 0 0 0 0 1 1 1 1 1 1 4 4 4 4 4 4 4 4 17 17 22 20 20
        22 15 25 16 13 12 12 17 17 23 15 15 17 15 21 15 25 13 13 13 13 13 22 26 14 14 15 22 21 21 24 20 22 15 17 16
        15 22 24 21 17 25 16 21 17 22 16 21 21 25 21 26 21 24 20 17 14 21 26 15 23 20 21 24 15 24 22 25 15 20 17 17
        22 14 18 18 18 18 18 18 18 26 26 19 19 24
        """.split(),
    )
]


@pytest.mark.parametrize("folders", [("", "stuffthingmaps"), ("images", "annotations")])
def test_coco_stuff_has_the_published_classes(folders: tuple[str, str], tmp_path: Path) -> None:
    used = [number for number in range(182) if number + 1 not in coco_stuff.UNUSED]
    pixels = np.array([*used, 255], np.uint8)[None].repeat(2, 0)
    for phase in ("train2017", "val2017"):
        for folder, suffix in zip(folders, ("jpg", "png"), strict=True):
            (tmp_path / folder / phase).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / phase / f"000000000009.{suffix}")
    coarse = [PUBLISHED[number] for number in used]
    expected = {
        "coco_stuff171": list(range(171)),
        "coco_stuff27": coarse,
        "coco_things": [one if one < 12 else 255 for one in coarse],
        "coco_stuff": [one - 12 if one >= 12 else 255 for one in coarse],
    }
    for name, numbers in expected.items():
        found = data.build(name, tmp_path, check_sizes=False)
        assert found.test.labels(0)[0].tolist() == [*numbers, 255], name
        assert found.test.pixels(0).shape == (3, 2, 172)
    Image.fromarray(np.full((2, 172), 182, np.uint8)).save(tmp_path / folders[1] / "val2017" / "000000000009.png")
    with pytest.raises(DataError, match="344 pixels of unknown classes, such as 182"):
        found.test.labels(0)
    names = data.build("coco_stuff171", tmp_path, check_sizes=False).train.class_names
    assert (names[0], names[79], names[80], names[-1]) == ("person", "toothbrush", "banner", "wood")


def test_missing_data_say_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLS_DATA", str(tmp_path))
    for name in ("coco2017", "voc0712", "cityscapes", "voc12aug", "ade20k", "coco_stuff", "ecssd", "duts", "dut_omron"):
        with pytest.raises(DataError, match=r"is missing: (download|unpack) .* data.root"):
            data.build(name)
