"""`folder`: any data set with a folder for each class. ImageNet, which has one too, is in imagenet.py."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path

from mls.data.listing import LOOKED_FOR, FileSource, list_images, printable, show
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.one_class import by_folder, first_folders

HELD_OUT = 5  # of a data set without a test part, every fifth image of each class is held out


def read(root: Path) -> DataSet:
    """`ROOT/train/CLASS/...` with `ROOT/test/CLASS/...`, `ROOT/val/CLASS/...` or both; a val without a test is the
    test. Classes are sorted by name.

    `ROOT/CLASS/...` without these parts: of each class a fifth, at least one image, is held out for the test: those
    whose CLASS/FILE has the lowest SHA-1. So the parts are the same everywhere, and an image that is added moves few
    others from one part to the other.
    """
    if (root / "train").is_dir():
        train = images_in(root / "train")
        classes = first_folders(train)
        parts = {part: root / part for part in ("val", "test") if (root / part).is_dir()}
        if not parts:
            raise FileNotFoundError(str(root / "test"))
        data = {part: labelled(f"folder {part}", place, images_in(place), classes) for part, place in parts.items()}
        test = data.pop("test", None) or data.pop("val")
        return DataSet("folder", labelled("folder train", root / "train", train, classes), test, data.get("val"))
    if (root / "val").is_dir() or (root / "test").is_dir():
        raise FileNotFoundError(str(root / "train"))
    train, test = held_out(images_in(root), root)
    classes = first_folders(train)
    return DataSet(
        "folder", labelled("folder train", root, train, classes), labelled("folder test", root, test, classes)
    )


def images_in(folder: Path) -> list[bytes]:
    """The sorted paths CLASS/... of all images below a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(str(folder))
    paths = list_images(folder)
    if not paths:
        raise DataError(f"no images under {show(folder)} ({LOOKED_FOR}): it needs a folder of images for each class")
    outside = next((path for path in paths if b"/" not in path), None)
    if outside is not None:
        raise DataError(f"{printable(outside)} lies in {show(folder)} itself: move it into the folder of its class")
    return paths


def labelled(name: str, root: Path, paths: list[bytes], classes: list[bytes]) -> LabelledImages:
    """Images that were found in class folders."""
    return LabelledImages(
        FileSource(name, root, paths), by_folder(paths, classes, root), [printable(one) for one in classes]
    )


def held_out(paths: list[bytes], root: Path) -> tuple[list[bytes], list[bytes]]:
    """Train and test.

    >>> train, test = held_out([b"ant/%d.jpg" % i for i in range(10)] + [b"bee/1.jpg", b"bee/2.jpg"], Path("insects"))
    >>> len(train), test
    (9, [b'ant/0.jpg', b'ant/6.jpg', b'bee/1.jpg'])
    """
    of_class: dict[bytes, list[bytes]] = defaultdict(list)
    for path in paths:
        of_class[path.partition(b"/")[0]].append(path)
    chosen: set[bytes] = set()
    for name, images in of_class.items():
        if len(images) < 2:
            raise DataError(
                f"{show(root)} has one image of {printable(name)}: train and test need one each, so add some"
            )
        images.sort(key=lambda path: hashlib.sha1(path).digest())
        chosen.update(images[: max(1, round(len(images) / HELD_OUT))])
    return [path for path in paths if path not in chosen], [path for path in paths if path in chosen]


DOWNLOAD = "put train/CLASS/FILES with test/CLASS/FILES into one folder, or CLASS/FILES alone"
register("folder", Layout(read, "folder", DOWNLOAD, own=True))
