"""Every reader of labelled images in mls.eval.data against one contract, each on a small tree in its published layout:
real JPEGs, MATLAB files, pickles as Python 2 wrote them. What only one reader has to do is below the contract."""

import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

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
from mls.eval.data import LAYOUTS, DataSet, LabelledImages, build, openimages
from mls.eval.data.annotations import corners
from mls.eval.data.class_folders import held_out
from mls.eval.data.content import content_hash
from mls.tools.eval import check

# ------------------------------------------------------------------------------------------------------- writing trees

RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)


@dataclass
class Photo:
    """64 × 48 pixels of one colour, with boxes (x, y, width, height) of others on JPEG's grid: colours do not mix."""

    colour: tuple[int, int, int] = BLUE
    boxes: Mapping[tuple[int, int, int, int], tuple[int, int, int]] | None = None

    def save(self, file: Path) -> None:
        image = Image.new("RGB", (64, 48), self.colour)
        for (x, y, width, height), paint in (self.boxes or {}).items():
            image.paste(paint, (x, y, x + width, y + height))
        image.save(file, quality=95, subsampling=0)


def put(root: Path, files: Mapping[str, Any]) -> Path:
    """A number is an 8 × 6 image with that much red, text and bytes are themselves, arrays are .npy, variables of
    MATLAB come from `mat`, anything else is JSON."""
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Photo):
            content.save(file)
        elif isinstance(content, int):
            Image.new("RGB", (8, 6), (content, 80, 160)).save(file)
        elif isinstance(content, np.ndarray):
            np.save(file, content, allow_pickle=True)
        elif isinstance(content, str | bytes):
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        else:
            file.write_text(json.dumps(content))
    return root


def images(names: list[str] | str, form: str = "{}", step: int = 20) -> dict[str, int]:
    """Photos of different colours."""
    return {
        form.format(name): number * step
        for number, name in enumerate(names.split() if isinstance(names, str) else names)
    }


def mat(**variables: object) -> bytes:
    """Compressed as MATLAB does it."""
    stream = BytesIO()
    savemat(stream, variables, do_compression=True)
    return stream.getvalue()


def records(*rows: tuple, fields: str) -> np.ndarray:
    """A MATLAB array of structs."""
    return np.array([list(rows)], dtype=[(field, object) for field in fields.split()])


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


def pickled(content: object) -> bytes:
    stream = BytesIO()
    Python2Pickler(stream, protocol=2).dump(content)
    return stream.getvalue()


def noise(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3 * 32 * 32)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------- the published trees


def cub_lists(folder: Path, names: list[str], split: str) -> Path:
    lines = {
        "images.txt": "".join(f"{i} {name}\n" for i, name in enumerate(names, start=1)),
        "train_test_split.txt": split,
    }
    return put(folder, lines | images(names, "images/{}"))


def cub200(root: Path) -> Path:
    names = ["001.Albatross/A_46.jpg", "002.Crow/C_1.jpg", "001.Albatross/A_9.jpg", "002.Crow/C_2.jpg"]
    folder = cub_lists(root / "CUB_200_2011", names, "1 0\n2 1\n3 1\n4 1\n")
    return put(
        folder, {"classes.txt": "1 001.Albatross\n2 002.Crow\n", "image_class_labels.txt": "1 1\n2 2\n3 1\n4 2\n"}
    )


NUS_COLUMN = "Groundtruth/TrainTestLabels/Labels_animal_Train.txt"
CUB_FILE = "attributes/image_attribute_labels.txt"
CUB_LABELS = "1 1 1 4 27.7080\n1 2 0 3 1\n2 1 0 1 5.2\n2 2 1 3 0 1.25\n3 1 0 4 2.5\n3 2 0 2 3\n"


def cub_attributes(root: Path) -> Path:
    """One line has more columns than the others, as some of the real file."""
    names = ["001.Albatross/A_0046_18.jpg", "001.Albatross/A_0009_34.jpg", "002.Crow/C_0001_1.jpg"]
    put(root, {"attributes.txt": "1 has_bill_shape::curved_(up_or_down)\n2 has_wing_color::blue\n"})
    return put(cub_lists(root / "CUB_200_2011", names, "1 0\n2 1\n3 1\n"), {CUB_FILE: CUB_LABELS})


def flowers(root: Path) -> Path:
    sets = {"trnid": [[4, 1]], "valid": [[2]], "tstid": [[5, 3]]}
    files = {
        "imagelabels.mat": mat(labels=np.array([[77, 1, 102, 1, 5]], np.uint8)),
        "setid.mat": mat(**{name: np.array(ids, np.uint16) for name, ids in sets.items()}),
    }
    return put(root / "flowers-102", files | images("00001 00002 00003 00004 00005", "jpg/image_{}.jpg"))


def car_list(*rows: tuple[object, str]) -> bytes:
    boxed = [(1, 1, 5, 5, number, name) for number, name in rows]
    return mat(annotations=records(*boxed, fields="bbox_x1 bbox_y1 bbox_x2 bbox_y2 class fname"))


def cars(root: Path) -> Path:
    names = np.array([["AM General SUV", "Acura RL", "Audi R8"]], object)
    files = {
        "devkit/cars_meta.mat": mat(class_names=names),
        "devkit/cars_train_annos.mat": car_list((3, "00001.jpg"), (1, "00002.jpg"), (2, "00003.jpg")),
        "cars_test_annos_withlabels.mat": car_list((2, "00001.jpg"), (2, "00002.jpg")),
    }
    files |= images("00001 00002 00003", "cars_train/{}.jpg") | images("00001 00002", "cars_test/{}.jpg")
    return put(root / "stanford_cars", files)


def aircraft(root: Path) -> Path:
    files = {
        "data/variants.txt": "707-320\nCessna 172\n",
        "data/images_variant_trainval.txt": "1025794 Cessna 172\n0056978 707-320\n",
        "data/images_variant_test.txt": "1514522 Cessna 172\n",
    }
    return put(root / "fgvc-aircraft-2013b", files | images("1025794 0056978 1514522", "data/images/{}.jpg"))


def indoor67(root: Path) -> Path:
    lists = {"Train": ["gameroom/b t.jpg", "bar/1.jpg", "gameroom/a.jpg"], "Test": ["bar/2.jpg", "gameroom/c.jpg"]}
    for split, names in lists.items():
        put(root / "indoorCVPR_09", {f"{split}Images.txt": "\r\n".join(names)} | images(names, "Images/{}"))
    return root / "indoorCVPR_09"


def pets(root: Path) -> Path:
    lists = {
        "trainval": ["american_bulldog_100 2 2 1", "Abyssinian_100 1 1 1", "american_bulldog_7 2 2 1"],
        "test": ["Abyssinian_2 1 1 1", "american_bulldog_1 2 2 1"],
    }
    for split, rows in lists.items():
        listed = {f"annotations/{split}.txt": "".join(f"{row}\n" for row in rows)}
        put(root / "oxford-iiit-pet", listed | images([row.split()[0] for row in rows], "images/{}.jpg"))
    return root / "oxford-iiit-pet"


def dtd(root: Path) -> Path:
    for part, number in {"train": 2, "val": 4, "test": 6}.items():
        names = [f"{kind}/{kind}_{number:04d}.jpg" for kind in ("zigzagged", "banded")]
        photos = {f"dtd/images/{name}": number * 20 + shift for shift, name in zip((0, 10), names, strict=True)}
        put(root / "dtd", {f"dtd/labels/{part}1.txt": "".join(f"{name}\n" for name in names)} | photos)
    return root / "dtd"


def voc(root: Path, year: str, lists: dict[str, dict[str, dict[str, int]]]) -> Path:
    for phase, labels in lists.items():
        for name in VOC_CLASSES:
            lines = [f"{stem} {present.get(name, -1):2d}\n" for stem, present in labels.items()]
            put(root / f"VOCdevkit/{year}", {f"ImageSets/Main/{name}_{phase}.txt": "".join(lines)})
        put(root / f"VOCdevkit/{year}", {f"JPEGImages/{stem}.jpg": int(stem[-1]) * 10 for stem in labels})
    return root / "VOCdevkit"


def voc07(root: Path) -> Path:
    """000005 shows a cat and a difficult dog."""
    train = {"000009": {"person": 1}, "000005": {"cat": 1, "dog": 0}}
    return voc(root, "VOC2007", {"trainval": train, "test": {"000001": {"person": 1, "dog": 1}}})


def voc2012(root: Path) -> Path:
    """2008_000003 shows a cat and a difficult dog. The lists are not in the order of the names."""
    train = {"2008_000009": {"person": 1}, "2008_000003": {"cat": 1, "dog": 0}}
    return voc(root, "VOC2012", {"train": train, "val": {"2008_000002": {"tvmonitor": 1, "person": 1}}})


def coco(root: Path) -> Path:
    """Image 7 has no annotation. Neither categories nor images are in the order of their ids."""
    categories = [{"id": 44, "name": "bottle"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
    for phase, labels in {"train": {9: [1, 1, 44], 100: [3], 10: [44, 3], 7: []}, "val": {42: [1]}}.items():
        names = {image: f"COCO_{phase}2014_{image:012d}.jpg" for image in labels}
        found = [
            {"image_id": image, "category_id": category, "bbox": [0, 0, 4, 4], "iscrowd": 0}
            for image, present in labels.items()
            for category in present
        ]
        listed = [{"id": image, "file_name": name, "width": 8, "height": 6} for image, name in names.items()]
        content = {"images": listed, "annotations": found, "categories": categories}
        photos = {f"{phase}2014/{name}": 2 * image for image, name in names.items()}
        put(root / "coco2014", {f"annotations/instances_{phase}2014.json": content, **photos})
    return root / "coco2014"


def nuswide(root: Path, line_end: str = "\r\n") -> Path:
    lists = {"Train": [r"actor\0001_21.jpg", r"zebra\0007_5.jpg", r"actor\0002_3.jpg"], "Test": [r"sky\0001_8.jpg"]}
    marks = {"airport": {"Train": "0\n0\n1\n", "Test": "1\n"}, "animal": {"Train": "0\n1\n1\n", "Test": "0\n"}}
    folder = put(root / "nuswide", {"ConceptsList/Concepts81.txt": "airport\nanimal\n"})
    for phase, names in lists.items():
        columns = {f"Groundtruth/TrainTestLabels/Labels_{c}_{phase}.txt": marks[c][phase] for c in marks}
        photos = images([name.replace("\\", "/") for name in names], "Flickr/{}")
        put(folder, {f"ImageList/{phase}Imagelist.txt": line_end.join([*names, ""])} | columns | photos)
    return folder


def imagenet(root: Path) -> Path:
    photos = images("n02/n02_1.JPEG n01/n01_9.JPEG n01/n01_10.JPEG", "train/{}")
    val = {"val/n02/ILSVRC2012_val_00000001.JPEG": 0, "val/n01/ILSVRC2012_val_00000002.JPEG": 0}
    return put(root / "imagenet", photos | val)


GROUND_TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"


def flat_imagenet(root: Path) -> Path:
    """The same with val as its archive unpacks. The devkit counts classes in another order than that of their names,
    and lists what stands above them too."""
    folder = imagenet(root)
    for image in sorted((folder / "val").rglob("*.JPEG")):
        image.rename(folder / "val" / image.name)
    for empty in (folder / "val/n01", folder / "val/n02"):
        empty.rmdir()
    synsets = [(2, "n01", "crane", 0), (1, "n02", "maillot, tank suit", 0), (3, "n00", "entity", 2)]
    table = records(*synsets, fields="ILSVRC2012_ID WNID words num_children").T
    return put(folder, {"ILSVRC2012_devkit_t12/data/meta.mat": mat(synsets=table), GROUND_TRUTH: "1\n2\n"})


def cifar10(root: Path) -> Path:
    files = {"batches.meta": pickled({"label_names": ["airplane", "automobile", "bird"], "num_vis": 3072})}
    for number in range(1, 6):
        content = {"batch_label": f"training batch {number} of 5", "labels": [number % 3, 0], "data": noise(2, number)}
        files[f"data_batch_{number}"] = pickled(content)
    files["test_batch"] = pickled({"labels": [2], "data": noise(1, 9), "filenames": ["bird_s_1.png"]})
    return put(root / "cifar-10-batches-py", files)


def cifar100(root: Path) -> Path:
    files = {"meta": pickled({"fine_label_names": ["apple", "bear"], "coarse_label_names": ["fruit", "carnivores"]})}
    for split, labels in {"train": [1, 0, 1], "test": [0, 1]}.items():
        count = len(labels)
        content = {"fine_labels": labels, "coarse_labels": [0] * count, "data": noise(count, count)}
        files[split] = pickled(content)
    return put(root / "cifar-100-python", files)


def class_folders(root: Path) -> Path:
    return put(root / "folder", images("train/bee/1.png train/ant/deep/2.jpg test/ant/3.jpg test/bee/4.jpg"))


def wider(root: Path) -> Path:
    """A row is a person. -1 is absent, 0 not specified."""
    names = {"10": "hat", "0": "Male", "2": "longHair"}  # json keeps no order worth trusting
    two = [{"attribute": [1, -1, 0], "bbox": [8, 16, 16, 8]}, {"attribute": [0, 0, 1], "bbox": [32, 0, 16, 40]}]
    trainval = {"train/0--Parade/a.jpg": two, "val/1--Handshaking/b.jpg": []}
    trainval["val/1--Handshaking/c.jpg"] = [{"attribute": [-1, -1, -1], "bbox": [0, 0, 64, 48]}]
    test = {"test/2--Demonstration/d.jpg": [{"attribute": [1, 1, 1], "bbox": [-8.0, 40, 16.0, 16]}]}
    for split, part in (("trainval", trainval), ("test", test)):
        listed = [{"file_name": name, "scene_id": 0, "targets": targets} for name, targets in part.items()]
        content = {"attribute_id_map": names, "scene_id_map": {"0": "Parade"}, "images": listed}
        put(root / "wider_attribute", {f"wider_attribute_annotation/wider_attribute_{split}.json": content})
    photos = {
        "train/0--Parade/a.jpg": Photo(BLUE, {(8, 16, 16, 8): RED, (32, 0, 16, 40): GREEN}),
        "val/1--Handshaking/b.jpg": Photo(),
        "val/1--Handshaking/c.jpg": Photo(GREEN),
        "test/2--Demonstration/d.jpg": Photo(BLUE, {(0, 40, 8, 8): RED}),
    }
    return put(root / "wider_attribute", {f"Image/{name}": photo for name, photo in photos.items()})


def thing(image: int, instance: int, box: list[float], positive: list[str], negative: list[str]) -> dict[str, Any]:
    facts = {"image_id": image, "instance_id": instance, "instance_bbox": box, "instance_polygon": None}
    return {**facts, "object_name": "thing", "positive_attributes": positive, "negative_attributes": negative}


def vaw(root: Path) -> Path:
    """A row is an object; its image lies in either folder of Visual Genome."""
    files = {
        "attribute_index.json": {"wet": 2, "red": 0, "tall": 1},
        "train_part1.json": [thing(7, 100, [8.0, 16.0, 16.0, 8.0], ["red"], ["tall"])],
        "train_part2.json": [thing(3, 200, [0, 0, 8, 8], [], ["wet"]), thing(7, 201, [32, 0, 16, 40], [], [])],
        "val.json": [thing(3, 300, [0, 0, 64, 48], ["tall", "wet"], [])],
        "test.json": [thing(11, 400, [56, 40, 8, 8], ["wet"], ["red"])],
        "VG_100K/7.jpg": Photo(BLUE, {(8, 16, 16, 8): RED, (32, 0, 16, 40): GREEN}),
        "VG_100K_2/3.jpg": Photo(GREEN),
        "VG_100K/11.jpg": Photo(BLUE, {(56, 40, 8, 8): RED}),
    }
    return put(root / "vaw", files)


def vispr(root: Path) -> Path:
    lines = ["idx\tattribute_id\tdescription", "1\ta1_age_approx\tAge", "\ta3_unused\tNot one of them"]
    lines += ["0\ta0_safe\tSafe", "2\ta10_face_partial\tFace", ""]
    files: dict[str, Any] = {"attributes.tsv": "\n".join(lines)}
    labels = {
        "train2017": {"2017_20": ["a1_age_approx", "a10_face_partial"], "2017_10": ["a0_safe"]},
        "val2017": {"2017_30": ["a0_safe"]},
        "test2017": {"2017_40": ["a10_face_partial"]},
    }
    for split, found in labels.items():
        for name, present in found.items():
            image = f"images/{split}/{name}.jpg"
            files[f"annotations/{split}/{name}.json"] = {"id": name, "image_path": image, "labels": present}
            files[image] = Photo(RED if name == "2017_20" else BLUE)
    return put(root / "vispr", files)


def csv_of(*labels: str) -> str:
    return "\n".join(["ImageID,Source,LabelName,Confidence", *labels]) + "\n"


OPENIMAGES = {
    "train": [
        "ffff0a0000000001,verification,/m/0k4j,1",
        "000000000000000b,crowdsource-verification,/m/01g317,0",
        "ffff0a0000000001,verification,/m/0c9ph5,0",
        "00000000000000aa,verification,/m/0zzz,1",
    ],
    "validation": ["0000000000000001,verification,/m/0c9ph5,1.0", "0000000000000001,verification,/m/0k4j,0.0"],
    "test": ["0000000000000002,verification,/m/01g317,1"],
}


def open_images(root: Path, labels_file: str = "{0}/annotations-human.csv") -> Path:
    files: dict[str, Any] = {
        "classes-trainable.txt": "/m/0k4j\n/m/01g317\n/m/0c9ph5\n",
        "class-descriptions.csv": '/m/01g317,Person\n/m/0k4j,"Car, any"\n/m/0zzz,Other\n',
    }
    for split, lines in OPENIMAGES.items():
        files[labels_file.format(split)] = csv_of(*lines)
        files |= {f"{split}/{line[:16]}.jpg": Photo(RED if line[0] == "f" else BLUE) for line in lines}
    return put(root / "openimages", files)


# ------------------------------------------------------------------------------------------------- what must be read


@dataclass(frozen=True)
class Reader:
    """A row of a split is 'FOLDER/FILE class', or where there are many labels 'FOLDER/FILE +present ?not annotated'."""

    tree: Callable[[Path], Path]
    classes: list[str] | int  # in the published order
    train: list[str]
    test: list[str]
    val: list[str] | None
    download: str  # what the sentence about a missing file advises
    needs: list[str]  # files without which there is nothing to read
    published: tuple[str, int] | None  # the first count that is checked


HUMAN = "unpack annotations_human_2017_11.tar.gz and classes_2017_11.tar.gz"
VAW_FILES = "put the json files of https://github.com/adobe-research/vaw_dataset"
ATTRIBUTES = ["has_bill_shape::curved_(up_or_down)", "has_wing_color::blue"]
BATCHES = "automobile airplane bird airplane airplane airplane automobile airplane bird airplane".split()
DTD = [f"{kind}/{kind}_{number}.jpg {kind}" for number in ("0002", "0004") for kind in ("zigzagged", "banded")]
# fmt: off
READERS = {
    "cub200": Reader(
        cub200, ["001.Albatross", "002.Crow"],
        ["002.Crow/C_1.jpg 002.Crow", "001.Albatross/A_9.jpg 001.Albatross", "002.Crow/C_2.jpg 002.Crow"],
        ["001.Albatross/A_46.jpg 001.Albatross"], None,
        "download CUB_200_2011.tgz", ["image_class_labels.txt", "classes.txt"], ("classes", 200)),
    "cub_attributes": Reader(
        cub_attributes, ATTRIBUTES,
        ["001.Albatross/A_0009_34.jpg +has_wing_color::blue", "002.Crow/C_0001_1.jpg"],
        ["001.Albatross/A_0046_18.jpg +has_bill_shape::curved_(up_or_down)"], None,
        "download CUB_200_2011.tgz", ["../attributes.txt", "train_test_split.txt", CUB_FILE], ("classes", 312)),
    "flowers": Reader(
        flowers, 102,
        ["jpg/image_00004.jpg pink primrose", "jpg/image_00001.jpg passion flower",
         "jpg/image_00002.jpg pink primrose"],
        ["jpg/image_00005.jpg english marigold", "jpg/image_00003.jpg blackberry lily"], None,
        "download imagelabels.mat, setid.mat and 102flowers.tgz", ["imagelabels.mat", "setid.mat"], ("train", 2040)),
    "cars": Reader(
        cars, ["AM General SUV", "Acura RL", "Audi R8"],
        ["cars_train/00001.jpg Audi R8", "cars_train/00002.jpg AM General SUV", "cars_train/00003.jpg Acura RL"],
        ["cars_test/00001.jpg Acura RL", "cars_test/00002.jpg Acura RL"], None,
        "its own page serves the archives no more", ["cars_test_annos_withlabels.mat", "devkit/cars_meta.mat"],
        ("classes", 196)),
    "aircraft": Reader(
        aircraft, ["707-320", "Cessna 172"],
        ["images/1025794.jpg Cessna 172", "images/0056978.jpg 707-320"], ["images/1514522.jpg Cessna 172"], None,
        "download fgvc-aircraft-2013b.tar.gz", ["data/variants.txt", "data/images_variant_test.txt"],
        ("classes", 100)),
    "indoor67": Reader(
        indoor67, ["bar", "gameroom"],
        ["gameroom/b t.jpg gameroom", "bar/1.jpg bar", "gameroom/a.jpg gameroom"],
        ["bar/2.jpg bar", "gameroom/c.jpg gameroom"], None,
        "download TrainImages.txt, TestImages.txt and indoorCVPR_09.tar", ["TestImages.txt"], ("classes", 67)),
    "pets": Reader(
        pets, ["Abyssinian", "american_bulldog"],
        ["images/american_bulldog_100.jpg american_bulldog", "images/Abyssinian_100.jpg Abyssinian",
         "images/american_bulldog_7.jpg american_bulldog"],
        ["images/Abyssinian_2.jpg Abyssinian", "images/american_bulldog_1.jpg american_bulldog"], None,
        "download images.tar.gz and annotations.tar.gz", ["annotations/test.txt"], ("classes", 37)),
    "dtd": Reader(
        dtd, ["banded", "zigzagged"], DTD,
        ["zigzagged/zigzagged_0006.jpg zigzagged", "banded/banded_0006.jpg banded"], None,
        "download dtd-r1.0.1.tar.gz", ["dtd/labels/val1.txt"], ("classes", 47)),
    "voc07": Reader(  # difficult objects are not annotated
        voc07, list(VOC_CLASSES),
        ["JPEGImages/000005.jpg +cat ?dog", "JPEGImages/000009.jpg +person"],
        ["JPEGImages/000001.jpg +dog +person"], None,
        "download VOCtrainval_06-Nov-2007.tar and VOCtest", ["VOC2007/ImageSets/Main/sofa_test.txt"],
        ("train", 5011)),
    "voc2012": Reader(  # sorted by name; difficult objects are absent
        voc2012, list(VOC_CLASSES),
        ["JPEGImages/2008_000003.jpg +cat", "JPEGImages/2008_000009.jpg +person"],
        ["JPEGImages/2008_000002.jpg +person +tvmonitor"], None,
        "download VOCtrainval_11-May-2012.tar", ["VOC2012/ImageSets/Main/sofa_val.txt"], ("train", 5717)),
    "coco2014": Reader(  # annotated images alone, sorted by id as text; classes by id
        coco, ["person", "car", "bottle"],
        ["train2014/COCO_train2014_000000000010.jpg +car +bottle", "train2014/COCO_train2014_000000000100.jpg +car",
         "train2014/COCO_train2014_000000000009.jpg +person +bottle"],
        ["val2014/COCO_val2014_000000000042.jpg +person"], None,
        "download train2014.zip.*annotations_trainval2014.zip", ["annotations/instances_val2014.json"],
        ("classes", 80)),
    "nuswide": Reader(  # in the order of its lists
        nuswide, ["airport", "animal"],
        ["actor/0001_21.jpg", "zebra/0007_5.jpg +animal", "actor/0002_3.jpg +airport +animal"],
        ["sky/0001_8.jpg +airport"], None,
        "download ImageList, Groundtruth, ConceptsList",
        ["ConceptsList/Concepts81.txt", "ImageList/TestImagelist.txt", NUS_COLUMN], ("classes", 81)),
    "imagenet": Reader(
        imagenet, ["n01", "n02"],
        ["n01/n01_10.JPEG n01", "n01/n01_9.JPEG n01", "n02/n02_1.JPEG n02"],
        ["n01/ILSVRC2012_val_00000002.JPEG n01", "n02/ILSVRC2012_val_00000001.JPEG n02"], None,
        "download ILSVRC2012_img_train.tar, .*ILSVRC2012_devkit_t12.tar.gz", ["train", "val"], ("classes", 1000)),
    "cifar10": Reader(
        cifar10, ["airplane", "automobile", "bird"],
        [f"image {row} of cifar10 train {name}" for row, name in enumerate(BATCHES)],
        ["image 0 of cifar10 test bird"], None,
        "download cifar-10-python.tar.gz", ["data_batch_3", "batches.meta"], ("classes", 10)),
    "cifar100": Reader(
        cifar100, ["apple", "bear"],
        [f"image {row} of cifar100 train {name}" for row, name in enumerate(("bear", "apple", "bear"))],
        ["image 0 of cifar100 test apple", "image 1 of cifar100 test bear"], None,
        "download cifar-100-python.tar.gz", ["test"], ("classes", 100)),
    "folder": Reader(
        class_folders, ["ant", "bee"], ["deep/2.jpg ant", "bee/1.png bee"], ["ant/3.jpg ant", "bee/4.jpg bee"], None,
        "put train", ["test"], None),
    "wider_attribute": Reader(
        wider, ["Male", "longHair", "hat"],
        ["0--Parade/a.jpg +Male ?hat", "0--Parade/a.jpg ?Male ?longHair +hat", "1--Handshaking/c.jpg"],
        ["2--Demonstration/d.jpg +Male +longHair +hat"], None,
        "unpack wider_attribute_annotation", ["wider_attribute_annotation/wider_attribute_test.json"],
        ("classes", 14)),
    "vaw": Reader(  # the parts of train are joined
        vaw, ["red", "tall", "wet"],
        ["VG_100K/7.jpg +red ?wet", "VG_100K_2/3.jpg ?red ?tall", "VG_100K/7.jpg ?red ?tall ?wet"],
        ["VG_100K/11.jpg ?tall +wet"], ["VG_100K_2/3.jpg ?red +tall +wet"],
        VAW_FILES, ["train_part2.json", "attribute_index.json"], ("classes", 620)),
    "vispr": Reader(
        vispr, ["a0_safe", "a1_age_approx", "a10_face_partial"],
        ["train2017/2017_10.jpg +a0_safe", "train2017/2017_20.jpg +a1_age_approx +a10_face_partial"],
        ["test2017/2017_40.jpg +a10_face_partial"], ["val2017/2017_30.jpg +a0_safe"],
        "put attributes.tsv, the annotations and the images", ["attributes.tsv"], ("classes", 68)),
    "openimages": Reader(  # what people verified, of the trainable classes
        open_images, ["Car, any", "Person", "/m/0c9ph5"],
        ["train/000000000000000b.jpg ?Car, any ?/m/0c9ph5", "train/ffff0a0000000001.jpg +Car, any ?Person"],
        ["test/0000000000000002.jpg ?Car, any +Person ?/m/0c9ph5"],
        ["validation/0000000000000001.jpg ?Person +/m/0c9ph5"],
        HUMAN, ["classes-trainable.txt", "validation/annotations-human.csv"], ("classes", 5000)),
}
# fmt: on
LIST_IMAGES = ["cub200", "flowers", "cars", "aircraft", "indoor67", "pets", "dtd", "voc07"]  # and look for each of them
LIST_IMAGES_UNSEEN = ["voc2012", "coco2014", "nuswide", "cub_attributes"]  # and look for some
SINGLE = {*LIST_IMAGES[:-1], "imagenet", "cifar10", "cifar100", "folder"}
every = pytest.mark.parametrize("name", READERS)


def small(name: str, root: Path) -> DataSet:
    return build(name, root, check_sizes=False)


def tree(name: str, root: Path) -> Path:
    return READERS[name].tree(root)


def fails(sentence: str):
    return pytest.raises(DataError, match=sentence)


def shown(part: LabelledImages) -> list[str]:
    lines = []
    for row, truth in enumerate(part.truth.tolist()):
        text = part.describe(row)
        place = "/".join(Path(text).parts[-2:])
        if part.single_label:
            marks = [part.class_names[truth]]
        else:
            marks = [
                {1: "+", 0: "?"}[sign] + name for sign, name in zip(truth, part.class_names, strict=True) if sign >= 0
            ]
        lines.append(" ".join([place, *marks]))
    return lines


def is_colour(pixels: torch.Tensor, colour: tuple[int, int, int]) -> bool:
    return bool((pixels.int() - torch.tensor(colour)[:, None, None]).abs().max() < 12)


# ------------------------------------------------------------------------------------------------------- the contract


def test_every_reader_of_labelled_images_is_under_this_contract() -> None:
    dense = {name for name in LAYOUTS if name.endswith(("_objects", "_regions"))}  # tests/eval/dense
    dense |= {"coco2017", "voc0712", "voc12aug", "cityscapes", "ade20k", "camvid", "coco", "yolo", "masks"}
    dense |= {"coco_stuff", "coco_things", "coco_stuff27", "coco_stuff171", "ecssd", "duts", "dut_omron"}
    assert set(LAYOUTS) - dense - {"scenes", "table"} == set(READERS)


@every
def test_images_labels_classes_and_parts_are_the_published_ones_in_their_order(tmp_path, name):
    reader, data = READERS[name], small(name, tree(name, tmp_path))
    assert data.name == name
    assert shown(data.train) == reader.train
    assert shown(data.test) == reader.test
    assert (None if data.val is None else shown(data.val)) == reader.val
    for part in filter(None, (data.train, data.val, data.test)):
        classes = list(part.class_names)
        assert classes == reader.classes or len(classes) == reader.classes
        assert part.single_label == (name in SINGLE)
        assert part.truth.dtype == (torch.int64 if part.single_label else torch.int8)
        assert isinstance(part.images, Source)
        assert len(part.truth) == len(part) == len(part.images if part.rows is None else part.rows)


@every
def test_every_image_decodes_to_its_own_pixels(tmp_path, name):
    data = small(name, tree(name, tmp_path))
    for part in (data.train, data.test):
        for row in range(len(part)):
            if part.boxes is None and "cifar" not in name:  # those two have tests of their own
                with Image.open(part.describe(row)) as image:
                    colour, size = image.convert("RGB").getpixel((4, 3)), image.size
                pixels = part.pixels(row)
                assert pixels.shape == (3, *size[::-1])
                assert (pixels[:, 3, 4].int() - torch.tensor(colour)).abs().max() <= 2
    pixels = {tuple(data.train.pixels(row).flatten()[::7].tolist()) for row in range(len(data.train))}
    assert len(pixels) == len(data.train)


@every
def test_content_is_the_same_in_another_place_and_changes_with_every_part_of_it(tmp_path, name):
    reader = READERS[name]
    data, elsewhere = (small(name, reader.tree(tmp_path / place)) for place in ("a", "b"))
    content = content_hash(data)
    assert content_hash(elsewhere) == content
    last = torch.arange(len(data.train) - 1)
    others = [
        replace(data, train=replace(data.train, truth=data.train.truth.flip(0) * 0 + 1)),
        replace(data, train=replace(data.train, class_names=["other", *list(data.train.class_names)[1:]])),
        replace(data, train=data.train.part(last)),
        replace(data, train=data.test, test=data.train),
    ]
    assert len({content, *map(content_hash, others)}) == 1 + len(others)
    if "cifar" not in name:
        file = Path(elsewhere.test.describe(0))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        assert content_hash(elsewhere) != content


@every
def test_a_part_keeps_images_and_labels_together(tmp_path, name):
    train = small(name, tree(name, tmp_path)).train
    last = len(train) - 1
    part = train.part(torch.tensor([last, 0]))
    assert shown(part) == [shown(train)[last], shown(train)[0]]
    assert shown(part.part(torch.tensor([1]))) == [shown(train)[0]]
    assert torch.equal(part.pixels(0), train.pixels(last))


@every
def test_the_default_folder_is_under_the_data_variable_and_a_missing_one_says_what_to_download(
    tmp_path, monkeypatch, name
):
    monkeypatch.setenv("MLS_DATA", str(tmp_path))
    folder = tmp_path / LAYOUTS[name].folder
    with fails(f"^{folder} is missing: {READERS[name].download}.*, or set data.root$"):
        build(name)
    tree(name, tmp_path)
    assert shown(build(name, check_sizes=False).train) == READERS[name].train


@pytest.mark.parametrize(("name", "file"), [(name, file) for name in READERS for file in READERS[name].needs])
def test_a_missing_file_is_named_with_what_to_download(tmp_path, name, file):
    folder = tree(name, tmp_path)
    missing = Path(os.path.normpath(folder / file))
    missing.rename(tmp_path / "away")
    with fails(f"^{missing} is missing: {READERS[name].download}"):
        small(name, folder)


@pytest.mark.parametrize("name", LIST_IMAGES)
def test_a_listed_image_that_is_not_there_is_named(tmp_path, name):
    folder = tree(name, tmp_path)
    gone = Path(small(name, folder).train.describe(0))
    gone.unlink()
    with fails(rf"1 of the \d images that .* names are not in .* \(first: .*{gone.name}\): unpack the images again"):
        small(name, folder)


@pytest.mark.parametrize("name", [*LIST_IMAGES, *LIST_IMAGES_UNSEEN])
def test_a_set_without_any_images_is_refused(tmp_path, name):
    folder = tree(name, tmp_path)
    for image in folder.rglob("*.jpg"):
        image.unlink()
    with fails("none of the first . images that .* names is in "):
        small(name, folder)


@pytest.mark.parametrize(
    ("name", "folder"), [("wider_attribute", "Image"), ("vispr", "images/test2017"), ("openimages", "train")]
)
def test_images_that_are_not_there_at_all_are_missed_at_once(tmp_path, name, folder):
    root = tree(name, tmp_path)
    for file in (root / folder).rglob("*.jpg"):
        file.unlink()
    with fails("none of the first . images that .* names is in .*: point data.root to"):
        small(name, root)


@pytest.mark.parametrize("name", [name for name in READERS if READERS[name].published])
def test_another_size_than_published_is_refused_unless_asked_for(tmp_path, name):
    folder = tree(name, tmp_path)
    what, count = READERS[name].published
    train = small(name, folder).train
    found = f"{len(train.class_names)} classes" if what == "classes" else f"{len(train)} train images"
    with fails(f"^{folder} has {found} where the published {name} has {count}: complete it, or say data.check_sizes=f"):
        build(name, folder)


MAIN = "ImageSets/Main"
TRAINVAL = "wider_attribute_annotation/wider_attribute_trainval.json"
AGAIN = "is not a whole .*{}.*download it again$"
BROKEN = [  # reader, file, content, how the sentence that names the file goes on
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
    ("voc07", f"VOC2007/{MAIN}/cat_test.txt", "000001  2\n", "has a line that is not an image name and 1, 0 or -1"),
    ("voc07", f"VOC2007/{MAIN}/cat_test.txt", "000001 1\n" * 2, "names an image twice"),
    ("voc07", f"VOC2007/{MAIN}/cat_test.txt", "000002  1\n", "lists other images than .*aeroplane_test.txt"),
    ("voc2012", f"VOC2012/{MAIN}/cat_train.txt", "2008_000003  1\n", "lists other images than .*aeroplane_train.txt"),
    ("voc2012", f"VOC2012/{MAIN}/cat_train.txt", "2008_000003\n", "has a line that is not an image name and 1, 0"),
    ("voc2012", f"VOC2012/{MAIN}/cat_train.txt", "2008_000003 7\n", "has a line that is not an image name and 1, 0"),
    ("coco2014", "annotations/instances_train2014.json", '{"images": [', "is not a whole COCO instances file"),
    ("coco2014", "annotations/instances_train2014.json", "[]", "is not a whole COCO instances file"),
    ("nuswide", NUS_COLUMN, "0\n1\n", "is not a 0 or 1 for each of 3 listed images"),
    ("nuswide", NUS_COLUMN, "0\n1\n2\n", "is not a 0 or 1 for each of 3 listed images"),
    ("nuswide", NUS_COLUMN, "0\n1\n-1\n", "is not a 0 or 1 for each of 3 listed images"),
    ("cub_attributes", CUB_FILE, "1 1 1 4 2\n1 2", r"cannot be read \(.*\): unpack CUB_200_2011.tgz again"),
    ("cub_attributes", CUB_FILE, "1 1 1 4 2\n1 x 0 1", r"cannot be read \(.*\): unpack CUB_200_2011.tgz again"),
    ("cub_attributes", CUB_FILE, "1 1 1 4 2\n", "does not label just 2 attributes for each of 3 images"),
    ("cub_attributes", CUB_FILE, CUB_LABELS + "9 1 1 4 2\n", "does not label just 2 attributes for each of 3 images"),
    ("cub_attributes", "images.txt", "1 a.jpg\n3 b.jpg\n", "line 2 of .*images.txt does not give something"),
    ("cub_attributes", "train_test_split.txt", "1 0\n", "is about 1 images where images.txt has 3"),
    ("wider_attribute", TRAINVAL, '{"images": [', AGAIN.format("JSONDecodeErr")),
    ("wider_attribute", TRAINVAL, {"images": []}, AGAIN.format("KeyError")),
    ("vaw", "train_part1.json", '[{"image_id": 1', AGAIN.format("VAW file .JSONDecodeError")),
    ("vaw", "val.json", [thing(3, 1, [0, 0, 8, 8], ["unheard-of"], [])], AGAIN.format("KeyError: 'unheard-of'")),
    ("vaw", "test.json", [thing(3, 1, [0, 0, 8], [], [])], AGAIN.format("VAW file .ValueError")),
    ("vaw", "attribute_index.json", ["red", "tall"], AGAIN.format("VAW attribute index")),
    ("vispr", "annotations/train2017/2017_10.json", '{"labels": ["a0', AGAIN.format("VISPR annotation .JSONDecode")),
    ("vispr", "annotations/train2017/2017_10.json", {"labels": []}, AGAIN.format("KeyError: 'image_path'")),
    ("vispr", "attributes.tsv", "a0_safe\na1_age\n", AGAIN.format("VISPR attribute list .KeyError: 'idx'")),
    ("openimages", "train/annotations-human.csv", "", AGAIN.format("first line is not ImageID,Source,LabelName,Conf")),
    ("openimages", "train/annotations-human.csv", csv_of(), AGAIN.format("it has no label of the classes")),
    ("openimages", "classes-trainable.txt", "\n", AGAIN.format("list of classes")),
]


@pytest.mark.parametrize(("name", "file", "content", "sentence"), BROKEN)
def test_a_damaged_file_is_named_in_one_sentence(tmp_path, name, file, content, sentence):
    folder = put(tree(name, tmp_path), {file: content})
    with fails(sentence) as error:
        small(name, folder)
    place = folder / file if "has other classes in test1" not in sentence else Path("test1.txt")
    assert str(place) in str(error.value)
    assert "\n" not in str(error.value)
    if sentence.endswith("$"):
        assert str(error.value).startswith(f"{folder / file} is not a whole ")


@pytest.mark.parametrize(
    ("name", "lists"),
    [
        ("voc2012", [f"VOC2012/{MAIN}/{name}_val.txt" for name in VOC_CLASSES]),
        (
            "nuswide",
            [
                "ImageList/TestImagelist.txt",
                *(NUS_COLUMN.replace("animal_Train", f"{c}_Test") for c in ("airport", "animal")),
            ],
        ),
    ],
)
def test_a_list_without_images_is_refused(tmp_path, name, lists):
    folder = put(tree(name, tmp_path), dict.fromkeys(lists, ""))
    with fails("lists no images: download it again"):
        small(name, folder)


@pytest.mark.parametrize("damage", ["empty", "page", "cut early", "cut late", "other variables"])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("flowers", "imagelabels.mat"),
        ("flowers", "setid.mat"),
        ("cars", "devkit/cars_meta.mat"),
        ("cars", "cars_test_annos_withlabels.mat"),
        ("imagenet", "ILSVRC2012_devkit_t12/data/meta.mat"),
    ],
)
def test_a_damaged_matlab_file_is_named(tmp_path, name, file, damage):
    folder = flat_imagenet(tmp_path) if name == "imagenet" else tree(name, tmp_path)
    whole = (folder / file).read_bytes()
    page = b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 9
    contents = {"empty": b"", "page": page, "cut early": whole[:140], "cut late": whole[:-3]}
    put(folder, {file: contents.get(damage) if damage in contents else mat(unknown=np.arange(9))})
    with fails(rf"{file}.* (is not a whole|cannot be read) .*: (download it|unpack the archive) again") as error:
        small(name, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cars", "aircraft", "dtd"])
def test_a_folder_of_another_name_than_its_reader_wants_is_refused(tmp_path, name):
    folder = tree(name, tmp_path)
    folder.rename(tmp_path / "mine")
    with fails(f"mine is not called {folder.name}, as its reader wants: rename it, or make a link"):
        small(name, tmp_path / "mine")
    folder.symlink_to(tmp_path / "mine")
    assert len(small(name, folder).test) > 0


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path):
    folder = pets(tmp_path)
    (folder / "annotations").rename(tmp_path / "away")
    put(folder, {"annotations": ""})
    with fails("annotations/trainval.txt cannot be read .Not a directory.: make it readable, or download images"):
        small("pets", folder)


def test_check_says_what_is_there_and_what_is_missing(tmp_path, monkeypatch, capsys):
    class_folders(tmp_path)
    (flowers(tmp_path) / "setid.mat").unlink()
    monkeypatch.setenv("MLS_DATA", str(tmp_path))
    check(["folder", "flowers", "cifar10"])
    printed = capsys.readouterr().out
    assert "  yes  folder: 2 classes, 2 train, 2 test\n" in printed
    assert f"  no   flowers: {tmp_path}/flowers-102/setid.mat is missing: download imagelabels.mat" in printed
    assert f"  no   cifar10: {tmp_path}/cifar-10-batches-py is missing: download cifar-10-python.tar.gz" in printed


# ------------------------------------------------------------------------------------------ the same in other places


def move(root: Path, places: Mapping[str, str]) -> Path:
    for source, target in places.items():
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / source).rename(root / target)
    return root


JSONS = ("attribute_index.json", "train_part1.json", "train_part2.json", "val.json", "test.json")
OTHER_PLACES = [
    ("nuswide", {"Flickr": "images", "ConceptsList/Concepts81.txt": "Concepts81.txt"}),
    ("cub_attributes", {"../attributes.txt": "attributes/attributes.txt"}),
    ("cub_attributes", {"../attributes.txt": "attributes.txt"}),
    ("wider_attribute", {"wider_attribute_annotation": "Annotations"}),
    (
        "wider_attribute",
        {
            f"wider_attribute_annotation/{file}": file
            for file in ("wider_attribute_trainval.json", "wider_attribute_test.json")
        },
    ),
    ("vaw", {file: f"data/{file}" for file in JSONS}),
    ("openimages", {f"{s}/annotations-human.csv": f"{s}/{s}-annotations-human-imagelabels.csv" for s in OPENIMAGES}),
    ("openimages", {f"{s}/annotations-human.csv": f"{s}-annotations-human-imagelabels.csv" for s in OPENIMAGES}),
]


@pytest.mark.parametrize(("name", "places"), OTHER_PLACES)
def test_files_are_found_where_other_versions_have_them(tmp_path, name, places):
    data = small(name, move(tree(name, tmp_path), places))
    places = [line.rpartition("/")[2] for line in READERS[name].train]
    assert [line.rpartition("/")[2] for line in shown(data.train)] == places
    assert data.train.pixels(1).shape[0] == 3


@pytest.mark.parametrize(("name", "year"), [("voc07", "VOC2007"), ("voc2012", "VOC2012")])
def test_voc_may_be_given_as_the_year_itself(tmp_path, name, year):
    assert shown(small(name, tree(name, tmp_path) / year).train) == READERS[name].train


def test_nus_wide_lists_may_end_their_lines_either_way(tmp_path):
    assert shown(small("nuswide", nuswide(tmp_path, "\n")).train) == READERS["nuswide"].train


def test_vispr_annotations_may_lie_beside_the_images(tmp_path):
    root = vispr(tmp_path)
    for folder in ("images", "annotations"):
        for file in (root / folder).rglob("2017_*.*"):
            move(root, {str(file.relative_to(root)): f"{file.parent.name}/{file.name}"})
        for split in ("train2017", "val2017", "test2017"):
            (root / folder / split).rmdir()
    data = small("vispr", root)
    assert shown(data.train) == READERS["vispr"].train and is_colour(data.train.pixels(1), RED)


def test_a_missing_or_empty_vispr_split_is_named(tmp_path):
    folder = vispr(tmp_path) / "annotations/val2017"
    (folder / "2017_30.json").unlink()
    with fails(r"annotations/val2017/\*.json is missing: put attributes.tsv"):
        small("vispr", tmp_path / "vispr")
    folder.rmdir()
    with fails("val2017 is missing: put attributes.tsv"):
        small("vispr", tmp_path / "vispr")


# ------------------------------------------------------------------------------- rows that are a part of their image


def test_wider_boxes_crop_the_person_and_nothing_else(tmp_path):
    data = small("wider_attribute", wider(tmp_path))
    assert data.train.rows.tolist() == [0, 0, 2]
    assert data.train.boxes.tolist() == [[8, 16, 24, 24], [32, 0, 48, 40], [0, 0, 64, 48]]
    for row, size, colour in [(0, (8, 16), RED), (1, (40, 16), GREEN), (2, (48, 64), GREEN)]:
        pixels = data.train.pixels(row)
        assert pixels.shape == (3, *size) and is_colour(pixels, colour)
    partly_outside = data.test.pixels(0)
    assert partly_outside.shape == (3, 8, 8) and is_colour(partly_outside, RED)
    for box in ([8, 16, 8, 16], [64, 48, 80, 60]):  # nothing of the image: a pixel all the same
        assert replace(data.test, boxes=torch.tensor([box])).pixels(0).shape == (3, 1, 1)


def test_vaw_objects_are_cut_from_images_in_either_folder(tmp_path):
    data = small("vaw", vaw(tmp_path))
    assert len(data.train.images) == 2
    crops = [data.train.pixels(row) for row in range(3)]
    assert [crop.shape[1:] for crop in crops] == [(8, 16), (8, 8), (40, 16)]
    assert [is_colour(crop, colour) for crop, colour in zip(crops, (RED, GREEN, GREEN), strict=True)] == [True] * 3
    assert is_colour(data.test.pixels(0), RED)


def test_vaw_counts_the_images_that_neither_folder_has(tmp_path):
    folder = vaw(tmp_path)
    (folder / "VG_100K_2/3.jpg").unlink()
    (folder / "VG_100K_2").rmdir()
    with fails(r"1 of the 2 images of VAW's train are neither in .*VG_100K nor in VG_100K_2 \(first: 3.jpg\): put the"):
        small("vaw", folder)


@given(st.lists(st.lists(st.integers(-400, 20_000).map(lambda quarters: quarters / 4), min_size=4, max_size=4)))
def test_corners_hold_the_whole_box_and_less_than_a_pixel_more(boxes):
    found = corners(boxes)
    exact = np.array(boxes).reshape(-1, 4)  # in quarters of a pixel, which floats add exactly
    exact[:, 2:] += exact[:, :2]
    outwards = (exact - found) * [1, 1, -1, -1]
    assert ((outwards >= 0) & (outwards < 1)).all()


# ------------------------------------------------------------------------------------------------------- openimages


def test_a_label_verified_twice_with_both_answers_is_present(tmp_path):
    one = "0000000000000002,{},/m/01g317,{}"
    lines = csv_of(one.format("verification", 1), one.format("crowd", 0))
    folder = put(open_images(tmp_path), {"test/annotations-human.csv": lines})
    assert small("openimages", folder).test.truth.tolist() == [[0, 1, 0]]


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
    put(file.parent, {file.name: text if newline else text.rstrip("\n")})
    expected = [(i, classes.index(name), 1 if sign == "1" else -1) for i, name, sign in labels if name in classes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openimages, "BLOCK", block)
        if not expected:
            with pytest.raises(ValueError, match="no label of the classes"):
                openimages._labels(file, [name.encode() for name in classes])
            return
        found = openimages._labels(file, [name.encode() for name in classes])
    assert list(zip(*(values.tolist() for values in found), strict=True)) == expected


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
    good = "0000000000000002,verification,/m/01g317,1"
    folder = put(open_images(tmp_path), {"test/annotations-human.csv": csv_of(good, line, good)})
    with fails(rf"test/annotations-human.csv is not a whole OpenImages label file .*unexpected line '{line}'"):
        small("openimages", folder)


def test_labels_that_do_not_fit_into_memory_are_refused_with_advice(tmp_path, monkeypatch):
    folder = open_images(tmp_path)
    monkeypatch.setattr(openimages, "memory_size", lambda: 5)
    with fails(r"\(2 images, 3 classes\) and this machine has .* leave fewer classes in classes-trainable.txt and say"):
        small("openimages", folder)
    monkeypatch.undo()
    assert openimages.memory_size() > 1e8


# ------------------------------------------------------------------------------------------------------ CIFAR


@pytest.mark.parametrize(("name", "label"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_has_the_pixels_and_labels_that_an_unrestricted_unpickler_finds(tmp_path, name, label):
    folder = tree(name, tmp_path)
    data = small(name, folder)
    for part, files in ((data.train, ["data_batch_*", "train"]), (data.test, ["test*"])):
        row = 0
        for file in sorted(file for pattern in files for file in folder.glob(pattern)):
            content = pickle.loads(file.read_bytes(), encoding="latin1")
            for number, pixels in zip(content[label], content["data"], strict=True):
                assert part.truth[row] == number
                assert np.array_equal(part.pixels(row), pixels.reshape(3, 32, 32))
                row += 1
        assert row == len(part)
    assert sorted(data.train.images.order(0, 1)) == list(range(len(data.train)))


def test_pixels_that_numpy_stored_by_columns_are_read_right(tmp_path):
    pixels = noise(2, 0)
    columns = pickled({"labels": [0, 1], "data": np.asfortranarray(pixels)})
    folder = put(cifar10(tmp_path), {"test_batch": columns})
    assert np.array_equal(small("cifar10", folder).test.images.images.flatten(1), pixels)


class Hostile:
    """Unpickled without restrictions it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_a_cifar_file_that_would_run_a_program_is_refused_and_does_not_run_it(tmp_path):
    hostile = pickle.dumps({"labels": [0], "data": Hostile(tmp_path / "made")}, protocol=2)
    folder = put(cifar10(tmp_path), {"test_batch": hostile})
    with fails(
        "test_batch is not a whole file of CIFAR .UnpicklingError: it asks for posix.mkdir.: unpack the archive"
    ):
        small("cifar10", folder)
    assert not (tmp_path / "made").exists()
    pickle.loads(hostile)
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
    folder = put(cifar10(tmp_path), {"data_batch_4": pickled(content)})
    with fails(f"data_batch_4 .*{sentence}"):
        small("cifar10", folder)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"<html>"])
def test_a_torn_cifar_file_is_named(tmp_path, name, damage):
    folder = tree(name, tmp_path)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(damage(whole))
        with fails(f"{file.name} is not a whole file of CIFAR .*: unpack the archive again"):
            small(name, folder)
        file.write_bytes(whole)


# --------------------------------------------------------------------------------------- torchvision's and MATLAB's


def test_pets_are_those_of_torchvision(tmp_path):
    data = small("pets", pets(tmp_path))
    for part, split in ((data.train, "trainval"), (data.test, "test")):
        theirs = OxfordIIITPet(tmp_path, split)
        assert [label for _, label in (theirs[row] for row in range(len(theirs)))] == part.truth.tolist()
        assert np.array_equal(np.array(theirs[1][0]), part.pixels(1).permute(1, 2, 0))


def test_class_folders_are_those_of_torchvision(tmp_path):
    data = small("imagenet", imagenet(tmp_path))
    theirs = ImageFolder(tmp_path / "imagenet" / "train")
    assert theirs.samples == [(data.train.describe(row), int(data.train.truth[row])) for row in range(3)]


SETS = "is not a whole .*beyond the 5 images of image"


@pytest.mark.parametrize(
    ("file", "variables", "sentence"),
    [
        (
            "imagelabels.mat",
            {"labels": [[77, 1, 103, 1, 5]]},
            "gives its image 3 the class 103 where classes go from 1",
        ),
        ("imagelabels.mat", {"labels": [[77, 0, 102, 1, 5]]}, "gives its image 2 the class 0 where classes go from 1"),
        ("setid.mat", {"trnid": [[1, 6]], "valid": [[2]], "tstid": [[3, 4]]}, SETS),
        ("setid.mat", {"trnid": [[1, 2]], "valid": [[2]], "tstid": [[3, 4]]}, "names image_00002.jpg 2 times"),
    ],
)
def test_flowers_out_of_range_are_refused(tmp_path, file, variables, sentence):
    content = mat(**{name: np.array(values, np.uint16) for name, values in variables.items()})
    folder = put(flowers(tmp_path), {file: content})
    with fails(f"{file} {sentence}"):
        small("flowers", folder)


@pytest.mark.parametrize("number", [0, 4, "two"])
def test_a_car_of_an_unknown_class_is_refused(tmp_path, number):
    rows = car_list((1, "00001.jpg"), (number, "00002.jpg"))
    folder = put(cars(tmp_path), {"cars_test_annos_withlabels.mat": rows})
    with fails("cars_test_annos_withlabels.mat (gives its image 2 the class|and .* cannot be read .TypeError)"):
        small("cars", folder)


# ------------------------------------------------------------------------------------------------------ ImageNet


def test_flat_imagenet_val_has_the_classes_of_the_folders(tmp_path):
    classes = lambda lines: sorted(line.split("/")[1] for line in lines)
    assert classes(shown(small("imagenet", flat_imagenet(tmp_path)).test)) == classes(READERS["imagenet"].test)


def test_a_part_of_the_flat_imagenet_val_keeps_its_classes(tmp_path):
    folder = flat_imagenet(tmp_path)
    (folder / "val/ILSVRC2012_val_00000001.JPEG").unlink()
    assert shown(small("imagenet", folder).test) == ["val/ILSVRC2012_val_00000002.JPEG n01"]


def test_flat_imagenet_needs_its_devkit(tmp_path):
    folder = flat_imagenet(tmp_path)
    (folder / "ILSVRC2012_devkit_t12/data/meta.mat").unlink()
    with fails(f"^{folder}/ILSVRC2012_devkit_t12/data/meta.mat is missing: {READERS['imagenet'].download}"):
        small("imagenet", folder)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        (GROUND_TRUTH, "1\n", "is not a whole list of .*answers"),
        (GROUND_TRUTH, "1\n9\n", "KeyError: 9"),
        (GROUND_TRUTH, "1\n3\n", "has n00, which is in none of"),
        ("val/mine.JPEG", "", "mine.JPEG in .*val is not named like a val image: remove it"),
        ("train/mine.JPEG", "", "mine.JPEG lies in .*train itself: move it into the folder of its class"),
    ],
)
def test_imagenet_images_without_a_class_are_refused(tmp_path, file, content, sentence):
    folder = put(flat_imagenet(tmp_path), {file: content})
    with fails(sentence):
        small("imagenet", folder)


def test_an_imagenet_val_class_that_train_lacks_is_refused(tmp_path):
    folder = put(imagenet(tmp_path), {"val/n03/ILSVRC2012_val_00000003.JPEG": 0})
    with fails("val has n03/ILSVRC2012_val_00000003.JPEG, which is in none of the 2 class folders of the training"):
        small("imagenet", folder)


# --------------------------------------------------------------------------------------------------- class folders


def test_a_val_folder_is_the_test_unless_there_is_a_test(tmp_path):
    folder = put(class_folders(tmp_path), {"val/bee/5.jpg": 0})
    assert shown(small("folder", folder).val) == ["bee/5.jpg bee"]
    (folder / "test").rename(tmp_path / "elsewhere")
    data = small("folder", folder)
    assert shown(data.test) == ["bee/5.jpg bee"] and data.val is None


def test_a_folder_without_parts_holds_out_a_fifth_of_each_class(tmp_path):
    names = [*(f"ant/{number}.jpg" for number in range(15)), "bee/1.jpg", "bee/2.jpg"]
    data = small("folder", put(tmp_path, images(names, step=10)))
    assert data.train.truth.bincount().tolist() == [12, 1]
    assert data.test.truth.bincount().tolist() == [3, 1]
    assert len({*shown(data.train), *shown(data.test)}) == 17


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
    put(tmp_path / "folder", {file: 0 if file.endswith("jpg") else "" for file in files})
    with fails(sentence):
        small("folder", tmp_path / "folder")


# ------------------------------------------------------------------------------------------------------------- COCO


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
    file = coco(tmp_path) / "annotations" / "instances_train2014.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with fails(rf"instances_train2014.json is not a whole COCO instances file \({reason}.*\): download it again"):
        small("coco2014", tmp_path / "coco2014")


def test_coco_halves_with_other_categories_are_refused(tmp_path):
    file = coco(tmp_path) / "annotations" / "instances_val2014.json"
    file.write_text(file.read_text().replace("bottle", "flask"))
    with fails("the two instances files in .*coco2014 have different categories"):
        small("coco2014", tmp_path / "coco2014")


# ------------------------------------------------------------------------------- the .npy files of the SPML papers


def formatted(folder: Path, names: list[str], labels: np.ndarray, observed: np.ndarray | None = None) -> Path:
    """Images, labels and observed labels: the last image is the official val, all others train."""
    for phase, part in {"train": slice(None, -1), "val": slice(-1, None)}.items():
        arrays = {"images": np.array(names[part]), "labels": labels[part]}
        arrays |= {} if observed is None else {"labels_obs": observed[part]}
        put(folder, {f"formatted_{phase}_{what}.npy": array for what, array in arrays.items()})
    return folder


def test_formatted_files_come_before_annotations_and_bring_observed_labels(tmp_path):
    names = [f"train2014/COCO_train2014_{i:012d}.jpg" for i in (100, 9)] + ["val2014/COCO_val2014_000000000042.jpg"]
    labels = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0]], np.float64)
    observed = np.array([[1, 0, 0, -1], [0, 0, 1, 0], [0, 1, 0, 0]], np.float64)
    folder = formatted(coco(tmp_path), names, labels, observed)
    data = small("coco2014", folder)
    assert [Path(data.train.describe(row)).name[-7:-4] for row in range(2)] == ["100", "009"]
    assert data.train.truth.tolist() == [[1, -1, 1, -1], [-1, 1, 1, -1]]
    assert data.train.observed.tolist() == [[1, 0, 0, -1], [0, 0, 1, 0]]
    assert data.train.observed.dtype == data.train.truth.dtype == torch.int8
    assert data.test.truth.tolist() == [[1, 1, -1, -1]]
    assert abs(int(data.train.pixels(0)[0, 3, 4]) - 200) <= 2
    assert data.train.class_names == ["0", "1", "2", "3"]
    put(folder, {"formatted_metadata.json": {"category_list": ["a", "b", "c", "d"]}})
    assert small("coco2014", folder).test.class_names == ["a", "b", "c", "d"]


FORMATTED = {
    "voc2012": ("{}.jpg", ["2008_000009", "2008_000003", "2008_000002"], 20),
    "nuswide": ("{}", ["zebra/0007_5.jpg", "actor/0001_21.jpg", "sky/0001_8.jpg"], 3),
    "cub_attributes": ("001.Albatross/{}.jpg", ["A_0009_34", "A_0046_18", "A_0009_34"], 2),
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", FORMATTED)
def test_formatted_paths_start_at_the_image_folder_of_the_data_set(tmp_path, name, beside):
    form, stems, classes = FORMATTED[name]
    folder = tree(name, tmp_path)
    if beside and name != "nuswide":
        folder = folder.parent  # the papers' code keeps the files beside what the archive unpacks to
    labels = np.eye(3, classes, dtype=np.int64)
    data = small(name, formatted(folder, [form.format(stem) for stem in stems], labels))
    expected = [Path(form.format(stem)).name for stem in stems[:2]]
    assert [Path(data.train.describe(row)).name for row in range(2)] == expected
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
    names = [f"001.Albatross/{stem}.jpg" for stem in ("A_0009_34", "A_0046_18", "A_0009_34")]
    folder = formatted(cub_attributes(tmp_path), names, np.eye(3, 2), np.eye(3, 2))
    put(folder, {f"formatted_{what}.npy": array})
    with fails(f"formatted_{what}.npy {sentence}"):
        small("cub_attributes", folder)


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_torn_formatted_file_is_refused(tmp_path, content):
    folder = formatted(voc2012(tmp_path), ["2008_000009.jpg", "2008_000002.jpg"], np.eye(2, 20))
    file = folder / "formatted_val_labels.npy"
    file.write_bytes(file.read_bytes()[:-20] if content is None else content)
    with fails(r"formatted_val_labels.npy cannot be read \(.*\): save it again as plain numbers"):
        small("voc2012", folder)


def test_a_missing_formatted_file_is_named(tmp_path):
    folder = formatted(voc2012(tmp_path), ["2008_000009.jpg", "2008_000002.jpg"], np.eye(2, 20))
    (folder / "formatted_val_images.npy").unlink()
    with fails("formatted_val_images.npy is missing: put it beside formatted_train_images.npy, or remove that one"):
        small("voc2012", folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"category_list": 3}'])
def test_a_broken_list_of_categories_is_named(tmp_path, content):
    folder = formatted(coco(tmp_path), ["a.jpg", "b.jpg"], np.eye(2, 3))
    put(folder, {"formatted_metadata.json": content})
    with fails("formatted_metadata.json has no readable category_list"):
        small("coco2014", folder)
