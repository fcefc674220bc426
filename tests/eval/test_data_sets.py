"""VOC 2012, COCO 2014, NUS-WIDE, CUB attributes and the formatted .npy files, read from small trees that are written in
the published layouts. The attribute data sets with boxes are tested in test_attribute_sets.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mls.data.annotated import VOC_CLASSES
from mls.errors import DataError
from mls.eval.data import build

CUB_FILE = "CUB_200_2011/attributes/image_attribute_labels.txt"
CUB_LABELS = "1 1 1 4 27.7080\n1 2 0 3 1\n2 1 0 1 5.2\n2 2 1 3 0 1.25\n3 1 0 4 2.5\n3 2 0 2 3\n"


def picture(file: Path, colour: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (colour, 80, 160)).save(file)


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def voc(root: Path) -> Path:
    """2008_000003 shows a cat and a difficult dog. The lists are not in the order of the names."""
    year = root / "VOCdevkit" / "VOC2012"
    labels = {
        "train": {"2008_000009": {"person": 1}, "2008_000003": {"cat": 1, "dog": 0}},
        "val": {"2008_000002": {"tvmonitor": 1, "person": 1}},
    }
    for phase, images in labels.items():
        for name in VOC_CLASSES:
            lines = [f"{stem} {present.get(name, -1):2d}\n" for stem, present in images.items()]
            write(year / "ImageSets" / "Main" / f"{name}_{phase}.txt", "".join(lines))
        for stem in images:
            picture(year / "JPEGImages" / f"{stem}.jpg", int(stem[-1]) * 10)
    return root / "VOCdevkit"


def coco(root: Path) -> Path:
    """Image 7 has no annotation. Neither categories nor images are in the order of their ids."""
    categories = [{"id": 44, "name": "bottle"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
    labels = {"train": {9: [1, 1, 44], 100: [3], 10: [44, 3], 7: []}, "val": {42: [1]}}
    for phase, images in labels.items():
        name = lambda image, phase=phase: f"COCO_{phase}2014_{image:012d}.jpg"
        content = {
            "images": [{"id": image, "file_name": name(image), "width": 8, "height": 6} for image in images],
            "annotations": [
                {"image_id": image, "category_id": category, "bbox": [0, 0, 4, 4], "iscrowd": 0}
                for image, present in images.items()
                for category in present
            ],
            "categories": categories,
        }
        write(root / "coco2014" / "annotations" / f"instances_{phase}2014.json", json.dumps(content))
        for image in images:
            picture(root / "coco2014" / f"{phase}2014" / name(image), 2 * image)
    return root / "coco2014"


def nus(root: Path, line_end: str = "\r\n") -> Path:
    folder = root / "nuswide"
    write(folder / "ConceptsList" / "Concepts81.txt", "airport\nanimal\n")
    lists = {"Train": [r"actor\0001_21.jpg", r"zebra\0007_5.jpg", r"actor\0002_3.jpg"], "Test": [r"sky\0001_8.jpg"]}
    labels = {"airport": {"Train": [0, 0, 1], "Test": [1]}, "animal": {"Train": [0, 1, 1], "Test": [0]}}
    for phase, images in lists.items():
        write(folder / "ImageList" / f"{phase}Imagelist.txt", line_end.join([*images, ""]))
        for concept, marks in labels.items():
            column = folder / "Groundtruth" / "TrainTestLabels" / f"Labels_{concept}_{phase}.txt"
            write(column, "".join(f"{mark}\n" for mark in marks[phase]))
        for number, image in enumerate(images):
            picture(folder / "Flickr" / image.replace("\\", "/"), number * 20)
    return folder


def cub(root: Path) -> Path:
    """Three images, two attributes. One line has more columns than the others, as some of the real file."""
    folder = root / "CUB_200_2011"
    images = ["001.Albatross/A_0046_18.jpg", "001.Albatross/A_0009_34.jpg", "002.Crow/C_0001_1.jpg"]
    write(root / "attributes.txt", "1 has_bill_shape::curved_(up_or_down)\n2 has_wing_color::blue\n")
    write(folder / "images.txt", "".join(f"{i} {image}\n" for i, image in enumerate(images, start=1)))
    write(folder / "train_test_split.txt", "1 0\n2 1\n3 1\n")
    write(root / CUB_FILE, CUB_LABELS)
    for number, image in enumerate(images):
        picture(folder / "images" / image, number * 20)
    return folder


def formatted(folder: Path, images: list[str], labels: np.ndarray, observed: np.ndarray | None = None) -> None:
    """Images, labels and observed labels: the last image is the official val, all others train."""
    for phase, part in {"train": slice(None, -1), "val": slice(-1, None)}.items():
        np.save(folder / f"formatted_{phase}_images.npy", np.array(images[part]))
        np.save(folder / f"formatted_{phase}_labels.npy", labels[part])
        if observed is not None:
            np.save(folder / f"formatted_{phase}_labels_obs.npy", observed[part])


TREES = {"voc2012": voc, "coco2014": coco, "nuswide": nus, "cub_attributes": cub}


def read(name: str, root: Path):
    return build(name, root, check_sizes=False)


def fails(sentence: str):
    return pytest.raises(DataError, match=sentence)


def files(images) -> list[str]:
    return [Path(images.describe(row)).name for row in range(len(images))]


def present(images) -> list[list[str]]:
    return [[images.class_names[j] for j in (row == 1).nonzero().flatten().tolist()] for row in images.truth]


# ---------------------------------------------------------------- what is read


def test_voc_is_sorted_by_name_and_difficult_is_absent(tmp_path):
    data = read("voc2012", voc(tmp_path))
    assert files(data.train) == ["2008_000003.jpg", "2008_000009.jpg"]
    assert present(data.train) == [["cat"], ["person"]]
    assert files(data.test) == ["2008_000002.jpg"]
    assert present(data.test) == [["person", "tvmonitor"]]
    assert data.train.truth.abs().all()
    assert data.val is None


def test_voc_may_be_given_as_the_year_itself(tmp_path):
    assert present(read("voc2012", voc(tmp_path) / "VOC2012").train) == [["cat"], ["person"]]


def test_coco_keeps_annotated_images_sorted_by_id_as_text_and_classes_by_id(tmp_path):
    data = read("coco2014", coco(tmp_path))
    assert [int(name[-7:-4]) for name in files(data.train)] == [10, 100, 9]
    assert data.train.class_names == ["person", "car", "bottle"]
    assert data.train.truth.tolist() == [[-1, 1, 1], [-1, 1, -1], [1, -1, 1]]
    assert data.test.truth.tolist() == [[1, -1, -1]]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_nus_wide_keeps_the_order_of_its_lists_and_reads_their_backslashes(tmp_path, line_end):
    data = read("nuswide", nus(tmp_path, line_end))
    assert [data.train.describe(i).split("Flickr/")[1] for i in range(3)] == [
        "actor/0001_21.jpg",
        "zebra/0007_5.jpg",
        "actor/0002_3.jpg",
    ]
    assert data.train.class_names == ["airport", "animal"]
    assert data.train.truth.tolist() == [[-1, -1], [-1, 1], [1, 1]]
    assert data.test.truth.tolist() == [[1, -1]]


def test_nus_wide_images_may_lie_in_images_and_the_concepts_beside(tmp_path):
    folder = nus(tmp_path)
    (folder / "Flickr").rename(folder / "images")
    (folder / "ConceptsList" / "Concepts81.txt").rename(folder / "Concepts81.txt")
    assert read("nuswide", folder).train.pixels(1).shape == (3, 6, 8)


def test_cub_follows_its_split_and_takes_lines_with_extra_columns(tmp_path):
    data = read("cub_attributes", cub(tmp_path))
    assert files(data.train) == ["A_0009_34.jpg", "C_0001_1.jpg"]
    assert data.train.truth.tolist() == [[-1, 1], [-1, -1]]
    assert files(data.test) == ["A_0046_18.jpg"]
    assert data.test.truth.tolist() == [[1, -1]]
    assert data.train.class_names == ["has_bill_shape::curved_(up_or_down)", "has_wing_color::blue"]


@pytest.mark.parametrize("place", ["CUB_200_2011/attributes", "CUB_200_2011"])
def test_cub_attribute_names_may_lie_inside_the_folder(tmp_path, place):
    folder = cub(tmp_path)
    (tmp_path / "attributes.txt").rename(tmp_path / place / "attributes.txt")
    assert len(read("cub_attributes", folder).train.class_names) == 2


@pytest.mark.parametrize("name", TREES)
def test_every_image_decodes_to_its_own_pixels(tmp_path, name):
    data = read(name, TREES[name](tmp_path))
    for images in (data.train, data.test):
        for row in range(len(images)):
            with Image.open(images.describe(row)) as image:
                colour = image.getpixel((4, 3))[0]
            pixels = images.pixels(row)
            assert pixels.shape == (3, 6, 8)
            assert abs(int(pixels[0, 3, 4]) - colour) <= 2
    assert len({int(data.train.pixels(row)[0, 3, 4]) for row in range(len(data.train))}) == len(data.train)


@pytest.mark.parametrize("name", TREES)
def test_the_default_folder_is_under_the_data_variable(tmp_path, monkeypatch, name):
    folder = TREES[name](tmp_path)
    monkeypatch.setenv("MLS_DATA", str(folder.parent))
    assert len(build(name, check_sizes=False).train) > 1


# ---------------------------------------------------------------- formatted files


def test_formatted_files_come_before_annotations_and_bring_observed_labels(tmp_path):
    folder = coco(tmp_path)
    images = [f"train2014/COCO_train2014_{i:012d}.jpg" for i in (100, 9)] + ["val2014/COCO_val2014_000000000042.jpg"]
    labels = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0]], np.float64)
    observed = np.array([[1, 0, 0, -1], [0, 0, 1, 0], [0, 1, 0, 0]], np.float64)
    formatted(folder, images, labels, observed)
    data = read("coco2014", folder)
    assert [Path(data.train.describe(row)).name[-7:-4] for row in range(2)] == ["100", "009"]
    assert data.train.truth.tolist() == [[1, -1, 1, -1], [-1, 1, 1, -1]]
    assert data.train.observed.tolist() == [[1, 0, 0, -1], [0, 0, 1, 0]]
    assert data.train.observed.dtype == data.train.truth.dtype == torch.int8
    assert data.test.truth.tolist() == [[1, 1, -1, -1]]
    assert abs(int(data.train.pixels(0)[0, 3, 4]) - 200) <= 2
    assert data.train.class_names == ["0", "1", "2", "3"]
    write(folder / "formatted_metadata.json", json.dumps({"category_list": ["a", "b", "c", "d"]}))
    assert read("coco2014", folder).test.class_names == ["a", "b", "c", "d"]


FORMATTED = {
    "voc2012": (voc, "{}.jpg", ["2008_000009", "2008_000003", "2008_000002"], 20),
    "nuswide": (nus, "{}", ["zebra/0007_5.jpg", "actor/0001_21.jpg", "sky/0001_8.jpg"], 3),
    "cub_attributes": (cub, "001.Albatross/{}.jpg", ["A_0009_34", "A_0046_18", "A_0009_34"], 2),
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", FORMATTED)
def test_formatted_paths_start_at_the_image_folder_of_the_data_set(tmp_path, name, beside):
    tree, form, stems, classes = FORMATTED[name]
    folder = tree(tmp_path)
    if beside and name != "nuswide":
        folder = folder.parent  # the papers' code keeps the files beside what the archive unpacks to
    labels = np.eye(3, classes, dtype=np.int64)
    formatted(folder, [form.format(stem) for stem in stems], labels)
    data = read(name, folder)
    assert files(data.train) == [Path(form.format(stem)).name for stem in stems[:2]]
    assert data.train.truth.tolist() == (2 * labels - 1)[:2].tolist()
    assert data.train.observed is None
    assert len(data.train.class_names) == classes
    assert data.train.pixels(1).shape == (3, 6, 8)


BROKEN_ARRAYS = [
    ("train_images", np.array(["a.jpg", None], object), "cannot be read .Object arrays.*: save it again as plain"),
    ("train_images", np.array([["a.jpg"], ["b.jpg"]]), "holds no list of paths"),
    ("train_labels", np.array([[0, 2], [0, 1]]), "holds other labels than 0, 1: make it again"),
    ("train_labels", np.array([["a", "b"]] * 2), "holds other labels than 0, 1"),
    ("train_labels", np.array([[0, 1]]), r"has shape \(1, 2\) for 2 images"),
    ("train_labels", np.array([0, 1]), r"has shape \(2,\) for 2 images"),
    ("train_labels", np.array([[0, 1, 1]] * 2), "has 3 classes where cub_attributes has 2"),
    ("val_labels_obs", np.array([[0.5, 1]]), "holds other labels than -1, 0, 1"),
    ("val_labels_obs", np.array([[0, 1, 1]]), "has other classes than .*formatted_val_labels.npy"),
]


@pytest.mark.parametrize(("what", "array", "sentence"), BROKEN_ARRAYS)
def test_a_formatted_file_that_does_not_fit_is_refused(tmp_path, what, array, sentence):
    folder = cub(tmp_path)
    images = [f"001.Albatross/{stem}.jpg" for stem in ("A_0009_34", "A_0046_18", "A_0009_34")]
    formatted(folder, images, np.eye(3, 2), np.eye(3, 2))
    np.save(folder / f"formatted_{what}.npy", array, allow_pickle=True)
    with fails(f"formatted_{what}.npy {sentence}"):
        read("cub_attributes", folder)


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_torn_formatted_file_is_refused(tmp_path, content):
    folder = voc(tmp_path)
    formatted(folder, ["2008_000009.jpg", "2008_000002.jpg"], np.eye(2, 20))
    file = folder / "formatted_val_labels.npy"
    file.write_bytes(file.read_bytes()[:-20] if content is None else content)
    with fails(r"formatted_val_labels.npy cannot be read \(.*\): save it again as plain numbers"):
        read("voc2012", folder)


def test_a_missing_formatted_file_is_named(tmp_path):
    folder = voc(tmp_path)
    formatted(folder, ["2008_000009.jpg", "2008_000002.jpg"], np.eye(2, 20))
    (folder / "formatted_val_images.npy").unlink()
    with fails("formatted_val_images.npy is missing: put it beside formatted_train_images.npy, or remove that one"):
        read("voc2012", folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"category_list": 3}'])
def test_a_broken_list_of_categories_is_named(tmp_path, content):
    folder = coco(tmp_path)
    formatted(folder, ["a.jpg", "b.jpg"], np.eye(2, 3))
    write(folder / "formatted_metadata.json", content)
    with fails("formatted_metadata.json has no readable category_list"):
        read("coco2014", folder)


# ---------------------------------------------------------------- what is missing or broken

MISSING = [
    ("voc2012", "VOCdevkit/VOC2012/ImageSets/Main/sofa_val.txt", "download VOCtrainval_11-May-2012.tar"),
    ("coco2014", "coco2014/annotations/instances_val2014.json", "download .*annotations_trainval2014.zip"),
    ("nuswide", "nuswide/ConceptsList/Concepts81.txt", "download ImageList, Groundtruth, ConceptsList"),
    ("nuswide", "nuswide/ImageList/TestImagelist.txt", "download ImageList, Groundtruth, ConceptsList"),
    ("nuswide", "nuswide/Groundtruth/TrainTestLabels/Labels_animal_Train.txt", "download ImageList, Groundtruth"),
    ("cub_attributes", "attributes.txt", "download CUB_200_2011.tgz"),
    ("cub_attributes", "CUB_200_2011/train_test_split.txt", "download CUB_200_2011.tgz"),
    ("cub_attributes", CUB_FILE, "download CUB_200_2011.tgz"),
]


@pytest.mark.parametrize(("name", "file", "advice"), MISSING)
def test_a_missing_file_is_named_with_what_to_download(tmp_path, name, file, advice):
    folder = TREES[name](tmp_path)
    (tmp_path / file).unlink()
    with fails(f"^{tmp_path}/{file} is missing: {advice}"):
        read(name, folder)


def test_a_missing_folder_is_named_with_what_to_download(tmp_path):
    with fails("coco2014 is missing: download train2014.zip.*, or set data.root"):
        read("coco2014", tmp_path / "coco2014")


@pytest.mark.parametrize("name", TREES)
def test_annotations_without_any_images_are_refused_at_once(tmp_path, name):
    folder = TREES[name](tmp_path)
    for image in tmp_path.rglob("*.jpg"):
        image.unlink()
    with fails("none of the first . images that .* names is in "):
        read(name, folder)


VOC_LISTS = "VOCdevkit/VOC2012/ImageSets/Main"
NUS_LABELS = "nuswide/Groundtruth/TrainTestLabels"
BROKEN = [
    ("voc2012", f"{VOC_LISTS}/cat_train.txt", "2008_000003  1\n", "lists other images than .*aeroplane_train.txt"),
    ("voc2012", f"{VOC_LISTS}/cat_train.txt", "2008_000003\n", "has a line that is not an image name and 1, 0 or -1"),
    ("voc2012", f"{VOC_LISTS}/cat_train.txt", "2008_000003 7\n", "has a line that is not an image name and 1, 0 or -1"),
    ("coco2014", "coco2014/annotations/instances_train2014.json", '{"images": [', "is not a COCO instances file"),
    ("coco2014", "coco2014/annotations/instances_train2014.json", "[]", "is not a COCO instances file"),
    ("nuswide", f"{NUS_LABELS}/Labels_animal_Train.txt", "0\n1\n", "is not a 0 or 1 for each of 3 listed images"),
    ("nuswide", f"{NUS_LABELS}/Labels_animal_Train.txt", "0\n1\n2\n", "is not a 0 or 1 for each of 3 listed images"),
    ("nuswide", f"{NUS_LABELS}/Labels_animal_Train.txt", "0\n1\n-1\n", "is not a 0 or 1 for each of 3 listed images"),
    ("cub_attributes", CUB_FILE, "1 1 1 4 2\n1 2", r"cannot be read \(.*\): unpack CUB_200_2011.tgz again"),
    ("cub_attributes", CUB_FILE, "1 1 1 4 2\n1 x 0 1", r"cannot be read \(.*\): unpack CUB_200_2011.tgz again"),
    ("cub_attributes", CUB_FILE, "1 1 1 4 2\n", "does not label just 2 attributes for each of 3 images"),
    ("cub_attributes", CUB_FILE, CUB_LABELS + "9 1 1 4 2\n", "does not label just 2 attributes for each of 3 images"),
    (
        "cub_attributes",
        "CUB_200_2011/images.txt",
        "1 a.jpg\n3 b.jpg\n",
        "line 2 of .*images.txt does not give something",
    ),
    ("cub_attributes", "CUB_200_2011/train_test_split.txt", "1 0\n", "is about 1 images where images.txt has 3"),
]


@pytest.mark.parametrize(("name", "file", "content", "sentence"), BROKEN)
def test_a_broken_file_is_named(tmp_path, name, file, content, sentence):
    folder = TREES[name](tmp_path)
    write(tmp_path / file, content)
    with fails(sentence) as error:
        read(name, folder)
    assert str(tmp_path / file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content["annotations"][0].update(category_id=2), "KeyError: 2"),
        (lambda content: content["annotations"][0].update(image_id=5), "KeyError: 5"),
        (lambda content: content["annotations"][0].pop("image_id"), "KeyError: 'image_id'"),
        (lambda content: content.update(annotations=None), "TypeError"),
    ],
)
def test_coco_annotations_that_point_nowhere_are_refused(tmp_path, change, reason):
    folder = coco(tmp_path)
    file = folder / "annotations" / "instances_train2014.json"
    content = json.loads(file.read_text())
    change(content)
    write(file, json.dumps(content))
    with fails(rf"instances_train2014.json is not a COCO instances file \({reason}.*\): download it again"):
        read("coco2014", folder)


def test_coco_halves_with_other_categories_are_refused(tmp_path):
    folder = coco(tmp_path)
    file = folder / "annotations" / "instances_val2014.json"
    write(file, file.read_text().replace("bottle", "flask"))
    with fails("the two instances files in .*coco2014 have different categories"):
        read("coco2014", folder)


@pytest.mark.parametrize(
    ("name", "empty"),
    [
        ("voc2012", [f"{VOC_LISTS}/{name}_val.txt" for name in VOC_CLASSES]),
        (
            "nuswide",
            [
                "nuswide/ImageList/TestImagelist.txt",
                *(f"{NUS_LABELS}/Labels_{c}_Test.txt" for c in ("airport", "animal")),
            ],
        ),
    ],
)
def test_a_list_without_images_is_refused(tmp_path, name, empty):
    folder = TREES[name](tmp_path)
    for file in empty:
        write(tmp_path / file, "")
    with fails("lists no images: download it again"):
        read(name, folder)


# ---------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "voc2012",
            "VOCdevkit has 2 train images where the published voc2012 has 5717: complete it, or say data.check",
        ),
        ("coco2014", "has 3 classes where the published coco2014 has 80"),
        ("nuswide", "has 2 classes where the published nuswide has 81"),
        ("cub_attributes", "has 2 classes where the published cub_attributes has 312"),
    ],
)
def test_another_size_than_published_is_refused_unless_asked_for(tmp_path, name, sentence):
    folder = TREES[name](tmp_path)
    with fails(sentence):
        build(name, folder)
    assert build(name, folder, check_sizes=False).name == name
