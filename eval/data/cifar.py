"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), the archives for Python. They are pickles, and a pickle may run any program
when it is opened as torchvision opens it: here a file that asks for more than an array of numbers is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from mls.data.listing import printable, show
from mls.errors import DataError
from mls.eval.data import DataSet, LabelledImages, Layout, register
from mls.eval.data.annotations import parsing
from mls.eval.data.one_class import numbered
from mls.streams import generator


class PixelSource:
    """Images that are in memory as pixels."""

    class_names = None
    labels = None

    def __init__(self, name: str, pixels: UInt8[Tensor, "images 3 height width"]) -> None:
        self.name, self.images = name, pixels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> UInt8[Tensor, "3 height width"]:
        return self.images[index]

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return torch.randperm(len(self), generator=generator(seed, "order", epoch)).numpy()


def read_cifar10(folder: Path) -> DataSet:
    """`data_batch_1` to `data_batch_5`, `test_batch` and `batches.meta`, which has the names."""
    names = _names(folder / "batches.meta", b"label_names")
    train = [folder / f"data_batch_{number}" for number in range(1, 6)]
    split = lambda phase, files: _split(f"cifar10 {phase}", files, b"labels", names)
    return DataSet("cifar10", split("train", train), split("test", [folder / "test_batch"]))


def read_cifar100(folder: Path) -> DataSet:
    """`train`, `test` and `meta`, which has the names. The 100 classes, not the 20 groups of them."""
    names = _names(folder / "meta", b"fine_label_names")
    split = lambda phase: _split(f"cifar100 {phase}", [folder / phase], b"fine_labels", names)
    return DataSet("cifar100", split("train"), split("test"))


def _names(file: Path, key: bytes) -> list[str]:
    content = unpickle(file)
    with parsing(file, "list of CIFAR's classes"):
        return [printable(name) for name in content[key]]


def _split(name: str, files: Sequence[Path], key: bytes, names: list[str]) -> LabelledImages:
    parts = [_batch(file, key, len(names)) for file in files]
    pixels, truth = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return LabelledImages(PixelSource(name, pixels), truth, names)


def _batch(file: Path, key: bytes, classes: int) -> tuple[UInt8[Tensor, "images 3 32 32"], Int64[Tensor, "images"]]:
    content = unpickle(file)
    with parsing(file, "CIFAR batch"):
        pixels = _numbers(content[b"data"]).reshape(-1, 3, 32, 32)
        truth = numbered(content[key], classes, file, first=0)
    if len(truth) != len(pixels):
        raise DataError(f"{show(file)} has {len(pixels)} images and {len(truth)} labels: unpack the archive again")
    return torch.tensor(pixels), truth


class _Stored:
    """What was given to make an object of numpy, instead of the object."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) in ARRAYS:
            return _Stored
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def unpickle(file: Path) -> Any:
    """Lists, dictionaries, numbers and bytes (what Python 2 called text); arrays as `_Stored`."""
    with open(file, "rb") as opened:
        try:
            return _Unpickler(opened, encoding="bytes").load()
        except Exception as error:  # there is no end to what broken pickles raise
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{show(file)} is not a whole file of CIFAR ({reason}): unpack the archive again") from None


def _numbers(stored: Any) -> UInt8[np.ndarray, "..."]:
    """The array of bytes that numpy would make. Its state is (version, shape, type, by columns?, data)."""
    _, shape, kind, by_columns, data = stored.state
    if kind.arguments[0] != b"u1":
        raise ValueError(f"numbers of the type {kind.arguments[0]!r}")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


ARRAYS = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
HOST = "from www.cs.toronto.edu/~kriz/cifar.html and unpack it into $MLS_DATA"
PARTS = {"train": 50_000, "test": 10_000}
register(
    "cifar10",
    Layout(read_cifar10, "cifar-10-batches-py", f"download cifar-10-python.tar.gz {HOST}", {"classes": 10, **PARTS}),
)
register(
    "cifar100",
    Layout(read_cifar100, "cifar-100-python", f"download cifar-100-python.tar.gz {HOST}", {"classes": 100, **PARTS}),
)
