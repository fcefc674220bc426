"""Readers of OpenImages, VISPR, WIDER Attribute and VAW on small trees in their published layouts, with real JPEGs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mls.errors import DataError
from mls.eval.data import DataSet, build, openimages
from mls.eval.data.annotations import corners

RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)


def put(file: Path, content: object) -> Path:
    """Text as it is, anything else as json."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def photo(file: Path, colour: tuple[int, int, int] = BLUE, boxes: dict | None = None) -> None:
    """A JPEG of one colour with boxes (x, y, width, height) of another; on JPEG's grid, so that colours do not mix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (64, 48), colour)
    for (x, y, width, height), paint in (boxes or {}).items():
        image.paste(paint, (x, y, x + width, y + height))
    image.save(file, quality=95, subsampling=0)


def is_colour(pixels: torch.Tensor, colour: tuple[int, int, int]) -> bool:
    return bool((pixels.int() - torch.tensor(colour)[:, None, None]).abs().max() < 12)


def fails(sentence: str):
    return pytest.raises(DataError, match=sentence)


# ---------------------------------------------------------------- the four trees


def wider(root: Path) -> Path:
    names = {"10": "hat", "0": "Male", "2": "longHair"}  # json keeps no order worth trusting
    two = [
        {"attribute": [1, -1, 0], "bbox": [8, 16, 16, 8]},
        {"attribute": [0, 0, 1], "bbox": [32, 0, 16, 40]},
    ]
    images = {"train/0--Parade/a.jpg": two, "val/1--Handshaking/b.jpg": []}
    images["val/1--Handshaking/c.jpg"] = [{"attribute": [-1, -1, -1], "bbox": [0, 0, 64, 48]}]
    tests = {"test/2--Demonstration/d.jpg": [{"attribute": [1, 1, 1], "bbox": [-8.0, 40, 16.0, 16]}]}
    for split, part in (("trainval", images), ("test", tests)):
        content = {
            "attribute_id_map": names,
            "scene_id_map": {"0": "Parade"},
            "images": [{"file_name": name, "scene_id": 0, "targets": targets} for name, targets in part.items()],
        }
        put(root / f"wider_attribute_annotation/wider_attribute_{split}.json", content)
    photo(root / "Image/train/0--Parade/a.jpg", BLUE, {(8, 16, 16, 8): RED, (32, 0, 16, 40): GREEN})
    photo(root / "Image/val/1--Handshaking/b.jpg")
    photo(root / "Image/val/1--Handshaking/c.jpg", GREEN)
    photo(root / "Image/test/2--Demonstration/d.jpg", BLUE, {(0, 40, 8, 8): RED})
    return root


def thing(image: int, instance: int, box: list[float], positive: list[str], negative: list[str]) -> dict:
    return {
        "image_id": image,
        "instance_id": instance,
        "instance_bbox": box,
        "instance_polygon": None,
        "object_name": "thing",
        "positive_attributes": positive,
        "negative_attributes": negative,
    }


def vaw(root: Path) -> Path:
    put(root / "attribute_index.json", {"wet": 2, "red": 0, "tall": 1})
    put(root / "train_part1.json", [thing(7, 100, [8.0, 16.0, 16.0, 8.0], ["red"], ["tall"])])
    put(root / "train_part2.json", [thing(3, 200, [0, 0, 8, 8], [], ["wet"]), thing(7, 201, [32, 0, 16, 40], [], [])])
    put(root / "val.json", [thing(3, 300, [0, 0, 64, 48], ["tall", "wet"], [])])
    put(root / "test.json", [thing(11, 400, [56, 40, 8, 8], ["wet"], ["red"])])
    photo(root / "VG_100K/7.jpg", BLUE, {(8, 16, 16, 8): RED, (32, 0, 16, 40): GREEN})
    photo(root / "VG_100K_2/3.jpg", GREEN)
    photo(root / "VG_100K/11.jpg", BLUE, {(56, 40, 8, 8): RED})
    return root


def vispr(root: Path) -> Path:
    lines = ["idx\tattribute_id\tdescription", "1\ta1_age_approx\tAge", "\ta3_unused\tNot one of them"]
    put(root / "attributes.tsv", "\n".join([*lines, "0\ta0_safe\tSafe", "2\ta10_face_partial\tFace"]) + "\n")
    labels = {
        "train2017": {"2017_20": ["a1_age_approx", "a10_face_partial"], "2017_10": ["a0_safe"]},
        "val2017": {"2017_30": ["a0_safe"]},
        "test2017": {"2017_40": ["a10_face_partial"]},
    }
    for split, images in labels.items():
        for name, found in images.items():
            content = {"id": name, "image_path": f"images/{split}/{name}.jpg", "labels": found}
            put(root / f"annotations/{split}/{name}.json", content)
            photo(root / f"images/{split}/{name}.jpg", RED if name == "2017_20" else BLUE)
    return root


def csv_of(*labels: str) -> str:
    return "\n".join(["ImageID,Source,LabelName,Confidence", *labels]) + "\n"


def open_images(root: Path, name: Callable[[str], str] = lambda split: f"{split}/annotations-human.csv") -> Path:
    put(root / "classes-trainable.txt", "/m/0k4j\n/m/01g317\n/m/0c9ph5\n")
    put(root / "class-descriptions.csv", '/m/01g317,Person\n/m/0k4j,"Car, any"\n/m/0zzz,Other\n')
    labels = {
        "train": [
            "ffff0a0000000001,verification,/m/0k4j,1",
            "000000000000000b,crowdsource-verification,/m/01g317,0",
            "ffff0a0000000001,verification,/m/0c9ph5,0",
            "00000000000000aa,verification,/m/0zzz,1",
        ],
        "validation": ["0000000000000001,verification,/m/0c9ph5,1.0", "0000000000000001,verification,/m/0k4j,0.0"],
        "test": ["0000000000000002,verification,/m/01g317,1"],
    }
    for split, lines in labels.items():
        put(root / name(split), csv_of(*lines))
        for line in lines:
            photo(root / split / f"{line[:16]}.jpg", RED if line[0] == "f" else BLUE)
    return root


TREES = {"wider_attribute": wider, "vaw": vaw, "vispr": vispr, "openimages": open_images}


def small(name: str, root: Path) -> DataSet:
    return build(name, root, check_sizes=False)


# ---------------------------------------------------------------- what is read


def test_wider_has_a_row_for_each_person_and_unspecified_is_zero(tmp_path):
    data = small("wider_attribute", wider(tmp_path))
    assert data.train.class_names == ["Male", "longHair", "hat"]
    assert data.train.truth.tolist() == [[1, -1, 0], [0, 0, 1], [-1, -1, -1]]
    assert data.train.truth.dtype == torch.int8
    assert data.train.rows.tolist() == [0, 0, 2]
    assert data.train.boxes.tolist() == [[8, 16, 24, 24], [32, 0, 48, 40], [0, 0, 64, 48]]
    assert data.test.truth.tolist() == [[1, 1, 1]]
    assert data.val is None


def test_boxes_crop_the_person_and_nothing_else(tmp_path):
    data = small("wider_attribute", wider(tmp_path))
    for row, size, colour in [(0, (8, 16), RED), (1, (40, 16), GREEN), (2, (48, 64), GREEN)]:
        pixels = data.train.pixels(row)
        assert pixels.shape == (3, *size)
        assert is_colour(pixels, colour)
    partly_outside = data.test.pixels(0)
    assert partly_outside.shape == (3, 8, 8)
    assert is_colour(partly_outside, RED)


@pytest.mark.parametrize("folder", [".", "Annotations"])
def test_wider_annotations_may_lie_in_a_folder_of_another_name(tmp_path, folder):
    wider(tmp_path)
    published = tmp_path / "wider_attribute_annotation"
    (tmp_path / folder).mkdir(exist_ok=True)
    for file in published.iterdir():
        file.rename(tmp_path / folder / file.name)
    assert len(small("wider_attribute", tmp_path).train) == 3


@pytest.mark.parametrize("folder", ["", "data"])
def test_vaw_joins_the_parts_of_train_and_what_is_not_annotated_is_zero(tmp_path, folder):
    vaw(tmp_path)
    if folder:
        (tmp_path / folder).mkdir()
        for file in tmp_path.glob("*.json"):
            file.rename(tmp_path / folder / file.name)
    data = small("vaw", tmp_path)
    assert data.train.class_names == ["red", "tall", "wet"]
    assert data.train.truth.tolist() == [[1, -1, 0], [0, 0, -1], [0, 0, 0]]
    assert data.val.truth.tolist() == [[0, 1, 1]]
    assert data.test.truth.tolist() == [[-1, 0, 1]]


def test_vaw_objects_are_cut_from_images_in_either_folder(tmp_path):
    data = small("vaw", vaw(tmp_path))
    assert len(data.train.images) == 2
    crops = [data.train.pixels(row) for row in range(3)]
    assert [crop.shape[1:] for crop in crops] == [(8, 16), (8, 8), (40, 16)]
    assert [is_colour(crop, colour) for crop, colour in zip(crops, (RED, GREEN, GREEN), strict=True)] == [True] * 3
    assert "VG_100K_2" in data.train.describe(1)
    assert is_colour(data.test.pixels(0), RED)


def test_vispr_says_of_every_label_whether_it_is_there(tmp_path):
    data = small("vispr", vispr(tmp_path))
    assert data.train.class_names == ["a0_safe", "a1_age_approx", "a10_face_partial"]
    assert data.train.truth.tolist() == [[1, -1, -1], [-1, 1, 1]]
    assert (data.val.truth.tolist(), data.test.truth.tolist()) == ([[1, -1, -1]], [[-1, -1, 1]])
    assert is_colour(data.train.pixels(1), RED) and is_colour(data.train.pixels(0), BLUE)


def test_vispr_annotations_may_lie_beside_the_images(tmp_path):
    apart, together = small("vispr", vispr(tmp_path / "apart")), vispr(tmp_path / "together")
    for folder in ("images", "annotations"):
        for file in (together / folder).rglob("2017_*.*"):
            target = together / file.parent.name / file.name
            target.parent.mkdir(exist_ok=True)
            file.rename(target)
        for split in ("train2017", "val2017", "test2017"):
            (together / folder / split).rmdir()
    found = small("vispr", together)
    assert torch.equal(found.train.truth, apart.train.truth)
    assert is_colour(found.train.pixels(1), RED)


def test_openimages_keeps_what_people_verified_of_the_trainable_classes(tmp_path):
    data = small("openimages", open_images(tmp_path))
    assert data.train.class_names == ["Car, any", "Person", "/m/0c9ph5"]
    assert [Path(data.train.describe(row)).name for row in range(2)] == ["000000000000000b.jpg", "ffff0a0000000001.jpg"]
    assert data.train.truth.tolist() == [[0, -1, 0], [1, 0, -1]]
    assert is_colour(data.train.pixels(1), RED)
    assert data.val.truth.tolist() == [[-1, 0, 1]]
    assert data.test.truth.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    "place", ["{0}/{0}-annotations-human-imagelabels.csv", "{0}-annotations-human-imagelabels.csv"]
)
def test_openimages_file_names_of_later_versions_are_known(tmp_path, place):
    earlier, later = open_images(tmp_path / "3"), open_images(tmp_path / "4", place.format)
    assert torch.equal(small("openimages", earlier).train.truth, small("openimages", later).train.truth)


def test_a_label_verified_twice_with_both_answers_is_present(tmp_path):
    open_images(tmp_path)
    one = "0000000000000002,{},/m/01g317,{}"
    put(tmp_path / "test/annotations-human.csv", csv_of(one.format("verification", 1), one.format("crowd", 0)))
    assert small("openimages", tmp_path).test.truth.tolist() == [[0, 1, 0]]


MIDS = ["/m/a", "/m/ab", "/m/abc", "/m/0abcdefg", "/m/0abcdefghi", "/g/1"]


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.sampled_from(MIDS), st.sampled_from("01")), min_size=1),
    st.lists(st.sampled_from(MIDS), min_size=1, unique=True),
    st.integers(40, 200),
    st.booleans(),
)
def test_labels_are_those_that_reading_line_by_line_gives(tmp_path_factory, labels, classes, block, newline):
    """Whatever the order of lines and classes, wherever blocks end, with a newline at the end or without."""
    file = tmp_path_factory.mktemp("csv") / "labels.csv"
    text = csv_of(*(f"{image:016x},verification,{name},{sign}" for image, name, sign in labels))
    put(file, text if newline else text.rstrip("\n"))
    expected = [(i, classes.index(name), 1 if sign == "1" else -1) for i, name, sign in labels if name in classes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openimages, "BLOCK", block)
        if not expected:
            with pytest.raises(ValueError, match="no label of the classes"):
                openimages._labels(file, [name.encode() for name in classes])
            return
        found = openimages._labels(file, [name.encode() for name in classes])
    assert list(zip(*(values.tolist() for values in found), strict=True)) == expected


@given(st.lists(st.lists(st.integers(-400, 20_000).map(lambda quarters: quarters / 4), min_size=4, max_size=4)))
def test_corners_hold_the_whole_box_and_less_than_a_pixel_more(boxes):
    found = corners(boxes)
    exact = np.array(boxes).reshape(-1, 4)  # in quarters of a pixel, which floats add exactly
    exact[:, 2:] += exact[:, :2]
    outwards = (exact - found) * [1, 1, -1, -1]
    assert ((outwards >= 0) & (outwards < 1)).all()


# ---------------------------------------------------------------- what is wrong with a tree


@pytest.mark.parametrize(
    ("name", "missing", "advice"),
    [
        (
            "wider_attribute",
            "wider_attribute_annotation/wider_attribute_test.json",
            "unpack wider_attribute_annotation",
        ),
        ("vaw", "train_part2.json", "put the json files of https://github.com/adobe-research/vaw_dataset"),
        ("vaw", "attribute_index.json", "put the json files of https://github.com/adobe-research/vaw_dataset"),
        ("vispr", "attributes.tsv", "put attributes.tsv, the annotations and the images"),
        ("openimages", "classes-trainable.txt", "unpack annotations_human_2017_11.tar.gz and classes_2017_11.tar.gz"),
        ("openimages", "validation/annotations-human.csv", "unpack annotations_human_2017_11.tar.gz"),
    ],
)
def test_a_missing_file_is_named_with_what_to_download(tmp_path, name, missing, advice):
    (TREES[name](tmp_path) / missing).unlink()
    with fails(f"{missing} is missing: {advice}"):
        small(name, tmp_path)


def test_a_missing_or_empty_vispr_split_is_named(tmp_path):
    vispr(tmp_path)
    folder = tmp_path / "annotations/val2017"
    (folder / "2017_30.json").unlink()
    with fails(r"annotations/val2017/\*.json is missing: put attributes.tsv"):
        small("vispr", tmp_path)
    folder.rmdir()
    with fails("val2017 is missing: put attributes.tsv"):
        small("vispr", tmp_path)


@pytest.mark.parametrize("name", TREES)
def test_a_missing_root_says_what_to_download(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MLS_DATA", str(tmp_path))
    with fails(rf"{name} is missing: (put|unpack) .*, or set data.root"):
        build(name)


@pytest.mark.parametrize(
    ("name", "file", "content", "sentence"),
    [
        (
            "wider_attribute",
            "wider_attribute_annotation/wider_attribute_trainval.json",
            '{"images": [',
            "JSONDecodeErr",
        ),
        ("wider_attribute", "wider_attribute_annotation/wider_attribute_trainval.json", {"images": []}, "KeyError"),
        ("vaw", "train_part1.json", '[{"image_id": 1', "not a whole VAW file .JSONDecodeError"),
        ("vaw", "val.json", [thing(3, 1, [0, 0, 8, 8], ["unheard-of"], [])], "KeyError: 'unheard-of'"),
        ("vaw", "test.json", [thing(3, 1, [0, 0, 8], [], [])], "not a whole VAW file .ValueError"),
        ("vaw", "attribute_index.json", ["red", "tall"], "not a whole VAW attribute index"),
        ("vispr", "annotations/train2017/2017_10.json", '{"labels": ["a0', "not a whole VISPR annotation .JSONDecode"),
        ("vispr", "annotations/train2017/2017_10.json", {"labels": []}, "KeyError: 'image_path'"),
        ("vispr", "attributes.tsv", "a0_safe\na1_age\n", "not a whole VISPR attribute list .KeyError: 'idx'"),
        ("openimages", "train/annotations-human.csv", "", "first line is not ImageID,Source,LabelName,Confidence"),
        ("openimages", "train/annotations-human.csv", csv_of(), "it has no label of the classes"),
        ("openimages", "classes-trainable.txt", "\n", "is not a whole list of classes"),
    ],
)
def test_a_damaged_file_is_named_with_the_reason(tmp_path, name, file, content, sentence):
    put(TREES[name](tmp_path) / file, content)
    with fails(sentence) as caught:
        small(name, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / file} is not a whole ")
    assert str(caught.value).endswith("download it again")


@pytest.mark.parametrize(
    "line",
    [
        "0000000000000002,verification,/m/01g317",  # cut off
        "0000000000000002,verification,/m/01g317,",
        "0000000000000002,verification,/m/01g317,1,2",
        "0000000000000002,machine,/m/01g317,0.7",  # not a person's word
        "0000000000000002,verification,/m/01g317,2",
        "0000000000000002,verification,/m/01g317,1.5",
        "02,verification,/m/01g317,1",
        "000000000000000X,verification,/m/01g317,1",
        "",
    ],
)
def test_an_openimages_line_of_another_form_is_shown(tmp_path, line):
    open_images(tmp_path)
    good = "0000000000000002,verification,/m/01g317,1"
    put(tmp_path / "test/annotations-human.csv", csv_of(good, line, good))
    with fails(rf"test/annotations-human.csv is not a whole OpenImages label file .*unexpected line '{line}'"):
        small("openimages", tmp_path)


def test_labels_that_do_not_fit_into_memory_are_refused_with_advice(tmp_path, monkeypatch):
    open_images(tmp_path)
    monkeypatch.setattr(openimages, "memory_size", lambda: 5)
    with fails(r"\(2 images, 3 classes\) and this machine has .* leave fewer classes in classes-trainable.txt and say"):
        small("openimages", tmp_path)
    monkeypatch.undo()
    assert openimages.memory_size() > 1e8


@pytest.mark.parametrize(
    ("name", "folder"), [("wider_attribute", "Image"), ("vispr", "images/test2017"), ("openimages", "train")]
)
def test_images_that_are_not_there_at_all_are_missed_at_once(tmp_path, name, folder):
    for file in (TREES[name](tmp_path) / folder).rglob("*.jpg"):
        file.unlink()
    with fails("none of the first . images that .* names is in .*: point data.root to"):
        small(name, tmp_path)


def test_vaw_counts_the_images_that_neither_folder_has(tmp_path):
    vaw(tmp_path)
    (tmp_path / "VG_100K_2/3.jpg").unlink()
    (tmp_path / "VG_100K_2").rmdir()
    with fails(r"1 of the 2 images of VAW's train are neither in .*VG_100K nor in VG_100K_2 \(first: 3.jpg\): put the"):
        small("vaw", tmp_path)


@pytest.mark.parametrize(
    ("name", "classes"), [("wider_attribute", 14), ("vaw", 620), ("vispr", 68), ("openimages", 5000)]
)
def test_a_part_of_a_data_set_is_an_error_unless_asked_for(tmp_path, name, classes):
    TREES[name](tmp_path)
    with fails(f"has 3 classes where the published {name} has {classes}: complete it, or say data.check_sizes=false"):
        build(name, tmp_path)
    assert len(build(name, tmp_path, check_sizes=False).test) == 1
