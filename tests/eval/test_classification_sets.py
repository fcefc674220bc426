"""Readers of the data sets of classification on small trees in their published layouts: real JPEGs, real MATLAB files,
and pickles as Python 2 wrote them."""

import os
import pickle
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import ImageFolder, OxfordIIITPet

from mls.data import Source
from mls.data.annotated import VOC_CLASSES
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, build
from mls.eval.data.class_folders import held_out
from mls.tools.eval import check


def photo(file: Path, colour: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (colour, 80, 160)).save(file)


def put(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def mat(file: Path, **variables: object) -> Path:
    """A MATLAB file, compressed as MATLAB does it."""
    stream = BytesIO()
    savemat(stream, variables, do_compression=True)
    return put(file, stream.getvalue())


def records(*rows: tuple, fields: str) -> np.ndarray:
    """A MATLAB array of structs."""
    return np.array([list(rows)], dtype=[(field, object) for field in fields.split()])


# ---------------------------------------------------------------- the trees


def cub200(root: Path) -> Path:
    folder = root / "CUB_200_2011"
    images = ["001.Albatross/A_46.jpg", "002.Crow/C_1.jpg", "001.Albatross/A_9.jpg", "002.Crow/C_2.jpg"]
    put(folder / "images.txt", "".join(f"{i} {image}\n" for i, image in enumerate(images, start=1)))
    put(folder / "classes.txt", "1 001.Albatross\n2 002.Crow\n")
    put(folder / "image_class_labels.txt", "1 1\n2 2\n3 1\n4 2\n")
    put(folder / "train_test_split.txt", "1 0\n2 1\n3 1\n4 1\n")
    for number, image in enumerate(images):
        photo(folder / "images" / image, number * 20)
    return folder


def flowers(root: Path) -> Path:
    folder = root / "flowers-102"
    mat(folder / "imagelabels.mat", labels=np.array([[77, 1, 102, 1, 5]], np.uint8))
    sets = {"trnid": [[4, 1]], "valid": [[2]], "tstid": [[5, 3]]}
    mat(folder / "setid.mat", **{name: np.array(ids, np.uint16) for name, ids in sets.items()})
    for number in range(1, 6):
        photo(folder / "jpg" / f"image_{number:05d}.jpg", number * 20)
    return folder


CARS = "bbox_x1 bbox_y1 bbox_x2 bbox_y2 class fname"


def cars(root: Path) -> Path:
    folder = root / "stanford_cars"
    mat(folder / "devkit/cars_meta.mat", class_names=np.array([["AM General SUV", "Acura RL", "Audi R8"]], object))
    train = [(1, 1, 5, 5, 3, "00001.jpg"), (1, 1, 5, 5, 1, "00002.jpg"), (1, 1, 5, 5, 2, "00003.jpg")]
    mat(folder / "devkit/cars_train_annos.mat", annotations=records(*train, fields=CARS))
    test = [(1, 1, 5, 5, 2, "00001.jpg"), (1, 1, 5, 5, 2, "00002.jpg")]
    mat(folder / "cars_test_annos_withlabels.mat", annotations=records(*test, fields=CARS))
    for split, rows in (("train", train), ("test", test)):
        for number, row in enumerate(rows):
            photo(folder / f"cars_{split}" / row[-1], number * 20)
    return folder


def aircraft(root: Path) -> Path:
    folder = root / "fgvc-aircraft-2013b"
    put(folder / "data/variants.txt", "707-320\nCessna 172\n")
    lists = {"trainval": {"1025794": "Cessna 172", "0056978": "707-320"}, "test": {"1514522": "Cessna 172"}}
    for split, images in lists.items():
        lines = "".join(f"{image} {variant}\n" for image, variant in images.items())
        put(folder / f"data/images_variant_{split}.txt", lines)
        for number, image in enumerate(images):
            photo(folder / f"data/images/{image}.jpg", number * 20)
    return folder


def indoor67(root: Path) -> Path:
    folder = root / "indoorCVPR_09"
    lists = {"Train": ["gameroom/b t.jpg", "bar/1.jpg", "gameroom/a.jpg"], "Test": ["bar/2.jpg", "gameroom/c.jpg"]}
    for split, images in lists.items():
        put(folder / f"{split}Images.txt", "\r\n".join(images))
        for number, image in enumerate(images):
            photo(folder / "Images" / image, number * 20)
    return folder


def pets(root: Path) -> Path:
    folder = root / "oxford-iiit-pet"
    lists = {
        "trainval": ["american_bulldog_100 2 2 1", "Abyssinian_100 1 1 1", "american_bulldog_7 2 2 1"],
        "test": ["Abyssinian_2 1 1 1", "american_bulldog_1 2 2 1"],
    }
    for split, rows in lists.items():
        put(folder / f"annotations/{split}.txt", "".join(f"{row}\n" for row in rows))
        for number, row in enumerate(rows):
            photo(folder / f"images/{row.split()[0]}.jpg", number * 20)
    return folder


def dtd(root: Path) -> Path:
    folder = root / "dtd"
    for part, number in {"train": 2, "val": 4, "test": 6}.items():
        images = [f"{kind}/{kind}_{number:04d}.jpg" for kind in ("zigzagged", "banded")]
        put(folder / f"dtd/labels/{part}1.txt", "".join(f"{image}\n" for image in images))
        for shift, image in enumerate(images):
            photo(folder / "dtd/images" / image, number * 20 + shift * 10)
    return folder


def voc07(root: Path) -> Path:
    """000005 shows a cat and a difficult dog."""
    year = root / "VOCdevkit" / "VOC2007"
    labels = {
        "trainval": {"000009": {"person": 1}, "000005": {"cat": 1, "dog": 0}},
        "test": {"000001": {"person": 1, "dog": 1}},
    }
    for phase, images in labels.items():
        for name in VOC_CLASSES:
            lines = [f"{stem} {shown.get(name, -1):2d}\n" for stem, shown in images.items()]
            put(year / f"ImageSets/Main/{name}_{phase}.txt", "".join(lines))
        for stem in images:
            photo(year / f"JPEGImages/{stem}.jpg", int(stem) * 10)
    return root / "VOCdevkit"


def imagenet(root: Path) -> Path:
    folder = root / "imagenet"
    for number, image in enumerate(["n02/n02_1.JPEG", "n01/n01_9.JPEG", "n01/n01_10.JPEG"]):
        photo(folder / "train" / image, number * 20)
    photo(folder / "val/n02/ILSVRC2012_val_00000001.JPEG")
    photo(folder / "val/n01/ILSVRC2012_val_00000002.JPEG")
    return folder


def flat_imagenet(root: Path) -> Path:
    """The same with val as its archive unpacks. The devkit counts classes in another order than that of their names,
    and lists what stands above them too."""
    folder = imagenet(root)
    for image in sorted((folder / "val").rglob("*.JPEG")):
        image.rename(folder / "val" / image.name)
    for empty in (folder / "val/n01", folder / "val/n02"):
        empty.rmdir()
    data = folder / "ILSVRC2012_devkit_t12/data"
    synsets = [(2, "n01", "crane", 0), (1, "n02", "maillot, tank suit", 0), (3, "n00", "entity", 2)]
    mat(data / "meta.mat", synsets=records(*synsets, fields="ILSVRC2012_ID WNID words num_children").T)
    put(data / "ILSVRC2012_validation_ground_truth.txt", "1\n2\n")
    return folder


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: text as bytes, and numpy's functions under the names that they had."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def save_bytes(self, text: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(text)) + text)
        self.memoize(text)

    def save_str(self, text: str) -> None:
        self.save_bytes(text.encode())

    dispatch[bytes], dispatch[str] = save_bytes, save_str

    def save_global(self, obj: object, name: str | None = None) -> None:
        known = {np.ndarray: b"numpy\nndarray", np.dtype: b"numpy\ndtype"}
        self.write(b"c" + known.get(obj, b"numpy.core.multiarray\n_reconstruct") + b"\n")
        self.memoize(obj)


def put_pickle(file: Path, content: object) -> None:
    stream = BytesIO()
    Python2Pickler(stream, protocol=2).dump(content)
    put(file, stream.getvalue())


def noise(images: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (images, 3 * 32 * 32)).astype(np.uint8)


def cifar10(root: Path) -> Path:
    folder = root / "cifar-10-batches-py"
    put_pickle(folder / "batches.meta", {"label_names": ["airplane", "automobile", "bird"], "num_vis": 3072})
    for number in range(1, 6):
        content = {"batch_label": f"training batch {number} of 5", "labels": [number % 3, 0], "data": noise(2, number)}
        put_pickle(folder / f"data_batch_{number}", content)
    put_pickle(folder / "test_batch", {"labels": [2], "data": noise(1, 9), "filenames": ["bird_s_1.png"]})
    return folder


def cifar100(root: Path) -> Path:
    folder = root / "cifar-100-python"
    names = {"fine_label_names": ["apple", "bear"], "coarse_label_names": ["fruit", "carnivores"]}
    put_pickle(folder / "meta", names)
    for split, labels in {"train": [1, 0, 1], "test": [0, 1]}.items():
        content = {"fine_labels": labels, "coarse_labels": [0] * len(labels), "data": noise(len(labels), len(labels))}
        put_pickle(folder / split, content)
    return folder


def class_folders(root: Path) -> Path:
    folder = root / "folder"
    for number, image in enumerate(["train/bee/1.png", "train/ant/deep/2.jpg", "test/ant/3.jpg", "test/bee/4.jpg"]):
        photo(folder / image, number * 20)
    return folder


TREES: dict[str, Callable[[Path], Path]] = {
    "cub200": cub200,
    "flowers": flowers,
    "cars": cars,
    "aircraft": aircraft,
    "indoor67": indoor67,
    "pets": pets,
    "dtd": dtd,
    "voc07": voc07,
    "imagenet": imagenet,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "folder": class_folders,
}


def small(name: str, root: Path) -> DataSet:
    return build(name, root, check_sizes=False)


def fails(sentence: str):
    return pytest.raises(DataError, match=sentence)


def shown(images: LabelledImages) -> list[str]:
    """Of each image its folder and file, and the name of its class."""
    files = [Path(images.describe(row)) for row in range(len(images))]
    names = [images.class_names[number] for number in images.truth.tolist()]
    return [f"{file.parent.name}/{file.name} {name}" for file, name in zip(files, names, strict=True)]


# ---------------------------------------------------------------- what is read

EXPECTED = {  # train and test: the folder and file of each image, and its class
    "cub200": (
        "002.Crow/C_1.jpg 002.Crow, 001.Albatross/A_9.jpg 001.Albatross, 002.Crow/C_2.jpg 002.Crow",
        "001.Albatross/A_46.jpg 001.Albatross",
    ),
    "flowers": (
        "jpg/image_00004.jpg pink primrose, jpg/image_00001.jpg passion flower, jpg/image_00002.jpg pink primrose",
        "jpg/image_00005.jpg english marigold, jpg/image_00003.jpg blackberry lily",
    ),
    "cars": (
        "cars_train/00001.jpg Audi R8, cars_train/00002.jpg AM General SUV, cars_train/00003.jpg Acura RL",
        "cars_test/00001.jpg Acura RL, cars_test/00002.jpg Acura RL",
    ),
    "aircraft": ("images/1025794.jpg Cessna 172, images/0056978.jpg 707-320", "images/1514522.jpg Cessna 172"),
    "indoor67": (
        "gameroom/b t.jpg gameroom, bar/1.jpg bar, gameroom/a.jpg gameroom",
        "bar/2.jpg bar, gameroom/c.jpg gameroom",
    ),
    "pets": (
        "images/american_bulldog_100.jpg american_bulldog, images/Abyssinian_100.jpg Abyssinian, "
        "images/american_bulldog_7.jpg american_bulldog",
        "images/Abyssinian_2.jpg Abyssinian, images/american_bulldog_1.jpg american_bulldog",
    ),
    "dtd": (
        "zigzagged/zigzagged_0002.jpg zigzagged, banded/banded_0002.jpg banded, "
        "zigzagged/zigzagged_0004.jpg zigzagged, banded/banded_0004.jpg banded",
        "zigzagged/zigzagged_0006.jpg zigzagged, banded/banded_0006.jpg banded",
    ),
    "imagenet": (
        "n01/n01_10.JPEG n01, n01/n01_9.JPEG n01, n02/n02_1.JPEG n02",
        "n01/ILSVRC2012_val_00000002.JPEG n01, n02/ILSVRC2012_val_00000001.JPEG n02",
    ),
    "folder": ("deep/2.jpg ant, bee/1.png bee", "ant/3.jpg ant, bee/4.jpg bee"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_images_have_their_published_class_and_order(tmp_path, name):
    data = small(name, TREES[name](tmp_path))
    assert (", ".join(shown(data.train)), ", ".join(shown(data.test))) == EXPECTED[name]
    assert data.train.class_names == data.test.class_names
    assert data.val is None


@pytest.mark.parametrize("name", TREES)
def test_truth_is_a_class_number_for_each_image_or_a_row_of_signs(tmp_path, name):
    data = small(name, TREES[name](tmp_path))
    assert data.name == name
    for images in (data.train, data.test):
        assert images.single_label == (name != "voc07")
        assert images.truth.dtype == (torch.int64 if images.single_label else torch.int8)
        assert len(images) == len(images.images)
        assert isinstance(images.images, Source)


@pytest.mark.parametrize("name", TREES)
def test_the_default_folder_is_under_the_data_variable(tmp_path, monkeypatch, name):
    TREES[name](tmp_path)
    monkeypatch.setenv("MLS_DATA", str(tmp_path))
    assert len(build(name, check_sizes=False).train) > 1


@pytest.mark.parametrize("name", EXPECTED)
def test_every_image_decodes_to_its_own_pixels(tmp_path, name):
    data = small(name, TREES[name](tmp_path))
    for images in (data.train, data.test):
        for row in range(len(images)):
            with Image.open(images.describe(row)) as image:
                colour = image.getpixel((4, 3))[0]
            assert abs(int(images.pixels(row)[0, 3, 4]) - colour) <= 2


def test_a_part_of_single_labels_keeps_images_and_classes_together(tmp_path):
    train = small("cars", cars(tmp_path)).train
    part = train.part(torch.tensor([2, 0]))
    assert shown(part) == [shown(train)[2], shown(train)[0]]
    assert part.part(torch.tensor([1])).truth.tolist() == [2]
    assert torch.equal(part.pixels(0), train.pixels(2))


def test_classes_are_in_the_published_order(tmp_path):
    of = lambda name: small(name, TREES[name](tmp_path)).train.class_names
    assert of("cars") == ["AM General SUV", "Acura RL", "Audi R8"]
    assert of("aircraft") == ["707-320", "Cessna 172"]
    assert of("pets") == ["Abyssinian", "american_bulldog"]
    assert of("cifar10") == ["airplane", "automobile", "bird"]
    assert len(of("flowers")) == 102


def test_voc07_leaves_difficult_objects_not_annotated(tmp_path):
    data = small("voc07", voc07(tmp_path))
    assert [Path(data.train.describe(row)).name for row in range(2)] == ["000005.jpg", "000009.jpg"]
    cat, dog, person = (VOC_CLASSES.index(name) for name in ("cat", "dog", "person"))
    first, second = data.train.truth
    assert (first[cat], first[dog], first[person]) == (1, 0, -1)
    assert (second[cat], second[dog], second[person]) == (-1, -1, 1)
    assert int((data.train.truth == 0).sum()) == 1
    assert (data.test.truth[0] > 0).nonzero().flatten().tolist() == [dog, person]


def test_voc07_may_be_given_as_the_year_itself(tmp_path):
    assert len(small("voc07", voc07(tmp_path) / "VOC2007").train) == 2


def test_flat_imagenet_val_has_the_classes_of_the_folders(tmp_path):
    sorted_in, flat = small("imagenet", imagenet(tmp_path / "a")).test, small("imagenet", flat_imagenet(tmp_path)).test
    assert sorted(line.split("/")[1] for line in shown(sorted_in)) == [line.split("/")[1] for line in shown(flat)]


def test_a_part_of_the_flat_imagenet_val_keeps_its_classes(tmp_path):
    folder = flat_imagenet(tmp_path)
    (folder / "val/ILSVRC2012_val_00000001.JPEG").unlink()
    assert shown(small("imagenet", folder).test) == ["val/ILSVRC2012_val_00000002.JPEG n01"]


@pytest.mark.parametrize(("name", "label"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_has_the_pixels_and_labels_that_an_unrestricted_unpickler_finds(tmp_path, name, label):
    folder = TREES[name](tmp_path)
    data = small(name, folder)
    for images, files in ((data.train, ["data_batch_*", "train"]), (data.test, ["test*"])):
        row = 0
        for file in sorted(file for pattern in files for file in folder.glob(pattern)):
            content = pickle.loads(file.read_bytes(), encoding="latin1")
            for number, pixels in zip(content[label], content["data"], strict=True):
                assert images.truth[row] == number
                assert np.array_equal(images.pixels(row), pixels.reshape(3, 32, 32))
                row += 1
        assert row == len(images)
    assert data.test.describe(0) == f"image 0 of {name} test"
    assert sorted(data.train.images.order(0, 1)) == list(range(len(data.train)))


def test_pixels_that_numpy_stored_by_columns_are_read_right(tmp_path):
    pixels = noise(2, 0)
    put_pickle(cifar10(tmp_path) / "test_batch", {"labels": [0, 1], "data": np.asfortranarray(pixels)})
    assert np.array_equal(small("cifar10", tmp_path / "cifar-10-batches-py").test.images.images.flatten(1), pixels)


def test_pets_are_those_of_torchvision(tmp_path):
    data = small("pets", pets(tmp_path))
    for images, split in ((data.train, "trainval"), (data.test, "test")):
        theirs = OxfordIIITPet(tmp_path, split)
        assert [label for _, label in (theirs[row] for row in range(len(theirs)))] == images.truth.tolist()
        assert np.array_equal(np.array(theirs[1][0]), images.pixels(1).permute(1, 2, 0))


def test_class_folders_are_those_of_torchvision(tmp_path):
    data = small("imagenet", imagenet(tmp_path))
    theirs = ImageFolder(tmp_path / "imagenet" / "train")
    assert theirs.samples == [(data.train.describe(row), int(data.train.truth[row])) for row in range(3)]


# ---------------------------------------------------------------- folders without published parts


def test_a_val_folder_is_the_test_unless_there_is_a_test(tmp_path):
    folder = class_folders(tmp_path)
    photo(folder / "val/bee/5.jpg")
    data = small("folder", folder)
    assert shown(data.val) == ["bee/5.jpg bee"]
    (folder / "test").rename(tmp_path / "elsewhere")
    data = small("folder", folder)
    assert shown(data.test) == ["bee/5.jpg bee"]
    assert data.val is None


def test_a_folder_without_parts_holds_out_a_fifth_of_each_class(tmp_path):
    for number in range(10):
        photo(tmp_path / f"ant/{number}.jpg")
    photo(tmp_path / "bee/1.jpg")
    photo(tmp_path / "bee/2.jpg")
    data = small("folder", tmp_path)
    assert data.train.truth.bincount().tolist() == [8, 1]
    assert data.test.truth.bincount().tolist() == [2, 1]
    assert len({*shown(data.train), *shown(data.test)}) == 12


@given(st.sets(st.integers(0, 10**6), min_size=2, max_size=60), st.integers(0, 10**6))
def test_an_added_image_moves_at_most_one_other(numbers, added):
    paths = lambda chosen: sorted(b"ant/%d.jpg" % number for number in chosen)
    train, test = (set(part) for part in held_out(paths(numbers), Path("ants")))
    assert train | test == set(paths(numbers)) and not train & test
    _, later = held_out(paths(numbers | {added}), Path("ants"))
    assert len(test ^ (set(later) - {b"ant/%d.jpg" % added})) <= 1


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([], "no images under .*folder .looked for jpg.*: it needs a folder of images for each class"),
        (["a.jpg", "ant/1.jpg"], "a.jpg lies in .*folder itself: move it into the folder of its class"),
        (["ant/1.jpg", "bee/1.jpg", "bee/2.jpg"], "has one image of ant: train and test need one each"),
        (["train/ant/1.jpg", "test/bee/1.jpg"], "test has bee/1.jpg, which is in none of the 1 class folders"),
        (["train/ant/1.jpg"], "folder/test is missing: put train"),
        (["val/ant/1.jpg"], "folder/train is missing: put train"),
        (["train/ant/1.txt", "test/ant/1.jpg"], "no images under .*train"),
    ],
)
def test_a_folder_without_two_parts_of_the_same_classes_is_refused(tmp_path, files, sentence):
    (tmp_path / "folder").mkdir()
    for file in files:
        photo(tmp_path / "folder" / file) if file.endswith("jpg") else put(tmp_path / "folder" / file, "")
    with fails(sentence):
        small("folder", tmp_path / "folder")


# ---------------------------------------------------------------- what is missing or broken

MISSING = [
    ("cub200", "image_class_labels.txt", "download CUB_200_2011.tgz"),
    ("cub200", "classes.txt", "download CUB_200_2011.tgz"),
    ("flowers", "imagelabels.mat", "download imagelabels.mat, setid.mat and 102flowers.tgz"),
    ("flowers", "setid.mat", "download imagelabels.mat, setid.mat and 102flowers.tgz"),
    ("cars", "cars_test_annos_withlabels.mat", "its own page serves the archives no more"),
    ("cars", "devkit/cars_meta.mat", "its own page serves the archives no more"),
    ("aircraft", "data/variants.txt", "download fgvc-aircraft-2013b.tar.gz"),
    ("aircraft", "data/images_variant_test.txt", "download fgvc-aircraft-2013b.tar.gz"),
    ("indoor67", "TestImages.txt", "download TrainImages.txt, TestImages.txt and indoorCVPR_09.tar"),
    ("pets", "annotations/test.txt", "download images.tar.gz and annotations.tar.gz"),
    ("dtd", "dtd/labels/val1.txt", "download dtd-r1.0.1.tar.gz"),
    ("voc07", "VOC2007/ImageSets/Main/sofa_test.txt", "download VOCtrainval_06-Nov-2007.tar and VOCtest"),
    ("cifar10", "data_batch_3", "download cifar-10-python.tar.gz"),
    ("cifar10", "batches.meta", "download cifar-10-python.tar.gz"),
    ("cifar100", "test", "download cifar-100-python.tar.gz"),
]


@pytest.mark.parametrize(("name", "file", "advice"), MISSING)
def test_a_missing_file_is_named_with_what_to_download(tmp_path, name, file, advice):
    folder = TREES[name](tmp_path)
    (folder / file).unlink()
    with fails(f"^{folder / file} is missing: {advice}"):
        small(name, folder)


def test_a_missing_part_of_imagenet_is_named(tmp_path):
    for part in ("ILSVRC2012_devkit_t12/data/meta.mat", "val", "train"):
        folder = flat_imagenet(tmp_path / part.replace("/", "-"))
        (folder / part).rename(tmp_path / "away" if (folder / part).is_file() else tmp_path / f"away-{part}")
        with fails(f"^{folder / part} is missing: download ILSVRC2012_img_train.tar, .*ILSVRC2012_devkit_t12.tar.gz"):
            small("imagenet", folder)


@pytest.mark.parametrize("name", TREES)
def test_a_missing_root_says_what_to_download(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MLS_DATA", str(tmp_path))
    with fails(r" is missing: (download|put train|its own page).*, or set data.root$"):
        build(name)


@pytest.mark.parametrize("name", ["cub200", "flowers", "cars", "aircraft", "indoor67", "pets", "dtd", "voc07"])
def test_a_listed_image_that_is_not_there_is_named(tmp_path, name):
    folder = TREES[name](tmp_path)
    gone = Path(small(name, folder).train.describe(0))
    gone.unlink()
    with fails(rf"1 of the \d images that .* names are not in .* \(first: .*{gone.name}\): unpack the images again"):
        small(name, folder)


@pytest.mark.parametrize("name", ["cub200", "flowers", "cars", "aircraft", "indoor67", "pets", "dtd", "voc07"])
def test_a_set_without_any_images_is_refused(tmp_path, name):
    folder = TREES[name](tmp_path)
    for image in folder.rglob("*.jpg"):
        image.unlink()
    with fails("none of the first . images that .* names is in "):
        small(name, folder)


BROKEN = [
    ("cub200", "image_class_labels.txt", "1 1\n2 3\n3 1\n4 2\n", "gives its image 2 the class 3 where .* from 1 to 2"),
    ("cub200", "image_class_labels.txt", "1 1\n2 crow\n3 1\n4 2\n", "is not a whole list of classes"),
    ("cub200", "image_class_labels.txt", "1 1\n2 2\n", "is about 2 images where images.txt has 4"),
    ("cub200", "images.txt", "1 a\n2 002.Crow/C_1.jpg\n3 b\n4 002.Crow/C_1.jpg\n", "names 002.Crow/C_1.jpg 2 times"),
    ("cub200", "train_test_split.txt", "1 0\n2 1\n", "is about 2 images where images.txt has 4"),
    ("aircraft", "data/images_variant_test.txt", "1514522 Boeing\n", "and .*variants.txt cannot be read .KeyError"),
    ("aircraft", "data/images_variant_test.txt", "1514522\n", "and .*variants.txt cannot be read .ValueError"),
    ("aircraft", "data/images_variant_trainval.txt", "1514522 707-320\n" * 2, "names 1514522.jpg 2 times"),
    ("indoor67", "TestImages.txt", "bar/2.jpg\nbar/2.jpg\n", "names bar/2.jpg 2 times: download it again"),
    ("indoor67", "TestImages.txt", "bar/2.jpg\ncellar/1.jpg\n", "cellar/1.jpg, which is in none of the 2 class fold"),
    ("indoor67", "TestImages.txt", "", "lists no images"),
    ("pets", "annotations/test.txt", "Abyssinian_2 1 1\n", "is not a whole list of pets .ValueError"),
    ("pets", "annotations/test.txt", "Abyssinian_2 one 1 1\n", "is not a whole list of pets .ValueError"),
    ("pets", "annotations/test.txt", "Abyssinian_2 2 1 1\n", "gives Abyssinian_2 the breed 2, which is american_bull"),
    ("pets", "annotations/trainval.txt", "Abyssinian_2 1 1 1\npug_1 4 2 1\n", "skips a breed between 1 and 4"),
    ("dtd", "dtd/labels/val1.txt", "banded/banded_0004.jpg\n", "cannot be read .their classes are not the same"),
    ("dtd", "dtd/labels/val1.txt", "banded\n", "cannot be read .ValueError"),
    ("dtd", "dtd/labels/test1.txt", "banded/banded_0006.jpg\n", "has other classes in test1.txt than in train1.txt"),
    ("voc07", "VOC2007/ImageSets/Main/cat_test.txt", "000001  2\n", "has a line that is not an image name and 1, 0"),
    ("voc07", "VOC2007/ImageSets/Main/cat_test.txt", "000001 1\n" * 2, "names an image twice"),
    ("voc07", "VOC2007/ImageSets/Main/cat_test.txt", "000002  1\n", "lists other images than .*aeroplane_test.txt"),
]


@pytest.mark.parametrize(("name", "file", "content", "sentence"), BROKEN)
def test_a_damaged_list_is_named(tmp_path, name, file, content, sentence):
    folder = TREES[name](tmp_path)
    put(folder / file, content)
    with fails(sentence) as error:
        small(name, folder)
    assert Path(file).name in str(error.value)
    assert "\n" not in str(error.value)


MATLAB = [
    ("flowers", "imagelabels.mat"),
    ("flowers", "setid.mat"),
    ("cars", "devkit/cars_meta.mat"),
    ("cars", "cars_test_annos_withlabels.mat"),
    ("imagenet", "ILSVRC2012_devkit_t12/data/meta.mat"),
]


@pytest.mark.parametrize("damage", ["empty", "page", "cut early", "cut late", "other variables"])
@pytest.mark.parametrize(("name", "file"), MATLAB)
def test_a_damaged_matlab_file_is_named(tmp_path, name, file, damage):
    folder = flat_imagenet(tmp_path) if name == "imagenet" else TREES[name](tmp_path)
    whole = (folder / file).read_bytes()
    if damage == "other variables":
        mat(folder / file, unknown=np.arange(9))
    else:
        page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 9
        put(folder / file, {"empty": b"", "page": page, "cut early": whole[:140], "cut late": whole[:-3]}[damage])
    with fails(rf"{file}.* (is not a whole|cannot be read) .*: (download it|unpack the archive) again") as error:
        small(name, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "variables", "sentence"),
    [
        (
            "imagelabels.mat",
            {"labels": [[77, 1, 103, 1, 5]]},
            "gives its image 3 the class 103 where classes go from 1",
        ),
        ("imagelabels.mat", {"labels": [[77, 0, 102, 1, 5]]}, "gives its image 2 the class 0 where classes go from 1"),
        (
            "setid.mat",
            {"trnid": [[1, 6]], "valid": [[2]], "tstid": [[3, 4]]},
            "is not a whole .*beyond the 5 images of image",
        ),
        ("setid.mat", {"trnid": [[1, 2]], "valid": [[2]], "tstid": [[3, 4]]}, "names image_00002.jpg 2 times"),
    ],
)
def test_flowers_out_of_range_are_refused(tmp_path, file, variables, sentence):
    folder = flowers(tmp_path)
    mat(folder / file, **{name: np.array(values, np.uint16) for name, values in variables.items()})
    with fails(f"{file} {sentence}"):
        small("flowers", folder)


@pytest.mark.parametrize("number", [0, 4, "two"])
def test_a_car_of_an_unknown_class_is_refused(tmp_path, number):
    folder = cars(tmp_path)
    rows = [(1, 1, 5, 5, 1, "00001.jpg"), (1, 1, 5, 5, number, "00002.jpg")]
    mat(folder / "cars_test_annos_withlabels.mat", annotations=records(*rows, fields=CARS))
    with fails("cars_test_annos_withlabels.mat (gives its image 2 the class|and .* cannot be read .TypeError)"):
        small("cars", folder)


@pytest.mark.parametrize("name", ["cars", "aircraft", "dtd"])
def test_a_folder_of_another_name_than_its_reader_wants_is_refused(tmp_path, name):
    folder = TREES[name](tmp_path)
    folder.rename(tmp_path / "mine")
    with fails(f"mine is not called {folder.name}, as its reader wants: rename it, or make a link"):
        small(name, tmp_path / "mine")
    folder.symlink_to(tmp_path / "mine")
    assert len(small(name, folder).test) > 0


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
            "1\n",
            "is not a whole list of .*answers",
        ),
        ("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", "1\n9\n", "KeyError: 9"),
        ("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", "1\n3\n", "has n00, which is in none of"),
        ("val/mine.JPEG", "", "mine.JPEG in .*val is not named like a val image: remove it"),
        ("train/mine.JPEG", "", "mine.JPEG lies in .*train itself: move it into the folder of its class"),
    ],
)
def test_imagenet_images_without_a_class_are_refused(tmp_path, file, content, sentence):
    folder = flat_imagenet(tmp_path)
    put(folder / file, content)
    with fails(sentence):
        small("imagenet", folder)


def test_an_imagenet_val_class_that_train_lacks_is_refused(tmp_path):
    photo(imagenet(tmp_path) / "val/n03/ILSVRC2012_val_00000003.JPEG")
    with fails("val has n03/ILSVRC2012_val_00000003.JPEG, which is in none of the 2 class folders of the training"):
        small("imagenet", tmp_path / "imagenet")


class Hostile:
    """Unpickled without restrictions it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_cifar_file_that_would_run_a_program_is_refused_and_does_not_run_it(tmp_path):
    folder = cifar10(tmp_path)
    put(folder / "test_batch", pickle.dumps({"labels": [0], "data": Hostile(tmp_path / "made")}, protocol=2))
    with fails(
        "test_batch is not a whole file of CIFAR .UnpicklingError: it asks for posix.mkdir.: unpack the archive"
    ):
        small("cifar10", folder)
    assert not (tmp_path / "made").exists()
    pickle.loads((folder / "test_batch").read_bytes())
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"labels": [0]}, "is not a whole CIFAR batch .KeyError: b'data'"),
        ({"labels": [0], "data": noise(1, 1)[:, :-1]}, "is not a whole CIFAR batch .ValueError"),
        ({"labels": [0], "data": noise(1, 1).astype(np.int64)}, "numbers of the type b'i8'"),
        ({"labels": [0], "data": [1, 2]}, "is not a whole CIFAR batch .AttributeError"),
        ({"labels": [0], "data": noise(2, 1)}, "has 2 images and 1 labels: unpack the archive again"),
        ({"labels": [3], "data": noise(1, 1)}, "gives its image 1 the class 3 where classes go from 0 to 2"),
        ([], "is not a whole CIFAR batch .TypeError"),
    ],
)
def test_a_cifar_batch_that_is_none_is_named(tmp_path, content, sentence):
    folder = cifar10(tmp_path)
    put_pickle(folder / "data_batch_4", content)
    with fails(f"data_batch_4 .*{sentence}"):
        small("cifar10", folder)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"<html>"])
def test_a_torn_cifar_file_is_named(tmp_path, name, damage):
    folder = TREES[name](tmp_path)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        with fails(f"{file.name} is not a whole file of CIFAR .*: unpack the archive again"):
            small(name, folder)
        file.write_bytes(whole)


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path):
    folder = pets(tmp_path)
    (folder / "annotations").rename(tmp_path / "away")
    put(folder / "annotations", "")
    with fails("annotations/trainval.txt cannot be read .Not a directory.: make it readable, or download images"):
        small("pets", folder)


# ---------------------------------------------------------------- published sizes


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cub200", "has 2 classes where the published cub200 has 200"),
        ("flowers", "has 3 train images where the published flowers has 2040"),
        ("cars", "has 3 classes where the published cars has 196"),
        ("aircraft", "has 2 classes where the published aircraft has 100"),
        ("indoor67", "has 2 classes where the published indoor67 has 67"),
        ("pets", "has 2 classes where the published pets has 37"),
        ("dtd", "has 2 classes where the published dtd has 47"),
        ("voc07", "has 2 train images where the published voc07 has 5011"),
        ("imagenet", "has 2 classes where the published imagenet has 1000"),
        ("cifar10", "has 3 classes where the published cifar10 has 10"),
        ("cifar100", "has 2 classes where the published cifar100 has 100"),
    ],
)
def test_another_size_than_published_is_refused_unless_asked_for(tmp_path, name, sentence):
    folder = TREES[name](tmp_path)
    with fails(f"{sentence}: complete it, or say data.check_sizes=false"):
        build(name, folder)
    assert build(name, folder, check_sizes=False).name == name


def test_check_says_what_is_there_and_what_is_missing(tmp_path, monkeypatch, capsys):
    class_folders(tmp_path)
    (flowers(tmp_path) / "setid.mat").unlink()
    monkeypatch.setenv("MLS_DATA", str(tmp_path))
    check(["folder", "flowers", "cifar10"])
    said = capsys.readouterr().out
    assert "  yes  folder: 2 classes, 2 train, 2 test\n" in said
    assert f"  no   flowers: {tmp_path}/flowers-102/setid.mat is missing: download imagelabels.mat" in said
    assert f"  no   cifar10: {tmp_path}/cifar-10-batches-py is missing: download cifar-10-python.tar.gz" in said
