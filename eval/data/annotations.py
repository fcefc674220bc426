"""What readers of annotation files share: the sentence for a damaged file, and boxes as corners."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from mls.data.listing import show
from mls.errors import DataError

WRONG = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, csv.Error)


@contextmanager
def parsing(file: Path, what: str, fix: str = "download it again") -> Iterator[None]:
    """Whatever goes wrong with the content of `file` becomes one sentence. A missing file is for the caller."""
    try:
        yield
    except WRONG as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{show(file)} is not a whole {what} ({reason}): {fix}") from None


def corners(boxes: Sequence[Sequence[float]]) -> Int64[np.ndarray, "boxes 4"]:
    """x y width height as x0 y0 x1 y1 in whole pixels. Rounded outwards: nothing of the object is cut off.

    >>> corners([[10, 20, 5, 6], [0.5, 1.5, 2, 2]]).tolist()
    [[10, 20, 15, 26], [0, 1, 3, 4]]
    """
    corner, size = np.array(boxes, np.float64).reshape(len(boxes), 2, 2).transpose(1, 0, 2)
    return np.concatenate([np.floor(corner), np.ceil(corner + size)], axis=1).astype(np.int64)
