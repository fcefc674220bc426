"""What tells two data sets apart: names, sizes, labels, classes, parts. Where they lie does not count."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mls.chunks import spaced
from mls.data.listing import FileSource, file_size
from mls.data.masks import IndexedFiles
from mls.data.sources import SIZES
from mls.eval.data import DataSet
from mls.eval.data.cifar import PixelSource

READ, BYTES = 256, 1 << 16  # of so many files of a part the first bytes


def content_hash(data: DataSet[Any]) -> str:
    """Of names, labels, classes and parts, of the sizes of the files and of what stands in some of them."""
    return hashlib.sha256(_digest(data)).hexdigest()[:16]


def _digest(value: Any) -> bytes:
    digest = hashlib.sha256(type(value).__name__.encode())
    for part in _parts(value):
        digest.update(part if isinstance(part, bytes) else _digest(part))
    return digest.digest()


def _parts(value: Any) -> Sequence[Any]:
    """Bytes, or what is to be taken apart in turn."""
    if isinstance(value, Tensor):
        return [str((value.dtype, tuple(value.shape))).encode(), value.contiguous().numpy().tobytes()]
    if isinstance(value, FileSource):
        names = value.relative_paths
        return [names.starts.tobytes(), names.text.tobytes(), _files(len(value), value.path)]
    if isinstance(value, IndexedFiles):
        folder = os.path.commonpath(value.paths)
        names = "\n".join(os.path.relpath(path, folder) for path in value.paths)
        files = _files(len(value.paths), value.paths.__getitem__)
        numbers = (value.values, value.void) if value.values else value.first  # a published layout's void stays
        return [os.fsencode(names), files, str(numbers).encode()]
    if isinstance(value, PixelSource):
        return [value.images]
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        return [repr(value).encode()] if all(isinstance(one, str | int) for one in value) else value
    if isinstance(value, dict):
        return [repr(sorted(value.items())).encode()]
    if hasattr(value, "describe"):  # another source
        return ["\n".join(map(value.describe, range(len(value)))).encode()]
    return [b"" if callable(value) else repr(value).encode()]


def _files(count: int, path: Callable[[int], bytes | Path]) -> bytes:
    """Sizes, and what stands in some. Whether files may be missing is for the reader to say."""
    sizes = [file_size(path(number)) for number in spaced(count, SIZES)]
    return np.array(sizes, np.int64).tobytes() + b"".join(_start(path(number)) for number in spaced(count, READ))


def _start(file: bytes | Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return hashlib.sha256(opened.read(BYTES)).digest()
    except OSError:
        return b""
