"""Readers of the user's own objects and masks, on small trees in the layouts that labelling programs export, and on
hostile ones: each mistake is one sentence with what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mls.errors import ConfigError, DataError
from mls.eval import cells, data, load_protocol
from mls.eval.data.content import content_hash
from mls.eval.dense import detectron2_data
from mls.eval.dense.prepare import load_images
from mls.frameworks import detectron2_train

SIDES = (40, 30)  # width and height


def image(file: Path, pixels: Any = None, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    given = np.full((*SIDES[::-1], 3), 90, np.uint8) if pixels is None else np.asarray(pixels)
    Image.fromarray(given).save(file, **options)


def text(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def instances(count: int, first: int = 1, folder: str = "") -> dict[str, Any]:
    """Of `count` images with a person of category 3 and, with a polygon, a kite of category 38."""
    names = [{"id": 38, "name": "kite"}, {"id": 3, "name": "person"}]
    images, objects = [], []
    for number in range(first, first + count):
        images.append({"id": number, "file_name": f"{folder}{number}.png", "width": SIDES[0], "height": SIDES[1]})
        square = [[4, 4, 14, 4, 14, 24, 4, 24]]
        for category, box in ((3, [4, 4, 10, 20]), (38, [4, 4, 10, 20])):
            one = {"image_id": number, "category_id": category, "bbox": box, "segmentation": square}
            objects.append({"id": len(objects) + 1, "area": 200, "iscrowd": 0, **one})
    return {"images": images, "annotations": objects, "categories": names}


def coco_of_roboflow(root: Path) -> None:
    for part, first in (("train", 1), ("valid", 5), ("test", 7)):
        text(root / part / "_annotations.coco.json", instances(2, first))
        for number in (first, first + 1):
            image(root / part / f"{number}.png")


def test_an_image_that_cannot_be_read_is_left_out_with_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    coco_of_cvat(tmp_path / "coco")
    whole = load_images(load_protocol("detection", ["data.name=coco", f"data.root={tmp_path / 'coco'}"]))
    broken = Path(whole.train.describe(2))
    broken.write_bytes(broken.read_bytes()[:60])
    settings = ["data.name=coco", f"data.root={tmp_path / 'coco'}", "data.max_unreadable=0.5"]  # another key: read anew
    found = load_images(load_protocol("detection", settings)).train
    assert len(found) == len(whole.train) - 1 == len(found.images)
    assert [found.describe(row) for row in range(len(found))] == [
        whole.train.describe(row) for row in range(len(whole.train)) if row != 2
    ]
    assert len(found.everything) == len(whole.train.everything) - len(whole.train.objects(2))
    assert f"skipped an image that cannot be read: {broken}" in capfd.readouterr().err


def coco_of_cvat(root: Path) -> None:
    text(root / "annotations" / "instances_default.json", instances(10))
    for number in range(1, 11):
        image(root / "images" / f"{number}.png")


def yolo_of_ultralytics(root: Path, polygons: bool = False) -> None:
    text(root / "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: person\n  5: kite\n")
    line = "5 0.1 0.2 0.35 0.2 0.35 0.8 0.1 0.8\n" if polygons else "5 0.225 0.5 0.25 0.6\n"
    for part in ("train", "val"):
        for number in range(2):
            image(root / "images" / part / f"{number}.png")
            text(root / "labels" / part / f"{number}.txt", line if number == 0 else "")


def yolo_of_roboflow(root: Path) -> None:
    text(
        root / "data.yaml", "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 1\nnames: ['cat']"
    )
    for part in ("train", "valid", "test"):
        image(root / part / "images" / f"{part}.jpg")
        text(root / part / "labels" / f"{part}.txt", "0 0.5 0.5 0.5 0.5")


def masks(root: Path, parts: tuple[str, ...] = ("train/", "val/")) -> None:
    text(root / "classes.yaml", "names: {0: road, 2: tree}\nvoid: [255, 9]\n")
    for part in parts:
        for number in range(2):
            image(root / "images" / f"{part}{number}.jpg")
            pixels = np.zeros(SIDES[::-1], np.uint8)
            pixels[:10], pixels[10:12] = 2, 9
            image(root / "masks" / f"{part}{number}.png", pixels)


def test_coco_files_are_read_as_labelling_programs_export_them(tmp_path: Path) -> None:
    coco_of_roboflow(tmp_path / "roboflow")
    found = data.build("coco", tmp_path / "roboflow")
    assert found.val is not None and (len(found.train), len(found.val), len(found.test)) == (2, 2, 2)
    assert found.train.class_names == ["person", "kite"]  # by their numbers, which are any
    one = found.train.objects(0)
    assert one.boxes.tolist() == [[4, 4, 14, 24]] * 2 and one.classes.tolist() == [0, 1]
    assert one.masks().sum((1, 2)).tolist() == [200, 200]
    coco_of_cvat(tmp_path / "cvat")
    parts = [data.build("coco", tmp_path / "cvat" / inside) for inside in ("", "annotations/instances_default.json")]
    for part in parts:
        assert (len(part.train), len(part.test)) == (8, 2)
        assert part.test.describe(0) == parts[0].test.describe(0)
    assert content_hash(parts[0]) == content_hash(parts[1])


def test_yolo_folders_are_read_as_labelling_programs_export_them(tmp_path: Path) -> None:
    yolo_of_ultralytics(tmp_path / "boxes")
    found = data.build("yolo", tmp_path / "boxes")
    assert (len(found.train), len(found.test)) == (2, 2) and found.train.class_names == ["person", "kite"]
    one = found.train.objects(0)
    assert torch.allclose(one.boxes, torch.tensor([[4.0, 6.0, 14.0, 24.0]])) and one.classes.tolist() == [1]
    assert len(found.train.objects(1)) == 0 and one.outlines is None
    yolo_of_ultralytics(tmp_path / "polygons", polygons=True)
    other = data.build("yolo", tmp_path / "polygons" / "data.yaml").train.objects(0)
    assert torch.allclose(other.boxes, one.boxes) and int(other.masks().sum()) == int(other.areas) == 180
    yolo_of_roboflow(tmp_path / "roboflow")
    found = data.build("yolo", tmp_path / "roboflow")
    assert found.val is not None and found.val.objects(0).boxes.tolist() == [[10, 7.5, 30, 22.5]]


def test_a_picture_that_lies_on_its_side_has_the_boxes_of_the_upright_one(tmp_path: Path) -> None:
    yolo_of_ultralytics(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6
    image(tmp_path / "images" / "train" / "0.jpg", exif=turned)
    (tmp_path / "images" / "train" / "0.png").unlink()
    found = data.build("yolo", tmp_path).train
    assert found.sizes[0].tolist() == list(SIDES) == list(found.pixels(0).shape[1:])
    Image.new("RGB", (7, 8)).save(tmp_path / "images" / "train" / "0.jpg")
    with pytest.raises(DataError, match=r"0.jpg has 7 × 8 pixels .*: bring back the image that was annotated, or"):
        found.pixels(0)


def test_masks_have_the_classes_of_their_list_in_folders_or_split(tmp_path: Path) -> None:
    masks(tmp_path / "parts")
    found = data.build("masks", tmp_path / "parts")
    assert (len(found.train), len(found.test), found.train.class_names) == (2, 2, ["road", "tree"])
    assert [found.train.labels(0)[row, 0].item() for row in (0, 10, 12)] == [1, 255, 0]
    masks(tmp_path / "one", ("", "a", "b"))
    text(tmp_path / "one" / "classes.yaml", "names: [road, path, tree]\nvoid: 9\n")
    found = data.build("masks", tmp_path / "one")
    assert (len(found.train), len(found.test)) == (5, 1) and found.train.labels(0).unique().tolist() == [0, 2, 255]


def broken(change: Callable[[Path], object], layout: Callable[[Path], None] = yolo_of_ultralytics) -> Any:
    def make(root: Path) -> None:
        layout(root)
        change(root)

    return make


def broken_masks(change: Callable[[Path], object]) -> Any:
    return broken(change, masks)


def broken_coco(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        coco_of_cvat(root)
        change(content := instances(10))
        text(root / "annotations" / "instances_default.json", content)

    return make


LABEL = "labels/train/0.txt"
HOSTILE = {
    "yolo": [
        (
            broken(lambda root: text(root / LABEL, "7 .5 .5 .2 .2")),
            r"1 unknown class \(line 1 of 0.txt: class 7 of 2 .*so many",
        ),
        (broken(lambda root: text(root / LABEL, "5 1.5 .5 .2 .2")), r"1 outside \(line 1 of 0.txt: x0 y0 x1 y1 56,"),
        (broken(lambda root: text(root / LABEL, "5 .5 .5")), "3 numbers, not a class and a box or a polygon"),
        (broken(lambda root: text(root / "data.yaml", "")), r"has no names of classes: write `names: \[cat, dog\]`"),
        (
            broken(lambda root: text(root / "data.yaml", "train: ../../etc\nnames: [a]")),
            "says train: ../../etc, which leaves .*: set its `path` to a folder that holds all images",
        ),
        (
            broken(
                lambda root: text(root / "data.yaml", "train: images/train\nval: images/train\nnames: {0: a, 5: b}")
            ),
            "2 of the 2 images of .* for the test are training images, too .*: name others",
        ),
        (broken(lambda root: text(root / "data.yaml", "train: images/x\nnames: [a]")), "images/x is missing: correct"),
        (
            broken(lambda root: text(root / "data.yaml", "nc: 3\ntrain: images\nnames: [a]")),
            "says nc: 3 and has 1 names",
        ),
        (broken(lambda root: (root / "data.yaml").unlink()), "has no data.yaml: name it with data.root=FILE.yaml"),
        (
            broken(lambda root: [(root / f"labels/val/{number}.txt").unlink() for number in range(2)]),
            r"no image of .*data.yaml for val has labels \(looked for .*labels/val/0.txt\): put them there",
        ),
    ],
    "coco": [
        (broken_coco(lambda c: c["annotations"][0].update(category_id=99)), ""),
        (
            broken_coco(lambda c: [one.update(bbox=[50, 4, 9, 9]) for one in c["annotations"]]),
            "20 outside .*no accident",
        ),
        (
            broken_coco(lambda c: c["images"][0].update(file_name="../../etc/passwd.png")),
            "names ../../etc/passwd.png, which leaves its folder: write paths below it",
        ),
        (broken_coco(lambda c: c.clear()), "is not a whole COCO instances file .KeyError.*: export it again as COCO's"),
        (
            broken_coco(lambda c: c["images"][0].update(file_name="gone.png")),
            r"1 of the \d images that .* names are not in .* \(first: gone.png\): put them there, or",
        ),
        (lambda root: text(root / "a.json", ""), "a.json is not a whole COCO instances file .*: export it again"),
        (
            lambda root: [text(root / f"{name}.json", "{}") for name in "ab"],
            r"has 2 json files \(a.json, b.json\): leave",
        ),
        (lambda root: root.mkdir(), "no json files for training and test in .*: put them there"),
    ],
    "masks": [
        (
            broken_masks(lambda root: image(root / "masks/train/0.png", np.full((30, 40), 7, np.uint8))),
            "0.png has 1200 pixels of unknown classes, such as 7; they are 0, 2: correct it, or the list of classes",
        ),
        (
            broken_masks(lambda root: (root / "masks/val/1.png").unlink()),
            r"1 of the 2 masks of .* for val are missing \(first: .*val/1.png\): put them there, or take their images",
        ),
        (
            broken_masks(lambda root: image(root / "masks/train/0.png")),
            r"holds no class numbers \(.30, 40, 3. of uint8\)",
        ),
        (
            broken_masks(lambda root: (root / "masks/train/0.png").write_bytes(b"")),
            "0.png cannot be read .*: correct it",
        ),
        (broken_masks(lambda root: text(root / "classes.yaml", "")), "has no names of classes: write `names:"),
        (
            broken_masks(lambda root: (root / "classes.yaml").unlink()),
            "has no list of classes: write classes.yaml, with",
        ),
        (
            broken_masks(lambda root: image(root / "images/more/0.jpg")),
            "has train, val and 1 beside them: sort the images",
        ),
        (
            broken_masks(lambda root: (root / "masks").rename(root / "x")),
            "has no folder masks: it needs images/, masks/",
        ),
    ],
}


@pytest.mark.parametrize(
    ("name", "number"), [(name, row) for name, rows in HOSTILE.items() for row in range(len(rows))]
)
def test_each_mistake_is_one_sentence_with_what_to_do(name: str, number: int, tmp_path: Path) -> None:
    make, sentence = HOSTILE[name][number]
    make(tmp_path / "x")
    if not sentence:  # one entry of many is left out, and a run says so
        odd = data.build(name, tmp_path / "x").train.odd
        assert odd is not None and "1 unknown class (annotation 1 of 1.png: category_id 99)" in str(odd)
        return
    with pytest.raises((DataError, ConfigError), match=sentence) as error:
        data.build(name, tmp_path / "x")
    assert "download" not in str(error.value) and "\n" not in str(error.value)


def test_own_data_are_told_and_written_for_detectron2_as_we_read_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yolo_of_ultralytics(tmp_path / "mine", polygons=True)
    (tmp_path / "mine" / LABEL).write_text("5 0.1 0.2 0.35 0.2 0.35 0.8 0.1 0.8\n" * 20 + "9 .1 .1 .2 .2\n")
    changes = [f"data.root={tmp_path / 'mine'}", "backend=detectron2", "model.masks=true"]
    found = load_images(protocol := load_protocol("detection", changes))
    said = capsys.readouterr().err.splitlines()
    assert "1 unknown class" in said[0] and said[1].startswith("yolo: 2 training images with 20 objects, 2 test images")
    assert detectron2_data.written(protocol.data)
    detectron2_data.write(found, tmp_path / "state")
    content = json.loads(detectron2_train.annotations_of(tmp_path / "state", "train2017").read_text())
    assert [Path(one["file_name"]) for one in content["images"]] == [
        tmp_path / "mine" / "images" / "train" / f"{number}.png" for number in range(2)
    ]
    assert len(content["annotations"]) == 20 and content["categories"][1]["name"] == "kite"


DETECTOR = """data.min_sizes=[32] data.test_size=32 data.max_size=64 model.backbone=resnet_tiny model.width=16
model.box_width=16 model.anchors=[8,12,18] model.before_nms=[20,20] model.proposals=[10,10]
training.precise_bn=0""".split()
SEGMENTER = """data.resize=[40,32] data.crop=[32,32] model.backbone=resnet_tiny model.output_stride=4 model.width=8
model.auxiliary_width=8 training.batch_size=2""".split()
SHORT = ["training.steps=1", "training.falls=[]", "training.warmup_steps=0"]
FROZEN = ["data.size=[64,64]", "probe.k=[2]", "probe.pixels=100", "probe.epochs=1", "features.device=cpu"]
RUNS = {
    "detection": ("yolo", [*DETECTOR, *SHORT]),
    "segmentation": ("masks", [*SEGMENTER, *SHORT]),
    "dense_knn": ("masks", FROZEN),
    "dense_linear": ("masks", FROZEN),
    "dense_cluster": ("masks", [*FROZEN, "probe.clusters=[2]"]),
    "objects": ("yolo", FROZEN),
}


@pytest.mark.parametrize("task", RUNS)
def test_every_dense_task_takes_own_data(  # with mmsegmentation: test_with_mmseg.py
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLS_CACHE", str(tmp_path / "cache"))
    kind, changes = RUNS[task]
    (yolo_of_ultralytics if kind == "yolo" else masks)(tmp_path / "mine")
    protocol = load_protocol(task, [f"data.root={tmp_path / 'mine'}", "data.workers=0", *changes])
    weights = "random" if "training.steps=1" in changes else "resnet_tiny"
    values = cells.run(protocol, weights, 0, tmp_path, quiet=True)
    assert 0 <= values[protocol.metric] <= 1 and all(0 <= value <= 1 or value != value for value in values.values())
