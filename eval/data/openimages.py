"""OpenImages V3's labels that people verified (https://github.com/openimages/dataset/blob/main/READMEV3.md): a few of
5,000 classes are annotated for each image, as present or as absent. The file has 21 million lines, so it is parsed in
blocks of bytes with no Python object a line."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int8, Int16, UInt64

from mls.data.annotated import folder_with
from mls.data.listing import FileSource, show
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.annotations import parsing

HEADER = b"ImageID,Source,LabelName,Confidence"
BLOCK = 1 << 24
ID_DIGITS = 16  # an ImageID is a 64-bit number in hexadecimal
HEX = np.full(256, 255, np.uint8)
HEX[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)

# image, class and +1 or -1 of each label
Labels = tuple[UInt64[np.ndarray, "labels"], Int16[np.ndarray, "labels"], Int8[np.ndarray, "labels"]]


def read(root: Path) -> DataSet:
    """`classes-trainable.txt` (a class id a line), `class-descriptions.csv` (id, name) where there is one, and for
    each SPLIT of train, validation and test `SPLIT/annotations-human.csv` with the columns ImageID, Source, LabelName,
    Confidence (1 present, 0 absent) and images `SPLIT/ImageID.jpg`. The file names of V4 and later,
    `SPLIT-annotations-human-imagelabels.csv` in SPLIT or in `root`, are read too; their class lists are longer.

    The rows are the images with a label of these classes, by id. Truth takes a byte an image and class."""
    listed = root / "classes-trainable.txt"
    with parsing(listed, "list of classes"):
        classes = listed.read_bytes().split()
        if not classes:
            raise ValueError("it is empty")
        names = _names(root / "class-descriptions.csv", [name.decode() for name in classes])
    train, val, test = (_split(root, split, classes, names) for split in ("train", "validation", "test"))
    return DataSet("openimages", train, test, val)


def _names(file: Path, classes: list[str]) -> list[str]:
    if not file.is_file():
        return classes
    with parsing(file, "list of class descriptions"), file.open(encoding="utf-8", newline="") as lines:
        described = {row[0]: row[1] for row in csv.reader(lines) if row}
    return [described.get(name, name) for name in classes]


def _split(root: Path, split: str, classes: list[bytes], names: list[str]) -> LabelledImages:
    later = f"{split}-annotations-human-imagelabels.csv"
    candidates = [root / split / "annotations-human.csv", root / split / later, root / later]
    file = next((file for file in candidates if file.is_file()), candidates[0])
    with parsing(file, "OpenImages label file"):
        ids, columns, signs = _labels(file, classes)
    images, rows = np.unique(ids, return_inverse=True)
    _demand_memory(file, len(images), len(classes))
    truth = np.zeros((len(images), len(classes)), np.int8)
    for sign in (-1, 1):  # a label that was verified twice is present if anyone saw it
        truth[rows[signs == sign], columns[signs == sign]] = sign
    paths = [b"%016x.jpg" % image for image in images.tolist()]
    source = FileSource(f"openimages:{split}", folder_with([root / split], paths, file), paths)
    return LabelledImages(source, torch.from_numpy(truth), names)


def _demand_memory(file: Path, images: int, classes: int) -> None:
    """Against all of the memory: what is free now says little, since the files just read fill the cache."""
    memory = memory_size()
    if images * classes > memory:
        raise DataError(
            f"the labels of {show(file)} take {images * classes / 1e9:.1f} GB ({images} images, {classes} classes) "
            f"and this machine has {memory / 1e9:.1f} GB: leave fewer classes in classes-trainable.txt and say "
            "data.check_sizes=false, or use a machine with more memory"
        )


def memory_size() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _labels(file: Path, classes: Sequence[bytes]) -> Labels:
    order = np.argsort(np.array(classes)).astype(np.int16)
    parts = [_parse(block, np.array(classes)[order], order) for block in _blocks(file)]
    ids, columns, signs = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not len(ids):
        raise ValueError("it has no label of the classes in classes-trainable.txt")
    return ids, columns, signs


def _blocks(file: Path) -> Iterator[bytes]:
    """Whole lines, many at a time."""
    with file.open("rb") as stream:
        if stream.readline().rstrip() != HEADER:
            raise ValueError(f"its first line is not {HEADER.decode()}")
        rest = b""
        while block := stream.read(BLOCK):
            whole, newline, rest = (rest + block).rpartition(b"\n")
            yield whole + newline
        yield rest + b"\n" if rest else b""


def _parse(text: bytes, classes: np.ndarray, order: Int16[np.ndarray, "classes"]) -> Labels:
    """The labels of `classes` (sorted; `order` has their columns) in these lines."""
    data = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(data == ord("\n"))
    starts = np.append(0, ends + 1)[:-1]
    commas = np.flatnonzero(data == ord(","))
    _demand(np.diff(np.searchsorted(commas, ends), prepend=0) == 3, text, starts, ends)
    first, second, third = commas.reshape(-1, 3).T
    _demand(first - starts == ID_DIGITS, text, starts, ends)
    digits = HEX[data[starts[:, None] + np.arange(ID_DIGITS)]]
    confidence, rest = data[third + 1] - ord("0"), ends - third - 2  # 1 or 1.0, 0 or 0.0; nothing between
    tail = data[np.minimum(third[:, None] + [2, 3], len(data) - 1)] == list(b".0")
    whole_number = (rest == 0) | ((rest == 2) & tail.all(axis=1))
    _demand((digits < 16).all(axis=1) & (confidence <= 1) & whole_number, text, starts, ends)

    width = classes.dtype.itemsize
    place = second[:, None] + 1 + np.arange(width)
    letters = np.where(place < third[:, None], data[np.minimum(place, len(data) - 1)], 0).astype(np.uint8)
    labels = letters.view(classes.dtype)[:, 0]
    nearest = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    known = (classes[nearest] == labels) & (third - second - 1 <= width)
    ids = np.zeros(len(digits), np.uint64)
    for digit in digits.T:
        ids = (ids << np.uint64(4)) | digit
    return ids[known], order[nearest[known]], np.where(confidence[known] == 1, 1, -1).astype(np.int8)


def _demand(fine: np.ndarray, text: bytes, starts: np.ndarray, ends: np.ndarray) -> None:
    if not fine.all():
        line = int(np.argmin(fine))
        raise ValueError(f"unexpected line {text[starts[line] : ends[line]].decode(errors='backslashreplace')!r}")


DOWNLOAD = (
    "unpack annotations_human_2017_11.tar.gz and classes_2017_11.tar.gz of "
    "https://github.com/openimages/dataset/blob/main/READMEV3.md, and put the images into train, validation and test "
    "beside the annotations"
)
register("openimages", Layout(read, "openimages", DOWNLOAD, {"classes": 5_000}))
