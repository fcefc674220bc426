"""`folder`: any data set with a folder for each class, or a text list of images with a class each. ImageNet, which has
folders too, is in imagenet.py."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from mls.data.listing import LOOKED_FOR, FileSource, is_image, list_images, printable, show
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


def read_list(file: Path, root: Path | None) -> DataSet:
    """Lines `PATH CLASS`, or `PATH` alone where the folder of the image is its class; paths are relative to `root`, by
    default the list's folder. A fifth of each class is the test, as of class folders."""
    folder, classes = file.parent if root is None else root, dict[bytes, bytes]()
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not (text := line.strip()) or text.startswith(b"#"):
            continue
        path, *rest = [text] if is_image(text) else re.split(rb"[\t,;]\s*|\s+(?=\S+$)", text, maxsplit=1)
        name = rest[0] if rest else os.path.basename(os.path.dirname(path))
        where = f"{show(file)} line {number}"
        if not is_image(path) or not name:
            raise DataError(f"{where} is not PATH CLASS, nor the path of an image in its class's folder: correct it")
        path = os.path.relpath(os.path.join(os.fsencode(folder), path), os.fsencode(folder))
        if path.split(b"/")[0] == b"..":
            raise DataError(f"{where} names {printable(path)}, which lies outside {show(folder)}: set data.root")
        if path in classes:
            raise DataError(f"{where} names {printable(path)} again: keep one of the lines")
        if not os.path.isfile(os.path.join(os.fsencode(folder), path)):
            raise DataError(
                f"{where} names {printable(path)}, which is not under {show(folder)}: correct it, or data.root"
            )
        classes[path] = name
    if not classes:
        raise DataError(f"{show(file)} names no image: write PATH CLASS, one image a line")
    names = sorted(set(classes.values()))
    parts = held_out(list(classes), file, classes.__getitem__)

    def part(phase: str, paths: list[bytes]) -> LabelledImages:
        truth = torch.tensor([names.index(classes[path]) for path in paths])
        return LabelledImages(FileSource(f"folder {phase}", folder, paths), truth, [printable(name) for name in names])

    return DataSet("folder", part("train", parts[0]), part("test", parts[1]))


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


def held_out(
    paths: list[bytes], root: Path, class_of: Callable[[bytes], bytes] = lambda path: path.partition(b"/")[0]
) -> tuple[list[bytes], list[bytes]]:
    """Train and test.

    >>> train, test = held_out([b"ant/%d.jpg" % i for i in range(10)] + [b"bee/1.jpg", b"bee/2.jpg"], Path("insects"))
    >>> len(train), test
    (9, [b'ant/0.jpg', b'ant/6.jpg', b'bee/1.jpg'])
    """
    of_class: dict[bytes, list[bytes]] = defaultdict(list)
    for path in paths:
        of_class[class_of(path)].append(path)
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
