"""Where the objects of a labelled split are: VOC's and COCO's annotations, as shares of each image."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mls.data.annotated import VOC_CLASSES
from mls.errors import DataError
from mls.eval import data

XML = "<annotation><size><width>40</width><height>20</height></size>{}</annotation>"
OBJECT = "<object><name>{}</name><difficult>{}</difficult><bndbox>{}</bndbox></object>"


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20)).save(path)


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    year = tmp_path / "VOC2012"
    for stem in ("a", "b", "c"):
        photo(year / "JPEGImages" / f"{stem}.jpg")
    corners = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    objects = OBJECT.format("dog", 0, corners.format(1, 1, 20, 10)) + OBJECT.format(
        "cat", 1, corners.format(21, 11, 40, 20)
    )
    for folder, files in {
        "Annotations": {"b.xml": XML.format(""), "c.xml": XML.format(objects)},
        "ImageSets/Main": {
            f"{one}_{phase}.txt": "".join(f"{stem} {1 if (stem, one) == ('c', 'dog') else -1}\n" for stem in stems)
            for one in VOC_CLASSES
            for phase, stems in (("train", "a"), ("val", "bc"))
        },
    }.items():
        (year / folder).mkdir(parents=True)
        for name, text in files.items():
            (year / folder / name).write_text(text)
    return tmp_path


def test_voc_boxes_are_shares_of_the_image_and_follow_the_rows(voc: Path) -> None:
    test = data.build("voc2012", voc, check_sizes=False).test
    empty, found = data.boxes("voc2012", voc, test)
    assert len(empty[0]) == 0
    assert found[0].tolist() == [[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]]
    assert [VOC_CLASSES[column] for column in found[1].tolist()] == ["dog", "cat"]
    (only,) = data.boxes("voc2012", voc, test.part(torch.tensor([1])))
    assert torch.equal(only[0], found[0])
    (voc / "VOC2012" / "Annotations" / "c.xml").unlink()
    with pytest.raises(DataError, match=r"c.xml is missing: download VOCtrainval"):
        data.boxes("voc2012", voc, test)


def test_coco_boxes_are_those_of_the_image_of_the_same_name(tmp_path: Path) -> None:
    for phase, ids in (("train", [1]), ("val", [9, 10])):
        images = [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 20} for i in ids]
        objects = [{"image_id": i, "category_id": 7 + i % 2, "bbox": [i, 0, 10, 5]} for i in ids]
        content = {
            "images": images,
            "annotations": objects,
            "categories": [{"id": 7, "name": "x"}, {"id": 8, "name": "y"}],
        }
        for i in ids:
            photo(tmp_path / f"{phase}2014" / f"{i}.jpg")
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{phase}2014.json").write_text(json.dumps(content))
    test = data.build("coco2014", tmp_path, check_sizes=False).test
    found = data.boxes("coco2014", tmp_path, test)
    assert [Path(test.describe(row)).name for row in range(2)] == ["10.jpg", "9.jpg"]  # ids are sorted as text
    assert [boxes.tolist() for boxes, _ in found] == [
        [[0.25, 0.0, 0.5, 0.25]],
        [[pytest.approx(0.225), 0.0, pytest.approx(0.475), 0.25]],
    ]
    assert [classes.tolist() for _, classes in found] == [[0], [1]]
