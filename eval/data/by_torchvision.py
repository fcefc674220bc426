"""Stanford Cars, FGVC-Aircraft and DTD: torchvision's readers say which images there are and what they show. What they
do not check is checked here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torchvision.datasets import DTD, FGVCAircraft, StanfordCars

from mls.data.listing import printable, show
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.one_class import listed, numbered


def read_cars(folder: Path) -> DataSet:
    """`devkit/cars_meta.mat`, `devkit/cars_train_annos.mat`, `cars_test_annos_withlabels.mat`, and the images in
    `cars_train` and `cars_test`."""

    def split(phase: str, annotations: Path) -> LabelledImages:
        files = [annotations, folder / "devkit" / "cars_meta.mat"]
        return _images(f"cars {phase}", StanfordCars, folder, folder / f"cars_{phase}", files, [phase])

    train = split("train", folder / "devkit" / "cars_train_annos.mat")
    return DataSet("cars", train, split("test", folder / "cars_test_annos_withlabels.mat"))


def read_aircraft(folder: Path) -> DataSet:
    """In `data`: `variants.txt`, `images_variant_{trainval,test}.txt` and `images`. As published results do, training
    is on train and val."""
    data = folder / "data"

    def split(phase: str) -> LabelledImages:
        files = [data / f"images_variant_{phase}.txt", data / "variants.txt"]
        return _images(f"aircraft {phase}", FGVCAircraft, folder, data / "images", files, [phase])

    return DataSet("aircraft", split("trainval"), split("test"))


def read_dtd(folder: Path) -> DataSet:
    """The first of the ten published splits: `dtd/labels/{train1,val1,test1}.txt`, `dtd/images`. As published results
    do, training is on train and val."""
    inside = folder / "dtd"

    def split(phase: str, *parts: str) -> LabelledImages:
        files = [inside / "labels" / f"{part}1.txt" for part in parts]
        return _images(f"dtd {phase}", DTD, folder, inside / "images", files, parts)

    train, test = split("train", "train", "val"), split("test", "test")
    if train.class_names != test.class_names:
        raise DataError(f"{show(inside / 'labels')} has other classes in test1.txt than in train1.txt: unpack it again")
    return DataSet("dtd", train, test)


def _images(
    name: str, reader: Callable[..., Any], folder: Path, images: Path, files: Sequence[Path], parts: Sequence[str]
) -> LabelledImages:
    """The named parts together. `files` are all that the reader opens: it does not say which one it misses."""
    for needed in (*files, images):
        needed.stat()
    root = _parent(folder, FOLDERS[reader])
    paths, labels, classes = [], [], []
    for part in parts:
        try:
            # Only what is documented: with this loader an item is (path, class number), and `classes` are the names.
            found = reader(root, split=part, loader=os.fsencode)
            items = [found[row] for row in range(len(found))]
            names = [printable(os.fsencode(one)) for one in found.classes]
        except Exception as error:  # there is no end to what is raised at broken files
            raise _not_whole(files, f"{type(error).__name__}: {error}") from None
        if classes and names != classes:  # DTD's reader numbers the classes that it meets in a list
            raise _not_whole(files, "their classes are not the same")
        classes = names
        paths += [os.path.relpath(path, os.fsencode(images)) for path, _ in items]
        labels += [label for _, label in items]
    truth = numbered(labels, len(classes), files[0], first=0)
    return listed(name, images, paths, truth, classes, files[0])


def _parent(folder: Path, name: str) -> Path:
    whole = Path(os.path.abspath(folder))
    if whole.name != name:
        raise DataError(f"{show(whole)} is not called {name}, as its reader wants: rename it, or make a link")
    return whole.parent


def _not_whole(files: Sequence[Path], reason: str) -> DataError:
    which = " and ".join(show(file) for file in files)
    return DataError(f"{which} cannot be read ({reason}): unpack the archive again")


FOLDERS = {StanfordCars: "stanford_cars", FGVCAircraft: "fgvc-aircraft-2013b", DTD: "dtd"}
DOWNLOAD_CARS = (
    "its own page serves the archives no more, so put a copy of cars_train, cars_test, devkit and "
    "cars_test_annos_withlabels.mat into $MLS_DATA/stanford_cars"
)
DOWNLOAD_AIRCRAFT = (
    "download fgvc-aircraft-2013b.tar.gz from www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft and unpack it into $MLS_DATA"
)
DOWNLOAD_DTD = (
    "download dtd-r1.0.1.tar.gz from www.robots.ox.ac.uk/~vgg/data/dtd and unpack it into $MLS_DATA/dtd, "
    "which then has dtd/images and dtd/labels"
)
register("cars", Layout(read_cars, FOLDERS[StanfordCars], DOWNLOAD_CARS, {"classes": 196, "train": 8144, "test": 8041}))
register(
    "aircraft",
    Layout(read_aircraft, FOLDERS[FGVCAircraft], DOWNLOAD_AIRCRAFT, {"classes": 100, "train": 6667, "test": 3333}),
)
register("dtd", Layout(read_dtd, FOLDERS[DTD], DOWNLOAD_DTD, {"classes": 47, "train": 3760, "test": 1880}))
