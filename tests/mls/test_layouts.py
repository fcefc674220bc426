"""The scenes on disk, read back by the tools that read the published data sets."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torchvision.datasets import Cityscapes, ImageFolder, VOCDetection, VOCSegmentation
from typer.testing import CliRunner

from mls.config import DataConfig
from mls.data.annotated import VOC_CLASSES
from mls.data.layouts import COCO_IDS, DIGIT_IDS, GROUND_IDS, LAYOUTS, THINGS, polygons, write
from mls.data.scenes import CLASS_NAMES, make_scenes
from mls.data.sources import build_source
from mls.errors import DataError
from mls.tools.scenes import app

TRAIN, TEST, SIZE = 80, 60, 64

# pycocotools' masks do not know numpy 2's `copy` yet
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One folder a layout, written on first use."""
    root = tmp_path_factory.mktemp("layouts")

    def folder(layout):
        if not (root / layout).exists():
            write(layout, root / layout, TRAIN, TEST, SIZE)
        return root / layout

    return folder


@pytest.fixture(scope="module")
def truth():
    return {"train": make_scenes(TRAIN, size=SIZE, masks=True), "test": make_scenes(TEST, "test", SIZE, masks=True)}


def objects(scenes, i):
    """(class, box, mask) of each object of one scene."""
    visible = scenes.classes[i] >= 0
    return list(
        zip(
            scenes.classes[i, visible].tolist(),
            scenes.boxes[i, visible].tolist(),
            scenes.masks[i, visible].numpy(),
            strict=True,
        )
    )


def voc_names(scenes, i):
    return [VOC_CLASSES[digit + 10 * (int(scenes.types[i]) % 2)] for digit, _, _ in objects(scenes, i)]


def opened(path):
    with Image.open(path) as image:
        return image.mode, np.array(image)


def assert_looks_like(path, image):
    """JPEG changes pixels, but not by much."""
    assert np.abs(opened(path)[1].astype(float) - image.permute(1, 2, 0).numpy()).mean() < 8


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12)))
@settings(deadline=None)
def test_polygons_cover_exactly_the_pixels_of_a_mask(mask):
    shapes = [[float(value) for value in polygon] for polygon in polygons(mask)]
    assert bool(shapes) == bool(mask.any())
    assert all(len(shape) >= 8 and len(shape) % 2 == 0 for shape in shapes)
    if shapes:
        assert np.array_equal(rle.decode(rle.merge(rle.frPyObjects(shapes, *mask.shape))), mask)


@given(st.integers(0, 2), st.integers(0, 2), st.integers(1, 5), st.integers(1, 5))
def test_a_rectangle_is_one_polygon_of_four_corners(x, y, width, height):
    mask = np.zeros((8, 8), bool)
    mask[y : y + height, x : x + width] = True
    assert [len(polygon) for polygon in polygons(mask)] == [8]


@pytest.mark.parametrize(("split", "name"), [("train", "train2017"), ("test", "val2017")])
def test_coco_boxes_areas_and_masks_are_the_scenes(written, truth, split, name):
    root, scenes = written("coco"), truth[split]
    coco = COCO(root / "annotations" / f"instances_{name}.json")
    assert sorted(coco.getImgIds()) == list(range(1, len(scenes) + 1))
    for i, image in enumerate(coco.loadImgs(sorted(coco.getImgIds()))):
        assert (image["width"], image["height"]) == (SIZE, SIZE)
        assert image["file_name"] == f"{i + 1:012d}.jpg"
        assert_looks_like(root / name / image["file_name"], scenes.images[i])
        found = coco.loadAnns(coco.getAnnIds(imgIds=image["id"]))
        for annotation, (digit, (x0, y0, x1, y1), mask) in zip(found, objects(scenes, i), strict=True):
            assert annotation["category_id"] == COCO_IDS[digit]
            assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
            assert np.array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum() == rle.area(coco.annToRLE(annotation))
            assert annotation["iscrowd"] == 0


def test_coco_categories_have_gaps_and_annotation_ids_are_unique(written):
    content = json.loads((written("coco") / "annotations" / "instances_train2017.json").read_text())
    assert [category["name"] for category in content["categories"]] == CLASS_NAMES
    ids = [category["id"] for category in content["categories"]]
    assert ids == sorted(set(ids)) and max(ids) > len(ids)
    assert len({annotation["id"] for annotation in content["annotations"]}) == len(content["annotations"])


@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_voc_2007_objects_are_the_scenes(written, truth, split):
    data = VOCDetection(written("voc"), year="2007", image_set=split)
    scenes = truth["test" if split == "test" else "train"]
    start, length = {"train": (0, 20), "val": (20, 20), "trainval": (0, 40), "test": (0, TEST)}[split]
    assert len(data) == length
    for i, (image, target) in enumerate(data, start=start):
        assert image.size == (SIZE, SIZE)
        found = target["annotation"]["object"]
        assert [item["name"] for item in found] == voc_names(scenes, i)
        for item, (_, (x0, y0, x1, y1), _) in zip(found, objects(scenes, i), strict=True):
            corners = [int(item["bndbox"][corner]) for corner in ("xmin", "ymin", "xmax", "ymax")]
            assert corners == [x0 + 1, y0 + 1, x1, y1]


def test_voc_2012_has_the_other_half_of_the_train_scenes(written, truth):
    data = VOCDetection(written("voc"), year="2012", image_set="trainval")
    names = [[item["name"] for item in target["annotation"]["object"]] for _, target in data]
    assert names == [voc_names(truth["train"], i) for i in range(40, 80)]


@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_voc_class_files_say_present_difficult_or_absent(written, split):
    root = written("voc") / "VOCdevkit" / "VOC2007"
    stems = (root / "ImageSets" / "Main" / f"{split}.txt").read_text().split()
    found = set()
    for name in VOC_CLASSES:
        lines = (root / "ImageSets" / "Main" / f"{name}_{split}.txt").read_text().splitlines()
        assert [line.split()[0] for line in lines] == stems
        for line in lines:
            stem, value = line.split()
            items = ElementTree.parse(root / "Annotations" / f"{stem}.xml").getroot().iter("object")
            hard = [item.findtext("difficult") == "1" for item in items if item.findtext("name") == name]
            assert int(value) == (-1 if not hard else 0 if all(hard) else 1)
            found.add(int(value))
    assert {-1, 1} <= found


def test_some_voc_objects_are_difficult_and_few(written):
    files = (written("voc") / "VOCdevkit").glob("*/Annotations/*.xml")
    flags = [item.findtext("difficult") for file in files for item in ElementTree.parse(file).getroot().iter("object")]
    assert 0 < flags.count("1") < 0.15 * len(flags)


@pytest.mark.parametrize(("year", "split", "start"), [("2007", "train", 0), ("2007", "test", 0), ("2012", "val", 60)])
def test_voc_segmentation_shows_classes_objects_and_a_void_line(written, truth, year, split, start):
    root, scenes = written("voc"), truth["test" if split == "test" else "train"]
    data = VOCSegmentation(root, year=year, image_set=split)
    assert len(data) == (TEST if split == "test" else 20)
    for i, path in enumerate(data.masks, start=start):
        mode, pixels = opened(path)
        _, numbered = opened(path.replace("SegmentationClass", "SegmentationObject"))
        assert mode == "P"
        drawn = np.zeros((SIZE, SIZE), bool)
        for number, (name, (_, _, mask)) in enumerate(zip(voc_names(scenes, i), objects(scenes, i), strict=True), 1):
            assert (pixels[mask] == VOC_CLASSES.index(name) + 1).all()
            assert (numbered[mask] == number).all()
            drawn |= mask
        assert set(np.unique(pixels[~drawn])) == set(np.unique(numbered[~drawn])) == {0, 255}


def test_voc_segmentation_has_the_published_colours(written):
    with Image.open(written("voc") / "VOCdevkit/VOC2007/SegmentationClass/000001.png") as image:
        palette = image.getpalette()
    colours = [tuple(palette[3 * i : 3 * i + 3]) for i in (0, 1, 2, 15, 20, 255)]
    assert colours == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (192, 128, 128), (0, 64, 128), (224, 224, 192)]


@pytest.mark.parametrize(("split", "part", "cities"), [("train", "train", 2), ("val", "test", 1)])
def test_cityscapes_pixels_are_the_scenes(written, truth, split, part, cities):
    scenes = truth[part]
    data = Cityscapes(written("cityscapes"), split, "fine", ["semantic", "instance", "color", "polygon"])
    assert len(data) == len(scenes)
    assert len({path.split("/")[-2] for path in data.images}) == cities
    order = {image.permute(1, 2, 0).numpy().tobytes(): i for i, image in enumerate(scenes.images)}
    train_ids = {entry.id: entry.train_id for entry in Cityscapes.classes}
    inner = np.zeros((SIZE, SIZE), bool)
    inner[1:-1, 1:-1] = True
    for path, (image, (labels, instances, colour, polygon)) in zip(data.images, data, strict=True):
        i = order[np.array(image).tobytes()]  # PNG keeps every pixel
        labels, instances = np.array(labels), np.array(instances)
        assert (labels[~inner] == 3).all()
        drawn = np.zeros_like(inner)
        for digit, _, mask in objects(scenes, i):
            assert (labels[mask & inner] == DIGIT_IDS[digit]).all()
            assert len(np.unique(instances[mask & inner])) == 1
            drawn |= mask
        assert (labels[inner & ~drawn] == GROUND_IDS[int(scenes.types[i])]).all()
        things = [digit for digit, _, _ in objects(scenes, i) if digit in THINGS]
        numbers = np.unique(instances[instances >= 1000])
        assert sorted(numbers // 1000) == sorted(DIGIT_IDS[digit] for digit in things)
        assert (instances[instances < 1000] == labels[instances < 1000]).all()
        _, trained = opened(path.replace("leftImg8bit/", "gtFine/").replace("leftImg8bit", "gtFine_labelTrainIds"))
        assert np.array_equal(trained, np.vectorize(train_ids.get)(labels))
        colours = np.array([entry.color for entry in Cityscapes.classes if entry.id >= 0])
        assert np.array_equal(np.array(colour), colours[labels])
        assert (polygon["imgWidth"], polygon["imgHeight"]) == (SIZE, SIZE)
        assert {item["label"] for item in polygon["objects"]} <= {entry.name for entry in Cityscapes.classes}


def test_cityscapes_uses_eighteen_of_the_nineteen_training_classes(written):
    found = set()
    for path in written("cityscapes").rglob("*_labelTrainIds.png"):
        found |= set(np.unique(opened(path)[1]).tolist())
    assert found == set(range(19)) - {5} | {255}  # 5: pole


@pytest.mark.parametrize(("split", "part"), [("train", "train"), ("val", "test")])
def test_the_folder_of_a_scene_is_its_largest_digit(written, truth, split, part):
    data = ImageFolder(written("folders") / split)
    assert data.classes == CLASS_NAMES
    assert len(data) == len(truth[part])
    for path, target in data.samples:
        i = int(path.rsplit("/", 1)[1].removesuffix(".jpg")) - 1
        areas = [(mask.sum(), digit) for digit, _, mask in objects(truth[part], i)]
        assert (max(areas)[0], target) in areas
        assert_looks_like(path, truth[part].images[i])


@pytest.mark.parametrize(
    ("layout", "root", "kind", "count"),
    [("coco", ".", "coco", TRAIN), ("voc", "VOCdevkit", "voc", TRAIN // 2), ("folders", "train", "folder", TRAIN)],
)
def test_pretraining_finds_the_layout_by_itself(written, layout, root, kind, count):
    source = build_source(DataConfig(root=str(written(layout) / root)))
    assert source.name.startswith(kind)
    assert len(source) >= count
    assert source.labels.sum(1).min() >= 1
    assert source.read(0)[:2] == b"\xff\xd8"  # a JPEG


@pytest.mark.parametrize("layout", LAYOUTS)
def test_progress_counts_every_image_once(tmp_path, layout):
    calls = []
    write(layout, tmp_path / "out", TRAIN, TEST, SIZE, progress=calls.append)
    assert calls == list(range(1, TRAIN + TEST + 1))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="is not an empty folder: name a new one, or delete what is there"):
        write("coco", tmp_path)
    with pytest.raises(DataError, match="is not an empty folder"):
        write("coco", tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_export_leaves_nothing_behind(tmp_path, existed):
    def interrupt(done):
        if done == 3:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    if existed:
        out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        write("voc", out, 8, 2, 32, progress=interrupt)
    assert [path.name for path in tmp_path.rglob("*")] == (["out"] if existed else [])


def test_impossible_exports_are_refused_with_a_sentence(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="unknown layout 'cocoo': did you mean 'coco'"):
        write("cocoo", out)
    with pytest.raises(DataError, match="0 test scenes make no data set: ask for 1 or more"):
        write("coco", out, test=0)
    with pytest.raises(DataError, match="VOC spreads its 3 train scenes over four lists: ask for 4 or more"):
        write("voc", out, train=3)
    with pytest.raises(DataError, match=r"none of the 4 train scenes belongs to class .*: raise --train"):
        write("folders", out, train=4, size=16)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write the scenes to .*: choose another --out"):
        write("coco", tmp_path / "file" / "out", 4, 4, 16)
    assert not out.exists()


def test_the_command_writes_a_layout_and_says_where(tmp_path):
    out = tmp_path / "scenes"
    arguments = ["export", "--layout", "coco", "--out", str(out), "--train", "6", "--test", "3", "--size", "32"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "wrote 6 train and 3 test images of 32 pixels" in result.output
    assert len(list((out / "train2017").glob("*.jpg"))) == 6
    assert len(list((out / "val2017").glob("*.jpg"))) == 3


def test_the_command_answers_an_unknown_layout_with_the_nearest(tmp_path):
    result = CliRunner().invoke(app, ["export", "--layout", "cityscape", "--out", str(tmp_path / "x")])
    assert isinstance(result.exception, DataError)
    assert "unknown layout 'cityscape': did you mean 'cityscapes'?" in str(result.exception)
